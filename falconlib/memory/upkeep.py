"""Looking after a memory file: find and mend damage, export to Parquet and back. Not used while training."""

from __future__ import annotations

import json
import os
import sqlite3
from contextlib import closing
from pathlib import Path

import numpy as np

from falconlib.errors import FalconError
from falconlib.memory._faiss import VectorIndex
from falconlib.memory.digest import text_hash
from falconlib.memory.embed import Embedder
from falconlib.memory.long_term import LongTermMemory
from falconlib.memory.store import EPISODE_COLUMNS, TASK_COLUMNS, Store

TASK, EPISODE = f"id, {TASK_COLUMNS}", f"id, task, {EPISODE_COLUMNS}, run_id, created"
COLUMNS = [f"task_{c}" for c in TASK.split(", ")] + [f"episode_{c}" for c in EPISODE.split(", ")]  # of an exported file


def verify(path: Path | str, *, repair: bool = False, embedder: Embedder | None = None) -> list[str]:
    """What is wrong with the memory at `path`, one line each; empty when it is sound.

    repair: a damaged file is replaced by a copy of its readable rows (the old one stays as `path`.damaged), wrong embeddings are
    made again (embedder: None takes the one that the file names), the index is rebuilt. Raises FalconError when there is no
    memory at `path`, or too little of it to be mended.
    """
    path = Path(path)
    found = _damage(path)
    if found and repair:
        found.append(_salvage(path))
    if repair or not found:
        with LongTermMemory(path, embedder, read_only=not repair) as memory:
            found += _wrong_tasks(memory, repair) + _wrong_index(memory, repair)
    return found


def _damage(path: Path) -> list[str]:
    """What SQLite finds in the file."""
    try:
        with closing(Store(path, None, read_only=True)) as store:
            lines = [line for (line,) in store.rows("PRAGMA integrity_check") if line != "ok"]
            return lines + [
                f"{table} {row} belongs to no {parent}" for table, row, parent, _ in store.rows("PRAGMA foreign_key_check")
            ]
    except FalconError as error:
        if "--repair" not in error.remedy:
            raise  # missing, or no memory at all: nothing of ours to be mended
        return [error.message]


def _wrong_tasks(memory: LongTermMemory, repair: bool) -> list[str]:
    """Tasks whose embedding or text hash does not belong to their description."""
    wrong = {}
    for i, task_id, description, digest, blob in memory._store.rows(
        "SELECT id, task_id, description, text_hash, embedding FROM task"
    ):
        whole = len(blob) == 4 * memory.dim and abs(np.linalg.norm(np.frombuffer(blob, np.float32)) - 1) < 1e-3
        if not whole or digest != text_hash(description):
            wrong[i] = (task_id, description)
    if repair and wrong:
        vectors = memory.encode([description for _, description in wrong.values()])
        with memory._store.transaction() as db:
            rows = [(v.tobytes(), text_hash(d), i) for v, (i, (_, d)) in zip(vectors, wrong.items(), strict=True)]
            db.executemany("UPDATE task SET embedding = ?, text_hash = ? WHERE id = ?", rows)
        memory._search.path.unlink(missing_ok=True)
    return [f"the embedding of task {task_id!r} is damaged" for task_id, _ in wrong.values()]


def _wrong_index(memory: LongTermMemory, repair: bool) -> list[str]:
    """An index file that is there but cannot be used."""
    search = memory._search
    if not search.path.exists() or VectorIndex(memory.dim, search.flat_limit).load(search.path, memory._store.stamp):
        return []
    if repair:
        search.path.unlink()
        search.sync()
        search.save()
    return [f"the index {search.path} is damaged or of another memory (it is rebuilt at the next recall)"]


def _salvage(path: Path) -> str:
    """Copies every readable row to a fresh file, which takes the place of the damaged one."""
    fresh, old = Path(f"{path}.mended"), Path(f"{path}.damaged")
    fresh.unlink(missing_ok=True)
    unreadable = 0
    try:
        with closing(sqlite3.connect(path)) as source:
            source.execute("PRAGMA writable_schema = ON")  # lets SQLite open a file that is shorter than its header says
            meta = dict(source.execute("SELECT key, value FROM meta"))
            tops = dict(source.execute("SELECT name, seq FROM sqlite_sequence"))
            with closing(Store(fresh, meta)) as target, target.transaction() as db:
                tasks = set()
                for table, columns in (("task", TASK), ("episode", EPISODE)):
                    for i in range(1, tops.get(table, 0) + 1):
                        try:
                            row = source.execute(f"SELECT {columns} FROM {table} NOT INDEXED WHERE id = ?", (i,)).fetchone()
                            if row and (table == "task" or row[1] in tasks):
                                db.execute(f"INSERT INTO {table}({columns}) VALUES ({', '.join('?' * len(row))})", row)
                                tasks.add(i) if table == "task" else None
                        except sqlite3.DatabaseError:
                            unreadable += 1
    except sqlite3.DatabaseError as error:
        raise FalconError(
            f"memory {path} cannot be mended: {error}", "restore it from a checkpoint, or start a new memory"
        ) from error
    for suffix in ("-wal", "-shm", ""):
        if Path(f"{path}{suffix}").exists():
            os.replace(f"{path}{suffix}", f"{old}{suffix}")
    os.replace(fresh, path)
    return f"{unreadable} rows could not be read; the damaged file is kept as {old}"


def export(memory: LongTermMemory, path: Path | str) -> None:
    """Writes everything to one Parquet file: one row per episode with its task's columns; a task without episodes has one row."""
    import pyarrow
    from pyarrow import parquet

    columns = [f"t.{c}" for c in TASK.split(", ")] + [f"e.{c}" for c in EPISODE.split(", ")]
    rows = memory._store.rows(f"SELECT {', '.join(columns)} FROM task t LEFT JOIN episode e ON e.task = t.id ORDER BY t.id, e.id")
    values = zip(*rows, strict=True) if rows else [()] * len(COLUMNS)
    table = pyarrow.table({name: list(column) for name, column in zip(COLUMNS, values, strict=True)})
    temporary = Path(f"{path}.tmp")
    try:
        parquet.write_table(
            table.replace_schema_metadata({"falconlib": json.dumps(memory._store.meta)}), temporary, compression="zstd"
        )
        os.replace(temporary, path)
    except OSError as error:
        raise FalconError(f"export to {path} failed: {error}", "check the folder and the disk") from error
    finally:
        temporary.unlink(missing_ok=True)


def import_export(source: Path | str, path: Path | str) -> None:
    """Makes a new memory at `path` from a file of `export`: the same contents, by content hash. Raises FalconError, leaving
    nothing behind, when `path` exists, `source` is no such file, or the disk is full."""
    from pyarrow import ArrowException, parquet

    if Path(path).exists():
        raise FalconError(f"{path} exists: an import makes a new memory", "give another path")
    try:
        table = parquet.read_table(source)
        meta = json.loads(table.schema.metadata[b"falconlib"])
        rows = list(zip(*(table[name].to_pylist() for name in COLUMNS), strict=True))
    except (OSError, ArrowException, KeyError, TypeError, ValueError) as error:
        raise FalconError(
            f"{source} is no exported memory: {type(error).__name__}: {error}", "give a file that `falconlib memory export` wrote"
        ) from error
    width = len(TASK.split(", "))
    tasks = {row[0]: row[:width] for row in rows}
    episodes = sorted(row[width:] for row in rows if row[width] is not None)
    try:
        with closing(Store(Path(path), meta)) as store, store.transaction() as db:
            for name, columns, values in (("task", TASK, list(tasks.values())), ("episode", EPISODE, episodes)):
                db.executemany(f"INSERT INTO {name}({columns}) VALUES ({', '.join('?' * len(columns.split(', ')))})", values)
    except FalconError:
        for suffix in ("", "-wal", "-shm"):
            Path(f"{path}{suffix}").unlink(missing_ok=True)
        raise
