"""The notebook graph: freshness and its reasons, proof of success, resuming after kills; on throw-away notebooks."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import nbformat
import psutil
import pytest

from falconlib import graph, notebook, workflow
from falconlib.config import load_profile
from falconlib.errors import FalconError
from falconlib.files import read_json, write_json
from falconlib.graph import Node, Workflow, select, steps_of
from falconlib.notebook import write_pair
from falconlib.reporting.run import Stage

REPO = Path(__file__).resolve().parents[1]
GRAPH = (
    Node("01_a", writes=("tables/a.csv",)),
    Node("06_train", writes=("{stage}/samples.txt",), grid=True),
    Node("07_b", needs=("06_train",), writes=("tables/b.txt",)),
)
PARAMETERS = 'profile: str = "smoke"  # which profile\nresults: str = ""\noverrides: dict = {}'
GRID = PARAMETERS + '\narm: str = "sft"\nseed: int = 0'
START = "from falconlib.reporting import start\nstage = start(NAME, dict(profile=profile, results=results, overrides=overrides))"
GRID_START = START.replace("overrides=overrides", "overrides=overrides, arm=arm, seed=seed")
BODIES = {
    "01_a": 'stage.path("tables/a.csv").write_text(f"steps\\n{stage.profile.train.steps}\\n")\nstage.finish(["tables/a.csv"])',
    "06_train": 'found = stage.folder / "samples.txt"\n'
    'found.write_text(f"{arm} {stage.profile.train.seed}")\nstage.finish([found])',
    "07_b": 'found = stage.find("train")\ntext = " ".join(sorted(p.name for p in found.iterdir()))\n'
    'stage.path("tables/b.txt").write_text(text)\nstage.finish(["tables/b.txt"])',
}


def write(folder: Path, name: str, body: str, grid: bool = False) -> None:
    cells = [
        nbformat.v4.new_markdown_cell("# A title"),
        nbformat.v4.new_code_cell(GRID if grid else PARAMETERS, metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell((GRID_START if grid else START).replace("NAME", repr(name))),
        nbformat.v4.new_code_cell(body),
    ]
    notebook = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}})
    folder.mkdir(exist_ok=True, parents=True)
    nbformat.write(notebook, folder / f"{name}.ipynb")


def make(folder: Path, overrides=None, nodes=GRAPH, **bodies: str) -> Workflow:
    """A workflow in `folder` on the profile smoke, with its notebooks written when they are not there."""
    for node in nodes:
        name = node.name
        if name in bodies or not (folder / "notebooks" / f"{name}.ipynb").is_file():
            write(folder / "notebooks", name, bodies.get(name, BODIES.get(name, "stage.finish()")), node.grid)
    overrides = {"arms": ["grpo"], **(overrides or {})}
    flow = Workflow("smoke", overrides, results=str(folder / "results"), notebooks=folder / "notebooks", graph=nodes)
    flow.check(flow.steps)
    flow.library, flow.data = {"falconlib/rewards.py": "0"}, {}  # somebody may edit the library while this runs
    return flow


def execute(flow: Workflow, steps=None, **options) -> tuple[int, list[str]]:
    lines: list[str] = []
    code = workflow.run(flow, flow.steps if steps is None else steps, echo=lines.append, **options)
    return code, lines


def states(flow: Workflow) -> dict[str, str]:
    return {step.key: flow.status(step).state for step in flow.steps}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A finished run of GRAPH; tests copy it."""
    folder = tmp_path_factory.mktemp("workflow")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FALCON_COPY", str(folder / "drive"))
        code, lines = execute(make(folder))
    assert code == 0, lines
    return folder


@pytest.fixture
def run(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def test_a_run_leaves_proofs_and_a_second_one_skips(finished):
    flow = make(finished)
    assert states(flow) == {
        "01_a": "up to date",
        "train/sft-s0": "up to date",
        "train/grpo-s0": "up to date",
        "07_b": "up to date",
    }
    code, lines = execute(flow)
    assert code == 0 and all(line.endswith("up to date") for line in lines) and len(lines) == 4
    root = finished / "results" / "runs" / "smoke"
    assert (root / "tables" / "b.txt").read_text() == "grpo-s0 sft-s0"
    facts = read_json(root / "train" / "grpo-s0" / "run.json")
    assert facts["complete"] and facts["wall_s"] > 0 and facts["config"]["train"]["arm"] == "grpo"
    manifest = read_json(root / "train" / "grpo-s0" / "manifest.json")
    assert list(manifest["inputs"]) == ["train/sft-s0"] and list(manifest["outputs"]) == ["train/grpo-s0/samples.txt"]
    executed = (root / "01_a" / "01_a.ipynb").read_text()
    assert "input_path" not in executed and "# A title" in executed


def test_a_copy_brings_back_whole_stages_and_what_it_lacks_is_copied_again(run, monkeypatch):
    shutil.rmtree(run / "results")
    shutil.copytree(run / "drive", run / "results")  # as the first cell does on Colab
    flow = make(run)
    lines = workflow.plan(flow, flow.steps, force=False, why=True)
    assert len(lines) == 4 and all(line.endswith("up to date  skipped") for line in lines), lines
    assert read_json(flow.root / "01_a/attempt.json")["state"] == "done"
    monkeypatch.setenv("FALCON_COPY", str(run / "drive"))
    shutil.rmtree(run / "drive/runs/smoke/01_a")
    kept = run / "drive/runs/smoke/tables/b.txt"
    kept.write_text("a stage that is there is left alone")
    assert execute(flow)[0] == 0 and (run / "drive/runs/smoke/01_a/01_a.ipynb").is_file() and kept.read_text()[0] == "a"


def test_the_executed_notebook_shows_the_injected_parameters(finished):
    cells = json.loads((finished / "results/runs/smoke/train/grpo-s0/06_train.ipynb").read_text())["cells"]
    injected = next("".join(c["source"]) for c in cells if "injected-parameters" in c["metadata"].get("tags", []))
    assert 'arm = "grpo"' in injected and "seed = 0" in injected and 'overrides = {"arms": ["grpo"]}' in injected


@pytest.mark.parametrize(
    ("change", "stale", "reason"),
    [
        ("code", ["01_a"], "its code cells changed"),
        ("prose", [], ""),
        ("parameter", ["01_a", "train/sft-s0", "train/grpo-s0", "07_b"], "train.steps: 1 -> 2"),
        ("grid", ["07_b"], "seeds: [0] -> [0, 1]"),
        ("output", ["train/sft-s0", "train/grpo-s0"], "output train/sft-s0/samples.txt was changed after the run"),
        ("output gone", ["01_a"], "output tables/a.csv is gone"),
        ("executed gone", ["01_a"], "its executed notebook is gone"),
        ("upstream", ["train/grpo-s0", "07_b"], "what train/sft-s0 wrote changed"),
        ("manifest broken", ["01_a"], "cannot be read"),
        ("by hand", ["01_a"], "run by hand, not by this command"),
    ],
)
def test_freshness_follows_contents_and_names_the_reason(run, change, stale, reason):
    root, overrides, bodies = run / "results/runs/smoke", {}, {}
    if change == "code":
        bodies = {"01_a": BODIES["01_a"] + "\n1 + 1"}
    elif change == "prose":
        path = run / "notebooks/01_a.ipynb"
        path.write_text(path.read_text().replace("# A title", "# Another title"))
    elif change == "parameter":
        overrides = {"train.steps": 2}
    elif change == "grid":
        overrides = {"seeds": [0, 1]}
    elif change == "output":
        (root / "train/sft-s0/samples.txt").write_text("else")
        stale = ["train/sft-s0"]
    elif change == "output gone":
        (root / "tables/a.csv").unlink()
    elif change == "executed gone":
        (root / "01_a/01_a.ipynb").unlink()
    elif change == "manifest broken":
        (root / "01_a/manifest.json").write_text('{"stage"')
    else:
        stage = "01_a" if change == "by hand" else "train/sft-s0"
        manifest = read_json(root / stage / "manifest.json")
        (root / "train/sft-s0/samples.txt").write_text("else")
        manifest |= (
            {"token": None}
            if change == "by hand"
            else {"outputs": {"train/sft-s0/samples.txt": graph.sha256(root / "train/sft-s0/samples.txt")}}
        )
        (root / stage / "manifest.json").write_text(json.dumps(manifest))
        if change == "by hand":
            (root / "train/sft-s0/samples.txt").write_text("sft 0")
    flow = make(run, overrides, **bodies)
    found = {step.key: flow.status(step) for step in flow.steps if not step.key.endswith("-s1")}
    assert [key for key, status in found.items() if status.state != "up to date"] == stale
    if stale:
        assert any(reason in text for text in found[stale[0]].reasons)


@pytest.fixture(scope="module")
def idle(tmp_path_factory) -> Workflow:
    """A workflow that never ran anything."""
    return make(tmp_path_factory.mktemp("idle"))


@pytest.mark.parametrize("name", ["manifest.json", "attempt.json"])
@pytest.mark.parametrize(
    "text",
    ["", '{"sta', "\x00" * 40, "[]", "7", "{}", '{"outputs": [], "state": 3}', '{"outputs": {}, "state": "running", "data": 1}'],
    ids=["empty", "half", "zeros", "list", "number", "nothing", "no outputs", "no data"],
)
def test_a_broken_record_makes_its_stage_stale_with_a_reason(idle, name, text):
    first, read, *_, reader = steps = idle.steps  # nobody reads the first one
    for step in (first, read):
        folder = idle.root / step.key
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / name).write_text(text)
        (folder / "run.json").write_text('{"wall_s": "long"}')
        status = idle.status(step)
        assert status.state == "stale" and len(status.reasons) == 1 and str(folder / name) in status.reasons[0], status
        assert idle.seconds(step) is None and "without writing its manifest" in workflow.unproven(idle, step, "token")
    assert idle.key(reader)["inputs"][read.key] is None and len(workflow.plan(idle, steps, force=False, why=False)) == 4
    workflow.prepare_folder(idle.root / first.key, idle.key(first), False)
    assert not [*(idle.root / first.key).iterdir()]


def test_a_run_goes_on_past_a_broken_record(tmp_path):
    flow = make(tmp_path, nodes=GRAPH[:1])
    (flow.root / "01_a").mkdir(parents=True)
    (flow.root / "01_a/attempt.json").write_text("{}")
    code, lines = execute(flow)
    assert code == 0 and "stale" in lines[0] and "attempt.json" in lines[0] and states(flow) == {"01_a": "up to date"}


def test_library_and_data_changes_are_named(run):
    flow = make(run)
    flow.library = {"falconlib/rewards.py": "1"}
    assert flow.status(flow.steps[0]).reasons == ("falconlib/rewards.py changed",)
    assert "falconlib/rewards.py" in graph.library_hashes() and "falconlib/workflow.py" not in graph.library_hashes()
    flow = make(run)
    flow.data = flow.data | {"data/new.jsonl": "x"}
    assert flow.status(flow.steps[0]).reasons == ("data/new.jsonl changed",)


def test_changed_parameters_are_shown_as_people_write_them():
    key = {"notebook": "", "parameters": {"a": False, "c": "x"}, "inputs": {}, "falconlib": {}, "data": {}}
    found = graph.differences({**key, "parameters": {"a": True, "b": None, "d": 1}}, key)
    assert found == ["a: true -> false", 'c: not set -> "x"', "d: 1 -> not set"]


def test_data_that_some_stages_alone_read_concerns_no_other(tmp_path):
    flow = make(tmp_path, nodes=(Node("01_a"), Node("02_x", data=("data/x/",)), Node("03_y", data=("data/x/", "data/y/"))))
    flow.data = dict.fromkeys(("data/all.jsonl", "data/x/1", "data/y/1", "task set basics"), "hash")
    keys = [[*flow.key(step)["data"]] for step in flow.steps]
    everybody = {"data/all.jsonl", "task set basics"}
    assert [{*key} - everybody for key in keys] == [set(), {"data/x/1"}, {"data/x/1", "data/y/1"}]
    assert all(everybody <= {*key} for key in keys)
    real = Workflow("smoke")
    assert not [name for name in real.special if not any(file.startswith(name) for file in real.data)]


def test_a_stage_that_writes_the_same_again_leaves_its_readers_fresh(run):
    bodies = {"06_train": BODIES["06_train"] + "\n'a comment is code too'"}
    flow = make(run, **bodies)
    code, _ = execute(flow, select(flow.steps, "sft", None))
    assert code == 0
    assert states(flow)["train/sft-s0"] == "up to date"
    assert flow.status(flow.steps[2]).reasons == ("its code cells changed",) and states(flow)["07_b"] == "up to date"


def test_forged_and_missing_proofs_are_failures(tmp_path):
    node = (Node("01_a", writes=("tables/a.csv",)),)
    code, lines = execute(make(tmp_path, nodes=node, **{"01_a": "import sys\nsys.exit(0)"}))
    assert code == 1 and "without writing its manifest" in lines[-1]
    flow = make(tmp_path, nodes=node, **{"01_a": "stage.finish()"})
    code, lines = execute(flow)
    assert code == 1 and "tables/a.csv is not among its outputs" in lines[-1]
    assert flow.status(flow.steps[0]).state != "up to date"


def test_errors_reach_the_caller(tmp_path):
    node = (Node("01_a"), Node("02_c"))
    flow = make(tmp_path, nodes=node, **{"01_a": "1 / 0"})
    code, lines = execute(flow)
    assert code == 1 and "ZeroDivisionError: division by zero" in lines[-1] and not any("02_c" in line for line in lines)
    assert flow.status(flow.steps[0]).state == "failed"
    flow = make(
        tmp_path, nodes=node, **{"01_a": "from falconlib.errors import FalconError\nraise FalconError('no data', 'fetch it')"}
    )
    with pytest.raises(FalconError, match="01_a: no data\n  remedy: fetch it"):
        execute(flow)
    flow = make(tmp_path, nodes=node, **{"01_a": "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)"})
    code, lines = execute(flow)
    assert code == 1 and "kernel died, probably out of memory" in lines[-1]


INTERRUPTED = (
    "marks = stage.folder / 'marks.txt'\nmarks.open('a').write('x')\nimport os, time\n"
    "(stage.folder / 'pid').write_text(str(os.getpid()))\n"
    "time.sleep(0 if len(marks.read_text()) > 1 else 60)\nstage.finish(['01_a/marks.txt'])"
)
SCRIPT = """
import signal, sys; sys.path.insert(0, {tests!r})
from pathlib import Path
from test_workflow import *
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job starts with SIGINT ignored
flow = make(Path({folder!r}), nodes=(Node("01_a"),))
try:
    sys.exit(workflow.run(flow, flow.steps, echo=print))
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_run_leaves_no_kernel_and_resumes(tmp_path, how):
    flow = make(tmp_path, nodes=(Node("01_a"),), **{"01_a": INTERRUPTED})
    script = SCRIPT.format(tests=str(REPO / "tests"), folder=str(tmp_path))
    runner = subprocess.Popen([sys.executable, "-c", script], start_new_session=True)
    folder = tmp_path / "results/runs/smoke/01_a"
    wait(lambda: (folder / "pid").is_file() and (folder / "pid").read_text())
    kernel = int((folder / "pid").read_text())
    with pytest.raises(FalconError, match=rf"another run is working in .*process {runner.pid}"):
        execute(flow)
    os.kill(runner.pid, how)
    assert runner.wait(20) == (-9 if how == signal.SIGKILL else 130)
    wait(lambda: not psutil.pid_exists(kernel) or psutil.Process(kernel).status() == psutil.STATUS_ZOMBIE)
    assert flow.status(flow.steps[0]).reasons == ("interrupted: resumes",)
    code, lines = execute(flow)
    assert code == 0, lines
    assert (folder / "marks.txt").read_text() == "xx"  # the folder was kept
    code, _ = execute(
        make(tmp_path, nodes=(Node("01_a"),), **{"01_a": "(stage.folder / 'marks.txt').open('a')\n" + "stage.finish()"})
    )
    assert code == 0 and not (folder / "pid").exists()  # other code starts in an empty folder


MEETS = """
import os, time
from pathlib import Path
assert "no_such" not in os.environ.get("MPLBACKEND", "") and os.environ["OMP_NUM_THREADS"] == str(max(os.cpu_count() // 2, 1))
Path(stage.root / NAME).write_text("here")
end = time.time() + 30
while not (stage.root / OTHER).is_file() and time.time() < end:
    time.sleep(0.1)
assert (stage.root / OTHER).is_file(), "nobody else is at work"
"""


def test_two_at_once_start_apart_and_a_failure_stops_what_has_not_begun(tmp_path, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "module://no_such_module")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    nodes = (Node("01_a"), Node("02_c"), Node("07_b", needs=("01_a", "02_c")))
    one = MEETS.replace("NAME", "'one'").replace("OTHER", "'two'") + "stage.finish()"
    two = "import time\nfirst = stage.root / '01_a/run.json'\n"  # a kernel takes longer than this to come up
    two += "assert time.time() - first.stat().st_mtime > 0.5, 'both kernels came up at once'"
    two += MEETS.replace("NAME", "'two'").replace("OTHER", "'one'") + "1 / 0"
    flow = make(tmp_path, nodes=nodes, **{"01_a": one, "02_c": two})
    code, lines = execute(flow, jobs=2)
    assert code == 1 and any(line.startswith("[ 1/3] 01_a: done") for line in lines), lines
    assert any("02_c: FAILED: ZeroDivisionError" in line for line in lines) and not any("07_b" in line for line in lines)


def test_a_notebook_that_did_not_start_is_tried_once_more(tmp_path, monkeypatch):
    begin, tried = workflow.Child.begin, []

    def fails_first(self, spec):
        tried.append(spec["source"])
        begin(self, spec | {"source": "/nowhere.ipynb"} if len(tried) == 1 else spec)

    monkeypatch.setattr(workflow.Child, "begin", fails_first)
    flow = make(tmp_path, nodes=(Node("01_a"),), **{"01_a": "stage.finish()"})
    code, lines = execute(flow)
    assert code == 0 and "nowhere.ipynb" in lines[1] and lines[1].endswith("once more") and len(tried) == 2


def test_a_hung_kernel_is_stopped_and_its_stage_resumes(tmp_path, monkeypatch):
    for name, value in (("LOOK_S", 0.5), ("HUNG_S", 4.0), ("IDLE_SHARE", 0.05)):
        monkeypatch.setattr(workflow, name, value)
    flow = make(tmp_path, nodes=(Node("01_a"),), **{"01_a": INTERRUPTED.replace("60", "600")})
    code, lines = execute(flow)
    assert code == 0 and "its kernel did nothing for" in lines[1] and lines[1].endswith("once more"), "\n".join(lines)
    assert (flow.root / "01_a/marks.txt").read_text() == "xx"


def test_a_kernel_at_work_does_not_hang_and_a_stopped_run_is_no_hang(monkeypatch):
    clock, used = [0.0], [0.0]
    monkeypatch.setattr(workflow.time, "monotonic", lambda: clock[0])
    watch = workflow.Watch(SimpleNamespace(cpu_seconds=lambda: used[0]))
    for _ in range(300):
        clock[0], used[0] = clock[0] + 11, used[0] + 1
        assert not watch.hangs()
    clock[0] += 10 * workflow.HUNG_S  # this process was suspended
    assert not watch.hangs()
    spent = [clock.__setitem__(0, clock[0] + 11) or watch.hangs() for _ in range(int(workflow.HUNG_S / 11) + 2)]
    assert spent.count(True) and not any(spent[: int(workflow.HUNG_S / 11) - 1])


def wait(condition, seconds: float = 40) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.1)


def test_sft_comes_first_and_is_added_when_an_arm_needs_it():
    keys = [step.key for step in steps_of(GRAPH, load_profile("smoke", {"arms": ["falcon", "base"], "seeds": [0, 3]}))]
    assert keys[1:4] == ["train/base-s0", "train/sft-s0", "train/falcon-s0"]
    assert keys[4:] == ["train/base-s3", "train/sft-s3", "train/falcon-s3", "07_b"]
    steps = steps_of(GRAPH, load_profile("smoke", {"arms": ["base"]}))
    assert [step.key for step in steps] == ["01_a", "train/base-s0", "07_b"] and steps[-1].needs == ("train/base-s0",)


@pytest.mark.parametrize(
    ("only", "first", "expected"),
    [
        ("07", None, ["07_b"]),
        ("06_train", None, ["train/sft-s0", "train/grpo-s0"]),
        ("grpo,01", None, ["01_a", "train/grpo-s0"]),
        ("train/sft-s0", None, ["train/sft-s0"]),
        (None, "06", ["train/sft-s0", "train/grpo-s0", "07_b"]),
        (None, "grpo-s0", ["train/grpo-s0", "07_b"]),
    ],
)
def test_selection(only, first, expected):
    steps = steps_of(GRAPH, load_profile("smoke", {"arms": ["grpo"]}))
    assert [step.key for step in select(steps, only, first)] == expected


def test_missing_pieces_are_named_before_anything_starts(tmp_path, monkeypatch):
    monkeypatch.setenv("FALCON_CACHE", str(tmp_path / "cache"))
    with pytest.raises(FalconError, match="the embedded model"):
        make(tmp_path, {"model.name": "SmolLM2-135M-Instruct"})
    with pytest.raises(FalconError, match="there is no such folder"):
        make(tmp_path, {"model.name": "./models/mine"})
    monkeypatch.setenv("FALCON_DATA", str(tmp_path))
    monkeypatch.setattr("falconlib.tasks.files.DATA", tmp_path)
    with pytest.raises(FalconError, match="missing data: 'mbpp"):
        make(tmp_path, {"tasks.benchmarks": ["mbpp"]})
    monkeypatch.undo()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FalconError, match="sentence encoder 'minilm' is not installed"):
        make(tmp_path, {"long_term.embedder": "minilm"})
    assert not (tmp_path / "results").exists()


def test_relative_task_files_and_models_reach_the_notebook_as_absolute_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("my/model").mkdir(parents=True)
    Path("my/model/config.json").write_text("{}")
    Path("own.jsonl").write_text(json.dumps({"task_id": "own/0", "prompt": "Return 1.", "tests": ["assert one() == 1"]}) + "\n")
    flow = make(tmp_path, {"tasks.benchmarks": ["own.jsonl", "basics"], "model.name": "my/model"})
    absolute = {"tasks.benchmarks": [str(tmp_path / "own.jsonl"), "basics"], "model.name": str(tmp_path / "my/model")}
    assert flow.parameters(flow.steps[0])["overrides"] == absolute | {"arms": ["grpo"]}


def test_an_error_inside_the_lock_is_not_blamed_on_the_lock(tmp_path):
    with pytest.raises(OSError, match="disk"), workflow.lock(tmp_path / "new"):
        raise OSError("disk")


def test_bad_input_is_refused_before_anything_is_written(tmp_path):
    steps = steps_of(GRAPH, load_profile("smoke", {"arms": ["grpo"]}))
    with pytest.raises(FalconError, match="unknown notebook '08'; known: 01_a, 06_train, 07_b"):
        select(steps, "08", None)
    with pytest.raises(FalconError, match="unknown task set 'humanevil'"):
        make(tmp_path, {"tasks.benchmarks": ["humanevil"]})
    with pytest.raises(FalconError, match=r"model\.device = 'cuda'"):
        import torch

        if torch.cuda.is_available():
            pytest.skip("this machine has a GPU")
        make(tmp_path, {"model.device": "cuda"})
    assert not (tmp_path / "results").exists()


def test_a_notebook_must_know_its_parameters(tmp_path):
    make(tmp_path)
    path = tmp_path / "notebooks/07_b.ipynb"
    good = path.read_text()
    path.write_text(good.replace("overrides: dict", "overides: dict"))
    with pytest.raises(FalconError, match=r"07_b.ipynb has no parameter overrides, only overides, profile, results"):
        make(tmp_path)
    path.write_text(good.replace('"parameters"', '"params"'))
    with pytest.raises(FalconError, match="0 cells tagged `parameters`"):
        make(tmp_path)
    path.write_text(good[:100])
    with pytest.raises(FalconError, match=r"07_b\.ipynb is no notebook"):
        make(tmp_path)


def test_a_pair_must_say_the_same(tmp_path):
    jupytext = pytest.importorskip("jupytext")
    make(tmp_path)
    path = tmp_path / "notebooks/01_a.ipynb"
    jupytext.write(jupytext.read(path), path.with_suffix(".py"), fmt="py:percent")
    make(tmp_path)
    path.with_suffix(".py").write_text(path.with_suffix(".py").read_text() + "\n# %%\n1 + 1\n")
    with pytest.raises(FalconError, match=r"01_a.py and 01_a.ipynb differ\n  remedy: after editing the .py: make notebooks"):
        make(tmp_path)


def test_pairs_are_written_without_outputs_and_the_same_each_time(tmp_path):
    source = tmp_path / "01_a.py"
    source.write_text('# %% [markdown]\n# # T\n\n# %% tags=["parameters"]\na: int = 1  # help\n\n# %%\n1 + 1\n\n# %%\n1 + 1\n')
    first = write_pair(source, tmp_path / "x").read_bytes()
    assert first == write_pair(source, tmp_path / "y").read_bytes()
    notebook = nbformat.read(tmp_path / "x/01_a.ipynb", 4)
    nbformat.validate(notebook)
    assert [cell.cell_type for cell in notebook.cells] == ["markdown", "code", "code", "code"] and len(
        {c.id for c in notebook.cells}
    ) == 4
    assert not any(cell.get("outputs") for cell in notebook.cells) and notebook.cells[1].metadata.tags == ["parameters"]
    source.write_text(source.read_text().replace("# # T", "# # U"))
    after = nbformat.read(write_pair(source, tmp_path / "z"), 4)
    assert [c.id for c in after.cells][1:] == [c.id for c in notebook.cells][1:], "an edit renames only its own cell"


def test_plan_says_what_would_run_and_why(run):
    flow = make(run, {"train.steps": 2})
    lines = workflow.plan(flow, flow.steps, force=False, why=True)
    assert "stale" in lines[0] and lines[0].endswith("runs") and lines[1] == "    train.steps: 1 -> 2"
    flow = make(run, **{"06_train": BODIES["06_train"] + "\n1"})
    last = workflow.plan(flow, flow.steps, force=False, why=False)[-1]
    assert last.endswith("runs if the outputs of the stages before it change")


def test_prepare_fills_in_parameters_without_running(tmp_path):
    flow, lines = make(tmp_path), []
    workflow.prepare(flow, select(flow.steps, "grpo", None), lines.append)
    prepared = Path(lines[0])
    assert prepared.name == "train-grpo-s0.ipynb" and 'arm = "grpo"' in "".join(
        json.loads(prepared.read_text())["cells"][2]["source"]
    )
    assert not (tmp_path / "results/runs/smoke/train").exists()
    workflow.prepare(flow, select(flow.steps, "grpo", None), lines.append)  # nobody touched it: made again
    prepared.write_text(prepared.read_text().replace(r"arm = \"grpo\"", r"arm = \"rft\""))
    with pytest.raises(FalconError, match=r"(?s)grpo-s0.ipynb was changed.*--force"):
        workflow.prepare(flow, select(flow.steps, "grpo", None), lines.append)
    assert "rft" in prepared.read_text()
    workflow.prepare(flow, select(flow.steps, "grpo", None), lines.append, force=True)
    assert "rft" not in prepared.read_text()


def test_cells_run_by_hand_cost_a_finished_stage_nothing_until_they_change_it(run):
    flow = make(run)
    step, folder = flow.steps[0], run / "results/runs/smoke/01_a"
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    stage = Stage("01_a", load_profile("smoke"), flow.root, {}, {})
    stage.note(model="another")
    assert flow.status(step).state == "up to date" and {p: p.read_bytes() for p in before} == before
    stage.finish()
    assert flow.status(step).reasons == ("run by hand, not by this command",)


def test_an_attempt_with_other_settings_does_not_say_that_it_resumes(tmp_path):
    flow = make(tmp_path)
    step = flow.steps[0]
    write_json(flow.root / step.key / "attempt.json", {"state": "running", "outputs": {}, **flow.key(step)})
    assert flow.status(step).reasons == ("interrupted: resumes",)
    other = make(tmp_path, {"train.steps": 2})
    assert other.status(step).reasons == ("interrupted with other settings: starts anew", "train.steps: 1 -> 2")


@pytest.mark.parametrize("seconds", [float("nan"), float("inf"), -1.0, "soon"])
def test_a_strange_duration_is_unknown(idle, seconds):
    path = idle.root / idle.steps[0].key / "run.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"wall_s": seconds}))
    assert idle.seconds(idle.steps[0]) is None
    path.unlink()


# -- what papermill does with parameters and paths, left to itself, and what we do about it


def test_trap_a_path_with_braces_is_a_path(tmp_path):
    flow, lines = make(tmp_path / "a {seed} {}"), []  # papermill puts paths through str.format
    workflow.prepare(flow, flow.steps[:1], lines.append)
    assert Path(lines[0]).is_file() and "{seed} {}" in lines[0]


def test_trap_a_tuple_reaches_the_notebook_as_a_list(tmp_path):
    flow, lines = make(tmp_path, {"seeds": (0, 1)}), []  # papermill would write the tuple as a text
    workflow.prepare(flow, flow.steps[:1], lines.append)
    assert '"seeds": [0, 1]' in "".join(json.loads(Path(lines[0]).read_text())["cells"][2]["source"])


def test_trap_the_prepared_notebook_names_no_folder_and_the_portable_kernel(tmp_path):
    flow, lines = make(tmp_path), []
    workflow.prepare(flow, flow.steps[:1], lines.append)
    metadata = json.loads(Path(lines[0]).read_text())["metadata"]
    assert metadata["kernelspec"]["name"] == "python3" and not {"input_path", "output_path"} & set(metadata["papermill"])


def test_trap_papermill_runs_with_our_settings(tmp_path, monkeypatch):
    seen: dict = {}
    monkeypatch.setattr("papermill.execute_notebook", lambda *names, **settings: seen.update(settings, names=names))
    notebook.execute({"source": "a", "target": str(tmp_path / "b"), "log": str(tmp_path / "log"), "parameters": {"x": 1}})
    assert seen["kernel_name"] == "python3" and seen["language"] == "python"  # notebooks saved by Colab name no kernel
    assert seen["iopub_timeout"] == 60 and seen["coalesce_streams"] and seen["start_timeout"] == 180  # much output, slow starts
    assert all(isinstance(name, str) for name in seen["names"]) and seen["parameters"] == {"x": 1}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("1e-5", "YAML reads 1e-5 as text: write 1.0e-5"),
        ('"true"', "a number is expected"),
        ("no", "lr = false: a number is expected"),
        ("012", "012 is no plain integer"),
        ("1:30", "1:30 is no plain integer"),
        ("1_000", "1_000 is no plain integer"),
        ("0x10", "0x10 is no plain integer"),
    ],
)
def test_trap_a_profile_means_what_it_looks_like(tmp_path, monkeypatch, text, problem):
    monkeypatch.setattr("falconlib.config.profiles_dir", lambda: tmp_path)
    (tmp_path / "mine.yaml").write_text(f"train: {{lr: {text}}}\n")
    with pytest.raises(FalconError, match=problem):
        load_profile("mine")


def test_a_full_disk_is_refused(tmp_path, monkeypatch):
    flow = make(tmp_path)
    monkeypatch.setattr(workflow.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(FalconError, match="less than 200 MB are free"):
        execute(flow)


def test_the_real_graph_is_in_order_and_reads_only_earlier_notebooks():
    names = [node.name for node in graph.GRAPH]
    assert [name[:2] for name in names] == [f"{i:02}" for i in range(11)]
    for i, node in enumerate(graph.GRAPH):
        assert set(node.needs) <= set(names[:i])


def test_progress_tells_the_time_left_once_it_is_known(run):
    flow = make(run)
    lines: list[str] = []
    progress = workflow.Progress(flow, flow.steps, True, lines.append, live=True, jobs=1)
    progress.expected |= {step.key: 10.0 for step in flow.steps}
    working = [SimpleNamespace(step=flow.steps[0], spent=lambda: 4.0)]
    progress.tick(working)
    assert lines[-1].startswith(workflow.REDRAW) and "01_a: 0:04" in lines[-1] and workflow.clock(75.2) == "1:15"
    assert f"about {workflow.clock(10 * len(flow.steps) - 4)} left" in lines[-1]
    progress.jobs = 2
    progress.end(working[0], "", [])
    assert f"about {workflow.clock(10 * (len(flow.steps) - 1) / 2)} left" in lines[-1]
    progress.expected["07_b"] = None
    progress.tick(working)
    assert "left" not in lines[-1]


def test_data_and_model_are_part_of_the_key_wherever_they_lie(tmp_path, monkeypatch):
    rows = [{"task_id": str(i), "prompt": "One.", "tests": ["assert one() == 1"], "entry_point": "one"} for i in range(2)]
    tasks, model = tmp_path / "own.jsonl", tmp_path / "model"
    model.mkdir()
    tasks.write_text(json.dumps(rows[0]) + "\n")
    (model / "config.json").write_text("{}")
    profile = load_profile("smoke", {"tasks.benchmarks": [str(tasks), "humaneval"], "model.name": str(model)})
    before = graph.data_hashes(profile)
    assert before == graph.data_hashes(profile) and {"task set humaneval", "task set basics", "model"} <= set(before)
    tasks.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (model / "config.json").write_text("{ }")
    after = graph.data_hashes(profile)
    assert {name for name in after if after[name] != before[name]} == {f"task set {tasks}", "model"}
