"""Test source -> code that records each assert and goes on. Runs in the judge; standard library only.

Every `assert` becomes `with __site__(n) as _falcon_t: _falcon_t.compare(a, "Eq", b)`; the context manager records the
outcome. Names that neither the tests nor Python define are the candidate's.
"""

import ast
import builtins
import sys
from collections import defaultdict
from dataclasses import dataclass, field

_FUNCTION_PARTS = {"__code__", "__doc__", "__annotations__", "__closure__", "__dict__", "__wrapped__", "__defaults__"}
_INTROSPECT = {"inspect", "dis", "globals", "locals", "vars", "exec", "eval", "__import__", "callable"}
_PURE = "math random re itertools collections heapq bisect statistics"  # copy, functools, string set or read any attribute
_FRAMES = ("_", "f_", "gi_", "cr_", "ag_", "tb_")  # attributes that lead to the interpreter's own objects
_MILD = """
abs all any bin bool bytes chr complex dict divmod enumerate filter float frozenset hash hex int isinstance iter len list map max
min next object oct ord pow print range repr reversed round set slice sorted str sum tuple type zip True False None Exception
ValueError TypeError KeyError IndexError ZeroDivisionError AssertionError
"""
_SAFE_MODULES, _SAFE_BUILTINS = set(_PURE.split()), set(_MILD.split())
_PYTHON, _LOAD = set(vars(builtins)), ast.Load()
_BUILTIN = (str, bytes, bytearray, list, tuple, dict, set, frozenset, int, float, complex, range)
COMMON = {name for kind in _BUILTIN for name in dir(kind)}
_HARMFUL = (
    ast.ClassDef,
    ast.Global,
    ast.Nonlocal,
    ast.With,
    ast.Delete,
    ast.AsyncFunctionDef,
    ast.Await,
    ast.Yield,
    ast.YieldFrom,
)
_LEAVES = (ast.Return, ast.Raise, ast.Break, ast.Continue)  # what follows them may not run
_DYNAMIC = (ast.If, ast.For, ast.While, ast.AsyncFor, ast.Try, ast.ClassDef, ast.Match)


@dataclass
class Site:
    """One assert in the source. constant: nothing of the program is in it, so it is no test. straight: it runs exactly once.
    barred: an `assert False` in a try that is not to be reached."""

    number: int
    snippet: int
    constant: bool
    straight: bool
    barred: bool


@dataclass
class Plan:
    """What the judge runs. code: compiled setup and snippets. names: the candidate's names. handles: those whose results may
    stay with the candidate as handles. own: names of Python that the tests use. in_process: why the tests cannot be
    proxied ("" when they can). harmless: running them leaves no trace in the process."""

    setup: object = None
    snippets: list = field(default_factory=list)
    sites: list = field(default_factory=list)
    names: set = field(default_factory=set)
    modules: set = field(default_factory=set)
    handles: set = field(default_factory=set)
    own: set = field(default_factory=set)
    in_process: str = ""
    harmless: bool = False

    @property
    def dynamic(self):
        """Whether a loop or a branch decides how many assertions run."""
        return not all(s.straight or s.constant for s in self.sites) or all(s.constant for s in self.sites)


def plan(setup, tests, entry):
    """The Plan of a program's tests. Raises SyntaxError or ValueError when they are not Python."""
    trees = [ast.parse(text, f"<test {i}>") for i, text in enumerate(tests)]
    before = ast.parse(setup, "<setup>")
    result = Plan()
    nodes = [node for tree in (before, *trees) for node in ast.walk(tree)]
    _resolve(result, nodes, entry)
    _find_handles(result, nodes, {entry} if entry else result.names)
    result.harmless = all(map(_is_harmless, nodes)) and not result.modules - _SAFE_MODULES and _only_as_bases(nodes)
    for i, tree in enumerate(trees):
        _Rewriter(result, i).module(tree)
        result.snippets.append(compile(tree, f"<test {i}>", "exec", dont_inherit=True))
    result.setup = compile(before, "<setup>", "exec", dont_inherit=True)
    return result


def _resolve(result, nodes, entry):
    loads, bound, called, based = set(), set(), set(), set()
    for node in nodes:
        if isinstance(node, ast.Name):
            (loads if isinstance(node.ctx, ast.Load) else bound).add(node.id)
        elif isinstance(node, ast.alias):
            bound.add((node.asname or node.name).split(".")[0])
        elif not isinstance(node, ast.keyword):  # functions, classes, arguments, exceptions, patterns
            bound.add(getattr(node, "name", None) or getattr(node, "arg", None))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            based.add(node.value.id)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            called.add(node.func.id)
    free = loads - bound - _PYTHON
    result.modules = {n for n in free if n in based and n not in called and n in sys.stdlib_module_names and n != entry}
    result.names = free - result.modules
    if entry:
        result.names.add(entry)
    elif not result.names:  # a program named like a builtin, as in `assert sum(10, 15) == 6`
        result.names = (called & _PYTHON) - bound
    names = result.names
    result.own = loads - bound - names - _INTROSPECT
    typed = "type" in loads - names
    for node in nodes:
        why = ""
        for name in _classes(node) if typed else ():  # where it is a class and not called, it is the true one
            if isinstance(name, ast.Name) and name.id == "type":
                name.id = "__type__"
                why = "binds `type` and compares with it" if "type" in bound else ""
        if isinstance(node, ast.Attribute) and node.attr in _FUNCTION_PARTS:
            why = f"reads {node.attr}"
        elif isinstance(node, ast.Name) and node.id in _INTROSPECT and node.id not in bound - {"inspect", "dis"}:
            why = f"uses {node.id}"
        elif isinstance(node, ast.ClassDef) and names & {b.id for b in node.bases if isinstance(b, ast.Name)}:
            why = "derives a class from the program's"
        elif isinstance(node, ast.ExceptHandler) and node.type is not None and names & _names(node.type):
            why = "catches the program's exception class"
        elif isinstance(node, ast.Call):
            called = getattr(node.func, "id", "")
            if called in ("isinstance", "issubclass") and names & _names(*node.args[1:]):
                why = "asks for the program's class"
            elif called in ("hasattr", "getattr") and _special(*node.args[1:2]):
                why = "asks for a special method"
        result.in_process = result.in_process or why


def _classes(node):
    """The parts of a node that are compared, derived from, or asked for an attribute."""
    parts = [node.value] if isinstance(node, ast.Attribute) else getattr(node, "bases", [])
    if isinstance(node, ast.Compare):
        parts = [node.left, *node.comparators]
    elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("isinstance", "issubclass"):
        parts = node.args[1:]
    return [*parts, *(e for part in parts if isinstance(part, ast.Tuple) for e in part.elts)]


def _special(name=None):
    return not isinstance(name, ast.Constant) or str(name.value).startswith("__")


def _only_as_bases(nodes):
    """Whether modules are named only as in `math.sqrt`: what else holds one reaches all that it imports."""
    named = sum(isinstance(n, ast.Name) and n.id in _SAFE_MODULES for n in nodes)
    bases = [n.value for n in nodes if isinstance(n, ast.Attribute)]
    return named == sum(isinstance(n, ast.Name) and n.id in _SAFE_MODULES for n in bases)


def _names(*nodes):
    return {n.id for node in nodes for n in ast.walk(node) if isinstance(n, ast.Name)}


def _find_handles(result, nodes, entries):
    """Handles are allowed for names whose results the tests call, hand back to the program, or read an attribute of that no
    builtin type has; and for classes (a capital letter), unless the tests only compare what they return with values."""
    names, held, judged = result.names | {"candidate"}, defaultdict(set), set()
    capitals = {n for n in names if n[:1].isupper()}

    def sources(node):
        """The program's names whose results `node` may hold."""
        inside = list(ast.walk(node))
        found = {n.func.id for n in inside if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)} & names
        return found.union(*(held[n.id] for n in inside if isinstance(n, ast.Name) and n.id in held))

    for node in nodes:
        value = getattr(node, "iter", None) or getattr(node, "value", None)
        if isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.NamedExpr, ast.For, ast.comprehension)) and value:
            for name in _names(*getattr(node, "targets", ()), *filter(None, [getattr(node, "target", None)])):
                held[name] |= sources(value)
    for node in nodes:
        if isinstance(node, ast.Attribute):
            found = sources(node.value) | (_names(node.value) & names if isinstance(node.value, ast.Name) else set())
            result.handles |= found if node.attr not in COMMON else found & capitals
        elif isinstance(node, ast.Call):
            own = isinstance(node.func, ast.Name) and node.func.id in names
            base = set() if own else sources(node.func)
            result.handles |= set() if isinstance(node.func, ast.Attribute) else base
            if own or base:
                result.handles |= set().union(*map(sources, node.args)) - (_names(node.func) if own else set())
    classes = [n for n in nodes if isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and n.func.id in capitals]
    for node in nodes if classes else ():
        parts = [node.left, *node.comparators] if isinstance(node, ast.Compare) else [getattr(node, "test", None)]
        parts = [p for p in parts if p is not None]
        if sum(bool(sources(p)) for p in parts) == 1:
            judged |= set(map(id, parts))
    result.handles |= {n.func.id for n in classes if id(n) not in judged}
    if "candidate" in result.handles:
        result.handles |= entries


def _is_harmless(node):
    """Whether this node can leave nothing behind in the process that runs it: no imports but of pure modules, no attribute
    set, no private name, no builtin that reaches into the interpreter. A judge that ran only such tests may serve again."""
    if isinstance(node, ast.Name):
        return node.id in _SAFE_BUILTINS or node.id == "__type__" or not (hasattr(builtins, node.id) or node.id.startswith("__"))
    if isinstance(node, ast.Attribute):
        pure = sys.modules.get(node.value.id) if isinstance(node.value, ast.Name) and node.value.id in _SAFE_MODULES else None
        public = pure is None or node.attr in getattr(pure, "__all__", vars(pure))
        return isinstance(node.ctx, ast.Load) and not node.attr.startswith(_FRAMES) and public
    if isinstance(node, ast.Import):
        return all(a.name in _SAFE_MODULES and a.asname is None for a in node.names)
    if isinstance(node, ast.ImportFrom):
        return node.module == "typing" and all(a.name[0].isupper() for a in node.names)
    return not isinstance(node, _HARMFUL) and not getattr(node, "decorator_list", None)


class _Rewriter:
    """Numbers and rewrites the asserts of one snippet; marks bare calls `f(xs)` whose argument is read again later."""

    def __init__(self, result, snippet):
        self.plan, self.snippet = result, snippet

    def module(self, tree):
        for body in [tree.body, *(n.body for n in tree.body if isinstance(n, ast.FunctionDef))]:
            self.mark_inout(body)
        self.block(tree.body, True)

    def block(self, body, straight, expects=False):
        for i, node in enumerate(body):
            if isinstance(node, ast.Assert):
                body[i] = self.rewrite(node, straight, expects)
                continue
            defines = isinstance(node, ast.FunctionDef)
            inner = straight and not isinstance(node, _DYNAMIC) and (not defines or node.name == "check")
            tries = straight and isinstance(node, ast.Try) and node.handlers and _names(*node.body) - self.plan.own
            for part in (node, *getattr(node, "handlers", ()), *getattr(node, "cases", ())):
                for name in ("body", "orelse", "finalbody"):
                    if isinstance(statements := getattr(part, name, None), list):
                        self.block(statements, inner, tries and part is node and name != "finalbody")
            straight = straight and (defines or not any(isinstance(n, _LEAVES) for n in ast.walk(node)))

    def rewrite(self, node, straight, expects):
        place = {"lineno": node.lineno, "col_offset": 0, "end_lineno": node.lineno, "end_col_offset": 0}
        barred = bool(expects) and isinstance(node.test, ast.Constant) and not node.test.value
        constant = not barred and all(n.id in self.plan.own for n in ast.walk(node.test) if isinstance(n, ast.Name))
        number, test = len(self.plan.sites), node.test
        self.plan.sites.append(Site(number, self.snippet, constant, straight or barred, barred))

        def call(method, *args):
            return ast.Call(ast.Attribute(ast.Name("_falcon_t", _LOAD, **place), method, _LOAD, **place), list(args), [], **place)

        if isinstance(test, ast.Compare) and len(test.ops) == 1:
            body = call("compare", test.left, ast.Constant(type(test.ops[0]).__name__, **place), test.comparators[0])
        else:
            body = call("truth", test)
        if node.msg is not None:
            body = ast.BoolOp(ast.Or(), [body, call("explain", node.msg)], **place)
        enter = ast.Call(ast.Name("__site__", _LOAD, **place), [ast.Constant(number, **place)], [], **place)
        return ast.With([ast.withitem(enter, ast.Name("_falcon_t", ast.Store(), **place))], [ast.Expr(body, **place)], **place)

    def mark_inout(self, body):
        """`f(xs)` as a statement, `xs` read by a later assert: the argument is copied back. Never inside an assert, where a
        program could change the expected value."""
        for i, node in enumerate(body):
            call = node.value if isinstance(node, (ast.Expr, ast.Assign)) else None
            if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
                continue
            targets = {t.id for t in getattr(node, "targets", []) if isinstance(t, ast.Name)}
            later = [_names(n) for n in body[i + 1 :] if isinstance(n, ast.Assert)]
            again = [k for k, a in enumerate(call.args) if isinstance(a, ast.Name) and any(a.id in n for n in later)]
            again = [k for k in again if not any({call.args[k].id} | targets <= n for n in later if targets)]
            if again and call.func.id in self.plan.names | {"candidate"}:
                place = {"lineno": node.lineno, "col_offset": 0}
                args = [call.func, *(ast.Constant(k, **place) for k in again)]
                call.func = ast.Call(ast.Name("__inout__", _LOAD, **place), args, [], **place)
