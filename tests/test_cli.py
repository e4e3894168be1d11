"""The command line: exit codes, one clear message, typed settings, and the small commands end to end."""

import contextlib
import errno
import json
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time

import pytest

from falconlib import cli, commands, doctor, workflow
from falconlib.config import Profile
from falconlib.errors import FalconError
from falconlib.evaluation.submissions import load_submissions
from falconlib.reporting.tables import MAIN
from falconlib.tasks import load_tasks


def call(capsys, *arguments: str) -> tuple[int, str, str]:
    code = cli.main(list(arguments))
    printed = capsys.readouterr()
    return code, printed.out, printed.err


@pytest.mark.parametrize(
    ("pair", "value"),
    [
        ("train.steps=5", 5),
        ("train.lr=1e-5", 1e-5),
        ("train.lr=1", 1.0),
        ("long_term.enabled=false", False),
        ("model.name=1e10", "1e10"),
        ("model.name=a=b", "a=b"),
        ("arms=grpo,falcon", ("grpo", "falcon")),
        ("seeds=0,1", (0, 1)),
        ("eval.ltm_arms=", ()),
    ],
)
def test_settings_are_read_by_the_type_of_their_field(pair, value):
    found = commands.parse_settings([pair])[pair.partition("=")[0]]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("train.steps", "name=value is expected"),
        ("train.stepz=5", "unknown parameter 'train.stepz'; known: train.arm, train.seed, train.steps"),
        ("stepz=5", "use 'train.steps'"),
        ("long_term.k=5", "long_term.learns\n  remedy: use one of them"),
        ("train.steps.x=5", "unknown parameter 'train.steps.x'"),
        ("train=5", "parameter train is a group of settings"),
        ("train.steps=5.5", 'parameter train.steps = "5.5": a whole number is expected'),
        ("train.lr=fast", 'parameter train.lr = "fast": a number is expected'),
        ("long_term.enabled=no", "true or false is expected\n  remedy: --set long_term.enabled=true"),
        ("seeds=a", r"parameter seeds = \[\"a\"\]: a list of whole numbers is expected\n  remedy: --set seeds=0,1"),
        ("train.arm=grpo", "--set arms="),
        ("train.seed=1", "--set seeds="),
        ("name=other", "--profile"),
    ],
)
def test_bad_settings_are_refused(pair, message):
    with pytest.raises(FalconError, match=message):
        commands.parse_settings([pair])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--profile", "nope"], "unknown profile 'nope'"),
        (["run", "--profile", "smoke", "--set", "arms=gpro"], "unknown arm 'gpro'"),
        (["run", "--profile", "smoke", "--set", "tasks.train=basix"], "unknown task set 'basix'"),
        (["run", "--profile", "smoke", "--set", "train.lr=x"], "a number is expected"),
        (["run", "--profile", "smoke", "--from", "08", "--only", "06"], "no stage is left"),
        (
            ["run", "--profile", "smoke", "--set", "seeds=0,-1"],
            "seeds = [0, -1]: at least one seed, each once, from 0 to 4294967295",
        ),
        (
            ["run", "--profile", "smoke", "--set", "tasks.train=./data/basix/basics.jsonl"],
            "there is no file data/basix/basics.jsonl",
        ),
        (["train", "--arm", "gpro"], "unknown arm 'gpro'"),
        (
            ["train", "--arm", "base", "--profile", "smoke", "--seed", "-1"],
            "train.seed = -1: 0 to 4294967295 is expected\n  remedy: --seed",
        ),
        (["train", "--arm", "base", "--profile", "smoke", "--set", "tasks.benchmarks=basix"], "unknown task set 'basix'"),
        (["doctor", "--profile", "nope"], "unknown profile"),
        (["score", "none.jsonl"], "none.jsonl is missing"),
        (["compare", "none", "none"], "none is missing"),
        (["memory", "stats", "none.sqlite"], "none.sqlite is no long-term memory"),
    ],
)
def test_bad_input_gives_one_message_and_2(capsys, monkeypatch, tmp_path, arguments, message):
    monkeypatch.setenv("FALCON_RESULTS", str(tmp_path))
    code, out, err = call(capsys, *arguments)
    assert code == 2 and out == "" and err.startswith("falconlib: ") and message in err and "Traceback" not in err
    assert "remedy: " in err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["solve", "eval"])
def test_a_mistyped_model_or_adapter_is_found_out_before_anything_heavy_is_imported(capsys, monkeypatch, tmp_path, command):
    for name in ("solve", "evaluate"):
        monkeypatch.setitem(sys.modules, f"falconlib.evaluation.{name}", None)  # whoever imports it gets an ImportError
    (tmp_path / "empty").mkdir()
    bad = {"nowhere": "there is no such folder", "empty": "the folder holds no config.json"}
    for name, message in bad.items():
        code, _, err = call(capsys, command, *(["Add."] if command == "solve" else []), "--model", str(tmp_path / name))
        assert code == 2 and f"model.name = '{tmp_path / name}': {message}" in err
    task = ["Add."] if command == "solve" else []
    code, _, err = call(capsys, command, *task, "--model", "tiny", "--adapter", str(tmp_path / "empty"))
    assert code == 2 and f"no adapter in {tmp_path / 'empty'}: adapter_config.json is missing" in err


def test_usage_errors_and_help(capsys):
    assert "argument --samples: invalid number value: 'x'" in call(capsys, "eval", "--samples", "x")[2]
    assert call(capsys)[0] == 2 and call(capsys, "fly")[0] == 2 and call(capsys, "--help")[0] == 0
    assert call(capsys, "--version")[1].startswith("0.")


def test_every_command_explains_itself(capsys):
    commands = ["run", "doctor", "train", "eval", "solve", "score", "compare", "sandbox check"]
    for command in commands + [f"memory {name}" for name in ("stats", "search", "export", "import", "verify")]:
        code, out, _ = call(capsys, *command.split(), "--help")
        assert code == 0 and out.startswith(f"usage: falconlib {command}")


def test_python_m_is_the_same_and_an_interrupt_gives_130(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "falconlib", "run", "--profile", "nope"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and "unknown profile" in done.stderr
    script = "import sys, time\nfrom falconlib import cli, graph\n"
    script += "def slow(*_, **__):\n    print('ready', flush=True)\n    time.sleep(30)\n"
    script += "graph.Workflow = slow\nsys.exit(cli.main(['run', '--profile', 'smoke']))"
    for how in (signal.SIGINT, signal.SIGTERM):
        child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert child.stdout.readline() == "ready\n"
        os.kill(child.pid, how)
        _, err = child.communicate(timeout=20)
        assert child.returncode == 130 and err == "falconlib: interrupted; the same command resumes\n"


def main_csv(folder, value: float) -> None:
    (folder / "tables").mkdir(parents=True)
    row = {name: "" for name in MAIN} | {"benchmark": "humaneval", "mode": "zero-shot", "arm": "base", "metric": "greedy"}
    row |= {"value": value, "ci_low": value - 0.05, "ci_high": value + 0.05, "seeds": 1, "n": 16}
    (folder / "tables/main.csv").write_text(",".join(MAIN) + "\n" + ",".join(str(row[name]) for name in MAIN) + "\n")


def test_compare_says_within_or_outside(capsys, tmp_path):
    for name, value in (("a", 0.2), ("b", 0.21), ("c", 0.6)):
        main_csv(tmp_path / name, value)
    code, out, _ = call(capsys, "compare", str(tmp_path / "a"), str(tmp_path / "b"))
    assert code == 0 and "20.0 -> 21.0, +1.0" in out and out.rstrip().endswith("within")
    assert call(capsys, "compare", str(tmp_path / "a"), str(tmp_path / "c/tables/main.csv"))[1].rstrip().endswith("outside")


def submission(tmp_path, *rows: dict):
    path = tmp_path / "samples.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_submissions_in_the_formats_of_the_field(tmp_path):
    tasks = load_tasks("humaneval")[:2]
    first, second = tasks
    body = first.gold[len(first.prompt) :]
    path = submission(
        tmp_path,
        {"task_id": first.task_id, "completion": body},
        {"task_id": second.task_id, "solution": second.gold, "other": 1},
        {"task_id": first.task_id, "completion": f"```python\n{first.gold}\n```"},
    )
    samples = load_submissions(path, tasks)
    assert [(s.task_id, s.index) for s in samples] == [(first.task_id, 0), (second.task_id, 0), (first.task_id, 1)]
    assert samples[0].code.strip() == first.gold.strip() and samples[1].code == second.gold
    assert not any(s.greedy for s in samples)
    namespace: dict = {}
    exec(compile(samples[2].code, "gold", "exec"), namespace)  # our own data: a gold program, fenced
    assert first.entry_point in namespace
    with pytest.raises(FalconError, match=r"samples.jsonl line 1: task 'HumanEval/999' is not in this task set"):
        load_submissions(submission(tmp_path, {"task_id": "HumanEval/999", "completion": ""}), tasks)
    with pytest.raises(FalconError, match="line 1: field 'completion' is missing"):
        load_submissions(submission(tmp_path, {"task_id": first.task_id}), tasks)


def test_score_runs_submissions_in_the_sandbox(capsys, tmp_path):
    pytest.importorskip("falconlib.sandbox.check", reason="the sandbox is not there")
    golds = load_tasks("humaneval")[:3]
    rows = [{"task_id": t.task_id, "solution": t.gold} for t in golds[:2]]
    path = submission(tmp_path, *rows, {"task_id": golds[2].task_id, "solution": "def nothing(): pass"})
    code, out, _ = call(capsys, "score", str(path), "--out", str(tmp_path / "verdicts.jsonl.gz"))
    assert code == 0 and "pass@1: 0.667\n" in out and "3 tasks" in out and (tmp_path / "verdicts.jsonl.gz").is_file()


def test_memory_commands_read_a_memory(capsys, tmp_path):
    from falconlib.memory import HashedTfidf, LongTermMemory

    path = tmp_path / "memory.sqlite"
    tasks = load_tasks("basics", "train")[:5]
    with LongTermMemory(path, HashedTfidf()) as memory:
        memory.add_tasks(tasks)
        memory.add_golds(tasks)
    before = path.read_bytes()
    code, out, _ = call(capsys, "memory", "stats", str(path))
    assert code == 0 and json.loads(out)["tasks"] == 5 and json.loads(out)["gold"] == 5
    code, out, _ = call(capsys, "memory", "search", str(path), tasks[0].prompt, "--k", "1")
    assert code == 0 and tasks[0].task_id in out and len(out.splitlines()) >= 1
    assert call(capsys, "memory", "verify", str(path))[:2] == (0, "sound\n")
    assert call(capsys, "memory", "export", str(path), "--out", str(tmp_path / "all.parquet"))[0] == 0
    assert (tmp_path / "all.parquet").stat().st_size > 0 and path.read_bytes() == before
    back = ("memory", "import", str(tmp_path / "all.parquet"), "--out", str(tmp_path / "copy.sqlite"))
    assert call(capsys, *back)[0] == 0 and call(capsys, *back)[0] == 2  # the second time there is something to lose
    with LongTermMemory(path, read_only=True) as memory, LongTermMemory(tmp_path / "copy.sqlite", read_only=True) as copy:
        assert copy.content_hash() == memory.content_hash()
    path.write_bytes(b"no database" * 100)
    assert call(capsys, "memory", "stats", str(path))[0] == 2


def test_memory_verify_names_its_repair_and_repairs(capsys, tmp_path):
    from falconlib.memory import HashedTfidf, LongTermMemory

    path = tmp_path / "memory.sqlite"
    with LongTermMemory(path, HashedTfidf()) as memory:
        memory.add_tasks(load_tasks("basics", "train")[:3])
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        db.execute("UPDATE task SET text_hash = 'wrong' WHERE id = 1")
    code, out, _ = call(capsys, "memory", "verify", str(path))
    assert code == 1 and f"remedy: falconlib memory verify {path} --repair" in out
    assert call(capsys, "memory", "verify", str(path), "--repair")[0] == 0
    assert call(capsys, "memory", "verify", str(path))[:2] == (0, "sound\n")


def test_an_error_of_the_system_is_one_message_and_2(capsys, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(doctor, "examine", full)
    code, _, err = call(capsys, "doctor")
    assert code == 2 and "No space left on device" in err and "remedy: " in err


def test_train_notes_what_it_used_and_keeps_others_out(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("FALCON_RESULTS", str(tmp_path))
    arguments = ("train", "--arm", "base", "--profile", "smoke")
    with workflow.lock(tmp_path / "runs" / "smoke"):
        code, _, err = call(capsys, *arguments)
    assert code == 2 and "another run is working" in err
    assert call(capsys, *arguments)[0] == 0
    facts = json.loads((tmp_path / "runs" / "smoke" / "train" / "base-s0" / "run.json").read_text())
    assert facts["model"].startswith("tiny (") and len(facts["data"]["basics train"]) == 64
    assert facts["sandbox"]["seccomp"]["verified"] and facts["trained_tokens"] == 0
    assert facts["data"]["humaneval test"] != facts["data"]["basics test"]


# -- doctor


def test_the_doctor_prints_a_row_and_a_remedy_each(capsys):
    rows = [doctor.Row("Python", "OK", "3.11"), doctor.Row("faiss", "missing", "two builds at once: a b", "pip uninstall -y a b")]
    text = doctor.as_text(rows)
    assert (
        text.splitlines()[1].split()[:2] == ["faiss", "missing"]
        and text.splitlines()[2].strip() == "remedy: pip uninstall -y a b"
    )


def test_the_doctor_examines_everything():
    names = [row.name for row in doctor.examine("smoke")]
    assert names[:7] == ["Python", "torch", "faiss", "sandbox", "libseccomp2", "ruff", "complexipy"]
    assert names[7:10] == ["judge", "model", "MiniLM"] and names[-3:] == ["results", "disk", "memory"]


def test_the_doctor_words_the_sandbox_and_what_is_missing(monkeypatch, tmp_path):
    def absent(name):
        raise doctor.importlib.metadata.PackageNotFoundError(name)

    assert re.match(r"tier [AB], \d+ of 13 layers verified", doctor.sandbox_layers(Profile()))
    monkeypatch.setattr(doctor.importlib.metadata, "version", absent)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    asked = []
    monkeypatch.setenv("FALCON_RESULTS", str(tmp_path / "later" / "results"))
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: asked.append(path) or shutil._ntuple_diskusage(10, 10, 0))
    rows = {row.name: row for row in doctor.examine("quick")}
    assert rows["ruff"].state == rows["MiniLM"].state == rows["disk"].state == "missing" and asked == [tmp_path]
    assert rows["ruff"].remedy == "make setup" and "pip install" in rows["MiniLM"].remedy and rows["MiniLM"].needed
    assert rows["faiss"].state == "OK" and "pip install" in rows["faiss"].detail
    assert not {row.name: row for row in doctor.examine("smoke")}["MiniLM"].needed


def test_the_doctor_says_whether_the_judge_can_be_used(monkeypatch, tmp_path):
    def row(**judge):
        found = doctor.examine("smoke", {f"judge.{name}": value for name, value in judge.items()})
        return next(row for row in found if row.name == "judge")

    for name in ("tasks", "sandbox_layers", "minilm", "torch_build"):
        monkeypatch.setattr(doctor, name, lambda *_, **__: "")
    for name in ("BASE_URL", "MODEL", "API_KEY"):
        monkeypatch.delenv(f"FALCON_JUDGE_{name}", raising=False)
    assert row().state == "OK" and row().detail.startswith("static")
    unset = row(backend="openai")
    assert unset.state == "missing" and "FALCON_JUDGE_BASE_URL" in unset.remedy
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setenv("FALCON_JUDGE_BASE_URL", f"http://someone:secret@127.0.0.1:{port}/v1")
        found = row(backend="openai", model="any")
        assert found.state == "OK" and f"http://127.0.0.1:{port}/v1 answers" in found.detail and "secret" not in found.detail
    gone = row(backend="openai", model="any")
    assert gone.state == "missing" and "does not answer" in gone.detail and "judge.backend=static" in gone.remedy
    assert row(backend="local", model="own/model").detail.startswith("local: own/model")
    assert row(backend="local", replay=True, cache=str(tmp_path / "none.sqlite")).state == "missing"
    assert not list(tmp_path.iterdir())


def test_the_doctor_sees_two_faiss_builds(monkeypatch):
    two = ("faiss-cpu", "faiss-gpu")
    monkeypatch.setattr(doctor.importlib.metadata, "distributions", lambda name: iter([name] if name in two else []))
    with pytest.raises(FalconError, match="2 builds of faiss are installed: faiss-cpu faiss-gpu\n  remedy: pip uninstall"):
        doctor.faiss_build(Profile())


def test_the_doctor_reports_a_missing_model(monkeypatch, tmp_path):
    monkeypatch.setenv("FALCON_CACHE", str(tmp_path))
    rows = {row.name: row for row in doctor.examine("quick")}
    assert rows["model"].state == "missing" and "make setup" in rows["model"].remedy


def test_the_command_starts_quickly():
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "falconlib", "--help"], capture_output=True, check=True)
    assert time.perf_counter() - began < 2
