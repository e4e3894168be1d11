"""Looking after a memory file: find and mend damage, export to Parquet and back. Not used while training."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import shutil
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from falconlib.errors import FalconError
from falconlib.memory._faiss import read
from falconlib.memory.digest import clean, program_hash, text_hash
from falconlib.memory.embed import Embedder
from falconlib.memory.long_term import LongTermMemory
from falconlib.memory.store import EPISODE_COLUMNS, PRIVATE, SCHEMA, SIDE, SUMMARY, TASK_COLUMNS, Store, beside, whole_meta
from falconlib.records import Feedback, from_json

TASK, EPISODE = f"id, {TASK_COLUMNS}", f"id, task, {EPISODE_COLUMNS}, run_id, created"
TABLES = {"task": TASK, "episode": EPISODE}
COLUMNS = [f"task_{c}" for c in TASK.split(", ")] + [f"episode_{c}" for c in EPISODE.split(", ")]  # of an exported file


def verify(path: Path | str, *, repair: bool = False, embedder: Embedder | None = None) -> list[str]:
    """What is wrong with the memory at `path`, one line each; empty when it is sound. An index that is only out of date is.

    repair: a damaged file is replaced by a copy of its sound rows (the old one stays as `path`.damaged, or with a number behind
    that), where rewards that are no numbers become unknown and hashes are made again; wrong embeddings are made again (embedder:
    None takes the one that the file names); an index that does not fit is rebuilt; what killed processes left beside it over an
    hour ago is removed. Raises FalconError when there is no memory at `path`, too little of it to be mended, or another process
    has a damaged one open.
    """
    path = Path(os.path.realpath(path))  # mends what a link points to, not the link
    found = _damage(path)
    if found and repair:
        found.append(_salvage(path))
    if repair or not found:
        with LongTermMemory(path, embedder, read_only=not repair) as memory:
            found += _wrong_tasks(memory, repair) + _wrong_index(memory, repair)
    ours = f"{re.escape(PRIVATE.format(path.name))}.*|{re.escape(f'.{path.name}.faiss')}(\\.json)?\\.[a-z0-9_]{{8}}"
    for left in path.parent.iterdir() if repair else ():
        if re.fullmatch(ours, left.name) and time.time() - left.stat().st_mtime > 3600:
            shutil.rmtree(left) if left.is_dir() else left.unlink()
    return found


def _damage(path: Path) -> list[str]:
    """What SQLite finds in the file, objects that it lacks, and programs that cannot be used."""
    try:
        with closing(Store(path, None, read_only=True)) as store:
            lines = [line for (line,) in store.rows("PRAGMA integrity_check") if line != "ok"]
            lines += [f"{table} {row} belongs to no {parent}" for table, row, parent, _ in store.rows("PRAGMA foreign_key_check")]
            there = {sql for (sql,) in store.rows("SELECT sql FROM sqlite_master")}
            lines += [f"{sql.partition('(')[0][7:]} is missing or altered" for sql in SCHEMA if sql not in there]
            wrong = [row[0] for row in store.rows(f"SELECT {EPISODE} FROM episode") if _mended(row) != row]
            lines += [f"program {i} is damaged, or another version of Python stored it" for i in wrong]
            if store.last() < store.rows("SELECT coalesce(max(id), 0) FROM task")[0][0]:
                lines.append("the count of ids is lost: new tasks would take those of others")
            if not lines:  # else the summaries cannot be made, or are made again anyway
                stale = store.rows(f"SELECT task_id FROM ({SUMMARY} EXCEPT SELECT * FROM summary)")
                lines = [f"the summary of task {name!r} is damaged" for (name,) in stale]
            return lines
    except FalconError as error:
        if "--repair" not in error.remedy:
            raise  # missing, or no memory at all: nothing of ours to be mended
        return [error.message]


def _mended(row: tuple) -> tuple | None:
    """A row of EPISODE with what its program and feedback say made again, and None for a number that is none; None where
    program, feedback or source are lost."""
    values = dict(zip(EPISODE.split(", "), row, strict=True))
    try:
        told = from_json(Feedback, values["feedback"])
        values |= {name: clean(getattr(told, name)) for name in ("status", "error_class", "message")}
        values |= {"ast_hash": program_hash(values["code"]), "verified": int(told.status == "pass")}
    except (FalconError, TypeError, AttributeError):
        return None
    if values["source"] not in ("gold", "own"):
        return None
    whole = {name: isinstance(values[name], int) for name in ("count", "step", "rollout")}
    values["count"] = max(values["count"], 1) if whole.pop("count") else 1  # it was met once at least
    values |= {name: None for name, sound in whole.items() if not sound}
    odd = [name for name in ("reward", "created") if not (isinstance(values[name], float) and math.isfinite(values[name]))]
    return tuple((values | dict.fromkeys(odd)).values())


def _wrong_tasks(memory: LongTermMemory, repair: bool) -> list[str]:
    """Tasks whose embedding or text hash does not belong to their description, or whose utility is no number."""
    wrong = {}
    for i, task_id, description, digest, blob, utility in memory._store.rows(
        "SELECT id, task_id, description, text_hash, embedding, utility FROM task"
    ):
        whole = (
            isinstance(blob, bytes)
            and isinstance(description, str)
            and len(blob) == 4 * memory.dim
            and abs(np.linalg.norm(np.frombuffer(blob, np.float32).astype(float)) - 1) < 1e-3
        )
        finite = isinstance(utility, float) and math.isfinite(utility)
        if not (whole and finite and digest == text_hash(description)):
            wrong[i] = (task_id, str(description), utility if finite else 0.0)
    if repair and wrong:
        vectors = memory.encode([description for _, description, _ in wrong.values()])
        with memory._store.transaction() as db:
            rows = [(v.tobytes(), text_hash(d), u, i) for v, (i, (_, d, u)) in zip(vectors, wrong.items(), strict=True)]
            db.executemany("UPDATE task SET embedding = ?, text_hash = ?, utility = ? WHERE id = ?", rows)
            # Whoever has it open then reads the vectors again, and does not save those that it holds.
            db.execute(f"PRAGMA schema_version = {memory._store.number('schema_version') + 1}")
    return [f"the embedding or utility of task {task_id!r} is damaged" for task_id, *_ in wrong.values()]


def _wrong_index(memory: LongTermMemory, repair: bool) -> list[str]:
    """An index file that is not whole, or that has other vectors than the table for the same tasks."""
    search = memory._search
    if not search.path.exists():
        return []
    damaged, index = not read(search.path, memory._store.meta["embedder"]), search.load()
    if index:
        damaged = not all(index.holds(keys[:, 0], vectors) for keys, vectors in memory._store.vectors(0, memory.dim))
    if repair and (damaged or not index):
        try:
            search.path.unlink()
        except OSError as error:
            raise FalconError(f"index {search.path} cannot be removed: {error}", "move it away: it is rebuilt then") from error
        search.reset()
        search.sync()
        search.save()
    return [f"the index {search.path} is damaged (it is rebuilt at the next recall)"] if damaged else []


def _salvage(path: Path) -> str:
    """Copies every sound row to a fresh file, which takes the place of the damaged one."""
    old = next(name for n in itertools.count(1) if not (name := Path(f"{path}.damaged" + f"-{n}" * (n > 1))).exists())
    try:
        with TemporaryDirectory(dir=path.parent, prefix=PRIVATE.format(path.name)) as folder:
            fresh, lost = Path(folder) / path.name, 0
            with closing(sqlite3.connect(path, timeout=1)) as source:
                source.execute("PRAGMA locking_mode = EXCLUSIVE")  # nobody else may have it open
                source.execute("PRAGMA writable_schema = ON")  # lets SQLite open a file that is shorter than its header says
                meta = dict(source.execute("SELECT key, value FROM meta"))
                with closing(Store(fresh, meta)) as target, target.transaction() as db:
                    lost = sum(not _copy(row, table, db) for table in TABLES for row in _rows(source, table))
                    target.summarise("TRUE")
            os.link(path, old)  # from here on there is a whole file at every moment
            Path(f"{path}-shm").unlink(missing_ok=True)  # holds nothing of its own
            if Path(f"{path}-wal").exists():
                os.replace(f"{path}-wal", f"{old}-wal")
            os.replace(fresh, path)
    except (OSError, sqlite3.Error) as error:
        remedy = "restore it from a checkpoint, or start a new memory"
        if "locked" in str(error):
            remedy = "another process has it open: stop that one first"
        raise FalconError(f"memory {path} cannot be mended: {error}", remedy) from error
    return f"{lost} rows could not be read; the damaged file is kept as {old}"


def _rows(source: sqlite3.Connection, table: str) -> Iterator[tuple | None]:
    """The rows of a damaged table in order of id; None for one that cannot be read."""
    top = 0
    for sql in (f"SELECT max(id) FROM {table} NOT INDEXED", f"SELECT seq FROM sqlite_sequence WHERE name = '{table}'"):
        try:
            (top,) = source.execute(sql).fetchone() or (0,)
            break
        except sqlite3.DatabaseError:  # the end of the table is damaged: as many as there have ever been
            continue
    for i in range(1, min(int(top or 0), 10**8) + 1):
        try:
            row = source.execute(f"SELECT {TABLES[table]} FROM {table} NOT INDEXED WHERE id = ?", (i,)).fetchone()
        except sqlite3.DatabaseError:
            yield None
        else:
            yield from [row] if row else []


def _copy(row: tuple | None, table: str, db: sqlite3.Connection) -> bool:
    """Whether a row was sound, or could be mended, and has been stored."""
    row = _mended(row) if row is not None and table == "episode" else row
    if row is None:
        return False
    try:
        db.execute(f"INSERT INTO {table}({TABLES[table]}) VALUES ({', '.join('?' * len(row))})", row)
    except sqlite3.IntegrityError:  # of a task that is lost, or with a damaged value
        return False
    return True


@contextmanager
def _new_file(path: Path | str, memory: Path | None = None) -> Iterator[Path]:
    """A private file that becomes `path` when the block ends; otherwise nothing is left. Raises FalconError when there is a
    file at `path`, whoever made it and when, or one beside it that SQLite would replay into it, and when that name belongs to
    the files of `memory`."""
    path = Path(path)
    taken = FalconError(f"{path} exists: only a new file is written", "give another path")
    if os.path.lexists(path) or (memory and os.path.realpath(path) in [f"{os.path.realpath(memory)}{end}" for end in SIDE]):
        raise taken
    if left := beside(path):
        raise FalconError(f"{left[0]} is what a killed process left of a memory", "give another path, or move it away")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=path.parent, prefix=PRIVATE.format(path.name)) as folder:
            temporary = Path(folder) / path.name
            yield temporary
            os.link(temporary, path)  # fails, unlike a rename, where another process was faster
    except FileExistsError as error:
        raise taken from error
    except FalconError as error:
        raise FalconError(error.message.replace(str(temporary), str(path)), error.remedy) from error
    except OSError as error:
        raise FalconError(f"cannot write {path}: {error}", "check the folder and the disk") from error


def export(memory: LongTermMemory, path: Path | str) -> None:
    """Writes everything to one new Parquet file: one row per episode with its task's columns; a task without episodes has one
    row. Raises FalconError, leaving everything as it was, when there is a file at `path` and when the disk is full."""
    import pyarrow
    from pyarrow import parquet

    columns = [f"t.{c}" for c in TASK.split(", ")] + [f"e.{c}" for c in EPISODE.split(", ")]
    rows = memory._store.rows(f"SELECT {', '.join(columns)} FROM task t LEFT JOIN episode e ON e.task = t.id ORDER BY t.id, e.id")
    values = zip(*rows, strict=True) if rows else [()] * len(COLUMNS)
    try:
        table = pyarrow.table({name: list(column) for name, column in zip(COLUMNS, values, strict=True)})
    except pyarrow.ArrowException as error:
        raise memory._store.damaged(f"a value cannot be exported: {error}") from error
    with _new_file(path, memory.path) as temporary:
        parquet.write_table(
            table.replace_schema_metadata({"falconlib": json.dumps(memory._store.meta)}), temporary, compression="zstd"
        )


def import_export(source: Path | str, path: Path | str) -> None:
    """Makes a new memory at `path` from a file of `export`: the same contents, by content hash. Raises FalconError, leaving
    nothing behind, when `path` exists, `source` is no such file or a damaged one, or the disk is full."""
    from pyarrow import ArrowException, parquet

    width = len(TASK.split(", "))
    with _new_file(path) as temporary:
        try:
            table = parquet.read_table(source)
            meta = whole_meta(json.loads(table.schema.metadata[b"falconlib"]), source)
            rows = list(zip(*(table[name].to_pylist() for name in COLUMNS), strict=True))
            tasks = {row[0]: row[:width] for row in rows}
            programs = [row[width:] for row in rows if row[width] is not None]
            episodes = sorted(_mended(row) or row for row in programs)  # another version of Python may have made the hashes
        except (OSError, ArrowException, KeyError, TypeError, ValueError) as error:
            told = f"{source} is no exported memory: {type(error).__name__}: {error}"
            raise FalconError(told, "give a file that `falconlib memory export` wrote") from error
        with closing(Store(temporary, meta)) as store, store.transaction() as db:
            for name, columns, values in (("task", TASK, list(tasks.values())), ("episode", EPISODE, episodes)):
                db.executemany(f"INSERT INTO {name}({columns}) VALUES ({', '.join('?' * len(columns.split(', ')))})", values)
            store.summarise("TRUE")
        if found := verify(temporary):
            raise FalconError(f"{source} holds a damaged memory: {found[0]}", "export it again, from a sound one")
