"""Long-term memory: what was tried on the training tasks and how it ended, recalled by the similarity of task descriptions.

METHOD's M_L. SQLite is the truth (store.py); a vector index with one vector per task is derived from it (recall.py), episodes
are joined to tasks by SQL, so eight neighbours are eight tasks. Only tasks of split "train" enter.
Prompts and rewards are made elsewhere.
"""

from __future__ import annotations

import json
import math
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from pathlib import Path

import numpy as np

from falconlib.errors import FalconError
from falconlib.memory.digest import clean, program_hash, text_hash
from falconlib.memory.embed import Embedder, get_embedder
from falconlib.memory.recall import TOP, Neighbour, Recall, Searcher
from falconlib.memory.store import BEST_FIRST, EPISODE_COLUMNS, LISTED, TASK_COLUMNS, Store, megabytes
from falconlib.records import INFRA_ERROR, Episode, Feedback, Task, from_dict, from_json, to_dict, to_json

KEPT = 4  # [ours] verified programs, and recent failures, kept per task


class LongTermMemory:
    """The memory in the file `path` (made when missing, unless read_only); its index lies beside it as `path`.faiss.

    embedder: None takes the one that the file names (`embedder_name`; `policy.states` has it when that is "policy").
    run_id, clock: provenance of new episodes; they affect nothing, and are no part of the content hash.
    flat_limit: tasks up to which search is exact; max_tasks: bound, beyond which the least useful, then the oldest tasks go.
    Raises FalconError when the file is foreign, damaged, or written with another embedder.
    """

    def __init__(
        self,
        path: Path | str,
        embedder: Embedder | None = None,
        *,
        read_only: bool = False,
        run_id: str = "",
        clock: Callable[[], float] | None = None,
        flat_limit: int = 50_000,
        max_tasks: int = 1_000_000,
    ):
        self.path, self._embedder, self._run_id, self._clock, self._max_tasks = Path(path), embedder, run_id, clock, max_tasks
        meta = {"embedder": embedder.fingerprint, "name": embedder.name, "dim": str(embedder.dim)} if embedder else None
        self._store = Store(self.path, meta, read_only)
        if meta and meta != self._store.meta:
            self._store.close()
            differ = [f"{key} {self._store.meta[key]!r}, not {meta[key]!r}" for key in meta if meta[key] != self._store.meta[key]]
            raise FalconError(f"memory {path} was written with {'; '.join(differ)}", "use the same embedder, or another path")
        self.dim, self.embedder_name = int(self._store.meta["dim"]), self._store.meta["name"]
        self._search = Searcher(self._store, self.dim, flat_limit)

    def __enter__(self) -> LongTermMemory:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Saves the index if it has grown, and closes the file."""
        try:
            self._search.save()
        finally:
            self._store.close()

    # -- remembering ---------------------------------------------------------------------------------------------------

    def add_tasks(self, tasks: Sequence[Task]) -> None:
        """Registers training tasks; those already there are left alone. Raises FalconError, storing nothing, on a malformed task,
        one of another split, one known by the same id with another description, and on more than the memory may hold."""
        _check(Task, tasks)
        names = sorted({task.task_id for task in tasks})
        if len(names) > self._max_tasks:
            many = f"{len(names)} tasks at once are more than the {self._max_tasks} that memory {self.path} may hold"
            raise FalconError(many, "give fewer, or raise max_tasks")
        rows, fresh = {}, self._fresh(tasks)
        if not fresh:
            return
        for t, v in zip(fresh, self.encode([task.prompt for task in fresh]), strict=True):
            texts = map(clean, (t.dataset, t.split, t.family, t.prompt, json.dumps(t.tests)))
            rows[t.task_id] = (t.task_id, text_hash(t.prompt), 0.0, *texts, v.tobytes())
        with self._store.transaction() as db:
            left = [rows[task.task_id] for task in self._fresh(fresh)]  # another process may have stored some since we looked
            db.executemany(f"INSERT INTO task({TASK_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", left)
            excess = self._store.count() - self._max_tasks
            if excess > 0:
                others = f"id NOT IN (SELECT id FROM task WHERE task_id IN {LISTED})"  # what comes in does not push itself out
                oldest = f"SELECT id FROM task INDEXED BY task_rank WHERE {others} ORDER BY utility, id LIMIT ?"
                db.execute(f"DELETE FROM task WHERE id IN ({oldest})", (json.dumps(names), excess))
            self._store.summarise(f"task_id IN {LISTED}", [row[0] for row in left])

    def _fresh(self, tasks: Sequence[Task]) -> list[Task]:
        """Those of the tasks that are not stored, each once. Raises FalconError on one that may not be."""
        known, fresh = {task_id: digest for task_id, (digest,) in self._lookup(tasks, "text_hash").items()}, []
        for task in tasks:
            if task.split != "train":
                raise FalconError(
                    f"{task.task_id!r} is of split {task.split!r}: memory holds training tasks only", "leave it out"
                )
            if not task.task_id.isprintable():
                raise FalconError(f"task id {task.task_id!r} holds characters that cannot be shown", "give it another one")
            if task.task_id not in known:
                known[task.task_id] = text_hash(task.prompt)
                fresh.append(task)
            elif known[task.task_id] != text_hash(task.prompt):
                raise FalconError(f"memory knows {task.task_id!r} with another description", "start a new memory for new data")
        return fresh

    def add_golds(self, tasks: Sequence[Task]) -> None:
        """Stores the gold program, where there is one, of registered tasks as verified episode of source "gold". Idempotent."""
        _check(Task, tasks)
        feedback = Feedback("pass", 1.0, 0)
        self._remember([(t.task_id, t.gold, "gold", feedback, None, None, None) for t in tasks if t.gold is not None])

    def add_episodes(self, episodes: Sequence[Episode]) -> None:
        """Stores digests: per task at most 4 verified and the 4 latest failed programs, one row per distinct syntax tree (a
        repeated one counts up; one that passed once stays verified). Of the sandbox's report the feedback is kept: the report
        itself is long, and its times and outputs differ from run to run. What has no feedback, or INFRA_ERROR, is not stored:
        nothing is known. Nor is what belongs to an evicted task. Raises FalconError, storing nothing, on a malformed episode, a
        reward that is not finite, and, as long as no task has gone, on one never registered."""
        _check(Episode, episodes)
        known = [e for e in episodes if e.feedback is not None and e.feedback.status != INFRA_ERROR]
        self._remember(
            [(e.task_id, e.code, "own", e.feedback, e.reward.total if e.reward else None, e.step, e.rollout) for e in known]
        )

    def _remember(self, digests: list[tuple]) -> None:
        """digests: (task id, code, source, feedback, reward, step, rollout) each."""
        for task_id, *_, reward, _, _ in digests:
            _check_number("reward", reward, task_id)
        hashes = [program_hash(code) for _, code, *_ in digests]
        created = self._clock() if self._clock else None
        with self._store.transaction() as db:
            names = json.dumps(sorted({task_id for task_id, *_ in digests}))
            ids = dict(db.execute(f"SELECT task_id, id FROM task WHERE task_id IN {LISTED}", (names,)).fetchall())
            for (task_id, *digest), program in zip(digests, hashes, strict=True):
                if task_id in ids:
                    self._upsert(db, (ids[task_id], program), digest, created)
                else:
                    self._must_be_evicted(db, task_id)
            kept_first = f"CASE WHEN verified THEN 0 ELSE -id END, {BEST_FIRST}"
            db.execute(
                f"""DELETE FROM episode WHERE id IN (SELECT id FROM (
                        SELECT id, row_number() OVER (PARTITION BY task, verified ORDER BY {kept_first}) AS place
                        FROM episode WHERE task IN {LISTED}) WHERE place > {KEPT})""",
                (json.dumps(sorted(ids.values())),),
            )
            self._store.summarise(f"t.id IN {LISTED}", sorted(ids.values()))

    def _must_be_evicted(self, db: sqlite3.Connection, task_id: str) -> None:
        """Passes over a task that is not there when tasks have gone; raises FalconError when none has."""
        if not db.execute("SELECT max(seq) > (SELECT count(*) FROM task) FROM sqlite_sequence WHERE name = 'task'").fetchone()[0]:
            raise FalconError(f"memory knows no task {task_id!r}", "register training tasks with add_tasks first")

    def _upsert(self, db: sqlite3.Connection, key: tuple[int, str], digest: list, created: float | None) -> None:
        """One digest: a new program, or one more sight of a known one. key: (task row, program hash)."""
        code, source, feedback, reward, step, rollout = digest
        old = db.execute("SELECT verified, source, count FROM episode WHERE task = ? AND ast_hash = ?", key).fetchone()
        verified, old_source, count = old or (0, "", 0)
        passed = feedback.status == "pass"
        if source == old_source == "gold":
            return
        if verified and source != "gold":  # a flaky failure takes nothing back; a better reward counts
            better = "reward = max(coalesce(reward, ?1), coalesce(?1, reward))"
            reward = reward if passed and old_source == "own" else None
            db.execute(f"UPDATE episode SET count = count + 1, {better} WHERE task = ?2 AND ast_hash = ?3", (reward, *key))
            return
        told = map(clean, (feedback.status, feedback.error_class, feedback.message, to_json(feedback)))
        row = (*key, passed, source, clean(code), count + 1, *told, reward, step, rollout, self._run_id, created)
        # REPLACE gives a new, higher id: ids are the order of last sight.
        db.execute(f"REPLACE INTO episode(task, {EPISODE_COLUMNS}, run_id, created) VALUES ({', '.join('?' * len(row))})", row)

    def update_utility(self, targets: Mapping[str, float | None], rate: float) -> None:
        """u <- (1 - rate) u + rate * target for each task id (METHOD section 5). None is unknown: u stays; evicted tasks are
        passed over. Raises FalconError, changing nothing, on a rate outside [0, 1], a target that is no finite number and, as
        long as no task has gone, on one never registered."""
        if not (isinstance(rate, Real) and 0 <= rate <= 1):
            raise FalconError(f"utility rate {rate!r} is no number from 0 to 1", "set long_term.utility_rate")
        known = {task_id: target for task_id, target in targets.items() if target is not None}
        for task_id, target in known.items():
            _check_number("utility target", target, task_id)
        with self._store.transaction() as db:
            for task_id, target in known.items():
                sql = "UPDATE task SET utility = (1 - ?1) * utility + ?1 * ?2 WHERE task_id = ?3"
                if not db.execute(sql, (float(rate), float(target), task_id)).rowcount:
                    self._must_be_evicted(db, task_id)

    # -- recalling -----------------------------------------------------------------------------------------------------

    def recall(self, tasks: Sequence[Task], k: int) -> list[Recall]:
        """One Recall per task: of its 8 most similar admissible tasks the k best by cosine + utility, ties by age.

        Never the task itself, one with the same description, or one that `blocklist` holds back. An empty memory recalls nothing.
        Raises FalconError unless k is at least 1.
        """
        hashes = [text_hash(t.prompt) for t in tasks]
        with self._store.transaction(write=False):  # what is found must still be there when it is described
            index, own = self._search.sync(), self._lookup(tasks, "id")
            places = np.searchsorted(index.keys[:, 0], [i for (i,) in own.values()])
            places = places[places < len(index)]  # in a damaged file there may be tasks that the index cannot know
            vectors = dict(zip(index.keys[places, 1].tolist(), index.rows(places), strict=True))
            missing = {h: t.prompt for t, h in zip(tasks, hashes, strict=True) if h not in vectors}
            vectors |= zip(missing, self.encode(list(missing.values())), strict=True)
            queries = np.array([vectors[h] for h in hashes], np.float32).reshape(-1, self.dim)
            ids = [own[t.task_id][0] if t.task_id in own else None for t in tasks]
            return self._search.describe(self._search.nearest(queries, ids, hashes, k))

    def search(self, text: str, k: int = TOP) -> list[Neighbour]:
        """The k stored tasks that fit a free text best, for people. Raises FalconError unless k is at least 1."""
        query = self.encode([text])
        with self._store.transaction(write=False):
            return list(self._search.describe(self._search.nearest(query, [None], [None], k))[0].neighbours)

    def blocklist(self, tasks: Sequence[Task]) -> list[str]:
        """From now on, training tasks with a cosine above 0.97 to one of these evaluation tasks are never recalled, those added
        later too. Replaces an earlier list; is not stored. Returns the ids of the tasks held back."""
        vectors = self.encode([t.prompt for t in tasks])
        with self._store.transaction(write=False):
            blocked = self._search.block(vectors)
            return [name for (name,) in self._store.rows(f"SELECT task_id FROM task WHERE id IN {LISTED} ORDER BY id", blocked)]

    def positives(self, task_ids: Sequence[str]) -> list[tuple[str, str, str]]:
        """(task id, code, source) of the verified programs of these tasks, source "gold" or "own"; best first within a task."""
        return self._episodes("code, source", f"verified AND task_id IN {LISTED} ORDER BY task.id, {BEST_FIRST}", task_ids)

    def failures(self, task_ids: Sequence[str]) -> list[tuple[str, str, Feedback]]:
        """(task id, code, feedback with error class and lines) of the kept failures of these tasks, latest first per task."""
        rows = self._episodes(
            "code, feedback", f"NOT verified AND task_id IN {LISTED} ORDER BY task.id, episode.id DESC", task_ids
        )
        return [(task_id, code, from_json(Feedback, feedback)) for task_id, code, feedback in rows]

    # -- keeping -------------------------------------------------------------------------------------------------------

    def snapshot(self, path: Path | str) -> None:
        """An exact copy of the memory as one file, for a checkpoint; replaces `path` atomically. Raises FalconError, leaving that
        alone, where a memory is in use, or was when its process was killed."""
        self._store.copy_to(Path(path))

    def restore(self, path: Path | str) -> None:
        """Replaces the contents by those of a snapshot. Raises FalconError, changing nothing, on a file of another kind."""
        self._store.copy_from(Path(path))

    def content_hash(self) -> str:
        """SHA-256 of all that affects behaviour: equal before and after an evaluation, equal for the same operations."""
        return self._store.content_hash()

    def stats(self) -> dict:
        """Counts, errors, utilities and sizes: what `falconlib memory stats` shows. A size is None while there is no file."""
        return self._store.stats() | {"index_mb": megabytes(self._search.path)}

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [n, d] of the memory's embedder. Raises FalconError when it gives anything but unit vectors of length d."""
        if not texts:
            return np.empty((0, self.dim), np.float32)
        self._embedder = self._embedder or get_embedder(self.embedder_name)
        vectors = np.asarray(self._embedder.encode([clean(text) for text in texts]), np.float32)
        given, expected = (self._embedder.fingerprint, vectors.shape), (self._store.meta["embedder"], (len(texts), self.dim))
        if given != expected:
            raise FalconError(f"memory {self.path}: vectors of {expected} expected, {given} given", "use the same embedder")
        if not np.allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-3):
            raise FalconError(f"embedder {self._embedder.name!r} gave a vector whose length is not 1", "scale it: embed.unit")
        return vectors

    def _lookup(self, tasks: Sequence[Task], columns: str) -> dict[str, list]:
        """task id -> these columns of the tasks that are stored."""
        names = sorted({t.task_id for t in tasks})
        found = self._store.rows(f"SELECT task_id, {columns} FROM task WHERE task_id IN {LISTED}", names)
        return {task_id: row for task_id, *row in found}

    def _episodes(self, columns: str, condition: str, task_ids: Sequence[str]) -> list[tuple]:
        sql = f"SELECT task_id, {columns} FROM episode JOIN task ON task.id = episode.task WHERE {condition}"
        return self._store.rows(sql, list(task_ids))


def _check(kind: type, records: Sequence) -> None:
    """Raises FalconError unless every record is a `kind` with values of the right types."""
    try:
        for record in records:
            from_dict(kind, to_dict(record))
    except TypeError as error:
        raise FalconError(f"not a {kind.__name__}: {error}", "see falconlib/records.py for its fields") from error


def _check_number(what: str, value: object, task_id: str) -> None:
    """Raises FalconError on what is neither a finite number nor None."""
    if value is not None and not (isinstance(value, Real) and math.isfinite(value)):
        raise FalconError(f"{what} {value!r} of task {task_id!r} is no finite number", "give None when it is unknown")
