"""What a pass may rest on, what is the tests' own fault, and what a program cannot choose."""

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import psutil
import pytest

from falconlib.config import SandboxConfig
from falconlib.errors import FalconError
from falconlib.records import Program
from falconlib.sandbox import Sandbox, worker, zygote
from falconlib.sandbox.worker import Worker

GOOD = Program("def f(x):\n    return x\n", ("assert f(1) == 1",))
LIAR = "class L:\n    __eq__ = lambda s, o: True\n    __hash__ = object.__hash__\n"
LIAR += "    def __getattr__(s, n): return lambda *a: True\ndef f(*a): return L()\n"
TRUE = "class L:\n    def __getattr__(s, n): return True\n    def __len__(s): return 3\ndef f(x): return L()\n"
POINT = "class P:\n    def __init__(s, x): s.x = x\n    def __len__(s): return s.x\n    def __eq__(s, o): return s.x == o.x\n"
POINT += "    def __add__(s, o): return P(s.x + o.x)\n    def next(s): return P(s.x + 1)\ndef f(x): return P(x)\n"
POINT += "class L:\n    def __getattr__(s, n): return lambda *a: True\n"
POINT += "    def __len__(s): return 3\nclass S:\n    def f(s, x): return L()\nP.__sub__ = lambda s, o: 0.0\n"


@pytest.fixture(scope="module")
def box():
    with Sandbox(SandboxConfig(workers=1, cpu_s=1.0)) as sandbox:
        yield sandbox


@pytest.fixture(scope="module")
def lenient():
    with Sandbox(SandboxConfig(workers=1, cpu_s=1.0, min_integrity="in_process")) as sandbox:
        yield sandbox


@pytest.mark.parametrize("tier", [None, "B"])
def test_nothing_is_kept_in_the_flags_of_an_open_file(tier):
    leak = "import fcntl, os\ndef f(x):\n    seen = fcntl.fcntl(0, 3) & os.O_APPEND\n"
    leak += "    fcntl.fcntl(0, 4, os.O_APPEND)\n    return seen\n"
    with Sandbox(SandboxConfig(workers=1), tier=tier) as sandbox:
        assert [sandbox.run(Program(leak, ("assert f(1) == 0",))).status for _ in range(2)] == ["pass"] * 2


PASSES = [  # program, test, integrity of the pass ("" where it is none)
    (LIAR, "assert f('x').endswith('hello')", ""),
    (LIAR, "def check(candidate):\n    assert candidate('x').isalpha() == True\ncheck(f)", ""),
    (TRUE, "r = f(1)\nassert len(r) == 3 and r.done and r.ok is True", "in_process"),
    (POINT, "assert f(2).x == 2", "in_process"),
    (POINT, "assert (P(1) + P(2)).x == 3", "value"),
    (POINT, "assert abs(P(1) - 5.0) < 1e-6", "in_process"),
    (POINT, "assert S().f('x').startswith('hello')", "in_process"),  # what a method returned should have been a text
    (POINT, "assert S().f('x').get(3) and len(S().f('x')) == 3", "in_process"),
    (POINT, "assert P(1) == P(1)", "in_process"),
    (POINT, "assert P(1).next().x == 2", "value"),
    (POINT, "p = P(3)\np.x += 1\nassert p.x == 4 and len(p) == 4", "value"),
    (POINT, "p = P(3)\np.q = P(4)\nassert p.q.x == 4", "value"),
    ("def f(x):\n    return lambda y: x + y\n", "gs = [f(1), f(2)]\nassert gs[1](3) == 5", "value"),
    ("def f(x): return {'a': x}\n", "assert f(1).get('a') == 1", "value"),
    ("limit, solved, primes = 10, False, [2, 3]\n", "assert limit == 10 and len(primes) == 2 and primes[1] == 3", "value"),
    ("limit, solved, primes = 10, False, [2, 3]\n", "assert solved", ""),
    ("def f(x): return 0\n", "assert f", ""),
]


@pytest.mark.parametrize(("code", "test", "integrity"), PASSES)
def test_what_a_pass_rests_on(box, lenient, code, test, integrity):
    report, strict = lenient.run(Program(code, (test,))), box.run(Program(code, (test,)))
    assert (report.integrity if report.status == "pass" else "") == integrity, report
    refused = strict.status == "infra_error" and strict.error.type == "IntegrityError"
    assert (strict.status == "pass", refused) == (integrity == "value", integrity == "in_process")


@pytest.mark.parametrize("test", ["assert Find_Min(3) == 1", "assert chain([Pair(1), Pair(2)]) == 3"])
def test_a_comparison_with_a_value_needs_no_object(box, test):
    code = LIAR + "class Pair:\n    def __init__(s, x): pass\nFind_Min = chain = f\n"
    assert box.run(Program(code, (test,))).status == "runtime_error"  # and not a refusal, which nobody would learn from


OWN_FAULT = [
    "import nope_nope\nassert f(1) == 1",
    "x = 1 / 0\nassert f(1) == x",
    "assert f(1 / 0) == 1",
    "assert f(1) == 1\nimport nope_nope",
    "import time\ntime.sleep(2)\nassert f(1) == 1",
    "import time\nassert f(1) == 1\ntime.sleep(2)\nassert f(2) == 2",
    "import os\nos._exit(0)\nassert f(1)",
    "import os\nassert f(1) == 1\nos._exit(0)",
    "import unittest\nclass T(unittest.TestCase):\n    def test_a(self):\n        assert f(1) == 1\nunittest.main()",
    "xs = [1]\nassert xs == [1]",
    "xs = [1]\nassert xs == [2]\nassert f(1) == 1",
    "assert f is not None",
]


@pytest.mark.parametrize("test", OWN_FAULT)
def test_broken_tests_say_nothing_about_the_program(box, test):
    report = box.run(Program(GOOD.code, (test,)))
    assert (report.status, report.error.type) == ("infra_error", "BrokenTests"), report


def test_sleepers_and_their_kind_are_still_the_programs_fault(box):
    for body in ("import time; time.sleep(9)", "while True: pass"):
        assert box.run(Program(f"def f(x):\n    {body}\n", GOOD.tests)).status == "timeout"
        assert box.run(Program(f"{body}\n", GOOD.tests)).status == "timeout"


def test_asserts_before_the_first_question_are_no_tests(box):
    report = box.run(Program("def f(x):\n    return 0\n", ("xs = [1, 2]\nassert len(xs) == 2\nassert f(xs) == 3",)))
    assert [t.status for t in report.tests] == ["fail"] and report.tests_expected == 1


def test_asserts_that_an_answer_avoids_have_failed(box):
    check = "def check(c):\n    if not c(1):\n        return\n    assert c(1) == 5\ncheck(f)"
    report = box.run(Program("def f(x):\n    return 0\n", (check,)))
    assert report.status == "fail" and len(report.tests) == 1


def test_more_asserts_than_are_recorded(box):
    report = box.run(Program(GOOD.code, ("assert f(1) == 1\n" * 5100,)))
    assert report.status == "pass" and report.tests_expected == len(report.tests) == 5000


RANGE = "def f(n):\n    return list(range(n))\n"
LOOPS = [  # tests, a program that runs fewer asserts than the gold, asserts of the gold, of them passed
    ("for x in f(20):\n    assert x >= 0", "def f(n): return [1]", 20, 1),
    ("for x in f(20):\n    assert x >= 0", "def f(n): return []", 20, 0),
    ("for a, b in zip(f(3), [0, 1, 2]):\n    assert a == b", "def f(n): return [0]", 3, 1),
    ("i = 0\nwhile f(5)[i] < 4:\n    assert f(5)[i] == i\n    i += 1", "def f(n): return [0, 1, 9, 9]", 4, 2),
    ("def check(c):\n    for x in c(4):\n        assert x >= 0\n    for x in c(2):\n        assert x in (0, 1)\ncheck(f)",
     "def f(n): return [1] * 6 if n == 2 else []", 6, 2),
    ("if f(2):\n    assert f(3) == [0, 1, 2]\nassert f(0) == []", "def f(n): return []", 2, 1),
    ("for x in f(3):\n    assert x >= 0", "def f(n):\n    yield 1\n    raise KeyError", 3, 0),
]  # fmt: skip


@pytest.mark.parametrize(("test", "code", "count", "passed"), LOOPS)
def test_asserts_in_loops_are_counted_with_the_gold_program(box, test, code, count, passed):
    short = box.run(Program(code, (test,), "f", gold=RANGE))
    assert short.status != "pass" and short.tests_expected == len(short.tests) == count, short
    assert [t.status for t in short.tests].count("pass") == passed
    gold = box.run(Program(RANGE, (test,), "f", gold=RANGE))
    assert (gold.status, gold.tests_expected, len(gold.tests)) == ("pass", count, count), gold


def test_longer_answers_earn_no_more(box):
    tests = ("for x in f(3):\n    assert x >= 0\nassert f(1) == 'no'",)
    report = box.run(Program("def f(n): return list(range(90))", tests, "f", gold="def f(n): return 'no' if n == 1 else [1, 2]"))
    assert [t.status for t in report.tests] == ["pass", "pass", "fail"] and report.tests_expected == 3


def test_a_gold_runs_once_and_one_that_fails_says_nothing(box, monkeypatch):
    started, original = [], Worker.start

    def start(self, task, *rest):
        started.append(task.program.code)
        original(self, task, *rest)

    monkeypatch.setattr(Worker, "start", start)
    tests = ("for x in f(7):\n    assert x == 0",)
    programs = [Program(f"def f(n): return {c}", tests, "f", gold=RANGE) for c in ("[]", "[0]")]
    assert [r.status for r in box.run_many(programs)] == ["fail", "pass"]  # the gold fails these tests
    assert [r.tests_expected for r in box.run_many(programs)] == [None, None] and started.count(RANGE) == 1
    straight = Program("def f(n): return 0", ("assert f(1) == 0",), "f", gold="def f(n): return 0 # unasked")
    assert box.run(straight).status == "pass" and straight.gold not in started


SLOW = "import time\ndef f(n):\n    end = time.process_time() + {}\n    while time.process_time() < end: pass\n    return n\n"


def test_limits_follow_a_gold_that_is_slow_up_to_a_bound():
    with Sandbox(SandboxConfig(workers=1, cpu_s=0.2)) as sandbox:

        def run(takes, gold):
            program = Program(SLOW.format(takes), ("assert f(1) == 1",), "f", gold=gold and SLOW.format(gold))
            return sandbox.run(program).status

        assert run(0.4, "0.4") == "pass"
        assert {run(0.4, None), run(0.4, "0"), run(9, "0.4"), run(9, "9")} == {"timeout"}


def test_a_test_that_sleeps_after_an_answer_is_broken():
    tests = ("assert f(1) == 1\ntime.sleep(60)", "assert f(1) == 1\ntime.sleep(60)\nassert f(2) == 2")
    with Sandbox(SandboxConfig(workers=2, cpu_s=0.2)) as sandbox:  # both at once: each sleeps its 4 seconds
        for report in sandbox.run_many([Program(GOOD.code, ("import time\n" + test,)) for test in tests]):
            assert (report.status, report.error.type) == ("infra_error", "BrokenTests"), report


@pytest.mark.parametrize("test", ["type(f(0)) == type(f(1))", "len(set(map(type, [f(0), f(1)]))) == 2", "type(f(0)) is not int"])
def test_the_class_of_what_does_not_travel_is_unknown(box, test):
    report = box.run(Program("def f(x): return object()", (f"assert {test}",), "f"))
    assert (report.status, report.error.type) == ("runtime_error", "TypeError")
    honest = box.run(Program("def f(x): return [x, 'x'][x:]", ("assert type(f(0)) is type(f(1)) is list",), "f"))
    assert honest.status == "pass"


CATCHES = ["class Bad(ValueError): pass\ndef f(x): raise Bad", "import json\ndef f(x): return json.loads('{')"]


@pytest.mark.parametrize("code", CATCHES)
def test_subclasses_of_builtin_exceptions_are_caught_as_their_base(box, code):
    test = "try:\n    f(1)\n    ok = False\nexcept ValueError:\n    ok = True\nassert ok"
    assert box.run(Program(code + "\n", (test,))).status == "pass"


@pytest.mark.parametrize("mark", ["\u2028", "\x0c", "\x1c", "\x85"])
def test_lines_are_pythons(box, mark):
    error = box.run(Program(f"s = '{mark}'\n\ndef f(x):\n    return 1 / 0\n", GOOD.tests)).error
    assert (error.line, error.text) == (4, "    return 1 / 0")
    assert box.run(Program(f"s = '{mark}'\ndef f(x):\n    return (x +", GOOD.tests)).error.truncated


def test_a_judge_that_others_kill_is_replaced(box, monkeypatch):
    original, seen = Worker.finish, []

    def killed_once(self):
        raw = original(self)
        if not seen:
            raw["result"], raw["ended"].ends[-1].status = b"", signal.SIGKILL
        seen.append(raw)
        return raw

    monkeypatch.setattr(Worker, "finish", killed_once)
    assert box.run(GOOD).status == "pass" and len(seen) == 2


def test_a_new_zygote_with_fewer_walls_is_not_used(monkeypatch):
    original = Worker.wait_ready

    def weaker(self, timeout):
        original(self, timeout)
        self.facts["landlock"] = [False, "gone"]

    with Sandbox(SandboxConfig(workers=1)) as sandbox:
        with monkeypatch.context() as patch:
            patch.setattr(Worker, "wait_ready", weaker)
            for action in (sandbox.refresh, lambda: sandbox.run(GOOD)):
                with pytest.raises(FalconError, match="lacks landlock"):
                    action()
        assert sandbox.run(GOOD).status == "pass"


def test_a_killed_owner_of_the_namespace_takes_all_with_it():
    with Sandbox(SandboxConfig(workers=1)) as sandbox:
        below = psutil.Process(sandbox._workers[0].process.pid).children(recursive=True)
        os.kill(below[0].pid, signal.SIGSTOP)  # it cannot see that its socket closed
        sandbox.close()
        assert not psutil.wait_procs(below, timeout=5)[1]


def test_a_closed_sandbox_has_reaped_its_processes():
    sandbox = Sandbox(SandboxConfig(workers=1))
    below = psutil.Process(sandbox._workers[0].process.pid).children(recursive=True)
    sandbox.run(GOOD)
    sandbox.close()
    time.sleep(0.05)
    assert [p for p in below if p.is_running()] == []


SETTINGS = [{"cpu_s": 0.0}, {"cpu_s": float("nan")}, {"workers": -1}, {"output_kb": 0}, {"require": "Strong"}]
SETTINGS += [{"min_integrity": "values"}, {"memory_mb": "1"}]


@pytest.mark.parametrize("wrong", SETTINGS)
def test_wrong_settings_are_named(wrong):
    with pytest.raises(FalconError, match=f"sandbox.{next(iter(wrong))}"):
        Sandbox(SandboxConfig(**wrong))


@pytest.mark.parametrize("wrong", [{"tests": ["assert f(1)"]}, {"tests": "assert f(1)"}, {"code": None}, {"mode": "stdin"}])
def test_what_is_no_program_is_named(box, wrong):
    with pytest.raises(FalconError, match="no Program"):
        box.run(Program(**{"code": "", "tests": ("assert f(1)",), **wrong}))


def test_the_judge_draws_the_same_numbers_for_every_program(box):
    test = "import random\nassert f(1) == random.random()"
    drawn = [box.run(Program(f"def f(x):\n    return {k}\n", (test,))).tests[0].expected for k in range(2)]
    assert drawn[0] == drawn[1] and drawn[0].startswith("0.")


def test_a_judge_that_has_grown_is_replaced():
    with Sandbox(SandboxConfig(workers=1), tier="B") as sandbox:

        def judge(test):
            assert sandbox.run(Program(GOOD.code, (test,))).status == "pass"
            return [p.pid for p in psutil.Process(sandbox._workers[0].process.pid).children()]

        first = judge("assert f(1) == 1")
        assert judge("assert f(2) == 2") == first != []
        judge("xs = [0] * 20_000_000\nassert f(1) == 1")
        assert judge("assert f(3) == 3") != first


def test_a_candidate_dies_with_its_zygote():
    with Sandbox(SandboxConfig(workers=1, cpu_s=2.0), tier="B") as sandbox:
        zygote = psutil.Process(sandbox._workers[0].process.pid)
        thread = threading.Thread(target=sandbox.run, args=(Program("while True: pass\n", GOOD.tests),))
        thread.start()
        time.sleep(0.3)
        below = zygote.children()
        zygote.kill()
        time.sleep(0.5)
        assert len(below) == 2 and all(not p.is_running() or p.status() == "zombie" for p in below)  # reaped by who adopts them
        thread.join()


@pytest.mark.parametrize(("starved", "killed"), [(0.0, "wall"), (1.0, "hard")])
def test_waiting_for_the_processor_is_not_the_programs_time_up_to_the_hard_wall(monkeypatch, starved, killed):
    start = time.monotonic()
    monkeypatch.setattr(zygote, "run_delay", lambda pid: starved * (time.monotonic() - start))
    server, (ours, theirs) = zygote.Zygote.__new__(zygote.Zygote), socket.socketpair()
    server.control, server.owner = ours, os.pidfd_open(os.getpid())
    with ours, theirs, tempfile.TemporaryFile() as fault:
        child = subprocess.Popen(["sleep", "5"])
        assert server.watch({"cpu": 0.1}, child.pid, None, fault.fileno(), start)["killed"] == killed
        child.wait()
    os.close(server.owner)


def test_a_program_that_could_not_be_enclosed_has_no_verdict(tmp_path, monkeypatch):
    shutil.copytree(Path(zygote.__file__).parent, tmp_path / "sandbox")
    source = (tmp_path / "sandbox" / "zygote.py").read_text()
    head = "def settle(self, fds, job, output, judge):\n"
    broken = source.replace(head, head + '        if not judge and job["mode"] == "value": raise OSError("no")\n')
    (tmp_path / "sandbox" / "zygote.py").write_text(broken)
    monkeypatch.setattr(worker, "_ZYGOTE", tmp_path / "sandbox" / "zygote.py")
    with Sandbox(SandboxConfig(workers=1)) as sandbox:
        assert sandbox.run(GOOD).status == "infra_error"


def test_a_program_that_ends_while_the_tests_answer_it_has_ended_itself(box):
    code = "import json, os, struct\ndef f(g):\n    d = json.dumps({'callback': 0, 'args': []}).encode()\n"
    code += "    os.write(3, struct.pack('!I', len(d)) + d)\n    os._exit(0)\n"
    report = box.run(Program(code, ("import time\nassert f(lambda: time.sleep(0.2)) == 1",)))
    assert (report.status, report.error.type) == ("runtime_error", "SystemExit")
