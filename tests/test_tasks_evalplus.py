"""EvalPlus's schema on a small file of our own: expected values from the canonical solution, tolerances, types, oracles."""

from __future__ import annotations

import json

import pytest

from falconlib.config import SandboxConfig
from falconlib.errors import FalconError
from falconlib.sandbox import Sandbox, program_for
from falconlib.tasks import evalplus, files, load_tasks


def row(number, prompt, name, solution, base, plus, **more):
    fields = {"task_id": f"Own/{number}", "prompt": prompt, "entry_point": name, "canonical_solution": solution}
    return {**fields, "base_input": base, "plus_input": plus, "atol": 0, "contract": "\n", **more}


MEAN = row(
    0, 'from typing import List\n\n\ndef mean(xs: List[float]) -> float:\n    """ The mean, 0.0 for none. """\n', "mean",
    "    return sum(xs) / len(xs) if xs else 0.0\n", [[[1.0, 2.0]], [[4.0]]], [[[]], [[0.1, 0.2, 0.3]]], atol=1e-6,
)  # fmt: skip
COUNT = row(
    1, '"""\nWrite a function to count each pair in a list.\nassert tally([(1, 2)]) == {(1, 2): 1}\n"""\n', "tally",
    "\ndef tally(pairs):\n  return {p: pairs.count(p) for p in pairs}\n", [[[[1, 2]]]], [[[[3, 4], [3, 4], [5, 6]]], [[]]],
    assertion="\nassert tally([(1, 2)]) == {(1, 2): 1}\n",
)  # fmt: skip
FACT = row(2, "def fact(n):\n", "fact", "    return n * fact(n - 1) if n > 1 else eval('1')\n", [[3]], [[20]])
ROOT = row(
    3, "def poly(xs, x):\n    return sum(c * x**i for i, c in enumerate(xs))\n\n\ndef find_zero(xs):\n", "find_zero",
    "    return 2.0 if xs[0] < 0 else -2.0\n", [[[-4, 0, 1]]], [[[4, 0, -1]]], atol=1e-4,
)  # fmt: skip
ROWS = [MEAN, COUNT, FACT, ROOT]


@pytest.fixture(scope="module")
def box():
    with Sandbox(SandboxConfig(workers=1)) as sandbox:
        yield sandbox


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


def status(box, row, code):
    report = box.run(program_for(evalplus.from_row(row, "own", "here"), code))
    return report.status


def test_both_sets_by_name_and_by_path(tmp_path, monkeypatch):
    monkeypatch.setenv("FALCON_DATA", str(tmp_path))
    write(tmp_path / "humanevalplus" / "HumanEvalPlus.jsonl", [MEAN, FACT])
    path = write(tmp_path / "mbppplus" / "MbppPlus.jsonl", [COUNT])
    first, second = load_tasks("humanevalplus")
    (third,) = load_tasks("mbppplus", "test")
    assert load_tasks(str(path))[0].tests == third.tests and third.dataset == "mbppplus"
    assert (first.kind, first.gold, len(first.tests), second.entry_point) == (
        "completion",
        MEAN["prompt"] + MEAN["canonical_solution"],
        4,
        "fact",
    )
    assert third.kind == "text" and third.prompt.startswith("Write a function") and '"""' not in third.prompt


def test_missing_file_says_where_to_put_it(tmp_path, monkeypatch):
    monkeypatch.delenv("FALCON_DATA", raising=False)
    monkeypatch.setattr(files, "DATA", tmp_path)
    with pytest.raises(FalconError, match=r"mbppplus/MbppPlus.jsonl") as error:
        load_tasks("mbppplus")
    assert "EvalPlus's releases" in error.value.remedy


@pytest.mark.parametrize("row", ROWS, ids=lambda r: r["entry_point"])
def test_golds_pass_in_value_mode(box, row):
    task = evalplus.from_row(row, "own", "here")
    report = box.run(program_for(task, task.gold))
    assert (report.status, report.integrity, report.tests_expected) == ("pass", "value", len(task.tests))


def test_plus_inputs_kill_what_passes_the_base_inputs(box):
    task = evalplus.from_row(MEAN, "own", "here")
    wrong = "def mean(xs):\n    return sum(xs) / len(xs)\n"
    report = box.run(program_for(task, wrong))
    assert [t.status for t in report.tests] == ["pass", "pass", "runtime_error", "pass"] and report.status == "runtime_error"
    tally = "def tally(pairs):\n    return {p: 1 for p in pairs}\n"
    assert [t.status for t in box.run(program_for(evalplus.from_row(COUNT, "own", "here"), tally)).tests] == [
        "pass",
        "fail",
        "pass",
    ]


def test_tolerance(box):
    off = "def mean(xs):\n    return (sum(xs) / len(xs) if xs else 0.0) + {}\n"
    assert status(box, MEAN, off.format("5e-7")) == "pass" and status(box, MEAN, off.format("5e-6")) == "fail"
    assert status(box, {**MEAN, "atol": 0}, off.format("5e-7")) == "pass"  # floats always have 1e-6
    assert status(box, {**MEAN, "atol": 1e-3}, off.format("5e-4")) == "pass"
    pairs = row(4, "def halves(n):\n", "halves", "    return [n / 2, [n]]\n", [[1]], [])
    mixed = "def halves(n):\n    return [n / 2 + 1e-5, [n]]\n"
    assert status(box, pairs, mixed) == "fail" and status(box, {**pairs, "atol": 1e-4}, mixed) == "pass"
    assert status(box, {**pairs, "atol": 1e-4}, "def halves(n):\n    return (n / 2, [n])\n") == "fail"
    wide = row(5, "def top(n):\n", "top", "    return float('inf') if n else float('nan')\n", [[1]], [[0]])
    assert status(box, wide, "def top(n):\n    return float('inf') if n else float('nan')\n") == "pass"
    assert status(box, wide, "def top(n):\n    return 1e308\n") == "fail"


def test_tolerance_grows_with_the_expected_value(box):
    """numpy's rule: atol + 1e-7 of the expected value, so that large floats need not agree to the last digit."""
    large = row(8, "def big(n):\n", "big", "    return 1e9 * n\n", [[1]], [])
    assert status(box, large, "def big(n):\n    return 1e9 * n + 50\n") == "pass"
    assert status(box, large, "def big(n):\n    return 1e9 * n + 150\n") == "fail"


@pytest.mark.parametrize("name", evalplus.SETS)
def test_tasks_whose_answers_are_sets(name):
    task = evalplus.from_row(row(9, '"""\nItems.\n"""\n', name, f"def {name}(a):\n    return a\n", [[[1]]], []), "own", "here")
    assert task.tests == (f"assert set({name}([1])) == set(reference_solution([1]))",)
    assert len(evalplus.SETS) == 8


def test_imports_that_must_stay_outside(box):
    future = "from __future__ import annotations\nfrom math import *\n\n\ndef half(n: Unknown) -> float:\n"
    task = row(10, future, "half", "    return floor(n) / 2\n", [[1.5]], [[3]])
    assert status(box, task, future + "    return floor(n) / 2\n") == "pass"
    assert status(box, task, future + "    return n / 2\n") == "fail"


def test_special_oracles(box):
    assert status(box, ROOT, "def find_zero(xs):\n    return -2.0 if xs[0] < 0 else 2.0\n") == "pass"  # the other root
    assert status(box, ROOT, "def find_zero(xs):\n    return 1.9\n") == "fail"
    common = "def similar_elements(a, b):\n    return tuple(set(a) & set(b))\n"
    same = row(6, '"""\nCommon items.\n"""\n', "similar_elements", common, [[[3, 1], [1, 3]]], [])
    assert status(box, same, "def similar_elements(a, b):\n    return [3, 1, 3]\n") == "pass"
    assert status(box, same, "def similar_elements(a, b):\n    return [3]\n") == "fail"
    truth = row(
        7, '"""\nText?\n"""\n', "check_str", "import re\ndef check_str(s):\n    return re.search('^a', s)\n", [["ab"]], [["b"]]
    )
    assert status(box, truth, truth["canonical_solution"]) == "pass"
    assert status(box, truth, "def check_str(s):\n    return s[0] == 'a'\n") == "pass"
    assert status(box, truth, "def check_str(s):\n    return True\n") == "fail"


def test_values_get_the_types_of_the_asserts():
    assert evalplus.typed([[1, 2], [3, 4], [5, 6]], [(0, 0)]) == [(1, 2), (3, 4), (5, 6)]
    assert evalplus.typed([[1, [2]], 3], ((1, {2}), 3)) == ((1, {2}), 3)
    assert evalplus.typed(["1", "1j"], ["x", 0j]) == ["1", 1j]
    assert evalplus.typed({"a": [1, 2]}, {"b": (0, 0)}) == {"a": (1, 2)}
    assert evalplus.typed([1], None) == [1] and evalplus.typed([], [(1,)]) == [] and evalplus.typed([[1]], []) == [[1]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"plus_input": None}, "here: field 'plus_input' is missing"),
        ({"base_input": [1]}, "here: base_input holds something else than lists of arguments"),
        ({"base_input": "[[1"}, "here: base_input: broken JSON"),
        ({"atol": "1e-6"}, "here: atol = '1e-6'"),
        ({"atol": -1}, "here: atol = -1"),
        ({"canonical_solution": "    return (\n"}, "here: canonical_solution and prompt make no program with 'mean'"),
        ({"entry_point": "median"}, "make no program with 'median'"),
        ({"base_input": [], "plus_input": []}, "here: no inputs"),
    ],
)
def test_bad_rows(changes, message):
    with pytest.raises(FalconError, match=message):
        evalplus.from_row({**MEAN, **changes}, "own", "here")


def test_parquet_holds_the_inputs_as_text():
    texts = {key: json.dumps(MEAN[key]) for key in ("base_input", "plus_input")}
    assert evalplus.from_row({**MEAN, **texts}, "own", "here") == evalplus.from_row(MEAN, "own", "here")
