"""Any table (JSON lines or Parquet) as a task set: `task_id`, `prompt` and `tests`, or the columns of a known data set.

Optional fields: entry_point, gold, visible, setup, family, split, kind, mode, as in `records.Task`; others are ignored, but
for one that looks like a misspelt one of these. Tests that end their own process (sys.exit) or assert nothing are broken: no
program gets a verdict by them.
"""

from __future__ import annotations

import ast
import difflib
import warnings
from collections.abc import Iterator
from pathlib import Path

from falconlib.errors import FalconError, did_you_mean
from falconlib.records import Task, to_json
from falconlib.tasks import apps, codal, evalplus, mbpp
from falconlib.tasks.files import SUFFIXES, field, parse_row, read_rows, tables

CHOICES = {"split": ("train", "validation", "test", "prompt"), "kind": ("text", "completion"), "mode": ("assert", "stdio")}
FIELDS = ("task_id", "prompt", "tests", "entry_point", "gold", "visible", "setup", "family", *CHOICES)


def load(path: Path, dataset: str) -> list[Task]:
    """The tasks of one file in its order, of the tables of a folder, or of a folder of APPS's original problems.

    A task without a split belongs to "test": nothing is trained on unasked. Problems of APPS without tests are left out.
    Raises FalconError naming file and line for a missing or wrong field, for tests that are no Python and for a repeated task_id.
    """
    tasks: dict[str, Task] = {}
    places: dict[str, str] = {}
    for number, where, row in rows(path):
        try:
            task = read(row, dataset, number, where)
            to_json(task).encode()  # half a surrogate pair is no text
        except FalconError:
            raise
        except Exception as error:  # whatever else a row may hold
            raise FalconError(f"{where}: {type(error).__name__}: {error}", f"mend {where}") from error
        if task is None:
            continue
        if task.task_id in tasks:
            raise FalconError(f"{where}: task_id {task.task_id!r} is that of {places[task.task_id]}", "give each task its own id")
        tasks[task.task_id], places[task.task_id] = task, where.removeprefix(f"{path.name} ")
    if not tasks:
        raise FalconError(f"{path} holds no task with tests", f"give {', '.join(SUFFIXES)} or APPS's original folders")
    return list(tasks.values())


def rows(path: Path) -> Iterator[tuple[int, str, dict | Path]]:
    """(number, place in words, row) of a file, or of the tables in a folder, or of the problems in APPS's original folders."""
    if not path.is_dir():
        yield from ((number, f"{path.name} line {number}", row) for number, row in read_rows(path))
    elif found := tables(path):
        for table in found:
            yield from rows(table)
    else:
        yield from ((0, "/".join(folder.parts[-3:]), folder) for folder in apps.folders(path.resolve()))


def read(row: dict | Path, dataset: str, number: int, where: str) -> Task | None:
    """One Task, by the columns of its row; the split of APPS is in the name of its table or folder."""
    if isinstance(row, Path):
        return apps.from_folder(row, row.parent.name)
    if "base_input" in row:
        return evalplus.from_row(row, dataset, where)
    if "test_list" in row:
        return runnable(mbpp.from_row(row, where), where)
    if "problem_id" in row:
        return apps.from_row(row, "train" if "train" in where else "test", where)
    if "instruction" in row and "preference" in row:
        return codal.from_row(row, number, where)
    return runnable(from_row(row, dataset, where), where)


def runnable(task: Task, where: str) -> Task:
    """The task. Raises SyntaxError for tests that are no Python, FalconError for none and for a setup that solves the task."""
    if not task.tests or not all(isinstance(t, str) and t.strip() for t in task.tests):
        raise FalconError(f"{where}: tests must be a list of source texts, at least one", '"tests": ["assert f(1) == 2"]')
    if task.mode == "stdio":
        for case in (parse_row(test, f"{where}: tests") for test in task.tests):
            field(case, "input", str, f"{where}: tests"), field(case, "output", str, f"{where}: tests")
        return task
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MBPP has odd escapes
        names = {getattr(node, "name", None) for node in ast.parse(task.setup, "setup").body}
        for i, test in enumerate(task.tests):
            ast.parse(test, f"tests[{i}]")
    if task.entry_point and task.entry_point in names:
        raise FalconError(f"{where}: setup defines {task.entry_point!r}, which the program is to define", "rename one of them")
    return task


def from_row(row: dict, dataset: str, where: str) -> Task:
    """One Task. `tests` is a list of snippets, or one text with a whole test program. Raises FalconError naming `where`."""
    for name in row:
        if name not in FIELDS and difflib.get_close_matches(name, FIELDS, n=1, cutoff=0.8):
            raise did_you_mean("field", f"{where}: {name}", FIELDS)
    defaults = {"split": "test", "kind": "text", "mode": "assert"}
    choices = {name: field(row, name, str, where, default) for name, default in defaults.items()}
    for name, value in choices.items():
        if value not in CHOICES[name]:
            raise FalconError(f"{where}: {name} {value!r} is unknown", f"use one of {', '.join(CHOICES[name])}")
    tests = row.get("tests")
    tests = [tests] if isinstance(tests, str) else field(row, "tests", list, where)
    visible = field(row, "visible", int, where, 0)
    if not 0 <= visible <= len(tests):
        raise FalconError(f"{where}: visible = {visible}, but there are {len(tests)} tests", f"use 0 to {len(tests)}")
    return Task(
        task_id=field(row, "task_id", str, where),
        dataset=dataset,
        prompt=field(row, "prompt", str, where),
        entry_point=field(row, "entry_point", str, where, None),
        tests=tuple(tests),
        visible=visible,
        setup=field(row, "setup", str, where, ""),
        gold=field(row, "gold", str, where, None),
        family=field(row, "family", str, where, ""),
        **choices,
    )
