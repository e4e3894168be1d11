"""Could an answer leak? Training tasks that are too close to held-out ones: shared wording, the same program, near embeddings.

Pure functions. Nothing is dropped unasked: `leaks` lists, `decontaminate` drops and lists.
"""

from __future__ import annotations

import ast
import builtins
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from falconlib.records import Task

WORDS = 8  # [ours] a shared run of so many words is the same wording; five-word runs are common phrases
COSINE = 0.9  # [ours] by MiniLM, MBPP's reworded twins lie above, neighbours such as "largest" and "smallest" below
LINES = 3  # [ours] shorter programs, such as `return sum(xs)`, agree by honest coincidence
OPENING = re.compile(r"^\s*write (a|an) (python )?(function|program|code|script)( (to|that|which|for))?\b", re.IGNORECASE)


@dataclass(frozen=True)
class Leak:
    """A training task that comes too close to a held-out one. reason: "words", "program" or "embedding".

    value: words of the shared run, lines of the shared program, or the cosine.
    """

    task_id: str
    held_out: str
    reason: str
    value: float


def leaks(
    train: Sequence[Task], held_out: Sequence[Task], encode: Callable[[Sequence[str]], np.ndarray], lines: int = LINES
) -> list[Leak]:
    """Every leak, in the order of `train`; at most one per training task and reason, the first held-out task of equals.

    encode: texts -> unit vectors float32 [n, d] (an embedder of `falconlib.memory.embed`). lines: as LINES.
    """
    if not train or not held_out:
        return []
    words = {gram: task.task_id for task in reversed(held_out) for gram in ngrams(description(task), WORDS)}
    programs = {code: task.task_id for task in reversed(held_out) for code in shapes(task.gold or "", lines)}
    cosines = encode([description(t) for t in train]) @ encode([description(t) for t in held_out]).T
    found = []
    for task, row in zip(train, cosines, strict=True):
        if gram := next((g for g in sorted(ngrams(description(task), WORDS)) if g in words), None):
            found.append(Leak(task.task_id, words[gram], "words", WORDS))
        if code := next((c for c in sorted(shapes(task.gold or "", lines)) if c in programs), None):
            found.append(Leak(task.task_id, programs[code], "program", len(code.splitlines())))
        if row.max() >= COSINE:
            found.append(Leak(task.task_id, held_out[int(row.argmax())].task_id, "embedding", float(row.max())))
    return found


def decontaminate(
    train: Sequence[Task], held_out: Sequence[Task], encode: Callable[[Sequence[str]], np.ndarray]
) -> tuple[list[Task], list[Leak]]:
    """(the training tasks without a leak, in order; why the others were dropped)."""
    found = leaks(train, held_out, encode)
    dropped = {leak.task_id for leak in found}
    return [task for task in train if task.task_id not in dropped], found


def description(task: Task) -> str:
    """The task in words: the prompt without MBPP's "Write a function to", for a completion task its function's docstring."""
    if task.kind != "completion":
        return OPENING.sub("", task.prompt)
    functions = [node for node in ast.parse(task.prompt + "\n    pass\n").body if isinstance(node, ast.FunctionDef)]
    return (ast.get_docstring(functions[-1]) if functions else None) or task.prompt


def ngrams(text: str, n: int) -> set[tuple[str, ...]]:
    """All runs of n words; case and signs do not count."""
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


class Nameless(ast.NodeTransformer):
    """Numbers functions, arguments and variables in order of appearance; drops annotations and docstrings."""

    def __init__(self) -> None:
        self.names: dict[str, str] = {}

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.name, node.returns = self.names.setdefault(node.name, f"v{len(self.names)}"), None
        if ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
        return self.generic_visit(node)

    def visit_arg(self, node: ast.arg) -> ast.AST:
        node.arg, node.annotation = self.names.setdefault(node.arg, f"v{len(self.names)}"), None
        return node

    def visit_Name(self, node: ast.Name) -> ast.AST:
        if not hasattr(builtins, node.id):
            node.id = self.names.setdefault(node.id, f"v{len(self.names)}")
        return node


def shapes(code: str, lines: int = 1) -> set[str]:
    """The functions of a program without their names, those of at least so many lines; none for what is no Python."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # golds of MBPP have odd escapes
            body = ast.parse(code).body
    except (SyntaxError, ValueError):
        return set()
    found = (ast.unparse(Nameless().visit(node)) for node in body if isinstance(node, ast.FunctionDef))
    return {text for text in found if len(text.splitlines()) >= lines}
