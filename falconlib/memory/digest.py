"""Normal forms by which memory tells whether two descriptions, or two programs, are the same. Pure functions."""

from __future__ import annotations

import ast
import hashlib
import unicodedata
import warnings

DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
DEEPEST = 60  # levels of a syntax tree: `unparse` takes six stack frames for each, and how many are left depends on the caller


def clean(text: str) -> str:
    """Text that SQLite can hold: half a surrogate pair, which sampled text may contain, becomes '?'."""
    return text.encode("utf-8", "replace").decode("utf-8")


def text_hash(text: str) -> int:
    """64-bit signed hash of a description; case, white space and ways of composing letters (NFKC) do not count."""
    words = unicodedata.normalize("NFKC", clean(text)).lower().split()
    return int.from_bytes(hashlib.sha256(" ".join(words).encode()).digest()[:8], signed=True)


def program_hash(code: str) -> str:
    """Hash of a program's syntax tree (layout, comments and doc strings do not count); of its words when it does not parse or is
    nested too deep."""
    code = clean(code)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the program's own odd escapes are none of our business
            tree = ast.parse(code)
        level: list[ast.AST] = [tree]
        for _ in range(DEEPEST):
            level = [child for node in level for child in ast.iter_child_nodes(node)]
        if level:
            raise RecursionError
        for node in ast.walk(tree):
            if isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
                node.body = node.body[1:] or [ast.Pass()]
        code = ast.unparse(tree)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        code = "\n".join(code.split())
    return hashlib.sha256(code.encode()).hexdigest()[:32]
