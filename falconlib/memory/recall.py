"""Nearest tasks of the long-term memory: keeps the index in step with the table, searches it, joins what is known of the hits.

Cosine, the top 8, re-ranked by utility; the frequent errors for R_lt. Writes nothing but the index file, which can be rebuilt.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from falconlib.memory._faiss import VectorIndex
from falconlib.memory.store import BEST_FIRST, LISTED, Store

TOP = 8  # [ours] candidates by cosine, before utility re-ranks them
NEAR = 0.97  # [ours] a training task this close to an evaluation task is never recalled
WIDEST = 2048  # most rows fetched for one query while looking for TOP admissible ones; a GPU index of FAISS gives no more
GHOSTS = 0.1  # [ours] share of an index that evicted tasks may take up before it is built again
SAVE_EVERY = 10_000  # new vectors after which the index file is written: a rebuild takes long


@dataclass(frozen=True)
class Neighbour:
    """A recalled training task. similarity: cosine in [-1, 1]; utility: learnt reward difference that its text made; code: best
    verified program, or None; errors: (class, count >= 2, latest message) among its kept failures, most frequent first."""

    task_id: str
    similarity: float
    utility: float
    description: str
    code: str | None
    errors: tuple[tuple[str, int, str], ...] = ()


@dataclass(frozen=True)
class Recall:
    """What memory says about one task: neighbours, best first; error classes seen at least twice among them, for R_lt."""

    neighbours: tuple[Neighbour, ...] = ()
    frequent_errors: frozenset[str] = frozenset()


class Searcher:
    """Search over the tasks of `store`. dim: d; flat_limit: tasks up to which the search is exact."""

    def __init__(self, store: Store, dim: int, flat_limit: int):
        self.store, self.dim, self.flat_limit = store, dim, flat_limit
        self.path = Path(f"{store.path}.faiss")
        self.index: VectorIndex | None = None
        self._version = store.number("schema_version")  # of the file whose rows the index holds: another one after a restore
        self._saved = 0  # vectors in the index file, as far as we know
        self._evaluation = np.empty((0, dim), np.float32)
        self._blocked: set[int] = set()
        self._checked = 0  # last id compared with the evaluation tasks

    def reset(self) -> None:
        """Forgets what was derived from the table: rows have gone, or others took their place."""
        self.index, self._blocked, self._checked = None, set(), 0

    def nearest(self, vectors: np.ndarray, own: Sequence, hashes: Sequence, k: int) -> list[list[tuple[int, float, float]]]:
        """(id, similarity, utility) of the k best rows per query. own, hashes: id and text hash of the query (None: none)."""
        index, wanted, chosen = self.sync(), max(TOP, k), []
        first = min(2 * wanted, WIDEST)
        similar, found = index.search(vectors, first)
        ranks = self._ranks(found)
        if len(ranks) < len(np.unique(found[found >= 0])) and len(index) > (1 + GHOSTS) * self.store.count():
            self.reset()
            return self.nearest(vectors, own, hashes, k)
        for row in range(len(vectors)):
            near, ids, fetched = similar[row], found[row], first
            while True:
                good = self._admissible(ids, near, ranks, own[row], hashes[row])
                # Settled when what was not fetched is farther than the last one wanted, so that no tie is cut at random.
                settled = len(good) >= wanted and good[wanted - 1][1] > near[-1] + 1e-6
                if settled or fetched >= min(len(index), WIDEST):
                    break
                fetched = min(4 * fetched, WIDEST)
                (near,), (ids,) = index.search(vectors[row : row + 1], fetched)
                ranks |= self._ranks(ids)
            if len(good) < wanted and fetched < len(index):  # in a crowd of rows that may not be shown: through the table itself
                good = []
                for ids, stored in self.store.vectors(0, self.dim):
                    near = np.vecdot(stored.astype(np.float64), vectors[row].astype(np.float64))
                    good += self._admissible(ids, near, self._ranks(ids), own[row], hashes[row])
                    good = sorted(good, key=lambda x: (-x[1], x[0]))[:wanted]
            chosen.append(sorted(good[:wanted], key=lambda x: (-x[1] - x[2], x[0]))[:k])
        return chosen

    def _admissible(self, ids: np.ndarray, near: np.ndarray, ranks: dict, own: int | None, digest: int | None) -> list:
        """(id, similarity, utility) of the rows that exist and may be shown."""
        return [
            (i, s, ranks[i][0])
            for i, s in zip(ids.tolist(), near.tolist(), strict=True)
            if i in ranks and i != own and i not in self._blocked and ranks[i][1] != digest
        ]

    def _ranks(self, ids: np.ndarray) -> dict[int, tuple[float, int]]:
        """id -> (utility, text hash) of the rows that still exist."""
        sql = f"SELECT id, utility, text_hash FROM task INDEXED BY task_rank WHERE id IN {LISTED}"
        return {i: (u, h) for i, u, h in self.store.rows(sql, np.unique(ids).tolist())}

    def describe(self, chosen: list[list[tuple[int, float, float]]]) -> list[Recall]:
        """Joins descriptions, best verified programs and error classes to the chosen rows."""
        ids = sorted({i for row in chosen for i, _, _ in row})
        names = {i: (t, d) for i, t, d in self.store.rows(f"SELECT id, task_id, description FROM task WHERE id IN {LISTED}", ids)}
        codes: dict[int, str] = {}
        sql = f"SELECT task, code FROM episode WHERE verified AND task IN {LISTED} ORDER BY {BEST_FIRST}"
        for i, code in self.store.rows(sql, ids):
            codes.setdefault(i, code)
        errors: dict[int, dict[str, list]] = {i: {} for i in ids}
        # a plain wrong answer ("fail") is no class of error: marking it frequent would punish every wrong answer near it
        failed = f"NOT verified AND error_class <> 'fail' AND task IN {LISTED}"
        sql = f"SELECT task, error_class, count, message FROM episode WHERE {failed} ORDER BY id DESC"
        for i, name, count, message in self.store.rows(sql, ids):
            errors[i].setdefault(name, [0, message])[0] += count
        recalls = []
        for row in chosen:
            total: Counter[str] = Counter()
            neighbours = []
            for i, similarity, utility in row:
                total.update({name: count for name, (count, _) in errors[i].items()})
                often = sorted(((n, c, m) for n, (c, m) in errors[i].items() if c >= 2), key=lambda x: (-x[1], x[0]))
                neighbours.append(Neighbour(names[i][0], similarity, utility, names[i][1], codes.get(i), tuple(often)))
            recalls.append(Recall(tuple(neighbours), frozenset(name for name, count in total.items() if count >= 2)))
        return recalls

    def sync(self) -> VectorIndex:
        """The index, brought up to the table: loaded or rebuilt at first and after any process has restored another state, then
        every row that any process has added since."""
        version = self.store.number("schema_version")
        if version != self._version:
            self.reset()
            self._version = version
        if self.index is None:
            self.index = self.load() or VectorIndex(self.dim, self.flat_limit)
            self._saved = len(self.index)
        last = int(self.index.ids[-1]) if len(self.index) else 0
        if self.store.last() > last:
            for ids, vectors in self.store.vectors(last, self.dim):
                self.index.add(ids, vectors)
            if len(self.index) - self._saved > SAVE_EVERY:
                self.save()
        self._block_new()
        return self.index

    def load(self) -> VectorIndex | None:
        """The saved index if it belongs to the table: by its stamp, and by a few of its vectors."""
        index = VectorIndex(self.dim, self.flat_limit)
        with self.store.transaction(write=False):
            if not index.load(self.path, self.store.stamp):
                return None
            some = np.arange(0, len(index), max(1, len(index) // 16))
            stored = self.store.embeddings(index.ids[some].tolist(), self.dim)
        return index if np.array_equal(index.rows(some), [stored[i] for i in index.ids[some].tolist()]) else None

    def save(self) -> None:
        """Writes the index file if it has grown. Raises FalconError on a full disk; nothing is lost then."""
        if self.index is None or self.store.read_only or len(self.index) == self._saved:
            return
        with self.store.transaction(write=False):
            ids, stamp = self.store.stamp(int(self.index.ids[-1]))
            same = self.store.number("schema_version") == self._version
        if same and np.array_equal(ids, self.index.ids):  # else tasks have been evicted, or all replaced: left to be rebuilt
            self.index.save(self.path, stamp)
            self._saved = len(ids)

    def block(self, evaluation: np.ndarray) -> list[int]:
        """Holds back tasks with a cosine above NEAR to a row of `evaluation` [m, d], those added later too. Returns their ids."""
        self._evaluation, self._blocked, self._checked = evaluation, set(), 0
        self._block_new()
        return sorted(self._blocked)

    def _block_new(self) -> None:
        if len(self._evaluation):
            for ids, vectors in self.store.vectors(self._checked, self.dim):
                self._blocked.update(ids[(vectors @ self._evaluation.T).max(1) > NEAR].tolist())
                self._checked = int(ids[-1])
