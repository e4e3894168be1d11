"""An SQLite cache in front of a judge: the same question is asked once, and a published run can be replayed offline.

Key: SHA-256 of everything that can change an answer. Values are JSON, never pickles. It holds no answers' quality:
what a judge said is stored as it was said.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from falconlib.errors import FalconError, did_you_mean
from falconlib.records import Scores, Task, from_dict, to_dict

if TYPE_CHECKING:
    from falconlib.judge import Judge

MODES = ("off", "read-write", "replay-only")


def cache_key(name: str, identity: dict[str, Any], task: Task, program: str) -> str:
    """SHA-256 (hex) of the canonical JSON of backend name, its identity (model, revision, rubric, sampling), task and program."""
    question = {"backend": name, "identity": identity, "task": to_dict(task), "program": program}
    return hashlib.sha256(json.dumps(question, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


class JudgeCache:
    """Answers by key in the file `path`; a context manager. Several processes may share the file.

    mode: "off" (nothing is read or written), "read-write", or "replay-only" (a missing answer is an error).
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
            if mode == "read-write":
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._db = sqlite3.connect(self.path, timeout=60)
                self._db.execute("PRAGMA journal_mode=WAL")
                self._db.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID")
            else:
                self._db = sqlite3.connect(f"{self.path.resolve().as_uri()}?mode=ro", uri=True, timeout=60)
            self._db.execute("SELECT key, value FROM answers LIMIT 1")
        except sqlite3.Error as error:
            self.close()
            raise FalconError(f"{path} is no judge cache: {error}", f"delete {path}, it is filled again") from error

    def get(self, key: str) -> Any:
        """The stored answer, or None."""
        row = self._db.execute("SELECT value FROM answers WHERE key = ?", (key,)).fetchone() if self._db else None
        return json.loads(row[0]) if row else None

    def put(self, answers: dict[str, Any]) -> None:
        """Stores answers (JSON data) by key in one transaction; does nothing unless the mode is read-write."""
        if self._db and self.mode == "read-write":
            rows = [(key, json.dumps(value, sort_keys=True)) for key, value in answers.items()]
            with self._db:
                self._db.executemany("INSERT OR REPLACE INTO answers VALUES (?, ?)", rows)

    def close(self) -> None:
        """Closes the file; `get` then finds nothing."""
        if self._db:
            self._db.close()
            self._db = None

    def __enter__(self) -> JudgeCache:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class CachedJudge:
    """`judge` behind `cache`; a judge itself. `hits` and `misses` count distinct questions.

    An answer that lacks a score is stored, so that a replay gives what the run saw, but in read-write mode it is asked again.
    """

    def __init__(self, judge: Judge, cache: JudgeCache):
        self.judge, self.cache = judge, cache
        self.name, self.version, self.identity = judge.name, judge.version, judge.identity
        self.hits = self.misses = 0

    def score_many(self, pairs: Sequence[tuple[Task, str]]) -> list[Scores]:
        """As the judge's. Raises FalconError for a question without a stored answer in replay-only mode."""
        keys = [cache_key(self.name, self.identity, task, code) for task, code in pairs]
        known: dict[str, Scores] = {}
        asked: dict[str, tuple[Task, str]] = {}
        for key, pair in zip(keys, pairs, strict=True):
            answer = self.cache.get(key)
            scores = None if answer is None else from_dict(Scores, answer)
            if scores is not None and (self.cache.mode == "replay-only" or None not in to_dict(scores).values()):
                known[key] = scores
            elif self.cache.mode == "replay-only":
                raise FalconError(
                    f"no stored answer of judge {self.version!r} for a program of task {pair[0].task_id!r}",
                    "run once with the cache in mode read-write, or with the judge version that made it",
                )
            else:
                asked[key] = pair
        self.hits, self.misses = self.hits + len(known), self.misses + len(asked)
        if asked:
            new = dict(zip(asked, self.judge.score_many(list(asked.values())), strict=True))
            self.cache.put({key: to_dict(scores) for key, scores in new.items()})
            known |= new
        return [known[key] for key in keys]
