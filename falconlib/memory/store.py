"""The SQLite file of the long-term memory: schema, opening, transactions, copies, hash of its contents. Knows nothing of vectors.

Every write is one transaction, on disk when it returns (WAL, synchronous=FULL): a killed process loses nothing acknowledged.
SQLite's errors leave here as FalconError with the file and the remedy.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import quote

import numpy as np

from falconlib.errors import FalconError
from falconlib.files import write_ahead

APPLICATION, VERSION = 0xFA1C0, 2  # written into the file's header: whose file, which schema
SCHEMA = (
    "CREATE TABLE meta(key TEXT PRIMARY KEY, value TEXT NOT NULL)",
    """CREATE TABLE task(id INTEGER PRIMARY KEY AUTOINCREMENT, task_id TEXT NOT NULL UNIQUE, text_hash INTEGER NOT NULL,
       utility REAL NOT NULL DEFAULT 0, dataset TEXT NOT NULL, split TEXT NOT NULL CHECK(split = 'train'), family TEXT NOT NULL,
       description TEXT NOT NULL, tests TEXT NOT NULL, embedding BLOB NOT NULL)""",
    # Small rows apart from the embeddings: recall reads a few hundred of them for every batch.
    "CREATE INDEX task_rank ON task(id, utility, text_hash)",
    """CREATE TABLE episode(id INTEGER PRIMARY KEY AUTOINCREMENT, task INTEGER NOT NULL REFERENCES task(id) ON DELETE CASCADE,
       ast_hash TEXT NOT NULL, verified INTEGER NOT NULL, source TEXT NOT NULL, code TEXT NOT NULL, count INTEGER NOT NULL,
       status TEXT NOT NULL, error_class TEXT NOT NULL, message TEXT NOT NULL, feedback TEXT NOT NULL, reward REAL,
       step INTEGER, rollout INTEGER, run_id TEXT NOT NULL, created REAL, UNIQUE(task, ast_hash))""",
    # All that recall tells of a task in one small row, so that a neighbour costs it one page. Derived: see `summarise`.
    """CREATE TABLE summary(task INTEGER PRIMARY KEY REFERENCES task(id) ON DELETE CASCADE, task_id TEXT NOT NULL,
       description TEXT NOT NULL, code TEXT, errors TEXT NOT NULL)""",
)
# What the contents are made of. Left out: ids (only their order counts), run_id and created (where and when, not what).
TASK_COLUMNS = "task_id, text_hash, utility, dataset, split, family, description, tests, embedding"
EPISODE_COLUMNS = "ast_hash, verified, source, code, count, status, error_class, message, feedback, reward, step, rollout"
# Gold first (checked by the data set's authors), then the better rewarded, the shorter, the older.
BEST_FIRST = "source = 'gold' DESC, reward DESC, length(code), episode.id"
# The rows of `summary`: the best verified program; per class of error (class, count, latest message: max(id) picks its row). A
# plain wrong answer ("fail") is no class of error: marking it frequent would punish every wrong answer near it.
SUMMARY = f"""SELECT t.id, task_id, description,
    (SELECT code FROM episode WHERE verified AND task = t.id ORDER BY {BEST_FIRST} LIMIT 1),
    (SELECT json_group_array(json_array(error_class, n, message)) FROM
        (SELECT error_class, sum(count) AS n, message, max(id) FROM episode
         WHERE NOT verified AND error_class <> 'fail' AND task = t.id GROUP BY error_class)) FROM task AS t"""

PRIVATE = ".{}.private-"  # how the folders begin in which a file is made before it takes its name
SIDE = ("", "-wal", "-shm", "-journal", ".faiss", ".faiss.json")  # endings of the files that belong to a memory
WARM = 100_000  # [ours] tasks whose names and summaries are read at the start: about 50 MB, which the cache can hold
WAIT = 60  # seconds for which another process may hold the file
LISTED = "(SELECT value FROM json_each(?))"  # `x IN {LISTED}` with a list as its value: any number of them


class Store:
    """An open memory file. Raises FalconError when it is missing (read-only), foreign, damaged, locked or of another schema.

    meta: facts to write into a new file; `self.meta` holds those of the file.
    """

    def __init__(self, path: Path, meta: dict[str, str] | None, read_only: bool = False):
        self.path, self.read_only = Path(os.path.realpath(path)), read_only
        if meta is None and not self.path.is_file():
            raise FalconError(f"there is no memory at {self.path}", "give the path of an existing memory, or train first")
        with self.guard():
            self.db = self._connect()
            try:
                self._prepare(meta)
                self.meta = whole_meta(dict(self.db.execute("SELECT key, value FROM meta")), self.path)
            except BaseException:
                self.db.close()
                raise

    def _connect(self) -> sqlite3.Connection:
        if not self.read_only:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise FalconError(f"memory {self.path}: its folder cannot be made: {error}", "choose another path") from error
            return sqlite3.connect(self.path, timeout=WAIT, isolation_level=None)
        # Only who may write takes away, at the end, what SQLite makes beside the file. What others left there is not touched.
        uri = f"file:{quote(os.fsencode(self.path))}?mode="
        db = sqlite3.connect(uri + ("ro" if unfinished(self.path) else "rw"), uri=True, timeout=WAIT, isolation_level=None)
        try:
            db.execute("PRAGMA application_id").fetchone()
        except sqlite3.DatabaseError as error:
            db.close()
            # Where no file beside it can be made, a WAL file opens only as immutable: safe while nothing unfinished lies there.
            if "locked" in str(error) or unfinished(self.path):
                raise
            db = sqlite3.connect(f"{uri}ro&immutable=1", uri=True, isolation_level=None)
        db.execute("PRAGMA query_only = ON")
        return db

    def _prepare(self, meta: dict[str, str] | None) -> None:
        self.db.execute("PRAGMA foreign_keys = ON")
        self.db.execute("PRAGMA cache_size = -65536")
        if self.number("application_id") == 0 and not self._tables() and meta is not None and not self.read_only:
            write_ahead(self.db)
            with self.transaction():
                if not self._tables():  # else another process was faster
                    for statement in (*SCHEMA, f"PRAGMA application_id = {APPLICATION}", f"PRAGMA user_version = {VERSION}"):
                        self.db.execute(statement)
                    self.db.executemany("INSERT INTO meta VALUES (?, ?)", meta.items())
        if self.number("application_id") != APPLICATION:
            raise FalconError(f"{self.path} is an SQLite file of another program", "give another path; it was left as it is")
        schema = self.number("user_version")
        if schema != VERSION:
            remedy = self._mend() if schema < VERSION else "use the falconlib that wrote it"
            raise FalconError(f"memory {self.path} has schema {schema}, {VERSION} is expected", remedy)
        if not self.read_only:
            write_ahead(self.db)  # a snapshot that was copied into place is none yet
            self.db.execute("PRAGMA synchronous = FULL")

    def number(self, pragma: str) -> int:
        """What SQLite says of the file; "schema_version" grows with every `copy_from`, by whatever process."""
        return self.rows(f"PRAGMA {pragma}")[0][0]

    def _tables(self) -> int:
        return self.db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Turns SQLite's errors, and those of values that it cannot hold, into FalconError."""
        try:
            yield
        except (sqlite3.Error, OverflowError, UnicodeError) as error:
            text, remedy = str(error).lower(), "see the message of SQLite"
            if "full" in text or "disk i/o" in text:
                remedy = "free some disk space and repeat: what was to be written is not stored, everything before it is safe"
            elif "locked" in text:
                remedy = "another process holds the file for over a minute: wait for it or stop it"
            elif "readonly" in text or "unable to open" in text:
                copy = "copy it, with its -wal file, to a folder that you may write to"
                remedy = f"check the path and its permissions, or {copy if self.read_only else 'open it read-only'}"
            elif "not a database" in text:
                remedy = "it is no memory, or its first bytes are damaged: give another path, or restore it from a checkpoint"
            elif "malformed" in text or "no such" in text:
                remedy = self._mend()
            raise FalconError(f"memory {self.path}: {error}", remedy) from error

    def _writable(self) -> None:
        if self.read_only:
            raise FalconError(f"memory {self.path} is open read-only: nothing may be written", "open it with read_only=False")

    @contextmanager
    def transaction(self, write: bool = True) -> Iterator[sqlite3.Connection]:
        """One write: all of it is on disk afterwards, or nothing. Raises FalconError on a read-only memory.

        write=False: all reads of the block see one state of the file, whatever others write; inside another one it is part of it.
        """
        with self.guard():
            if write:
                self._writable()
            elif self.db.in_transaction:
                yield self.db
                return
            self.db.execute("BEGIN IMMEDIATE" if write else "BEGIN")
            try:
                yield self.db
                self.db.execute("COMMIT")
            except BaseException:
                if self.db.in_transaction:
                    self.db.execute("ROLLBACK")
                raise

    def rows(self, sql: str, *values: object) -> list[tuple]:
        """All rows of a query. A list value belongs to a LISTED."""
        with self.guard():
            return self.db.execute(sql, [json.dumps(v) if isinstance(v, list) else v for v in values]).fetchall()

    def summarise(self, which: str, *values: object) -> None:
        """Makes the summaries of the tasks t with the condition `which` again, inside the transaction that changed their data."""
        self.rows(f"REPLACE INTO summary {SUMMARY} WHERE {which}", *values)

    def warm(self) -> None:
        """Reads that of which recall needs single rows into SQLite's cache, in order: a batch would wait for a hundred pages."""
        for table, column in (("task", "task_id"), ("summary", "task")):
            self.rows(f"SELECT count({column}) FROM (SELECT {column} FROM {table} LIMIT {WARM})")

    def vectors(self, after: int, dim: int, chunk: int = 20_000) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(keys int64 [n, 2], embeddings float32 [n, dim]) of the tasks with id > after, in order of id, chunk by chunk."""
        sql = "SELECT id, text_hash, embedding FROM task WHERE id > ? ORDER BY id LIMIT ?"
        while found := self.rows(sql, after, chunk):
            after = found[-1][0]
            yield np.array([key for *key, _ in found], np.int64), self.matrix([e for _, _, e in found], dim)

    def matrix(self, blobs: list[bytes], dim: int) -> np.ndarray:
        """Stored embeddings as float32 [n, dim]. Raises FalconError when one has another length."""
        if not all(isinstance(blob, bytes) and len(blob) == 4 * dim for blob in blobs):
            raise self.damaged(f"an embedding is not of {dim} numbers")
        return np.frombuffer(b"".join(blobs), np.float32).reshape(-1, dim)

    def keys(self, last: int) -> np.ndarray:
        """(id, text hash) of the tasks up to `last`, int64 [n, 2] in order of id."""
        found = self.rows("SELECT id, text_hash FROM task INDEXED BY task_rank WHERE id <= ? ORDER BY id", last)
        return np.array(found, np.int64).reshape(-1, 2)

    def last(self) -> int:
        """The highest id that any task has ever had (0: none)."""
        return self.rows("SELECT coalesce(max(seq), 0) FROM sqlite_sequence WHERE name = 'task'")[0][0]

    def count(self) -> int:
        """Number of tasks."""
        return self.rows("SELECT count(*) FROM task INDEXED BY task_rank")[0][0]

    def content_hash(self) -> str:
        """SHA-256 of everything that can affect behaviour: the same operations give the same hash, on any process and day."""
        digest = hashlib.sha256(json.dumps(self.meta, sort_keys=True).encode())
        with self.transaction(write=False) as db:
            for sql in (
                f"SELECT {TASK_COLUMNS} FROM task ORDER BY id",
                f"SELECT task_id, {EPISODE_COLUMNS} FROM episode JOIN task ON task.id = episode.task ORDER BY episode.id",
            ):
                for row in db.execute(sql):
                    digest.update(repr(row).encode())
        return digest.hexdigest()

    def stats(self) -> dict:
        """Counts of tasks and programs, error classes of the kept failures, range of the utilities, size of the file."""
        tasks, mean, low, high = self.rows(
            "SELECT count(*), avg(utility), min(utility), max(utility) FROM task INDEXED BY task_rank"
        )[0]
        kinds = self.rows("SELECT CASE WHEN verified THEN source ELSE 'failed' END AS kind, count(*) FROM episode GROUP BY kind")
        errors = self.rows(
            "SELECT error_class, sum(count) AS n FROM episode WHERE NOT verified GROUP BY error_class ORDER BY n DESC, 1"
        )
        counts = {"tasks": tasks, "gold": 0, "own": 0, "failed": 0, **dict(kinds)}
        told = {"errors": dict(errors), "utility": {"mean": mean, "min": low, "max": high}}
        return {"embedder": self.meta["embedder"], **counts, **told, "file_mb": megabytes(self.path, Path(f"{self.path}-wal"))}

    def copy_to(self, path: Path) -> None:
        """An exact copy as one file, made while others may write; replaces `path` atomically. Raises FalconError when that is a
        memory in use, or one whose process was killed: SQLite would replay what lies beside it into the copy."""
        if os.path.realpath(path) == str(self.path) or beside(path):
            raise FalconError(f"{path} is a memory in use, or was one", "give another path, or move it and the files beside it")
        try:
            with TemporaryDirectory(dir=path.parent, prefix=PRIVATE.format(path.name)) as folder:
                with closing(sqlite3.connect(Path(folder) / path.name, isolation_level=None)) as target:
                    self.db.backup(target)
                    target.execute("PRAGMA journal_mode = DELETE")  # one file, nothing beside it
                os.replace(Path(folder) / path.name, path)
        except (OSError, sqlite3.Error) as error:
            told = f"cannot copy memory {self.path} to {path}: {error}"
            raise FalconError(told, "check the folder and the disk; nothing was changed") from error

    def copy_from(self, path: Path) -> None:
        """Replaces the contents by those of a copy. Raises FalconError, changing nothing, when it is of another embedder."""
        self._writable()
        end = time.monotonic() + WAIT

        def progress(status: int, *_: int) -> None:  # without it, SQLite would wait for ever
            if status != sqlite3.SQLITE_DONE and time.monotonic() > end:
                raise sqlite3.OperationalError("database is locked")

        with closing(Store(path, None, read_only=True)) as source, self.guard():
            if source.meta != self.meta:
                raise FalconError(f"snapshot {path} was made with {source.meta}, not {self.meta}", "give one of this memory")
            source.db.backup(self.db, progress=progress)
            self.db.execute("PRAGMA journal_mode = WAL")

    def damaged(self, what: str) -> FalconError:
        """The error that says so, with its remedy."""
        return FalconError(f"memory {self.path}: {what}", self._mend())

    def _mend(self) -> str:
        return f"falconlib memory verify {self.path} --repair, or restore it from a checkpoint"

    def close(self) -> None:
        """Closes the file; the last one to close folds the WAL into it."""
        with self.guard():
            self.db.close()


def whole_meta(meta: object, path: Path | str) -> dict[str, str]:
    """The facts of a memory file. Raises FalconError when one is missing or malformed."""
    texts = {key: value for key, value in meta.items() if isinstance(value, str)} if isinstance(meta, dict) else {}
    if texts == meta and {"embedder", "name"} <= set(texts) and re.fullmatch(r"[1-9][0-9]{0,6}", texts.get("dim", "")):
        return texts
    raise FalconError(f"{path} does not say with which embedder it was written: {str(meta)[:99]}", "restore it from a checkpoint")


def beside(path: Path) -> list[Path]:
    """What SQLite has left beside a file: of a process that has it open, or was killed."""
    return [side for end in ("-wal", "-journal") if (side := Path(f"{os.path.realpath(path)}{end}")).exists()]


def unfinished(path: Path) -> bool:
    """Whether anything that SQLite would replay lies beside a file."""
    with suppress(FileNotFoundError):  # gone since we looked
        return any(side.stat().st_size for side in beside(path))
    return False


def megabytes(*paths: Path) -> float | None:
    """Size of the files that exist, in MiB; None when none does."""
    sizes = [path.stat().st_size for path in paths if path.exists()]
    return round(sum(sizes) / 2**20, 2) if sizes else None
