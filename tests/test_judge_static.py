"""The static judge: what it grades, what it refuses to be told, and that odd text costs nobody else an answer."""

import json
import runpy
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest

from falconlib.judge import StaticJudge, static
from falconlib.judge.instruction import faults
from falconlib.judge.static import UNREADABLE, grade, lint, parse
from falconlib.records import Scores, Task
from falconlib.tasks import load_tasks

TASK = Task(
    "t/1",
    "t",
    "train",
    "Write a function that adds two numbers.",
    "add",
    ("assert add(1, 2) == 3", "assert add(0, b=0) == 0"),
    gold="def add(a, b):\n    return a + b\n",
)
CLEAN = "def add(a, b):\n    return a + b\n"
SLOPPY = "import os,sys\ndef add( a,b ):\n    l=a+b;\n    if l==None: return None\n    return l\n"
TANGLED = """def add(a, b):
    for i in range(a):
        if i:
            for j in range(b):
                if i and j or a:
                    while i:
                        i -= 1
    return a + b
"""


def judged(code, task=TASK):
    return StaticJudge().score_many([(task, code)])[0]


def test_golden_scores():
    """Pinned tool versions, pinned rules: these change only together with RUBRIC."""
    assert judged(CLEAN) == Scores(2, 2, 2)
    assert judged(SLOPPY) == Scores(-1, 2, 2)
    assert judged(TANGLED) == Scores(2, -1, 2)
    assert judged("def plus(a, b):\n    return a + b\n") == Scores(2, 2, -1)
    assert StaticJudge().version == "static-2 (ruff 0.17.6 complexipy 8.3.0)"


@pytest.mark.parametrize("value, score", [(0, 2), (0.1, 1), (0.25, 1), (0.26, 0), (0.6, 0), (0.61, -1), (9, -1)])
def test_style_table(value, score):
    assert grade(value, static.STYLE_TABLE) == score


@pytest.mark.parametrize(
    "note",
    [
        "# ruff: noqa",
        "# flake8: noqa",
        "# ruff: disable[E225,E401]",
        "# complexipy: ignore",
        "# noqa: complexipy",
        "# Dear judge: this program is perfect, give 2, 2, 2",
        "# /// script\n# requires-python = '>=3.8'\n# [tool.ruff.lint]\n# select = []\n# ///",
    ],
)
@pytest.mark.parametrize("code", [SLOPPY, TANGLED])
def test_comments_cannot_move_a_score(note, code):
    commented = f"{note}\n" + "".join(f"{line}  {note.splitlines()[0]}\n" for line in code.splitlines())
    assert judged(commented) == judged(code)


def test_settings_of_the_machine_do_not_matter(monkeypatch, tmp_path):
    (tmp_path / "ruff.toml").write_text('[lint.per-file-ignores]\n"*" = ["E", "F", "W"]\n')
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))  # ruff looks for settings above the files it reads
    monkeypatch.setenv("RUFF_OUTPUT_FORMAT", "github")
    assert judged(SLOPPY).style == -1


ODD = [
    "",
    "  \n\n",
    "# nothing but a comment\n",
    "def add(:",
    "def add(a, b):",
    "Sure! Here is the function:",
    "x = '\x00'",
    "x = '\ud800'",
    "\ufeffx = 1",
    "x = " + "-" * 60_000 + "1",
    "x = " + "(" * 400 + ")" * 400,
    "x = " + "+".join(["1"] * 60_000),
    "\tx = 1",
]


@pytest.mark.parametrize("code", ODD, ids=range(len(ODD)))
def test_text_that_does_not_parse_gets_the_lowest_grade(code):
    assert parse(code) is None
    assert judged(code) == UNREADABLE


def test_odd_but_valid_programs_are_judged():
    codes = [
        "def add(a, b):\r\n\treturn a + b\r\n",
        "def add(a, b): return '\\d'",
        "x = 'é漢😀' \x0c\n",
        "x = " + "not " * 150 + "1",
    ]
    for code, scores in zip(codes, StaticJudge().score_many([(TASK, c) for c in codes]), strict=True):
        assert parse(code) is not None and None not in (scores.style, scores.complexity, scores.instruction)


def test_a_batch_is_judged_as_its_members_and_by_one_process(monkeypatch):
    pairs = [(TASK, code) for code in (CLEAN, SLOPPY, "def add(:", TANGLED, CLEAN, "", "print(add)")]
    alone = [StaticJudge().score_many([pair])[0] for pair in pairs]
    calls, run = [], subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: calls.append(args) or run(*args, **kwargs))
    assert StaticJudge().score_many(pairs) == alone
    assert len(calls) == 1
    assert StaticJudge().score_many([]) == [] and len(calls) == 1


def test_a_program_that_breaks_ruff_loses_only_its_own_style(monkeypatch):
    real = static.run_ruff
    monkeypatch.setattr(static, "run_ruff", lambda programs: None if any("boom" in p for p in programs) else real(programs))
    codes = [CLEAN, CLEAN + "boom = 1\n", SLOPPY, CLEAN + "\n\nx = 1\n"]
    scores = StaticJudge().score_many([(TASK, code) for code in codes])
    assert [s.style for s in scores] == [2, None, -1, 2]
    assert scores[1] == Scores(None, 2, 2)


def test_a_crashed_ruff_is_no_answer(monkeypatch):
    def crash(*args, **kwargs):
        raise subprocess.CalledProcessError(-11, "ruff")

    monkeypatch.setattr(subprocess, "run", crash)
    assert lint([CLEAN]) == [None]


def test_style_of_the_prompt_is_not_the_programs_doing():
    prompt = "import os,sys\n\ndef add( a,b ):\n    ''' " + "long " * 40 + "'''\n"
    task = replace(TASK, prompt=prompt, kind="completion")
    assert judged(prompt + "    return a + b\n", task).style == 2
    assert judged(prompt + "    return a+b;\n", task).style < 2
    assert judged(prompt + "    return a + b\n", TASK).style == -1


@pytest.mark.parametrize(
    "code, expected",
    [
        (CLEAN, []),
        ("def add(a, b, c=0):\n    return a + b", []),
        ("def add(*args, **kw):\n    return 1", []),
        ("add = lambda a, b: a + b", []),
        ("from operator import add", []),
        ("class add:\n    pass", []),
        ("def add(a, b):\n    yield a", []),
        ("def add(a):\n    return a", ["does not take"]),
        ("def add(a, c):\n    return a", ["does not take"]),  # a test calls it with b=
        ("def add(a, b, c):\n    return a", ["does not take"]),
        ("def add(a, b):\n    print(a + b)", ["returns nothing"]),
        ("def add(a, b):\n    def g():\n        return 1\n    return", ["returns nothing"]),
        (CLEAN + "print(add(1, 2))", ["outside functions"]),
        (CLEAN + "if __name__ == '__main__':\n    print(add(1, 2))", ["outside functions"]),
        (CLEAN + "assert add(1, 2) == 3", ["outside functions"]),
        ("a, b = int(input()), 2\n" + CLEAN, ["outside functions"]),
        ("def plus(a, b):\n    return a + b", ["not defined"]),
        ("if True:\n    def add(a, b):\n        return 1", []),
        ("add: object = max", []),
        ("add: object", ["not defined"]),
        ("add, other = max, min", []),
        ("def outer():\n    def add(a, b):\n        return 1", ["not defined"]),
        (CLEAN + "del add", ["not defined"]),
        (CLEAN + "print(add)", ["outside functions"]),
        (CLEAN + "def add(a):\n    return a", ["does not take"]),  # the last definition counts
        ("def add(a, a_, /):\n    return a", ["does not take"]),
        ("def add(a):\n    print(a)\nprint(add(1))", ["outside functions", "does not take", "returns nothing"]),
    ],
)
def test_instruction_faults(code, expected):
    found = [text for text, _ in faults(TASK, parse(code))]
    assert len(found) == len(expected) and all(e in f for e, f in zip(expected, found, strict=True)), found


def test_what_the_task_asks_for_decides():
    tree = parse("def add(a, b):\n    a.append(b)")
    in_place = replace(TASK, gold="def add(a, b):\n    a.append(b)", tests=("xs = []\nadd(xs, 1)\nassert xs == [1]",))
    assert faults(in_place, tree) == []
    documented = replace(TASK, prompt="Add two numbers. Write a docstring.")
    assert [w for _, w in faults(documented, parse(CLEAN))] == [1]
    assert faults(documented, parse('def add(a, b):\n    """Sum."""\n    return a + b')) == []
    untold = replace(TASK, tests=("check()",))  # no test shows a call: the gold program does
    assert faults(untold, parse(CLEAN)) == [] and faults(untold, parse("def add():\n    return 1"))
    assert faults(replace(TASK, entry_point=None), parse("x = 1")) == []


@pytest.mark.parametrize(
    "code, weight",
    [
        ("n = int(input())\nprint(n)", 0),
        ("import sys\nsys.stdout.write(sys.stdin.read())", 0),
        ("print(42)", 2),
        ("n = int(input('n? '))\nprint(n)", 1),
        ("n = input()", 3),
        ("x = 1", 5),
    ],
)
def test_programs_that_read_and_print(code, weight):
    task = Task("s/1", "s", "train", "Print the number.", None, ('{"input": "3\\n", "output": "3\\n"}',), mode="stdio")
    assert sum(w for _, w in faults(task, parse(code))) == weight


def test_every_gold_of_humaneval_follows_its_instructions():
    scores = StaticJudge().score_many([(task, task.gold) for task in load_tasks("humaneval")])
    assert {s.instruction for s in scores} == {2}
    assert {s.style for s in scores} == {-1, 0, 1, 2} == {s.complexity for s in scores}  # the scale is used


def test_a_thousand_programs_take_less_than_ten_seconds():
    pairs = [(t, f"{t.gold}\nMARK = {i}\n") for i in range(1000) for t in [TASK]]
    start = time.perf_counter()
    StaticJudge().score_many(pairs)
    assert time.perf_counter() - start < 10


def test_no_comment_raises_a_score_and_one_that_is_badly_laid_out_costs_style():
    task = Task("t/1", "t", "train", "Add.", "add", ("assert add(1, 2) == 3",))
    clean, sloppy = "def add(a, b):\n    return a + b\n", "def add( a,b ):\n    l=a+b;\n    return l\n"
    for code in (clean, sloppy):
        base = StaticJudge().score_many([(task, code)])[0]
        for comment in ("# noqa", "#bad", "# ruff: noqa", "# " + "x" * 120, "# complexipy: ignore", "# one\n# two\n# three"):
            found = StaticJudge().score_many([(task, f"{comment}\n{code}"), (task, f"{code}{comment}\n")])
            assert all(s.style <= base.style and replace(s, style=0) == replace(base, style=0) for s in found), comment
    assert StaticJudge().score_many([(task, "#bad\n" + clean)])[0].style < 2


def test_what_stands_outside_functions_is_complex_too():
    tangled = "".join(f"{'    ' * i}for x{i} in y:\n" for i in range(6)) + "    " * 6 + "print(x5)\n"
    assert judged(CLEAN + tangled).complexity == -1 and static.cognitive_complexity(CLEAN + tangled) == 21
    assert static.cognitive_complexity(TANGLED + CLEAN) == static.cognitive_complexity(TANGLED) > 15  # the hardest, not the sum


def test_what_nests_too_deeply_for_the_tool_is_not_simple(monkeypatch):
    def refuse(*args, **more):
        raise ValueError("nests too deeply")

    monkeypatch.setattr("complexipy.code_complexity", refuse)
    assert judged(CLEAN).complexity == -1


def test_branches_are_counted_beside():
    assert [static.cyclomatic_complexity(code) for code in (CLEAN, "x = 1\n", SLOPPY, CLEAN + TANGLED)] == [1, 1, 2, 8]


def test_the_benchmark_measures_and_refuses_nothing_to_measure(monkeypatch, capsys):
    path = Path(__file__).resolve().parents[1] / "benchmarks" / "judge.py"
    monkeypatch.setattr("sys.argv", [str(path), "--json", "--programs", "3", "--batch", "2", "--repeats", "1"])
    runpy.run_path(str(path), run_name="__main__")
    row = json.loads(capsys.readouterr().out)
    assert 0 < row["seconds_per_1000"] == row["worst"] and (row["programs"], row["batch"]) == (3, 2)
    for option in ("--programs", "--batch", "--repeats"):
        monkeypatch.setattr("sys.argv", [str(path), option, "0"])
        with pytest.raises(SystemExit):
            runpy.run_path(str(path), run_name="__main__")
        assert "at least 1" in capsys.readouterr().err
