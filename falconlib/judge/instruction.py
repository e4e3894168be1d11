"""Instruction following, read from the syntax tree: is the asked-for function there, callable, and nothing but code?

Returns faults with weights; falconlib/judge/static.py turns their sum into a score. Nothing is run.
"""

from __future__ import annotations

import ast
import inspect
import json
import warnings
from functools import lru_cache

from falconlib.records import Task

MISSING = 3  # weight that brings the score to its lowest grade whatever else is right
OUTPUT = ("print", "write", "writelines")
INPUT = ("input", "stdin", "read", "readline", "readlines")

Call = tuple[int, tuple[str, ...]]  # number of positional arguments, names of the others


def faults(task: Task, tree: ast.Module) -> list[tuple[str, int]]:
    """What the program does not do as asked: (text, weight) pairs, none for a program that follows the instructions."""
    return stdio_faults(task, tree) if task.mode == "stdio" else function_faults(task, tree)


def function_faults(task: Task, tree: ast.Module) -> list[tuple[str, int]]:
    """For tasks that ask for a function: name 3, number of parameters 2, no result 1, chatter at import 1, docstring 1."""
    found = [("prints, reads or asserts outside functions", 1)] if chatter(tree) else []
    if task.entry_point is None:
        return found
    defined = definition(tree, task.entry_point)
    if defined is None:
        return [(f"{task.entry_point} is not defined", MISSING), *found]
    if not isinstance(defined, ast.FunctionDef | ast.AsyncFunctionDef):
        return found  # a class, an alias, an import: its signature is not in this text
    if not all(accepts(defined.args, call) for call in demanded_calls(task)):
        found.append((f"{task.entry_point} does not take the arguments of the task", 2))
    if not gives_result(defined) and gold_gives_result(task):
        found.append((f"{task.entry_point} returns nothing", 1))
    if "docstring" in task.prompt.lower() and ast.get_docstring(defined) is None:
        found.append(("the docstring is missing", 1))
    return found


def stdio_faults(task: Task, tree: ast.Module) -> list[tuple[str, int]]:
    """For tasks that ask for a program: reads nothing 2 (when there is input), prints nothing 3, prompts its user 1."""
    names = {name for node in ast.walk(tree) if (name := getattr(node, "id", None) or getattr(node, "attr", None))}
    found = []
    if any(json.loads(test)["input"].strip() for test in task.tests) and not names & set(INPUT):
        found.append(("standard input is never read", 2))
    if not names & set(OUTPUT):
        found.append(("nothing is printed", MISSING))
    if any(called(node) == "input" and node.args for node in ast.walk(tree) if isinstance(node, ast.Call)):
        found.append(("input() prints a prompt into the output", 1))
    return found


def chatter(tree: ast.Module) -> bool:
    """Whether the module's own statements print, read input or assert: test code and demonstrations nobody asked for."""
    skip = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda
    stack: list[ast.AST] = list(tree.body)
    while stack:
        node = stack.pop()
        if isinstance(node, ast.Assert) or (isinstance(node, ast.Call) and called(node) in ("print", "input", "write")):
            return True
        if not isinstance(node, skip):
            stack.extend(ast.iter_child_nodes(node))
    return False


def called(call: ast.Call) -> str | None:
    """The last name of what is called: `print` of print(...), `write` of sys.stdout.write(...)."""
    return getattr(call.func, "id", None) or getattr(call.func, "attr", None)


def definition(tree: ast.Module, name: str) -> ast.AST | None:
    """What binds `name` last, outside functions and classes: a function, a class, an import, a variable; None after `del`."""
    bound: ast.AST | None = None
    todo: list[ast.AST] = [tree]
    while todo:
        node, own = todo.pop(), None
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            own = node.name
        elif isinstance(node, ast.alias):
            own = node.asname or node.name
        elif isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            own = node.id
        elif not (isinstance(node, ast.AnnAssign) and node.value is None):  # `add: int` binds nothing
            todo += reversed(list(ast.iter_child_nodes(node)))
        if own == name:
            bound = None if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Del) else node
    return bound


def gives_result(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether a `return value` or a `yield` belongs to the function itself."""
    stack: list[ast.AST] = list(function.body)
    while stack:
        node = stack.pop()
        if isinstance(node, ast.Yield | ast.YieldFrom) or (isinstance(node, ast.Return) and node.value is not None):
            return True
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda):
            stack.extend(ast.iter_child_nodes(node))
    return False


def accepts(arguments: ast.arguments, call: Call) -> bool:
    """Whether a function with these parameters can be called so."""
    kind, parameters = inspect.Parameter, []
    positional = [*arguments.posonlyargs, *arguments.args]
    required = len(positional) - len(arguments.defaults)
    for i, argument in enumerate(positional):
        place = kind.POSITIONAL_ONLY if i < len(arguments.posonlyargs) else kind.POSITIONAL_OR_KEYWORD
        parameters.append(kind(argument.arg, place, default=kind.empty if i < required else None))
    if arguments.vararg:
        parameters.append(kind(arguments.vararg.arg, kind.VAR_POSITIONAL))
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        parameters.append(kind(argument.arg, kind.KEYWORD_ONLY, default=kind.empty if default is None else None))
    if arguments.kwarg:
        parameters.append(kind(arguments.kwarg.arg, kind.VAR_KEYWORD))
    try:
        inspect.Signature(parameters).bind(*[None] * call[0], **dict.fromkeys(call[1]))
    except (TypeError, ValueError):  # ValueError: parameter names that no function can have
        return False
    return True


def demanded_calls(task: Task) -> frozenset[Call]:
    """How the tests call the entry point; from the gold program's parameters when no test shows it."""
    return calls_of(task.tests, task.entry_point or "") or calls_of_gold(task.gold or "", task.entry_point or "")


@lru_cache(maxsize=4096)
def calls_of(tests: tuple[str, ...], entry_point: str) -> frozenset[Call]:
    """The calls of `entry_point` (or of `candidate` in a HumanEval check) with plain arguments, without * and **."""
    found = set()
    for node in (node for test in tests for node in ast.walk(tree_of(test))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in (entry_point, "candidate"):
            names = tuple(sorted(keyword.arg or "" for keyword in node.keywords))
            if "" not in names and not any(isinstance(argument, ast.Starred) for argument in node.args):
                found.add((len(node.args), names))
    return frozenset(found)


@lru_cache(maxsize=4096)
def calls_of_gold(gold: str, entry_point: str) -> frozenset[Call]:
    """The shortest call that the gold program's definition allows."""
    defined = definition(tree_of(gold), entry_point)
    if not isinstance(defined, ast.FunctionDef):
        return frozenset()
    arguments = defined.args
    return frozenset({(len(arguments.posonlyargs) + len(arguments.args) - len(arguments.defaults), ())})


def gold_gives_result(task: Task) -> bool:
    """Whether the reference returns a value (True when there is no reference)."""
    defined = definition(tree_of(task.gold or ""), task.entry_point or "")
    return gives_result(defined) if isinstance(defined, ast.FunctionDef) else True


def tree_of(source: str) -> ast.Module:
    """The tree of a data set's own source; an empty one when it does not parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(source)
    except (SyntaxError, ValueError):
        return ast.Module([], [])
