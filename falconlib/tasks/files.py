"""Finds and reads the files of the task sets: JSON lines or Parquet. Knows folders and line numbers, nothing of tasks.

A data set is looked for in $FALCON_DATA, then in data/, then in data/downloads (filled by `falconlib.tasks.download`).
Nothing is fetched from here, and no loading script is ever run.
"""

from __future__ import annotations

import difflib
import gzip
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from falconlib.errors import WORDS, FalconError, shown

DATA = Path(__file__).resolve().parents[2] / "data"
SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")  # what a table may end in; the first that is there counts


def find(name: str, remedy: str, suffixes: tuple[str, ...] = ("",)) -> Path:
    """The first existing file or folder `name` + suffix of the data folders. Raises FalconError naming where it looked."""
    own = [Path(os.environ["FALCON_DATA"])] if os.environ.get("FALCON_DATA") else []
    roots = [*own, DATA, DATA / "downloads"]
    if found := next((path for root in roots for suffix in suffixes if (path := root / f"{name}{suffix}").exists()), None):
        return found
    names = " or ".join(repr(f"{name}{suffix}") for suffix in suffixes)
    raise FalconError(f"missing data: {names} was looked for in {', '.join(map(str, roots))}", remedy)


def missing(path: Path) -> FalconError:
    """A table of tasks that is not there, with the file beside it whose name is nearest."""
    near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*")], n=1)
    remedy = f"use {path.parent / near[0]}" if near else f"give the path of a {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]} file"
    return FalconError(f"there is no file {path}", remedy)


def tables(folder: Path) -> list[Path]:
    """The tables right in a folder, of one suffix only: a set that lies there twice is read once."""
    found = (sorted(folder.glob(f"*{suffix}")) for suffix in SUFFIXES)
    return next((paths for paths in found if paths), [])


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of each line of a .jsonl or .jsonl.gz file, blank lines skipped, or of each row of a .parquet file.

    Raises FalconError naming file and line for text that is no JSON object, and for a file without any.
    """
    rows = 0
    try:
        for number, row in read_parquet(path) if path.suffix.lower() == ".parquet" else read_lines(path):
            rows += 1
            yield number, row
    except (ValueError, EOFError, OSError, zlib.error) as error:  # pyarrow's and Unicode's errors are ValueErrors
        raise FalconError(f"{path} cannot be read: {error}", f"UTF-8 and one of {', '.join(SUFFIXES)} are expected") from error
    if not rows:
        raise FalconError(f"{path} is empty", "one JSON object per line is expected")


def read_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a file of JSON lines, packed or not, with or without a byte order mark."""
    with (gzip.open if path.suffix.lower() == ".gz" else open)(path, "rt", encoding="utf-8-sig") as lines:
        yield from ((n, parse_row(line, f"{path.name} line {n}")) for n, line in enumerate(lines, 1) if line.strip())


def read_parquet(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a Parquet file, in batches."""
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        yield from enumerate((row for batch in file.iter_batches() for row in batch.to_pylist()), 1)


def parse_row(line: str, where: str) -> dict[str, Any]:
    """One JSON object. Raises FalconError that names `where`."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:  # RecursionError: nested a thousandfold
        raise FalconError(f"{where}: broken JSON: {error}", "one JSON object per line is expected") from error
    if not isinstance(row, dict):
        raise FalconError(f"{where}: a JSON object is expected, not {shown(row)}", 'write {"task_id": ..., ...}')
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
        raise FalconError(f"{where}: field {name!r} = {shown(value)}: {WORDS[kind.__name__]} is expected", f"mend {where}")
    return value
