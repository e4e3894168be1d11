"""How like two programs are: the share of the gold's syntax subtrees, and of its data-flow edges, that a program has too.

The two matches of CodeBLEU (Ren et al. 2020, arXiv 2009.10297) for Python, on its own `ast`. Nothing is executed.
"""

from __future__ import annotations

import ast
import warnings
from collections import Counter
from collections.abc import Callable


def match(code: str, gold: str, parts: Callable[[ast.AST], Counter]) -> float:
    """sum min(own, gold) / sum gold over the parts of the two programs, in [0, 1]; 0 when one does not parse or gold has none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the program's own odd escapes are none of our business
            own, wanted = (parts(ast.parse(text)) for text in (code, gold))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return 0.0
    return (own & wanted).total() / wanted.total() if wanted else 0.0


def subtrees(tree: ast.AST) -> Counter:
    """Every subtree with at least one child, by its node types alone: names and constants do not count."""
    found: Counter = Counter()

    def shape(node: ast.AST) -> str:
        inner = [shape(child) for child in ast.iter_child_nodes(node) if not isinstance(child, ast.expr_context)]
        text = f"{type(node).__name__}({','.join(inner)})"
        if inner:
            found[text] += 1
        return text

    shape(tree)
    return found


def dataflow(tree: ast.AST) -> Counter:
    """Edges (variable, where its value comes from). The program's own variables are numbered as they first appear, so that their
    names do not count; "return" is a variable of its own."""
    nodes, names = list(ast.walk(tree)), dict[str, int]()
    bound = {n.arg for n in nodes if isinstance(n, ast.arg)}
    bound |= {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    label = lambda name: names.setdefault(name, len(names)) if name in bound else name  # noqa: E731
    inside = lambda node: [label(n.id) for n in ast.walk(node) if isinstance(n, ast.Name)]  # noqa: E731
    found: Counter = Counter()
    for node in nodes:
        if isinstance(node, ast.Return) and node.value is not None:
            found.update(("return", origin) for origin in inside(node.value))
        elif isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign | ast.NamedExpr | ast.For | ast.comprehension):
            value = node.iter if isinstance(node, ast.For | ast.comprehension) else node.value
            goals = [g for t in (node.targets if isinstance(node, ast.Assign) else [node.target]) for g in inside(t)]
            origins = (inside(value) if value is not None else []) + (goals if isinstance(node, ast.AugAssign) else [])
            found.update((goal, origin) for goal in goals for origin in origins)
    return found


def ast_match(code: str, gold: str) -> float:
    """Share of the gold's subtrees that the program has, in [0, 1]; 0 when one of them does not parse."""
    return match(code, gold, subtrees)


def dataflow_match(code: str, gold: str) -> float:
    """Share of the gold's data-flow edges that the program has, in [0, 1]; 0 when one of them does not parse."""
    return match(code, gold, dataflow)
