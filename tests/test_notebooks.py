"""Every notebook, run on profile smoke through the command, once per session; the tests read what it wrote."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pytest

from falconlib.config import Profile, load_profile
from falconlib.evaluation.score import load_samples
from falconlib.files import JsonLines, read_json, sha256
from falconlib.graph import Step, Workflow
from falconlib.records import INFRA_ERROR, STATUSES
from falconlib.reporting.pairs import PASSES, SCORES
from falconlib.reporting.run import REPO
from falconlib.reporting.tables import MAIN, main_table
from falconlib.training.arms import SETTINGS

SPY = """import os, sys
def note(event, arguments):
    if event == "open" and DATA in str(arguments[0]) and "FALCON_STAGE" in os.environ:
        with open(os.environ["OPENED"], "a") as file:
            file.write(os.environ["FALCON_STAGE"].split(chr(34))[3] + " data/" + str(arguments[0]).partition(DATA)[2] + chr(10))
DATA = os.getcwd() + "/data/"
sys.addaudithook(note)
"""  # as sitecustomize.py: each process of a stage writes down which data it opens


def falconlib(*arguments: str, results: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """The command, with its results in a folder of their own."""
    environment = os.environ | {"FALCON_RESULTS": str(results)} | variables
    command = [sys.executable, "-m", "falconlib", *arguments]
    return subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, check=False)


@dataclass(frozen=True)
class Smoke:
    """results: the folder handed to the command. root: of the profile in it. readme: README's hash before the run."""

    results: Path
    root: Path
    profile: Profile
    readme: str

    def table(self, name: str) -> pd.DataFrame:
        return pd.read_csv(self.root / "tables" / f"{name}.csv")

    def steps(self) -> list[tuple[Workflow, Step]]:
        flow = Workflow("smoke", results=str(self.results))
        return [(flow, step) for step in flow.steps]


@pytest.fixture(scope="session")
def smoke(tmp_path_factory) -> Smoke:
    results, readme = tmp_path_factory.mktemp("results"), sha256(REPO / "README.md")
    spy = tmp_path_factory.mktemp("spy")
    (spy / "sitecustomize.py").write_text(SPY)
    opened = {"PYTHONPATH": str(spy), "OPENED": str(results / "opened.txt")}
    done = falconlib("run", "--profile", "smoke", "--jobs", "2", results=results, **opened)
    root = results / "runs" / "smoke"
    logs = "\n".join(path.read_text()[-3000:] for path in root.rglob("log.txt")) if done.returncode else ""
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{logs[-6000:]}"
    return Smoke(results, root, load_profile("smoke"), readme)


def test_every_stage_is_complete_with_provenance(smoke):
    for flow, step in smoke.steps():
        assert flow.status(step).state == "up to date", f"{step.label}: {flow.status(step).reasons}"
        manifest = read_json(smoke.root / step.key / "manifest.json")
        declared = {name.replace("{stage}", step.key) for name in step.node.writes}
        assert manifest["stage"] == step.key and declared <= set(manifest["outputs"])
        run = read_json(smoke.root / step.key / "run.json")
        assert run["complete"] and run["wall_s"] > 0 and run["config"]["name"] == "smoke", step.label
        if step.arm:
            assert run["model"].startswith("tiny") and run["data"] and run["sandbox"] and run["trained_tokens"] is not None


def test_a_stage_opens_no_data_that_is_not_in_its_key(smoke):
    keys = {flow_step[1].key: flow_step[0].key(flow_step[1])["data"] for flow_step in smoke.steps()}
    found = {tuple(line.split(" ")) for line in (smoke.results / "opened.txt").read_text().splitlines()}
    assert len(found) > 5 and not [(stage, name) for stage, name in found if name not in keys[stage]]
    assert ("09_preferences", "data/preferences/answers.jsonl") in found


def test_readers_name_the_training_files_that_they_read(smoke):
    for name in ("07_benchmarks", "08_ablations", "09_preferences"):
        read = read_json(smoke.root / name / "manifest.json")["read"]
        assert "train/falcon-s0/samples.jsonl.gz" in read, name
        assert not [path for path in read if path.startswith("results/reference")], name


def test_executed_notebooks_ran_from_top_without_warnings(smoke):
    for flow, step in smoke.steps():
        cells = [c for c in json.loads(flow.executed(step).read_text())["cells"] if c["cell_type"] == "code"]
        assert [c["execution_count"] for c in cells] == list(range(1, len(cells) + 1)), step.label
        outputs = [output for cell in cells for output in cell["outputs"]]
        noise = ["".join(o["text"]) for o in outputs if o.get("name") == "stderr"]
        assert not noise, f"{step.label}: {noise[0][:300]}"
        for output in outputs:
            if "image/png" in output.get("data", {}):
                assert output["metadata"]["image/png"].get("alt"), f"{step.label}: a figure without alt text"


def test_metrics_have_every_step_and_no_clock(smoke):
    seed = smoke.profile.seeds[0]
    for arm in smoke.profile.arms:
        rows = JsonLines(smoke.root / f"train/{arm}-s{seed}/metrics.jsonl").rows()
        learns = SETTINGS[arm][1] is not None
        last = smoke.profile.train.steps if learns else {"base": 0, "sft": smoke.profile.sft.max_steps}[arm]
        assert [row["step"] for row in rows] == list(range(1, last + 1)), arm
        for row in rows:
            assert not [name for name in row if re.search(r"second|time|wall|date", name)], arm
            if learns:
                assert -1 <= row["reward_unit"] <= 1 and 0 <= row["pass_rate"] <= 1
                assert sum(row["errors"].values()) == smoke.profile.train.tasks * smoke.profile.train.group


def test_samples_are_scored_and_the_memory_was_left_alone(smoke):
    from falconlib.memory import LongTermMemory

    problems = smoke.profile.tasks.eval_limit * len(smoke.profile.tasks.benchmarks)
    for arm in smoke.profile.arms:
        folder = smoke.root / f"train/{arm}-s0"
        recalls = arm in smoke.profile.eval.ltm_arms
        assert (folder / "samples-ltm.jsonl.gz").is_file() == recalls, arm
        for path in folder.glob("samples*.jsonl.gz"):
            samples = load_samples(path)
            assert len(samples) == problems * (1 + smoke.profile.eval.samples)
            assert {s.status for s in samples} <= {*STATUSES, INFRA_ERROR}
        cards = read_json(folder / "card.json")
        assert set(cards) == ({"zero-shot", "+LTM"} if recalls else {"zero-shot"})
        if recalls:
            with LongTermMemory(folder / "memory.sqlite", read_only=True) as memory:
                assert cards["+LTM"]["memory"] == memory.content_hash()


def test_main_table_has_its_columns_and_can_be_built_again(smoke):
    main = smoke.table("main")
    assert list(main.columns) == MAIN and set(main["arm"]) == set(smoke.profile.arms)
    assert set(main["benchmark"]) == set(smoke.profile.tasks.benchmarks) and set(main["mode"]) == {"zero-shot", "+LTM"}
    assert ((main["ci_low"] >= 0) & (main["ci_low"] <= main["value"]) & (main["value"] <= main["ci_high"])).all()
    assert (main["ci_high"] <= 1).all() and (main["n"] == smoke.profile.tasks.eval_limit).all() and (main["seeds"] == 1).all()
    spent = main.set_index("arm")["completions"]
    assert (spent["falcon"] == smoke.profile.train.steps * smoke.profile.train.tasks * smoke.profile.train.group).all()
    again = main_table(smoke.root / "train", draws=smoke.profile.eval.bootstrap)
    assert again.to_csv(index=False, lineterminator="\n") == (smoke.root / "tables/main.csv").read_text()


def test_outcomes_count_every_program_once(smoke):
    outcomes = smoke.table("outcomes").set_index(["arm", "mode", "benchmark"])
    assert list(outcomes.columns) == [*STATUSES, INFRA_ERROR]
    assert (outcomes.sum(axis=1) == smoke.profile.tasks.eval_limit).all()
    rates = smoke.table("main").set_index(["arm", "mode", "benchmark"])["value"]  # greedy: the profile draws no samples
    shares = outcomes["pass"] / outcomes.drop(columns=INFRA_ERROR).sum(axis=1)
    assert shares.to_dict() == rates.to_dict()


def test_differences_lie_in_their_intervals(smoke):
    paired, ablations, preferences = (smoke.table(name) for name in ("paired", "ablations", "preferences"))
    assert list(paired.columns) == PASSES and paired["difference"].between(-1, 1).all()
    assert {"falcon - base", "falcon - sft", "falcon - grpo", "falcon +LTM - falcon"} <= set(paired["comparison"])
    assert ((paired["ci_low"] <= paired["difference"]) & (paired["difference"] <= paired["ci_high"])).all()
    known = ablations.dropna(subset=["difference"])
    assert ((known["difference_low"] <= known["difference"]) & (known["difference"] <= known["difference_high"])).all()
    assert set(ablations["source"]) == {"arms of the grid"} and set(ablations["against"]) == {"falcon"}
    assert {*SCORES} - {"comparison"} | {"arm", "judge", "against"} == set(preferences.columns)
    assert (preferences["better"] + preferences["same"] + preferences["worse"] == preferences["n"]).all()
    assert set(preferences["arm"]) == set(smoke.profile.arms) - {"base"}
    assert preferences.loc[preferences["n"] == 0, "difference"].isna().all()  # unknown, not zero


def test_report_tells_of_every_arm_and_needs_no_network(smoke):
    text, page = ((smoke.root / name).read_text() for name in ("report.md", "report.html"))
    for arm in smoke.profile.arms:
        assert re.search(rf"\b{re.escape(arm)}\b", text), arm
    for part in ("In short", "Benchmarks", "Ablations", "The paper's numbers beside ours", "How this was made", "no ablation"):
        assert part in text, part
    assert "82.9" in text and "CodeT5-770M" in text
    assert 'src="data:image/png;base64,' in page and not re.search(r'(src|href)="(?!data:|#)', page)


def test_a_test_run_leaves_the_readme_alone(smoke):
    assert sha256(REPO / "README.md") == smoke.readme


def test_second_run_finds_everything_up_to_date(smoke):
    manifests = {path: path.stat().st_mtime_ns for path in smoke.root.rglob("manifest.json")}
    done = falconlib("run", "--profile", "smoke", results=smoke.results)
    lines = [line for line in done.stdout.splitlines() if re.match(r"\[ *\d+/\d+\]", line)]
    assert done.returncode == 0 and len(lines) == len(smoke.steps())
    assert all(line.endswith(": up to date") for line in lines), done.stdout
    assert {path: path.stat().st_mtime_ns for path in smoke.root.rglob("manifest.json")} == manifests


@pytest.mark.parametrize(
    ("parameters", "message", "arguments"),
    [
        ({"profile": "smoek"}, "unknown profile 'smoek'", ["--profile", "smoek"]),
        ({"profile": "smoke", "overrides": {"train.stepz": 5}}, "unknown parameter 'train.stepz'", ["--set", "train.stepz=5"]),
    ],
)
def test_papermill_alone_gives_the_same_error_as_the_command(tmp_path, parameters, message, arguments):
    import papermill
    from papermill.exceptions import PapermillExecutionError

    with pytest.raises(PapermillExecutionError) as caught:
        papermill.execute_notebook(
            str(REPO / "notebooks" / "09_preferences.ipynb"), str(tmp_path / "out.ipynb"), cwd=str(REPO),
            parameters={"results": str(tmp_path), **parameters}, kernel_name="python3", progress_bar=False,
        )  # fmt: skip
    assert caught.value.ename == "FalconError" and message in caught.value.evalue
    assert "remedy: use" in caught.value.evalue and not (tmp_path / "runs").exists()
    done = falconlib("run", *arguments, results=tmp_path)
    assert done.returncode == 2 and message in done.stderr and "remedy: use" in done.stderr
    assert not (tmp_path / "runs").exists()


def alone(name: str, results: Path, target: Path | None = None, **parameters) -> None:
    """One notebook by papermill itself, as somebody without the command would run it, its results in a folder of its own."""
    import papermill

    papermill.execute_notebook(
        str(REPO / "notebooks" / f"{name}.ipynb"), target and str(target), cwd=str(REPO),
        parameters={"results": str(results), **parameters}, kernel_name="python3", progress_bar=False,
    )  # fmt: skip


def test_papermill_alone_refuses_a_parameter_that_the_notebook_does_not_know(tmp_path):
    from papermill.exceptions import PapermillExecutionError

    with pytest.raises(PapermillExecutionError) as caught:
        alone("09_preferences", tmp_path, profile="smoke", profil="quick")
    assert caught.value.ename == "FalconError" and "unknown parameter of 09_preferences 'profil'" in caught.value.evalue
    assert "remedy: use 'profile'" in caught.value.evalue and not (tmp_path / "runs").exists()


@pytest.mark.slow
@pytest.mark.parametrize("profile", ["quick", "small"])
@pytest.mark.parametrize("name", ["07_benchmarks", "08_ablations", "09_preferences", "10_report"])
def test_a_notebook_that_reads_runs_alone_on_the_committed_results(name, profile, tmp_path):
    needed = "tables/main.csv" if name == "10_report" else "train/base-s0/samples.jsonl.gz"
    source = profile if (REPO / "results/reference" / profile / needed).is_file() else "quick"
    alone(name, tmp_path / "results", tmp_path / "done.ipynb", profile=profile)
    cells = json.loads((tmp_path / "done.ipynb").read_text())["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    assert not [o for o in outputs if o.get("name") == "stderr"]
    facts = read_json(tmp_path / "results/runs" / profile / name / "run.json")
    assert facts["complete"] and facts["from_reference"]
    said = "".join("".join(o.get("text", [])) + "".join(o.get("data", {}).get("text/markdown", [])) for o in outputs)
    assert "committed" in said and source in said, "it must say that this was not made here, and of which profile it is"
    if name == "10_report":
        report = (tmp_path / "results/runs" / profile / "report.md").read_text()
        assert report.count("Drawn by the committed run") == report.count("](") == 8, "the figures of 03 and 05 to 09"
        assert not re.search(r"%\D*\[0\.\d|\d\.\d{3} *\[|points?,? *[+-]?0\.\d{3}", report), "one unit: percent and points"
