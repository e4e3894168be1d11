"""Objects that stay with the program, functions of the tests that it calls, and what travels between the two."""

import pytest

from falconlib.config import SandboxConfig
from falconlib.records import Program
from falconlib.sandbox import Sandbox

FORGED = """
class V:
    def __init__(s, *a): pass
    def __sub__(s, o): return s
    def __abs__(s): return 0.0
    def __neg__(s): return s
    def __len__(s): return 0
    def __iter__(s): return iter([])
    def __getitem__(s, k): return s
    def __call__(s): return 0
    def __getattr__(s, n): return s
    __add__ = __rsub__ = __round__ = __isub__ = __sub__
Circle = Area = V
config = V()
"""
RIGHT = """
class P:
    limit = 7
    def __init__(self, x, y=0): self.x, self.y, self.level, self._peer, self.number = x, y, 77, 78, 79
    def __repr__(self): return f"P({self.x}, {self.y})"
    def __format__(self, spec): return f"{self.x:{spec}}"
    def __float__(self): return self.x / 1
    def __index__(self): return self.x
    def __mul__(self, k): return P(self.x * k)
    __rmul__ = __mul__
    def __sub__(self, o): return P(self.x - o.x)
    def __or__(self, o): return self.x | o.x
    def __pow__(self, k): return self.x**k
    def __neg__(self): return P(-self.x)
    def __iadd__(self, o):
        self.x += o.x
        return self
    def __delitem__(self, k): self.x = k
    def __enter__(self): return self
    def __exit__(self, *a): self.y = len(a)
class Down:
    def __init__(self, n): self.n = n
    def __iter__(self): return self
    def __next__(self):
        if self.n <= 0: raise StopIteration
        self.n -= 1
        return self.n + 1
PI, name, peer = 3.5, P(4), P(5)
"""


@pytest.fixture(scope="module")
def box():
    with Sandbox(SandboxConfig(workers=1)) as sandbox:
        yield sandbox


def ended(report):
    """How it ended, in a word."""
    return report.error.type if report.status == "infra_error" else report.status


CHAINS = ["abs(Circle(3).area - 28.27) < 1e-2", "abs(Area(3) - 28.27) < 1e-2", "abs(Circle(3)[0] - 28.27) < 1e-2",
          "not [*V() - 1]", "abs(config.rate - 0.5) < 1e-9", "len(Area(3) - {1, 2, 3}) == 0",
          "list(Circle(3).items_ - {1, 2, 3}) == []",
          "len(V(3) + 5) == 0", "abs((V(3) - 12.5).x) == 0", "(V(3) - 12.5)() == 0", "abs(12.5 - V(3)) == 0",
          "abs(round(V(3), 2)) == 0",
          "abs(V(1) - (V(3) - 12.5)) == 0", "abs(-(V(3) - 12.5)) == 0"]  # fmt: skip


@pytest.mark.parametrize("chain", CHAINS)
def test_what_was_made_of_a_value_of_the_test_stays_the_programs_word(box, chain):
    assert ended(box.run(Program(FORGED, (f"assert {chain}",)))) == "IntegrityError"


def test_an_object_that_took_in_a_value_stays_so_in_place(box):
    assert ended(box.run(Program(FORGED, ("v = V(3)\nv -= 12.5\nassert abs(v) == 0",)))) == "IntegrityError"


@pytest.mark.parametrize("name", ["_peer", "_number", "_named", "peer", "number", "level", "__dict__"])
def test_all_names_of_an_object_are_the_programs(box, name):
    wrong = Program("class P:\n    __slots__ = ()\n", (f"assert P().{name} in (0, 1, 2)",))
    assert ended(box.run(wrong)) in ("runtime_error", "IntegrityError")


USES = ["P(1)._peer == 78 and P(1).level == 77 and P(1).number == 79", "name.x == 4 and peer.x == 5 and P.limit == 7",
        "repr(P(1)) == str(P(1)) == 'P(1, 0)' and f'{P(1):>3}' == '  1'", "float(P(3)) == 3.0 and [5, 6][P(1)] == 6",
        "(P(1) | P(2)) == 3", "(P(5) - P(3)).x == 2 and (-P(5)).x == -5",
        "list(Down(3)) == [3, 2, 1] and [*zip(Down(2), 'ab')] == [(2, 'a'), (1, 'b')]",
        "10 * PI == 35.0 and PI - 1 == 2.5 and 1 - PI == -2.5 and round(PI) == 4 and isinstance(PI, float) and repr(PI) == '3.5'",
        ]  # fmt: skip
LINES = ["c = Down(2)\nassert [next(c), next(c), next(c, 0)] == [2, 1, 0]", "p = P(1)\ndel p[6]\nassert p.x == 6",
         "import copy\np = P(1)\nq = copy.copy(p)\nr = copy.deepcopy(p)\np.x = 3\nassert (q.x, r.x) == (1, 1)",
         "with P(1) as p:\n    assert p.x == 1\nassert p.y == 3", "p = q = P(1)\np += P(2)\nassert q.x == 3",
         "p = P(1)\ndel p.x\nassert not hasattr(p, 'x')"]  # fmt: skip


@pytest.mark.parametrize("test", [*(f"assert {use}" for use in USES), *LINES])
def test_ordinary_use_of_objects(box, test):
    report = box.run(Program(RIGHT, (test,)))
    assert report.status == "pass" and report.integrity == "value", report


@pytest.mark.parametrize("use", ["(2 * P(1)).x == 2", "P(3) ** 2 == 9"])
def test_operators_with_values_are_refused(box, use):
    assert ended(box.run(Program(RIGHT, (f"assert {use}",)))) == "IntegrityError"


CALLS = """
def memoize(f):
    seen = {}
    def g(n):
        if n not in seen: seen[n] = f(n)
        return seen[n]
    return g
def apply(f, x): return f(x)
def safe(f):
    try: return f()
    except Exception as error: return str(error)
"""
NESTED = ["fib = memoize(lambda n: n if n < 2 else fib(n - 1) + fib(n - 2))\nassert fib(20) == 6765",
          "assert apply(lambda x: apply(lambda y: y + 1, x), 3) == 4",
          "def inner(x):\n    apply(len, [])\n    return memoize\nassert apply(inner, 3)(lambda n: n)(5) == 5",
          "assert 'KeyError' in safe(lambda: {}['a'])"]  # fmt: skip


@pytest.mark.parametrize("test", NESTED)
def test_functions_of_the_tests_may_ask_the_program(box, test):
    report = box.run(Program(CALLS, (test,)))
    assert report.status == "pass", report


def test_questions_inside_a_function_of_the_tests_count_for_nothing(box):
    test = "for x in range(apply(lambda n: apply(lambda m: m, n), 3)):\n    assert apply(str, x) == str(x)"
    twice = CALLS.replace("return f(x)", "return f(x) and f(x) or f(x)")
    report = box.run(Program(twice, (test,), "apply", gold=CALLS))
    assert report.status == "pass" and report.tests_expected == 3, report


SETUP = """
import collections, enum, io, re
class Node:
    v = 1
class Color(enum.Enum):
    red = 1
Pair = collections.namedtuple("Pair", "x y")
"""
LOST = [
    "Node()",
    "[Node()]",
    "{'a': Color.red}",
    "Color.red",
    "Pair(1, 2)",
    "io.StringIO('a')",
    "re.compile('a')",
    "slice(1)",
    "...",
]


@pytest.mark.parametrize("value", LOST)
def test_arguments_that_do_not_travel_are_not_the_programs_fault(box, value):
    for test in (
        f"assert f({value}) == 0",
        f"try:\n    ok = f(lambda: {value}) == 0\nexcept Exception:\n    ok = True\nassert ok",
    ):
        report = box.run(Program("def f(x):\n    return x() and 0 if callable(x) else 0\n", (test,), "f", setup=SETUP))
        assert ended(report) == "IntegrityError" and "as an argument" in report.error.message, report


VALUES = """
import collections, itertools
def gen(n): yield from range(n)
def endless():
    yield from itertools.count()
def count(s): return collections.Counter(s)
def group(s, kind=int):
    d = collections.defaultdict(kind)
    for c in s: d[c] += 1
    return d
def order(s): return collections.OrderedDict.fromkeys(s)
def take(xs, n): return [next(xs) for _ in range(n)]
def kind(x): return type(x).__name__
"""
TRAVELS = ["sum(gen(20000)) == sum(range(20000))",
           "[len(list(gen(n))) for n in (999, 1000, 1001, 2000)] == [999, 1000, 1001, 2000]",
           "next(endless()) == 0", "take(iter(range(5000)), 5000)[-1] == 4999", "take(gen(2500), 2500)[-1] == 2499",
           "take(itertools.count(), 1500)[-1] == 1499", "count('aab')['z'] == 0 and count('aab').most_common(1) == [('a', 2)]",
           "count('aab') == {'a': 2, 'b': 1}", "group('aab')['z'] == 0 and group('aab') == {'a': 2, 'b': 1}",
           "group('', None) == {} and group('', lambda: 0) == {}",
           "order('ab') == {'b': None, 'a': None} and order('ab') != order('ba')",
           "kind(collections.Counter()) == 'Counter' and kind(collections.OrderedDict()) == 'OrderedDict'"]  # fmt: skip


@pytest.mark.parametrize("test", TRAVELS)
def test_iterators_and_kinds_of_dict_travel_whole(box, test):
    report = box.run(Program(VALUES, (f"assert {test}",)))
    assert report.status == "pass", report


def test_how_a_program_iterates_changes_no_count(box):
    test = "for x in down(2500):\n    assert x > 0\nassert down(1) != 0"
    lazy, whole = "def down(n):\n    while n:\n        yield n\n        n -= 1\n", "def down(n): return [*range(n, 0, -1)]\n"
    report = box.run(Program(whole, (test,), "down", gold=lazy))
    assert report.status == "pass" and report.tests_expected == 2501, report


STALLS = """
import sys, time
frame = sys._getframe()
while "serve" not in frame.f_globals: frame = frame.f_back
space = frame.f_globals
space["send"] = lambda fd, message, send=space["send"]: (send(fd, message), time.sleep(60))
def f(xs): return 1
"""


@pytest.mark.parametrize("size", [1, 1_000_000])
def test_a_program_that_reads_no_argument_is_late_itself(size):
    with Sandbox(SandboxConfig(workers=1, cpu_s=0.5)) as sandbox:
        report = sandbox.run(Program(STALLS, (f"xs = [7] * {size}\nassert f(xs) == 2",)))
    assert report.status == "timeout", report


def test_an_endless_answer_that_is_taken_whole_is_the_programs_fault():
    with Sandbox(SandboxConfig(workers=1, cpu_s=0.2)) as sandbox:
        report = sandbox.run(Program(VALUES, ("assert list(endless())[:2] == [0, 1]",)))
    assert report.status in ("timeout", "memory"), report
