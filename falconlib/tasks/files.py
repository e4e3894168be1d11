"""Finds and reads the files of the task sets. Knows folders, JSON lines and line numbers, nothing of tasks.

A data set is looked for in $FALCON_DATA, then in data/, then in data/downloads (filled by `falconlib.tasks.download`).
Nothing is fetched from here.
"""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from falconlib.errors import FalconError

DATA = Path(__file__).resolve().parents[2] / "data"


def find(relative: str, remedy: str) -> Path:
    """The first existing file or folder `relative` of the data folders. Raises FalconError naming where it looked."""
    roots = [DATA, DATA / "downloads"]
    if os.environ.get("FALCON_DATA"):
        roots.insert(0, Path(os.environ["FALCON_DATA"]))
    for root in roots:
        if (root / relative).exists():
            return root / relative
    places = ", ".join(str(root / relative) for root in roots)
    raise FalconError(f"missing data: {relative!r} was looked for in {places}", remedy)


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of each line of a .jsonl or .jsonl.gz file; blank lines are skipped.

    Raises FalconError naming file and line for text that is no JSON object, and for a file without any.
    """
    opened = gzip.open if path.suffix == ".gz" else open
    rows = 0
    try:
        with opened(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                rows += 1
                yield number, parse_row(line, f"{path.name} line {number}")
    except (UnicodeDecodeError, EOFError, OSError) as error:
        raise FalconError(f"{path} cannot be read: {error}", "JSON lines in UTF-8 (.jsonl or .jsonl.gz) are expected") from error
    if not rows:
        raise FalconError(f"{path} is empty", "one JSON object per line is expected")


def parse_row(line: str, where: str) -> dict[str, Any]:
    """One JSON object. Raises FalconError that names `where`."""
    try:
        row = json.loads(line)
    except ValueError as error:
        raise FalconError(f"{where}: broken JSON: {error}", "one JSON object per line is expected") from error
    if not isinstance(row, dict):
        raise FalconError(f"{where}: a JSON object is expected, not {type(row).__name__}", 'write {"task_id": ..., ...}')
    return row


def field(row: dict[str, Any], name: str, kind: type, where: str, default: Any = ...) -> Any:
    """row[name], checked to be a `kind` (str, int, list). Raises FalconError naming field and place when it is not,
    or when it is missing (or null) and there is no `default`."""
    value = row.get(name)
    if value is None:
        if default is ...:
            raise FalconError(f"{where}: field {name!r} is missing", f"present: {', '.join(row) or 'none'}")
        return default
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise FalconError(f"{where}: field {name!r} is {type(value).__name__}, {kind.__name__} is expected", f"mend {where}")
    return value
