"""`basics`: elementary Python tasks of our own writing (data/basics), in families, two of them held out for the test split."""

from __future__ import annotations

from falconlib.records import Task
from falconlib.tasks import jsonl
from falconlib.tasks.files import DATA


def load() -> list[Task]:
    """All tasks of all splits, in the order of the file: one visible assert first, hidden ones after it."""
    return jsonl.load(DATA / "basics" / "basics.jsonl", "basics")
