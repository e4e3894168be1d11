"""MBPP: 974 short descriptions with three asserts each (Austin et al., arXiv 2108.07732; CC BY 4.0).

Splits by id: prompt 1-10, test 11-510, validation 511-600, train 601-974. The prompt shows the first assert.
"""

from __future__ import annotations

import ast
import builtins
import re

from falconlib.errors import FalconError
from falconlib.records import Task
from falconlib.tasks.files import field

REMEDY = (
    "put the 974 problems as JSON lines into data/mbpp/mbpp.jsonl (or $FALCON_DATA/mbpp/mbpp.jsonl), "
    "or fetch them: python -c \"from falconlib.tasks import download; download('mbpp')\""
)


def from_row(row: dict, where: str) -> Task:
    """One Task from a row with task_id, text (hub: also `prompt`), code, test_list, test_setup_code.

    setup: test_setup_code. It builds objects from classes that the candidate defines (367 and 927), so it runs after
    the candidate; test_imports of the sanitized version come before it. Raises FalconError naming `where`.
    """
    number = field(row, "task_id", int, where)
    if not 1 <= number <= 974:
        raise FalconError(f"{where}: task_id {number} is none of MBPP's, 1 to 974", "give own tasks `prompt` and `tests`")
    code, tests = field(row, "code", str, where).replace("\r\n", "\n"), field(row, "test_list", list, where)
    text = field(row, "text", str, where, None) or field(row, "prompt", str, where)
    imports = field(row, "test_imports", list, where, [])
    name, tests = entry_point(tests[0], code) if tests else None, tuple(t.strip() for t in tests)
    setup = "\n".join([*imports, field(row, "test_setup_code", str, where, "").replace("\r\n", "\n")]).strip()
    return Task(f"mbpp/{number}", "mbpp", split_of(number), text.strip(), name, tests, visible=1, setup=setup, gold=code)


def split_of(number: int) -> str:
    """The split of an MBPP id."""
    return "prompt" if number <= 10 else "test" if number <= 510 else "validation" if number <= 600 else "train"


def entry_point(test: str, code: str) -> str | None:
    """The function that the first assert calls: the outermost called name that `code` defines, else that is no builtin."""
    calls = [n.func.id for n in ast.walk(ast.parse(test)) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)]
    defined = re.findall(r"^(?:def|class)\s+(\w+)", code, re.MULTILINE)
    own = [c for c in calls if c in defined] + [c for c in calls if not hasattr(builtins, c)]
    return next(iter(own), None)
