"""Constraints on style and instructions that a program can check: each a kind and a value, decided on the syntax tree.

They belong to the prompts of data/preferences. Nothing is run. A program that does not parse satisfies none.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Callable, Iterable
from typing import Any

from falconlib.errors import did_you_mean
from falconlib.judge.instruction import called
from falconlib.judge.static import cognitive_complexity, parse

NESTING = ast.If | ast.For | ast.While | ast.With | ast.Try | ast.AsyncFor | ast.AsyncWith | ast.Match
FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef


def satisfied(kind: str, value: Any, code: str) -> bool:
    """Whether the program keeps the constraint. Raises FalconError for an unknown kind."""
    if kind not in CHECKS:
        raise did_you_mean("kind of constraint", kind, CHECKS)
    tree = parse(code)
    return tree is not None and bool(CHECKS[kind](tree, code, value))


def functions(tree: ast.AST) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    """All functions, methods and inner ones among them."""
    return [node for node in ast.walk(tree) if isinstance(node, FUNCTIONS)]


def names(tree: ast.AST) -> set[str]:
    """The names that the program gives: of functions, parameters and variables."""
    made = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    return made | {f.name for f in functions(tree)} | {n.arg for n in ast.walk(tree) if isinstance(n, ast.arg)}


def calls(tree: ast.AST) -> set[str]:
    """The last names of what is called."""
    return {str(called(node)) for node in ast.walk(tree) if isinstance(node, ast.Call)}


def kinds(tree: ast.AST) -> set[str]:
    """The names of the syntax that occurs: "For", "ListComp", "Yield", ... (see the module ast)."""
    return {type(node).__name__ for node in ast.walk(tree)}


def modules(tree: ast.AST) -> set[str]:
    """The top-level modules that are imported."""
    found = {a.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
    return found | {(node.module or "").split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}


def parameters(tree: ast.AST, name: str) -> list[str]:
    """The parameters of the function `name`, in order."""
    found = [f.args for f in functions(tree) if f.name == name]
    return [a.arg for args in found[:1] for a in (*args.posonlyargs, *args.args, *args.kwonlyargs)]


def annotated(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether the result and every parameter but self have a type."""
    args = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    return function.returns is not None and all(a.annotation is not None for a in args if a.arg not in ("self", "cls"))


def docstrings(tree: ast.AST) -> list[str]:
    """The docstring of every function and class, "" where there is none."""
    return [ast.get_docstring(n) or "" for n in ast.walk(tree) if isinstance(n, FUNCTIONS | ast.ClassDef)]


def raised(tree: ast.AST) -> set[str]:
    """The names of the exceptions that are raised."""
    found = (node.exc for node in ast.walk(tree) if isinstance(node, ast.Raise) and node.exc is not None)
    return {str(called(e)) if isinstance(e, ast.Call) else getattr(e, "id", "") for e in found}


def tokens(code: str, kind: int) -> list[str]:
    """The tokens of this kind; none when the text cannot be cut into tokens."""
    try:
        return [t.string for t in tokenize.generate_tokens(io.StringIO(code).readline) if t.type == kind]
    except (tokenize.TokenError, SyntaxError):
        return []


def strings(code: str) -> list[str]:
    """The string literals, or at least how they begin (f-strings, from Python 3.12 on)."""
    return tokens(code, tokenize.STRING) + tokens(code, getattr(tokenize, "FSTRING_START", -1))


def depth(node: ast.AST) -> int:
    """How many compound statements lie inside one another at most; an elif lies beside its if."""
    inner = 0
    for child in ast.iter_child_nodes(node):
        nested = depth(child)
        if isinstance(node, ast.If) and isinstance(child, ast.If) and [child] == node.orelse:
            nested -= child.col_offset == node.col_offset
        inner = max(inner, nested)
    return inner + isinstance(node, NESTING)


def constants(tree: ast.Module) -> set[str]:
    """Names in capitals that the module's own statements assign."""
    targets: Iterable[ast.expr] = (t for n in tree.body if isinstance(n, ast.Assign) for t in n.targets)
    return {t.id for t in targets if isinstance(t, ast.Name) and t.id.isupper()}


CHECKS: dict[str, Callable[[ast.Module, str, Any], Any]] = {
    "defines": lambda tree, _, name: name in {getattr(node, "name", None) for node in tree.body},
    "parameters": lambda tree, _, value: parameters(tree, value[0]) == value[1:],
    "annotated": lambda tree, *_: functions(tree) and all(map(annotated, functions(tree))),
    "docstring": lambda tree, *_: docstrings(tree) and all(docstrings(tree)),
    "docstring_says": lambda tree, _, words: all(word.lower() in "\n".join(docstrings(tree)).lower() for word in words),
    "max_lines": lambda _, code, most: sum(bool(line.strip()) for line in code.splitlines()) <= most,
    "max_width": lambda _, code, most: max(map(len, code.splitlines())) <= most,
    "max_complexity": lambda _, code, most: cognitive_complexity(code) <= most,
    "max_nesting": lambda tree, _, most: depth(tree) <= most,
    "min_functions": lambda tree, _, least: len(functions(tree)) >= least,
    "imports": lambda tree, _, value: modules(tree) == set(value),
    "uses": lambda tree, _, value: set(value) <= kinds(tree),
    "avoids": lambda tree, _, value: not set(value) & kinds(tree),
    "calls": lambda tree, _, value: set(value) <= calls(tree),
    "avoids_calls": lambda tree, _, value: not set(value) & calls(tree),
    "recursive": lambda tree, *_: any(f.name in calls(f) for f in functions(tree)),
    "raises": lambda tree, _, value: set(value) <= raised(tree),
    "min_comments": lambda _, code, least: len(tokens(code, tokenize.COMMENT)) >= least,
    "no_comments": lambda _, code, __: not tokens(code, tokenize.COMMENT),
    "min_name": lambda tree, _, least: min(map(len, names(tree)), default=0) >= least,
    "snake_case": lambda tree, *_: all(re.fullmatch(r"_*[a-z][a-z0-9_]*|[A-Z][A-Z0-9_]*", name) for name in names(tree)),
    "constant": lambda tree, _, name: name in constants(tree),
    "quotes": lambda _, code, mark: all(t.lstrip("rbfuRBFU").startswith(mark) for t in strings(code)),
}
