"""Verdicts of the sandbox: statuses, errors, integrity, output, broken and hostile tests."""

import _thread
import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import psutil
import pytest

from falconlib.config import SandboxConfig
from falconlib.errors import FalconError
from falconlib.records import Program, Task
from falconlib.sandbox import Sandbox, program_for
from falconlib.sandbox.codec import Encoder, ProtocolError, Unsupported, decode
from falconlib.sandbox.worker import Worker

ADD = ("assert add(1, 2) == 3", "assert add(2, 2) == 4", "assert add(-1, 1) == 0")
GOOD = Program("def add(a, b):\n    return a + b\n", ADD)


@pytest.fixture(scope="module")
def box():
    with Sandbox(SandboxConfig(workers=1, cpu_s=1.0, memory_mb=256, output_kb=16)) as sandbox:
        yield sandbox


@pytest.fixture(scope="module")
def lenient():
    with Sandbox(SandboxConfig(workers=1, cpu_s=1.0, min_integrity="in_process")) as sandbox:
        yield sandbox


CASES = [  # name, body after `def add(a, b):` or a whole program, status, error type, line
    ("pass", "return a + b", "pass", None, None),
    ("fail", "return a - b", "fail", None, None),
    ("exception", "return a / 0", "runtime_error", "ZeroDivisionError", 2),
    ("exit", "import os; os._exit(0)", "runtime_error", "SystemExit", None),
    ("sys_exit", "import sys; sys.exit(0)", "runtime_error", "SystemExit", 2),
    ("crash", "import os; os.abort()", "runtime_error", "SIGABRT", 2),
    ("kill_self", "import os; os.kill(os.getpid(), 9)", "runtime_error", "SIGKILL", None),
    ("spin", "while True: pass", "timeout", "Timeout", 2),
    ("c_loop", "sum(range(10 ** 11))", "timeout", "Timeout", 2),
    ("sleep", "import time; time.sleep(60)", "timeout", "Timeout", 2),
    ("memory", "return [0] * 10 ** 9", "memory", "MemoryError", 2),
    ("claimed_memory", "raise MemoryError", "runtime_error", "MemoryError", 2),
    ("claimed_timeout", "raise TimeoutError", "runtime_error", "TimeoutError", 2),
    ("own_assert", "assert False", "runtime_error", "AssertionError", 2),
    ("syntax", "return a +* b", "syntax_error", "SyntaxError", 2),
    ("stdin", "return int(input())", "runtime_error", "EOFError", 2),
    ("lying_eq", "return type('L', (int,), {'__eq__': lambda s, o: True})(7)", "fail", None, None),
    ("opaque", "return object()", "runtime_error", "TypeError", None),
]


@pytest.mark.parametrize(("name", "body", "status", "kind", "line"), CASES, ids=[c[0] for c in CASES])
def test_status(box, name, body, status, kind, line):
    report = box.run(Program(f"def add(a, b):\n    {body}\n", ADD, visible=1))
    assert report.status == status, report
    assert [t.status for t in report.tests] == [status] * 3 and report.tests_expected == 3
    assert [t.visible for t in report.tests] == [True, False, False]
    assert (report.error.type if report.error else None) == kind
    if line:
        assert report.error.line == line and report.error.text.strip() == body
    assert report.integrity == "value" and report.cpu_s is not None and report.layers.startswith(box.tier)
    assert report.loaded == (status != "syntax_error")


def test_partial_credit_and_texts(box):
    report = box.run(Program("def add(a, b):\n    return 3\n", ADD))
    assert [t.status for t in report.tests] == ["pass", "fail", "fail"]
    assert (report.tests[1].got, report.tests[1].expected) == ("3", "4")


def test_error_place(box):
    code = "def helper(x):\n    y = (x\n         / 0)\n    return y\n\ndef add(a, b):\n    return helper(a)\n"
    error = box.run(Program(code, ADD)).error
    assert (error.line, error.end_line, error.function) == (2, 3, "helper")
    assert error.traceback == (("add", 7), ("helper", 2))


TRUNCATED = [
    ("def add(a, b):\n    return (a +", True),
    ("def add(a, b):\n    return a +", True),
    ("def add(a, b):\n", True),
    ('def add(a, b):\n    """doc\n    return a', True),
    ("def add(a, b):\n    x = 'abc", True),
    ("def add(a, b)\n    return a + b\n", False),
    ("def add(a, b):\n    return a b\n    return 1\n", False),
    ("Here is the code:\n\ndef add(a, b):\n    return a + b\n", False),
]


@pytest.mark.parametrize(("code", "truncated"), TRUNCATED)
def test_truncated(box, code, truncated):
    report = box.run(Program(code, ADD))
    assert report.status == "syntax_error" and report.error.truncated is truncated


def test_check_function_and_setup_on_the_judges_side(box):
    test = (
        "def check(candidate):\n    for i in range(20):\n        assert candidate(i) == helper(i)\n    assert 1\ncheck(double)\n"
    )
    good = Program("def double(x):\n    return 2 * x\n", (test,), "double", setup="def helper(x):\n    return x + x\n")
    report = box.run(good)
    assert report.status == "pass" and len(report.tests) == 20 and report.tests_expected is None
    forged = Program("def helper(x):\n    return 0\ndef double(x):\n    return 0\n", (test,), "double", setup=good.setup)
    assert [t.status for t in box.run(forged).tests].count("pass") == 1  # only i == 0


VALUES = [
    ("f(2) == 2 ** 20000", "return x ** 20000"),
    ("list(f(3)) == [0, 1, 2]", "yield from range(x)"),
    ("f(1) == {(1, 2): {3}, None: [1.5, float('inf')]}", "return {(1, 2): {3}, None: [1.5, float('inf')]}"),
    ("f('\\ud800') == '\\ud800'", "return x"),
    ("f(2)(3) == 5", "return lambda y: x + y"),
    ("f([1, 2]) == {1: 1, 2: 1}", "import collections; return collections.Counter(x)"),
    ("f(lambda y: y + 1) == [2, 3]", "return [x(1), x(2)]"),
    ("f(len) == 2", "return x('ab')"),
    ("f(1) is None", "pass"),
    ("f(3) == 3 and isinstance(f(3), int)", "import enum; return enum.IntEnum('E', 'a b c').c"),
    ("f(b'ab') == b'ba'", "return x[::-1]"),
    ("str(f(1)) == '0.1'", "import decimal; return decimal.Decimal('0.1')"),
]


@pytest.mark.parametrize(("test", "body"), VALUES)
def test_values_travel(box, test, body):
    report = box.run(Program(f"def f(x):\n    {body}\n", (f"assert {test}",)))
    assert report.status == "pass" and report.integrity == "value", report


def test_arguments_are_copied_back_only_where_the_test_reads_them(box):
    report = box.run(Program("def f(xs):\n    xs.sort()\n", ("xs = [3, 1, 2]\nf(xs)\nassert xs == [1, 2, 3]",)))
    assert report.status == "pass" and report.inout
    forged = "def f(xs):\n    xs.clear()\n    return []\n"
    assert box.run(Program(forged, ("xs = [2, 1]\nassert f(xs) == sorted(xs)",))).status == "fail"
    assert box.run(Program(forged, ("xs = [2, 1]\nr = f(xs)\nassert r == sorted(xs)",))).status == "fail"


def test_expected_exception(box):
    test = "try:\n    f(-1)\n    assert False, 'no error'\nexcept ValueError:\n    pass\nassert f(4) == 2"
    good = "def f(x):\n    if x < 0:\n        raise ValueError\n    return x // 2\n"
    assert box.run(Program(good, (test,))).status == "pass"
    assert box.run(Program("def f(x):\n    return 2\n", (test,))).status == "fail"


CLASS = "class P:\n    def __init__(self, x):\n        self.x = x\n    def get(self):\n        return self.x\n"


def test_classes_through_handles(box, lenient):
    own_eq = CLASS + "    def __eq__(self, other):\n        return True\n"
    assert box.run(Program(CLASS, ("p = P(3)\np.x += 1\nassert p.get() == 4",))).status == "pass"
    assert box.run(Program(own_eq, ("assert P(1) == P(2)",))).error.type == "IntegrityError"  # its own comparison decided
    report = lenient.run(Program(own_eq, ("assert P(1) == P(2)",)))
    assert (report.status, report.integrity, report.candidate_eq) == ("pass", "in_process", True)


@pytest.mark.parametrize("test", ["assert f.__doc__ == 'd'", "import inspect\nassert 'd' in inspect.getsource(f) or f(1)"])
def test_in_process_is_refused_where_value_is_asked_for(box, lenient, test):
    program = Program("def f(x):\n    'd'\n    return x\n", (test,))
    refused = box.run(program)
    assert (refused.status, refused.error.type, refused.tests) == ("infra_error", "IntegrityError", ())
    assert lenient.run(program).integrity == "in_process"


def test_a_judge_that_refuses_at_once_waits_for_the_candidates_walls(box):
    program = Program("def f(x):\n    return x\n#" + (32 << 20) * "x", ("import inspect\nassert inspect.isfunction(f) or f(1)",))
    found = [box.run(p).error.type for p in (program, dataclasses.replace(program, tests=("assert f(",)))]
    assert found == ["IntegrityError", "BrokenTests"]


def test_stdio(box):
    cases = tuple(json.dumps({"input": f"{i} {i}\n", "output": f"{2 * i}\n\n"}) for i in range(3))
    good = Program(
        "a, b = map(int, input().split())\nif __name__ == '__main__':\n    print(a + b)\n", cases, mode="stdio", visible=1
    )
    report = box.run(good)
    assert report.status == "pass" and [t.visible for t in report.tests] == [True, False, False]

    def statuses(code):
        return [t.status for t in box.run(Program(code, cases, mode="stdio")).tests]

    assert statuses("print(2)\n") == ["fail", "pass", "fail"]
    assert statuses("a = input()\nprint(2 * int(a[0]))\nprint()\nprint(7)\n") == ["fail"] * 3  # a line too many
    assert statuses("print(int(input()))\n") == ["runtime_error"] * 3
    assert statuses("print(\n") == ["syntax_error"] * 3
    assert statuses("while True: pass\n") == ["timeout"] * 3
    assert statuses("import os\nos._exit(0)\n") == ["fail"] * 3


def test_output_is_capped_and_marked(box):
    report = box.run(Program("def add(a, b):\n    print('x' * 1000)\n    return a + b\n", ADD))
    assert report.status == "pass" and report.stdout == ("x" * 1000 + "\n") * 3 and not report.truncated
    flood = box.run(Program("import os\ndef add(a, b):\n    for _ in range(99): os.write(1, b'\\xff' * 999)\n", ADD))
    assert len(flood.stdout) == 16 << 10 and flood.truncated and flood.error.type == "OSError"


def test_same_program_same_report(box):
    code = "import random\ndef add(a, b):\n    print({'a', 'b', None, 1.5}, hash(None), random.random())\n    return a + b\n"
    reports = []
    for _ in range(3):
        box.refresh()
        reports.append(box.run(Program(code, ADD)))
    assert len({(r.status, r.tests, r.stdout) for r in reports}) == 1 and reports[0].stdout


def test_order_is_kept_and_identical_programs_run_once(box, monkeypatch):
    started = []
    monkeypatch.setattr(Worker, "start", count_calls(started))
    programs = [Program(f"def add(a, b):\n    return {n}\n", ADD) for n in (3, 4, 3, 0, 4)]
    assert [[t.status for t in r.tests].index("pass") for r in box.run_many(programs)] == [0, 1, 0, 2, 1]
    assert len(started) == 3
    assert box.run_many([]) == []


def test_suspected_sleepers_start_last(box, monkeypatch):
    started = []
    monkeypatch.setattr(Worker, "start", count_calls(started))
    sleeper = Program("import time\ndef add(a, b):\n    time.sleep(0.01)\n    return a + b\n", ADD)
    assert [r.status for r in box.run_many([sleeper, GOOD, sleeper])] == ["pass"] * 3
    assert [task.program for task, *_ in started] == [GOOD, sleeper]


def count_calls(calls):
    original = Worker.start

    def start(self, *args):
        calls.append(args)
        return original(self, *args)

    return start


BROKEN = [("", ()), ("", ("x = 1",)), ("", ("assert 1 == 1",)), ("", ("assert add(1,",)), ("import nope", ADD), ("1 / 0", ADD)]


@pytest.mark.parametrize(("setup", "tests"), BROKEN)
def test_broken_tests_are_no_verdict(box, setup, tests):
    report = box.run(Program(GOOD.code, tests, "add", setup=setup))
    assert (report.status, report.error.type) == ("infra_error", "BrokenTests")


HOSTILE = [
    "import os\nos._exit(0)",
    "import os\nos.fork()",
    "open('/tmp/falcon_pwned_by_test', 'w')",
    "import os\nos.kill(1, 9)\nos.kill(os.getppid(), 9)",
    "while True: pass",
    "x = [0] * 10 ** 10",
    "import builtins\nbuiltins.len = builtins.bool = builtins.isinstance = lambda *a: True",
    "import falconlib",
    "import sys\nsys.setrecursionlimit(10 ** 9)\ndef d(): d()\nd()",
]


@pytest.mark.parametrize("setup", HOSTILE)
def test_hostile_tests_harm_nothing(box, setup):
    assert box.run(Program("def add(a, b):\n    return 0\n", ADD, setup=setup)).status != "pass"
    assert not os.path.exists("/tmp/falcon_pwned_by_test")
    assert box.run(GOOD).status == "pass"
    assert [t.status for t in box.run(Program("def add(a, b):\n    return 0\n", ADD)).tests] == ["fail", "fail", "pass"]


def test_a_value_that_stalls_the_judge_is_the_programs_fault(box):
    code = "def add(a, b):\n    return {i * (2 ** 61 - 1): 0 for i in range(1, 20000)}\n"
    assert box.run(Program(code, ("assert add(1, 2) == 3", "while add(1, 2): pass\nassert add(1, 2)"))).status == "timeout"


def test_killed_zygote_is_replaced_and_nothing_is_lost(box):
    programs = [
        Program(f"import time\ndef add(a, b):\n    time.sleep(0.1)\n    return a + b + {i} - {i}\n", ADD) for i in range(3)
    ]
    timer = threading.Timer(0.2, lambda: psutil.Process(box._workers[0].process.pid).kill())
    timer.start()
    assert [r.status for r in box.run_many(programs)] == ["pass"] * 3
    timer.join()
    assert box.run(GOOD).status == "pass" and box.idle()


def test_killed_supervisor_leaves_nothing():
    script = """
        from falconlib.config import SandboxConfig
        from falconlib.records import Program
        from falconlib.sandbox import Sandbox
        with Sandbox(SandboxConfig(workers=2, cpu_s=30.0)) as s:
            print("ready", flush=True)
            s.run_many([Program(f"while True: pass\\n#{i}", ("assert f(1)",)) for i in range(2)])
    """
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"ready\n"
        time.sleep(0.3)
        below = psutil.Process(process.pid).children(recursive=True)
        assert len(below) >= 4
        process.kill()
    _, alive = psutil.wait_procs(below, timeout=5)
    assert not alive


def test_an_interrupt_leaves_a_usable_sandbox():
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job starts with SIGINT ignored
    with contextlib.closing(Sandbox(SandboxConfig(workers=1, cpu_s=30.0))) as sandbox:
        threading.Timer(0.2, _thread.interrupt_main).start()
        with pytest.raises(KeyboardInterrupt):
            sandbox.run(Program("import time\ntime.sleep(29)\n", ADD))
        signal.signal(signal.SIGINT, previous)
        assert sandbox.run(GOOD).status == "pass"


def test_a_replacement_that_is_killed_while_it_starts_is_replaced_again(box, monkeypatch):
    original, seen = Worker.wait_ready, []

    def killed_once(self, timeout):
        seen.append(self)
        if len(seen) == 1:
            self.process.kill()
        return original(self, timeout)

    monkeypatch.setattr(Worker, "wait_ready", killed_once)
    box.refresh()
    assert box.run(GOOD).status == "pass" and len(seen) == 2


def test_a_timeout_of_the_hard_wall_alone_is_run_again(box, monkeypatch):
    original, seen = Worker.finish, []

    def starved(self):
        raw = original(self)
        raw["ended"].killed = None if seen else "hard"
        seen.append(raw)
        return raw

    monkeypatch.setattr(Worker, "finish", starved)
    assert box.run(GOOD).status == "pass" and len(seen) == 2


def test_what_kills_the_harness_each_time_is_no_verdict(box, monkeypatch):
    started = []
    monkeypatch.setattr(Worker, "start", count_calls(started))
    monkeypatch.setattr(Worker, "finish", lambda self: self.release())
    assert box.run(GOOD).status == "infra_error" and len(started) == 3


def test_a_forked_copy_does_not_end_the_processes(box):
    pid = os.fork()
    if pid == 0:
        box._closer()
        os._exit(0)
    os.waitpid(pid, 0)
    assert box.run(GOOD).status == "pass"


def test_close_ends_everything_and_is_final():
    sandbox = Sandbox(SandboxConfig(workers=1))
    below = psutil.Process(sandbox._workers[0].process.pid).children(recursive=True)
    sandbox.run(GOOD)
    sandbox.close()
    sandbox.close()
    assert not psutil.wait_procs(below, timeout=5)[1]
    with pytest.raises(FalconError, match="closed"):
        sandbox.run(GOOD)


def test_program_for():
    task = Task("t/1", "t", "test", "p", "f", ("assert f(1)",), visible=1, setup="import math")
    assert program_for(task, "c") == Program("c", ("assert f(1)",), "f", 1, "import math", "assert", None)
    gold = program_for(dataclasses.replace(task, gold="g"), "c")
    assert gold == Program("c", ("assert f(1)",), "f", 1, "import math", "assert", "g")


GARBAGE = [{}, {"t": "set"}, {"t": "set", "v": [[]]}, {"t": "int", "v": "zz"}, {"t": "type", "v": "nope"}, {"t": "ref", "v": 0},
           {"t": "range", "v": [1, 2, 0]}, {"t": [], "v": 1}, {"t": "dict", "v": [1]}, {"t": "date", "v": "x"}]  # fmt: skip


@pytest.mark.parametrize("data", GARBAGE)
def test_garbage_is_a_protocol_error(data):
    with pytest.raises(ProtocolError):
        decode([data])


def test_encoder_bounds():
    deep = []
    for _ in range(300):
        deep = [deep]
    cyclic = []
    cyclic.append(cyclic)
    for value in (deep, cyclic, "x" * (1 << 24), [[0] * 1000] * 100_000):
        with pytest.raises(Unsupported):
            Encoder()(value)
