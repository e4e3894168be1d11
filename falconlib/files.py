"""What is written to disk: whole files or nothing, one JSON spelling, content hashes.

A reader never sees half a file: text goes to a temporary file beside its target, is synced, and takes the name in one
step. A full or read-only disk is a FalconError. This module knows nothing of what the files mean.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import sqlite3
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from falconlib.errors import FalconError, shown

MOVED = "(FALCON_RESULTS moves the results)"
REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), f"free some disk space, or write to another disk {MOVED}"),
    **dict.fromkeys((errno.EROFS, errno.EACCES), f"write to a folder where you may {MOVED}"),
    errno.ENOTDIR: f"a file stands where a folder is needed: move it, or write elsewhere {MOVED}",
}


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns an OSError of the block into a FalconError that names `path` and a remedy."""
    try:
        yield
    except OSError as error:
        remedy = REMEDIES.get(error.errno or 0, "check the disk and the rights of the folder")
        raise FalconError(f"cannot write {path}: {error.strerror or error}", remedy) from error


def write_bytes(path: Path, data: bytes) -> Path:
    """Writes `data` to `path` atomically (temporary file, fsync, rename), making its folder. Returns the path."""
    path = Path(path)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as sink:
                sink.write(data)
                sink.flush()
                os.fsync(sink.fileno())
            os.chmod(name, 0o644)  # mkstemp gives 0600; results are to be read by others
            os.replace(name, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise
    return path


def write_text(path: Path, text: str) -> Path:
    """`write_bytes` of UTF-8 text."""
    return write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, data: Any) -> Path:
    """`data` as indented JSON for people. Raises FalconError for NaN and for what JSON cannot hold."""
    return write_text(path, _dumps(data, indent=1) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. Raises FalconError when it is missing, broken, or no object."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FalconError(f"{path} is missing", "run the stage that writes it") from error
    except (OSError, ValueError) as error:
        raise FalconError(f"{path} cannot be read: {error}", "delete it and run its stage again") from error
    if not isinstance(data, dict):
        raise FalconError(f"{path} holds {shown(data)}, not an object", "delete it and run its stage again")
    return data


def read_yaml(path: Path) -> dict[str, Any]:
    """The settings in `path`, {} when it is empty. Raises FalconError when it is broken, holds no settings, or an integer that
    means another number than it looks like: to YAML 012 is ten and 1:30 ninety."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    def integer(loader: Loader, node: yaml.ScalarNode) -> int:
        if not re.fullmatch(r"[-+]?(0|[1-9][0-9]*)", node.value):
            raise FalconError(f"{path.name}: {node.value} is no plain integer", "write decimal digits, or quotes for a text")
        return int(node.value)

    Loader.add_constructor("tag:yaml.org,2002:int", integer)
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader) or {}
    except yaml.YAMLError as error:
        raise FalconError(f"{path.name} is no valid YAML: {error}", f"mend {path.name}") from error
    if not isinstance(data, dict):
        raise FalconError(f"{path.name} holds {shown(data)}, not settings", f"mend {path.name}")
    return data


def canonical(data: Any) -> str:
    """One line of JSON with sorted keys: equal data gives equal bytes. NaN and infinity raise FalconError."""
    return _dumps(data, separators=(",", ":"))


def _dumps(data: Any, **layout: Any) -> str:
    try:
        return json.dumps(data, sort_keys=True, ensure_ascii=False, allow_nan=False, default=_plain, **layout)
    except (TypeError, ValueError) as error:
        remedy = "numbers must be finite (None when unknown), the rest plain"
        raise FalconError(f"not writable as JSON: {error}", remedy) from error


def _plain(value: Any) -> Any:
    """numpy scalars and paths, which json does not know."""
    if hasattr(value, "item"):
        return value.item()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} is no JSON value")


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with open(path, "rb") as source:
        return hashlib.file_digest(source, "sha256").hexdigest()


def sha256_of(data: Any) -> str:
    """Hex SHA-256 of `canonical(data)`."""
    return hashlib.sha256(canonical(data).encode("utf-8")).hexdigest()


class JsonLines:
    """A file of one JSON object per line that survives being killed: `metrics.jsonl`, `timings.jsonl`.

    `metrics.jsonl` takes no clock values: same seed, same bytes. Each row has an integer "step".
    """

    def __init__(self, path: Path):
        self.path = Path(path)

    def append(self, row: dict[str, Any]) -> None:
        """Adds one row, whole or not at all. Raises FalconError on NaN, infinity, or a full disk."""
        line = (canonical(row) + "\n").encode("utf-8")
        with disk_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab", buffering=0) as sink:
                size = sink.seek(0, os.SEEK_END)
                try:
                    written = sink.write(line)
                    if written != len(line):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                except OSError:
                    with contextlib.suppress(OSError):
                        sink.truncate(size)
                    raise

    def rows(self) -> list[dict[str, Any]]:
        """All complete rows; a last line without its newline (a killed writer) is left out."""
        if not self.path.is_file():
            return []
        lines = self.path.read_bytes().split(b"\n")[:-1]
        try:
            return [json.loads(line) for line in lines]
        except ValueError as error:
            raise FalconError(f"{self.path} holds a broken line: {error}", "delete the file and run its stage again") from error

    def truncate(self, step: int) -> None:
        """Keeps the rows with row["step"] <= step: what a checkpoint of that step knows of."""
        kept = [canonical(row) + "\n" for row in self.rows() if row["step"] <= step]
        write_text(self.path, "".join(kept))


def write_ahead(db: sqlite3.Connection) -> None:
    """Switches to WAL. SQLite does not wait for others here, and several processes may make one new file at once."""
    for left in reversed(range(200)):
        try:
            db.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if not left or "locked" not in str(error):
                raise
            time.sleep(0.05)
