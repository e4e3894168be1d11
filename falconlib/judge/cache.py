"""An SQLite file of a model's answers: the same question is asked once, and a published run can be replayed offline.

Key: SHA-256 of everything that can change an answer. Values are JSON, never pickles. It holds no answers' quality:
what a judge said is stored as it was said. The judges that wrote into the file stand in it too, for the replay.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from falconlib.errors import FalconError, did_you_mean
from falconlib.files import write_ahead

MODES = ("off", "read-write", "replay-only")
PUT = (
    "INSERT INTO answers VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET value = excluded.value"
    """ WHERE excluded.value <> '{"answer": null}'"""
)
JUDGES = "judge/"  # what the keys of judges begin with; those of questions are hexadecimal


def cache_key(question: Any) -> str:
    """SHA-256 (hex) of a question's canonical JSON: backend, identity (model, revision, rubric, sampling) and prompt."""
    return hashlib.sha256(json.dumps(question, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def judge_entry(judge: dict[str, Any]) -> dict[str, Any]:
    """What to `put` beside an answer to note who gave it: backend, model (the setting), identity."""
    return {JUDGES + cache_key(judge): judge}


class JudgeCache:
    """Answers by key in the file `path`; a context manager. Several processes may share the file.

    mode: "off" (nothing is read or written), "read-write", or "replay-only" (nothing is written, not even beside the file,
    which nobody changes meanwhile).
    Raises FalconError for an unknown mode, a file that is no cache, and, in replay-only mode, a missing file.
    """

    def __init__(self, path: Path | str, mode: str = "read-write"):
        if mode not in MODES:
            raise did_you_mean("judge cache mode", mode, MODES)
        self.mode, self.path = mode, Path(path)
        self._db: sqlite3.Connection | None = None
        if mode == "replay-only" and not self.path.is_file():
            raise FalconError(f"no judge cache at {path}: replay-only needs one", "make it once in mode read-write")
        if mode == "off":
            return
        try:
            with self._sound():
                if mode == "read-write":
                    self.path.parent.mkdir(parents=True, exist_ok=True)
                    # `put` may be called by the thread that asks a server, while the one that made the cache waits for it
                    self._db = sqlite3.connect(self.path, timeout=60, check_same_thread=False)
                    write_ahead(self._db)
                    self._db.execute(
                        "CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID"
                    )
                else:
                    frozen = "" if Path(f"{self.path}-wal").exists() else "&immutable=1"  # else SQLite makes files beside it
                    self._db = sqlite3.connect(f"{self.path.resolve().as_uri()}?mode=ro{frozen}", uri=True, timeout=60)
                self._db.execute("SELECT key, value FROM answers LIMIT 1")
        except FalconError:
            self.close()
            raise

    @contextmanager
    def _sound(self) -> Iterator[None]:
        """Turns what is wrong with the file into a FalconError; only a damaged one is to be deleted."""
        try:
            yield
        except (OSError, sqlite3.Error, ValueError) as error:
            damaged = isinstance(error, ValueError) or type(error) is sqlite3.DatabaseError
            remedy = "wait until nobody writes to it" if "locked" in str(error) else "choose another file with judge.cache"
            raise FalconError(
                f"{self.path} cannot be used as a judge cache: {error}",
                f"delete {self.path}, it is filled again" if damaged else remedy,
            ) from error

    def get(self, key: str) -> Any:
        """The stored answer, or None."""
        with self._sound():
            row = self._db.execute("SELECT value FROM answers WHERE key = ?", (key,)).fetchone() if self._db else None
            return json.loads(row[0]) if row else None

    def judges(self) -> list[dict[str, Any]]:
        """The judges that wrote into the file, each as `judge_entry` was told."""
        with self._sound():
            found = (
                self._db.execute("SELECT value FROM answers WHERE key LIKE ? ORDER BY key", (f"{JUDGES}%",)) if self._db else []
            )
            return [json.loads(value) for (value,) in found]

    def put(self, answers: dict[str, Any]) -> None:
        """Stores answers (JSON data) by key in one transaction; does nothing unless the mode is read-write. That there was no
        answer replaces none: another process may have paid for it meanwhile."""
        if self._db and self.mode == "read-write":
            rows = [(key, json.dumps(value, sort_keys=True)) for key, value in answers.items()]
            with self._sound(), self._db:
                self._db.executemany(PUT, rows)

    def close(self) -> None:
        """Closes the file; `get` then finds nothing."""
        if self._db:
            self._db.close()
            self._db = None

    def __enter__(self) -> JudgeCache:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
