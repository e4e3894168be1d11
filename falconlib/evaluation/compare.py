"""Two result tables side by side: which differences are larger than their intervals explain. Reads rows, runs nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from falconlib.errors import FalconError
from falconlib.evaluation.stats import newcombe

Marks = tuple[float, float, float]  # value, ci_low, ci_high
KEYS = ("benchmark", "mode", "arm", "metric")  # what names a row of tables/main.csv; the ones a table lacks are left blank


def compare_rows(run_a: Sequence[Mapping[str, Any]], run_b: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of run A against the rows of run B with the same benchmark, mode, arm and metric.

    Row: those keys, a, b, difference (b - a), low, high (95 %, Newcombe from both rows' intervals, taken as
    independent, which is cautious when the problems are the same), verdict: "within" when 0 lies in [low, high], else
    "outside"; "only in A", "only in B", or "unknown" when a value or an interval is blank (then the numbers are None).
    Raises FalconError for a row that occurs twice or a value that is no number.
    """
    one, two = by_key(run_a, "A"), by_key(run_b, "B")
    rows = []
    for key in dict.fromkeys([*one, *two]):
        (a, a_marks), (b, b_marks) = one.get(key, (None, None)), two.get(key, (None, None))
        row: dict[str, Any] = dict(zip(KEYS, key, strict=True)) | {"a": a, "b": b, "difference": None, "low": None, "high": None}
        if key not in one or key not in two:
            row["verdict"] = "only in B" if key not in one else "only in A"
        elif a_marks is None or b_marks is None:
            row["verdict"] = "unknown"
        else:
            low, high = newcombe(b_marks, a_marks)
            difference = b_marks[0] - a_marks[0]
            row |= {"difference": difference, "low": low, "high": high, "verdict": "within" if low <= 0 <= high else "outside"}
        rows.append(row)
    return rows


def in_short(rows: Sequence[Mapping[str, Any]]) -> str:
    """What the verdicts of `compare_rows` say together: chance alone puts up to one row in twenty outside."""
    counts = Counter(row["verdict"] for row in rows)
    known = counts["within"] + counts["outside"]
    if not known:
        return "nothing to compare: no row is in both runs with its interval"
    told = f"{counts['outside']} of {known} rows outside the expected range; chance alone explains about {0.05 * known:.1f}"
    return told + (f"; {len(rows) - known} rows not comparable" if known < len(rows) else "")


def by_key(rows: Sequence[Mapping[str, Any]], run: str) -> dict[tuple[str, ...], tuple[float | None, Marks | None]]:
    """value and (value, ci_low, ci_high) by key; None where a cell is blank."""
    found: dict[tuple[str, ...], tuple[float | None, Marks | None]] = {}
    for row in rows:
        key = tuple(str(row.get(name, "")) for name in KEYS)
        if key in found:
            raise FalconError(f"run {run} holds the row {' '.join(key)} twice", "compare tables with one row per key")
        try:
            cells = [float(row[n]) for n in ("value", "ci_low", "ci_high") if row.get(n) not in (None, "")]
        except ValueError as error:
            raise FalconError(f"run {run}, row {' '.join(key)}: {error}", "value, ci_low and ci_high are numbers") from error
        value = cells[0] if row.get("value") not in (None, "") else None
        found[key] = (value, (cells[0], cells[1], cells[2]) if len(cells) == 3 else None)
    return found
