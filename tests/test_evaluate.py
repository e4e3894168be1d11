"""`falconlib eval`, `solve` and `train`: what they print, what they write, and what bad input gets. On the tiny model."""

import json
import re
import shlex
from pathlib import Path

import pytest

from falconlib import cli, config
from falconlib.errors import FalconError
from falconlib.evaluation import evaluate, load_samples
from falconlib.evaluation import solve as solver
from falconlib.evaluation.evaluate import COLUMNS, run_eval
from falconlib.evaluation.score import Sample
from falconlib.evaluation.solve import rank, solve, task_of, verdict_lines
from falconlib.files import read_json, sha256
from falconlib.memory import HashedTfidf, LongTermMemory
from falconlib.records import INFRA_ERROR
from falconlib.tasks import load_tasks

ADD = "Add two numbers.\nassert add(1, 2) == 3\nassert add(0, 0) == 0"


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Twelve tokens per completion, one thread: the tiny model says nothing sensible anyway."""
    plain, quick = config.override, {"eval.max_new_tokens": 12, "model.threads": 1, "sandbox.workers": 1}
    monkeypatch.setattr(config, "override", lambda profile, settings: plain(profile, settings | quick))


@pytest.fixture
def memory(tmp_path):
    path = tmp_path / "memory" / "memory.sqlite"
    path.parent.mkdir()
    tasks = load_tasks("basics", "train")[:20]
    with LongTermMemory(path, HashedTfidf()) as store:
        store.add_tasks(tasks)
        store.add_golds(tasks)
    return path


def call(capsys, *arguments):
    code = cli.main([str(a) for a in arguments])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def quiet(sets, *arguments, samples=0, limit=0, **more):
    settings = {"model.name": "tiny", "tasks.benchmarks": sets, "eval.samples": samples, "tasks.eval_limit": limit}
    return run_eval(config.override(config.Profile(), settings), None, *arguments, progress=False, **more)


# -- eval


def test_a_card_never_stands_beside_samples_that_it_does_not_describe(tmp_path, monkeypatch):
    quiet(["basics"], ["zero-shot", "best-of-k"], limit=1, out=tmp_path)
    saved = []
    monkeypatch.setattr("falconlib.evaluation.evaluate.save_samples", lambda *_: saved.append(1) or 1 / 0)  # killed here
    with pytest.raises(ZeroDivisionError):
        quiet(["basics"], ["zero-shot"], limit=2, out=tmp_path)
    assert saved and set(read_json(tmp_path / "card.json")) == {"best-of-K"}


def test_a_table_with_intervals_per_mode_and_set(tmp_path, memory):
    before = memory.read_bytes()
    table = quiet(["basics", "humaneval"], ["zero-shot", "ltm"], memory, samples=2, limit=2, out=tmp_path / "out")
    assert list(table.columns) == list(COLUMNS)
    keys = [
        (mode, name, metric)
        for mode in ("zero-shot", "+LTM")
        for name in ("basics", "humaneval")
        for metric in ("greedy", "pass@1")
    ]
    assert [tuple(row) for row in table[["mode", "benchmark", "metric"]].to_numpy()] == keys
    assert (table["n"] == 2).all() and ((table["ci_low"] <= table["value"]) & (table["value"] <= table["ci_high"])).all()
    plain, recalled = (table.attrs["cards"][mode] for mode in ("zero-shot", "+LTM"))
    assert plain["memory"] is None and len(recalled["memory"]) == 64 and memory.read_bytes() == before
    assert plain["decoding"]["samples"] == 2 and plain["stop"] == ["```"] and plain["benchmarks"]["humaneval"]["tasks"] == 2
    assert json.loads((tmp_path / "out/card.json").read_text()) == json.loads(json.dumps(table.attrs["cards"]))
    for name in ("samples.jsonl.gz", "samples-ltm.jsonl.gz"):
        samples = load_samples(tmp_path / "out" / name)
        assert len(samples) == 2 * 2 * 3 and all(s.status for s in samples)


def test_a_set_without_any_verdict_is_said_to_have_none(capsys, monkeypatch):
    broken = Sample("HumanEval/0", "humaneval", 0, "", "", greedy=True, status=INFRA_ERROR, error_class="BrokenTests: test 0")
    passed = Sample("basics/a", "basics", 0, "", "", greedy=True, status="pass")
    monkeypatch.setattr(evaluate, "evaluate", lambda *arguments, **more: [broken, passed])
    code, out, _ = call(capsys, "eval", "--model", "tiny", "--tasks", "basics,humaneval", "--limit", "1")
    notes = [line for line in out.splitlines() if line.startswith("note: ")]
    assert code == 0 and notes == ["note: zero-shot: no program of humaneval got a verdict (1 BrokenTests: test 0)"]


def test_the_same_seed_gives_the_same_samples(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        quiet(["basics"], ["zero-shot"], samples=2, limit=2, seed=seed, out=tmp_path / name)
    a, b, c = ((tmp_path / name / "samples.jsonl.gz").read_bytes() for name in "abc")
    assert a == b != c


def test_the_command_prints_cards_and_table(capsys, tmp_path):
    tasks = tmp_path / "own.jsonl"
    tasks.write_text(json.dumps({"task_id": "a", "prompt": "One.", "tests": ["assert one() == 1"], "entry_point": "one"}) + "\n")
    code, out, _ = call(capsys, "eval", "--model", "tiny", "--tasks", tasks, "--samples", 1, "--out", tmp_path / "out")
    assert code == 0 and out.startswith("evaluation card\n  model            tiny") and "temperature 0.6" in out
    assert " greedy " in out and " pass@1 " in out and "ci_low" in out and (tmp_path / "out/card.json").is_file()
    code, out, _ = call(capsys, "score", tmp_path / "out/samples.jsonl.gz", "--tasks", tasks, "--k", "1")
    assert code == 0 and "\ngreedy: 0.000\n" in out and "\npass@1: 0.000\n" in out


def test_a_profile_gives_the_settings_and_given_options_win(capsys):
    arguments = ("eval", "--profile", "smoke", "--set", "eval.temperature=0.9", "--set", "sandbox.cpu_s=1.5")
    code, out, _ = call(capsys, *arguments, "--samples", 0, "--tasks", "basics", "--limit", 1)
    assert code == 0 and "model            tiny" in out and "1.5" in out.split("limits")[1] and "humaneval" not in out
    code, out, _ = call(capsys, *arguments, "--limit", 1)
    assert code == 0 and "humaneval" in out and "temperature 0.9" in out  # smoke's own benchmarks and sample count
    code, _, err = call(capsys, "eval", "--profile", "smoke", "--set", "eval.temprature=0.9")
    assert code == 2 and "unknown parameter 'eval.temprature'" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mode", "zero-shoot"], "unknown mode 'zero-shoot'"),
        (["--mode", "zero-shot,ltm"], "a mode with ltm needs a long-term memory"),
        (["--mode", "ltm", "--memory", "none.sqlite"], "no long-term memory at none.sqlite"),
        (["--tasks", "basix"], "unknown task set 'basix'"),
        (["--samples", "-1"], "samples = -1"),
        (["--limit", "-1"], "limit = -1"),
        (["--adapter", "nowhere"], "no adapter in nowhere"),
        (["--model", str(Path(__file__).parent)], "holds no config.json"),
    ],
)
def test_bad_input_to_eval(capsys, arguments, message):
    code, out, err = call(capsys, "eval", "--model", "tiny", "--tasks", "basics", "--limit", 1, *arguments)
    assert code == 2 and out == "" and message in err and "remedy: " in err and "Traceback" not in err


def test_a_missing_memory_is_seen_before_anything_runs(monkeypatch):
    monkeypatch.setattr(evaluate, "load_policy", lambda *_, **__: pytest.fail("the model was loaded"))
    with pytest.raises(FalconError, match="needs a long-term memory"):
        quiet(["basics"], ["zero-shot", "ltm"])


def test_sets_that_cannot_be_scored_together_or_at_all(tmp_path, monkeypatch):
    row = json.dumps({"task_id": "a", "prompt": "One.", "tests": ["assert one() == 1"], "entry_point": "one"}) + "\n"
    for name in ("x.jsonl", "y.jsonl"):
        (tmp_path / name).write_text(row)
    with pytest.raises(FalconError, match="share task ids"):
        quiet([str(tmp_path / "x.jsonl"), str(tmp_path / "y.jsonl")], ["zero-shot"])
    (tmp_path / "codal").mkdir()
    (tmp_path / "codal/test.jsonl").write_text(json.dumps({"instruction": "Say why.", "preference": "explanation"}) + "\n")
    monkeypatch.setenv("FALCON_DATA", str(tmp_path))
    with pytest.raises(FalconError, match="'codal/1' has no unit tests"):
        quiet(["codal"], ["zero-shot"])


# -- solve


@pytest.mark.parametrize(
    ("text", "entry_point", "tests", "prompt"),
    [
        (ADD, "add", 2, "Add two numbers."),
        ("Sort it.\n  assert sorted(unique([1])) == [1]  ", "unique", 1, "Sort it."),
        ("Write `add(a, b)`, not `sub`.", "add", 0, "Write `add(a, b)`, not `sub`."),
        ("Print the assertion of a program.", None, 0, "Print the assertion of a program."),
    ],
)
def test_a_task_from_free_text(text, entry_point, tests, prompt):
    task = task_of(text)
    assert (task.entry_point, len(task.tests), task.prompt) == (entry_point, tests, prompt) and task.visible == tests


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (" \n", "no task"),
        ("assert f(1) == 1", "no task"),
        ("X.\nassert f(1 == 1", "is no Python"),
        ("X.\nassert 1 == 1", "calls no function"),
    ],
)
def test_texts_without_a_task(capsys, text, message):
    code, out, err = call(capsys, "solve", text, "--model", "tiny")
    assert code == 2 and out == "" and message in err


def programs(*verdicts):
    """Scored samples: (status, pass ratio) each, the first one greedy."""
    rows = [("solve", "solve", max(i - 1, 0), "", f"program {i}", i == 0) for i in range(len(verdicts))]
    return [Sample(*row, status=status, pass_ratio=ratio) for row, (status, ratio) in zip(rows, verdicts, strict=True)]


def test_the_best_program_and_no_more_is_claimed_than_was_checked():
    task = task_of(ADD)
    lines = verdict_lines(task, programs(("fail", 0.5), (INFRA_ERROR, None), ("pass", 1.0), ("pass", 1.0)))
    assert lines[1:3] == ["  greedy     fail, 50% of the asserts", "  sample 1   no verdict: the sandbox could not judge it"]
    assert lines[-2:] == ["best program (passes the 2 asserts in your text; nothing else was checked)", "program 2"]
    assert verdict_lines(task, programs(("timeout", None), ("fail", 0.5)))[-2].startswith("best program (no program passes")
    loose = task_of("Add `add`.")
    lines = verdict_lines(loose, programs(("runtime_error", 0.0), ("fail", 0.0)))
    assert lines[2] == "  sample 1   runs without error" and lines[-1] == "program 1"
    assert lines[-2] == "best program (runs without error; the text has no assert, so whether it is right is unknown)"
    assert rank(loose, programs((INFRA_ERROR, None))[0]) < rank(loose, programs(("runtime_error", None))[0])


def test_solve_runs_what_the_policy_says(monkeypatch, memory):
    said = ["def add(a, b):\n    return a - b\n```", "def add(a, b):\n    return a + b\n```", "def add(a, b:\n```"]
    plain = solver.complete

    def scripted(*arguments):
        from dataclasses import replace

        from falconlib.prompts import extract_program

        drafts = plain(*arguments)
        return [replace(s, completion=text, code=extract_program(text)) for s, text in zip(drafts, said, strict=True)]

    monkeypatch.setattr(solver, "complete", scripted)
    text = solve(ADD, "tiny", samples=2, progress=False)
    assert (
        "recalled" not in text
        and "greedy     fail, 50% of the asserts" in text
        and "sample 2   syntax_error (SyntaxError)" in text
    )
    assert text.endswith("nothing else was checked)\ndef add(a, b):\n    return a + b")
    text = solve("Add two numbers with `add`.", "tiny", memory=memory, samples=2, progress=False)
    assert text.startswith("recalled\n  ") and "basics/" in text and "(its program is in the prompt)" in text
    assert text.count("runs without error\n") == 2 and "whether it is right is unknown" in text


def test_the_solve_command(capsys, tmp_path):
    code, out, _ = call(capsys, "solve", ADD, "--model", "tiny", "--samples", 1)
    assert code == 0 and out.startswith("programs\n  greedy     ") and "best program (" in out
    code, _, err = call(capsys, "solve", ADD, "--model", "tiny", "--memory", tmp_path / "none.sqlite")
    assert code == 2 and "no long-term memory" in err


# -- train


def test_reinforcement_learning_asks_for_its_warm_start_and_writes_nothing(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("FALCON_RESULTS", str(tmp_path))
    monkeypatch.setattr("falconlib.reporting.run.reference_roots", lambda profile: [])
    code, out, err = call(capsys, "train", "--arm", "grpo", "--profile", "smoke")
    assert code == 2 and out == "" and "starts from the SFT adapter" in err and not list(tmp_path.iterdir())
    assert "falconlib train --arm sft --profile smoke --seed 0 first" in err


def test_a_card_names_the_adapter_without_its_place_and_keeps_other_modes(tmp_path):
    from falconlib.config import LoraConfig, ModelConfig, load_profile
    from falconlib.policy.models import load_policy

    adapter = tmp_path / "train" / "grpo-s0" / "adapter"
    load_policy(ModelConfig(name="tiny"), LoraConfig(r=4)).model.save_pretrained(adapter)
    profile = config.override(load_profile("smoke"), {"tasks.benchmarks": ["humaneval"], "tasks.eval_limit": 1})
    for mode in ("zero-shot", "best-of-k"):
        run_eval(profile, adapter, [mode], out=tmp_path / "modes", progress=False)
    cards = json.loads((tmp_path / "modes" / "card.json").read_text())
    assert list(cards) == ["best-of-K", "zero-shot"] and str(tmp_path) not in json.dumps(cards)
    weights = sha256(adapter / "adapter_model.safetensors")[:16]
    assert all(card["model"].endswith(f" with grpo-s0/adapter ({weights})") for card in cards.values())


def test_training_says_where_its_results_are(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("FALCON_RESULTS", str(tmp_path))
    small = ["--profile", "smoke", "--set", "model.threads=1"]
    code, out, _ = call(capsys, "train", "--arm", "sft", *small)
    folder = tmp_path / "runs/smoke/train/sft-s0"
    assert code == 0 and str(folder) in out and "adapter" in out and (folder / "manifest.json").is_file()
    card = (folder / "adapter" / "README.md").read_text()
    exec(card.split("```python")[1].split("```")[0].replace("FOLDER", str(folder / "adapter")), found := {})
    assert found["policy"].parameters() and "seed 0" in card
    command = shlex.split(re.search(r"`falconlib (.+?)`", card.replace("\n", " "))[1])
    options = cli.parser().parse_args(command)
    assert (options.profile, options.model, options.adapter, options.tasks) == ("smoke", "tiny", Path("FOLDER"), "humaneval")
    code, out, _ = call(capsys, "train", "--arm", "falcon", *small)
    folder = tmp_path / "runs/smoke/train/falcon-s0"
    assert code == 0 and "memory.sqlite" in out and "adapter/adapter_config.json" in (folder / "manifest.json").read_text()


def test_a_task_file_is_evaluated_on_its_test_split_only(tmp_path):
    from falconlib.config import Profile, override
    from falconlib.evaluation.evaluate import benchmark_tasks

    path = tmp_path / "own.jsonl"
    rows = [
        {"task_id": f"o/{i}", "prompt": "p", "tests": ["assert f() == 1"], "split": s} for i, s in enumerate(["train", "test"])
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [t.split for t in benchmark_tasks(override(Profile(), {"tasks.eval_limit": 0}), str(path))] == ["test"]
