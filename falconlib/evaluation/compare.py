"""Two result tables side by side: which differences are larger than their intervals explain. Reads rows, runs nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from falconlib.errors import FalconError
from falconlib.evaluation.stats import newcombe

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
        a, b = one.get(key), two.get(key)
        row: dict[str, Any] = dict(zip(KEYS, key, strict=True)) | {"a": a and a[0], "b": b and b[0]}
        rows.append(row | {"difference": None, "low": None, "high": None, "verdict": "unknown"})
        if a is None or b is None:
            rows[-1]["verdict"] = "only in B" if a is None else "only in A"
        elif None not in (*a, *b):
            low, high = newcombe(b, a)
            verdict = "within" if low <= 0 <= high else "outside"
            rows[-1] |= {"difference": b[0] - a[0], "low": low, "high": high, "verdict": verdict}
    return rows


def in_short(rows: Sequence[Mapping[str, Any]]) -> str:
    """What the verdicts of `compare_rows` say together: chance alone puts up to one row in twenty outside."""
    counts = Counter(row["verdict"] for row in rows)
    known = counts["within"] + counts["outside"]
    if not known:
        return "nothing to compare: no row is in both runs with its interval"
    told = f"{counts['outside']} of {known} rows outside the expected range; chance alone explains about {0.05 * known:.1f}"
    return told + (f"; {len(rows) - known} rows not comparable" if known < len(rows) else "")


def by_key(rows: Sequence[Mapping[str, Any]], run: str) -> dict[tuple[str, ...], tuple[Any, Any, Any]]:
    """(value, ci_low, ci_high) by key; None where a cell is blank."""
    found: dict[tuple[str, ...], tuple[Any, Any, Any]] = {}
    for row in rows:
        key = tuple(str(row.get(name, "")) for name in KEYS)
        if key in found:
            raise FalconError(f"run {run} holds the row {' '.join(key)} twice", "compare tables with one row per key")
        try:
            value, low, high = (None if row.get(n) in (None, "") else float(row[n]) for n in ("value", "ci_low", "ci_high"))
        except ValueError as error:
            raise FalconError(f"run {run}, row {' '.join(key)}: {error}", "value, ci_low and ci_high are numbers") from error
        if not all(v is None or 0 <= v <= 1 for v in (value, low, high)):  # NaN too
            raise FalconError(f"run {run}, row {' '.join(key)}: {value} [{low}, {high}]", "shares lie in [0, 1]")
        found[key] = (value, low, high)
    return found
