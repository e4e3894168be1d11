"""An SQLite cache in front of a judge: the same question is asked once, and a published run can be replayed offline.

Key: SHA-256 of everything that can change an answer. Values are JSON, never pickles. It holds no answers' quality:
what a judge said is stored as it was said.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from falconlib.errors import FalconError, did_you_mean
from falconlib.records import Scores, Task, from_dict, to_dict

if TYPE_CHECKING:
    from falconlib.judge import Judge

MODES = ("off", "read-write", "replay-only")


def cache_key(question: Any) -> str:
    """SHA-256 (hex) of a question's canonical JSON: backend, identity (model, revision, rubric, sampling), task and program."""
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
        frame = {"backend": self.name, "identity": self.identity}
        asked = [(frame | {"task": to_dict(task), "program": code}, (task, code)) for task, code in pairs]
        found = through(self.cache, asked, lambda pairs: [to_dict(s) for s in self.judge.score_many(pairs)], self)
        return [from_dict(Scores, answer) for answer in found]


def through(cache: JudgeCache, questions: Sequence[tuple[Any, Any]], ask: Callable[[list], list], tally: Any = None) -> list[Any]:
    """The answers (JSON objects) to `questions`, out of the cache where it has them. A question: (content of the key, what `ask`
    takes).

    An answer that lacks a value counts as missing unless the mode is replay-only. tally: its hits and misses are counted up.
    Raises FalconError for a question without a stored answer in replay-only mode.
    """
    keys = [cache_key(content) for content, _ in questions]
    known, asked = {}, {}
    for key, (content, what) in zip(keys, questions, strict=True):
        answer, replay = cache.get(key), cache.mode == "replay-only"
        if answer is not None and (replay or None not in answer.values()):
            known[key] = answer
        elif replay:
            about = content.get("task", {}).get("task_id", "?")
            raise FalconError(
                f"no stored answer of judge {content['backend']!r} to a question about task {about!r}",
                "run once with the cache in mode read-write, or with the judge version that made it",
            )
        else:
            asked[key] = what
    if tally is not None:
        tally.hits, tally.misses = tally.hits + len(known), tally.misses + len(asked)
    if asked:
        new = dict(zip(asked, ask(list(asked.values())), strict=True))
        cache.put(new)
        known |= new
    return [known[key] for key in keys]
