"""`basics`: elementary Python tasks of our own writing (data/basics), in families, two of them held out for the test split."""

from __future__ import annotations

import json

from falconlib.records import Task
from falconlib.tasks import jsonl
from falconlib.tasks.files import DATA

RATES = DATA / "basics" / "difficulty.json"  # written by falconlib.evaluation.difficulty


def load() -> list[Task]:
    """All tasks of all splits, in the order of the file: one visible assert first, hidden ones after it."""
    return jsonl.load(DATA / "basics" / "basics.jsonl", "basics")


def pass_rates() -> dict[str, float]:
    """Task id -> share of the base model's samples that passed, as measured and committed; empty when nothing was measured."""
    passed = json.loads(RATES.read_text(encoding="utf-8"))["passed"] if RATES.is_file() else {}
    return {name: c / n for name, (c, n) in passed.items() if n}


def difficulty(rate: float | None) -> str | None:
    """ "easy" from half of the samples on, "medium" from a quarter, "hard" above none, "unsolved"; None when not measured."""
    if rate is None:
        return None
    return "easy" if rate >= 0.5 else "medium" if rate >= 0.25 else "hard" if rate > 0 else "unsolved"
