"""Any table (JSON lines or Parquet) with `task_id`, `prompt` and `tests` as a task set; rows of EvalPlus's schema too.

Optional fields: entry_point, gold, visible, setup, family, split, kind, mode, as in `records.Task`; others are an error.
"""

from __future__ import annotations

from pathlib import Path

from falconlib.errors import FalconError, did_you_mean
from falconlib.records import Task
from falconlib.tasks import evalplus
from falconlib.tasks.files import field, read_rows

CHOICES = {"split": ("train", "validation", "test", "prompt"), "kind": ("text", "completion"), "mode": ("assert", "stdio")}
FIELDS = ("task_id", "prompt", "tests", "entry_point", "gold", "visible", "setup", "family", *CHOICES)


def load(path: Path, dataset: str) -> list[Task]:
    """The tasks of one file, in its order. A task without a split belongs to "test": nothing is trained on unasked.

    Raises FalconError naming file and line for a missing, unknown or wrong field and for a repeated task_id.
    """
    tasks: list[Task] = []
    lines: dict[str, int] = {}
    for number, row in read_rows(path):
        where = f"{path.name} line {number}"
        task = (evalplus.from_row if "base_input" in row else from_row)(row, dataset, where)
        if task.task_id in lines:
            raise FalconError(
                f"{where}: task_id {task.task_id!r} is that of line {lines[task.task_id]}", "give each task its own id"
            )
        lines[task.task_id] = number
        tasks.append(task)
    return tasks


def from_row(row: dict, dataset: str, where: str) -> Task:
    """One Task. `tests` is a list of snippets, or one text with a whole test program. Raises FalconError naming `where`."""
    for name in row:
        if name not in FIELDS:
            raise did_you_mean("field", f"{where}: {name}", FIELDS)
    defaults = {"split": "test", "kind": "text", "mode": "assert"}
    choices = {name: field(row, name, str, where, default) for name, default in defaults.items()}
    for name, value in choices.items():
        if value not in CHOICES[name]:
            raise FalconError(f"{where}: {name} {value!r} is unknown", f"use one of {', '.join(CHOICES[name])}")
    tests = row.get("tests")
    tests = [tests] if isinstance(tests, str) else field(row, "tests", list, where)
    if not tests or not all(isinstance(t, str) and t.strip() for t in tests):
        raise FalconError(
            f"{where}: tests must be a list of pieces of source text, at least one", '"tests": ["assert f(1) == 2"]'
        )
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
