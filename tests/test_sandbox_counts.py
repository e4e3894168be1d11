"""Which asserts have to run, how often and after which question; what the gold decides; what `type` is in tests."""

import json
import logging

import pytest

from falconlib.config import SandboxConfig
from falconlib.records import Program
from falconlib.sandbox import Sandbox

SAME = "def f(x):\n    return x\n"
RANGE = "def f(n):\n    return list(range(n))\n"
SHORT = "def f(n):\n    return [0] * 10 if n == 1 else []\n"
LOOP = "for x in f(5):\n    assert x >= 0\n"
HANDS_OUT = "class A: pass\ndef f(x):\n    return A()\n"
RAISES = "try:\n    f(-1)\n    assert False\nexcept ValueError:\n    pass\n"
REFUSES = "def f(x):\n    if x < 0:\n        raise ValueError('x')\n    return x\n"


@pytest.fixture(scope="module")
def box():
    with Sandbox(SandboxConfig(workers=1, cpu_s=1.0)) as sandbox:
        yield sandbox


def statuses(report):
    return [t.status for t in report.tests]


EACH = "def each(a, ok):\n    for x in a:\n        assert x in ok\neach(f(1), [0])\neach(f(9), list(range(9)))\n"
CASES = "for n, want in ((1, [0]), (3, [0, 1, 2]), (6, [0, 1, 2, 3, 4, 5])):\n    for x in f(n):\n        assert x in want\n"


@pytest.mark.parametrize("test", [EACH, CASES])
def test_a_long_answer_to_an_easy_question_makes_up_for_no_short_one(box, test):
    report = box.run(Program(SHORT, (test,), gold=RANGE))
    assert report.status == "fail" and statuses(report).count("pass") == 1, report
    assert len(report.tests) == report.tests_expected == 10
    assert box.run(Program(RANGE + "# the same\n", (test,), gold=RANGE)).status == "pass"


def test_questions_inside_an_assert_do_not_move_the_others(box):
    """A wrong answer ends `and` early: the asserts after it are still the gold's."""
    test = "for n in range(4):\n    assert f(n) == n and f(n + 9) == n + 9\n"
    report = box.run(Program("def f(x):\n    return x + (x == 1)\n", (test,), gold=SAME))
    assert (statuses(report), report.tests_expected) == (["pass", "fail", "pass", "pass"], 4)


CHECK = "def check(c):\n    assert c(2) == 2\n    if c(1) == 1:\n        return\n    assert c(3) == 4\ncheck(f)"
LEAVES = [
    CHECK,
    CHECK.replace("    if c(1) == 1:\n        return", "    return"),
    CHECK.replace("if c(1) == 1", "with open('/dev/null')"),
]


@pytest.mark.parametrize("test", LEAVES)
@pytest.mark.parametrize("gold", [SAME, None])
def test_asserts_after_a_return_need_not_run(box, test, gold):
    assert box.run(Program(SAME, (test,), gold=gold)).status == "pass"


def test_asserts_after_a_function_have_to_run(box):
    report = box.run(Program(SAME, ("def same(a, b):\n    return a == b\nassert same(f(1), 1)\nassert f(2) == 2",)))
    assert (report.status, report.tests_expected) == ("pass", 2)


@pytest.mark.parametrize("code", [REFUSES, SAME, "def f(x):\n    raise KeyError(x)\n"])
@pytest.mark.parametrize(
    "test", [RAISES, RAISES.replace("    assert False\n", "").replace("pass", "pass\nelse:\n    assert False")]
)
@pytest.mark.parametrize("gold", [REFUSES, None])
def test_an_exception_that_a_test_awaits_is_a_test(box, code, test, gold):
    report = box.run(Program(code, (test, "assert f(3) == 3"), gold=gold))
    wanted = {REFUSES: ["pass", "pass"], SAME: ["fail", "pass"]}.get(code, ["runtime_error", "runtime_error"])
    assert (statuses(report), report.tests_expected) == (wanted, 2)
    assert statuses(box.run(Program(code, (test,), gold=gold))) == wanted[:1]


def test_a_try_without_the_program_is_no_test(box):
    report = box.run(Program(SAME, ("assert f(1) == 2", RAISES.replace("f(-1)", "int('x')"), LOOP.replace("f(5)", "[]"))))
    assert statuses(report) == ["fail"]


def test_an_assert_false_that_an_answer_leads_past_is_no_pass(box):
    test = "for x in f(3):\n    if x != 3:\n        assert False\n"
    assert box.run(Program("def f(x):\n    return []\n", (test,))).status != "pass"


def test_asserts_without_the_program_earn_nothing(box):
    tests = ("assert f(1) == 1", "assert len('ab') == 2", "assert sorted([2, 1]) == [1, 2]", "assert math.floor(2.5) == 2")
    report = box.run(Program("def f(x):\n    return 0\n", tests))
    assert (statuses(report), report.tests_expected) == (["fail"], 1)
    report = box.run(Program("def sorted(x):\n    return x\n", ("assert sorted([2, 1]) == [1, 2]", "assert sorted([1]) == [1]")))
    assert (statuses(report), report.tests_expected) == (["fail", "pass"], 2)  # here it is the program's
    report = box.run(Program(SAME, ("def len(x):\n    return f(x)\nassert len('ab') == 2",)))
    assert (statuses(report), report.tests_expected) == (["fail"], 1)  # and here the test's own


OTHER_SPELLINGS = [
    "t = type\nassert t(f(0)) == t(f(1))",
    "assert [k(f(0)) for k in (type,)] == [k(f(1)) for k in (type,)]",
    "assert len(set(map(lambda *a: type(*a), [f(0), f(1)]))) == 1",
    "def same(a, b, type=type):\n    return type(a) == type(b)\nassert same(f(0), f(1))",
    "assert list(map(type, [f(0)])) == list(map(type, [f(1)]))",
]


@pytest.mark.parametrize("test", OTHER_SPELLINGS)
def test_an_object_has_no_class_however_one_asks(box, test):
    assert box.run(Program(HANDS_OUT, (test,))).status == "runtime_error"


def test_type_is_a_class_where_it_is_used_as_one(box):
    tests = (
        "assert type(f(3)) == int and type(f(int)) == type and type(f('a')) in (type, str)",
        "assert isinstance(f(int), type) and not isinstance(f(3), (type, str)) and type.__name__ == 'type'",
    )
    assert box.run(Program(SAME, tests)).status == "pass"
    assert box.run(Program("def type(x):\n    return 3\n", ("assert type('a') == 3",))).status == "pass"
    other = "def g(type):\n    return type\nassert f(1) == g(1)"
    assert box.run(Program(SAME, (other,))).status == "pass"
    assert box.run(Program(SAME, (other, tests[1]))).error.message.endswith("binds `type` and compares with it")


def test_the_slowest_run_of_the_gold_sets_the_limit_of_each(box, monkeypatch):
    case = [json.dumps({"input": str(n), "output": str(n)}) for n in range(8)]
    burn = "import time\nn = input()\nend = time.process_time() + {}\nwhile time.process_time() < end:\n    pass\nprint(n)\n"
    limits = []
    start = box._start
    monkeypatch.setattr(box, "_start", lambda number, task: limits.append(task.limits.cpu_s) or start(number, task))
    slow = Program(burn.format("2.5 * (n == '3')"), tuple(case), mode="stdio", gold=burn.format(0.15))
    assert box.run(slow).status == "timeout"  # the gold takes 1.2 s in all
    assert set(limits) == {1.0, 5.0}  # of its own run, and of the gold's


def test_a_gold_that_sleeps_gets_the_time_it_takes(box):
    gold = "import time\ndef f(x):\n    time.sleep(1.7)\n    return x\n"
    assert box.run(Program(gold, ("assert f(1) == 1",), gold=gold)).status == "pass"


def test_a_gold_that_prints_much_still_counts(box):
    gold = "print('x' * 300_000)\n" + RANGE
    assert box.run(Program("def f(n):\n    return [1]\n", (LOOP,), gold=gold)).status == "fail"


def test_a_lost_gold_is_told_and_its_verdict_not_kept(tmp_path, monkeypatch, caplog):
    program = Program("def f(n):\n    return [1]\n", (LOOP,), gold=RANGE)
    config = SandboxConfig(workers=1, cache=str(tmp_path / "verdicts.sqlite"))
    with Sandbox(config) as sandbox, monkeypatch.context() as patch, caplog.at_level(logging.WARNING, "falconlib"):
        settle = sandbox._settle
        lost = lambda tasks, results, bar: settle([], results, bar) | {t.program: sandbox.run(Program("", ())) for t in tasks}  # noqa: E731
        patch.setattr(sandbox, "_settle", lambda tasks, results, bar: (lost if type(tasks) is list and tasks and not
                      tasks[0].program.gold else settle)(tasks, results, bar))  # fmt: skip
        assert sandbox.run(program).tests_expected is None
        assert "does not pass its tests (infra_error" in caplog.text
        patch.undo()
        assert sandbox.run(program).status == "fail"  # asked again
    with Sandbox(config) as sandbox:
        assert sandbox.run(program).tests_expected == 5


EQUAL = "class P:\n    def __init__(self, *a): pass\n    def __eq__(self, other): return True\n    x = 0\n"


def test_a_wrong_program_cannot_choose_to_have_no_verdict(box):
    first, own, wrong = "assert P(1).x == 0", "p = P(1)\nassert p == P(1)", "assert P(3).x == 3"
    report = box.run(Program(EQUAL, (first, own, wrong)))
    assert (report.status, statuses(report), report.integrity) == ("fail", ["pass", "fail", "fail"], "value")
    assert "own comparison" in report.tests[1].message
    report = box.run(Program(EQUAL, (first, own)))
    assert (report.status, report.error.type) == ("infra_error", "IntegrityError")


def test_a_script_may_open_its_standard_streams_by_name(box):
    code = "print(open('/dev/stdin').read().strip())\nopen('/dev/stderr', 'a').write('e')\nopen('/dev/stdout').close()\n"
    report = box.run(Program(code, (json.dumps({"input": "a\n", "output": "a\n"}),), mode="stdio"))
    assert (report.status, report.stderr) == ("pass", "e"), report
