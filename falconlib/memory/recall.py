"""Nearest tasks of the long-term memory: keeps the index in step with the table, searches it, joins what is known of the hits.

Cosine, the top 8, re-ranked by utility; the frequent errors for R_lt. Writes nothing but the index file, which can be rebuilt.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from falconlib.errors import FalconError
from falconlib.memory._faiss import VectorIndex
from falconlib.memory.store import LISTED, Store

TOP = 8  # [ours] candidates by cosine, before utility re-ranks them
SPARE = 4  # [ours] rows fetched beyond them: the query itself, one to tell a tie by, and two that may not be shown
NEAR = 0.97  # [ours] a training task this close to an evaluation task is never recalled
WIDEST = 2048  # most rows fetched for one query while looking for TOP admissible ones; a GPU index of FAISS gives no more
GHOSTS = 0.1  # [ours] share of an index that evicted tasks may take up before it is built again
SAVE_EVERY = 10_000  # new vectors after which the index file is written: a rebuild takes long


@dataclass(frozen=True)
class Neighbour:
    """A recalled training task. similarity: cosine in [-1, 1]; utility: learnt reward difference that its text made; code: best
    verified program, or None; errors: (class, count, latest message) of its kept failures that are frequent in the recall."""

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
        if not isinstance(k, int) or k < 1:
            raise FalconError(f"{k} tasks cannot be recalled", "give k of at least 1")
        index, wanted, chosen = self.sync(), max(TOP, k), []
        first = min(wanted + SPARE, WIDEST)
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
                for keys, stored in self.store.vectors(0, self.dim):
                    near = np.vecdot(stored, vectors[row], dtype=np.float64)
                    good += self._admissible(keys[:, 0], near, self._ranks(keys[:, 0]), own[row], hashes[row])
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
        """id -> (utility, text hash) of the rows that still exist. Raises FalconError on a utility that is no number."""
        sql = f"SELECT id, utility, text_hash FROM task INDEXED BY task_rank WHERE id IN {LISTED}"
        ranks = {i: (u, h) for i, u, h in self.store.rows(sql, np.unique(ids).tolist())}
        if not all(isinstance(u, float) for u, _ in ranks.values()):
            raise self.store.damaged("a utility is no number")
        return ranks

    def describe(self, chosen: list[list[tuple[int, float, float]]]) -> list[Recall]:
        """Joins the summaries to the chosen rows. Raises FalconError on one that is damaged."""
        ids = sorted({i for row in chosen for i, _, _ in row})
        rows = {i: told for i, *told in self.store.rows(f"SELECT * FROM summary WHERE task IN {LISTED}", ids)}
        try:  # the most frequent class of error first
            errors = {i: sorted(map(tuple, json.loads(rows[i][-1])), key=lambda error: (-error[1], error[0])) for i in ids}
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise self.store.damaged("the summary of a task is damaged") from error
        recalls = []
        for row in chosen:
            total: Counter[str] = Counter()
            for name, count, _ in (error for i, *_ in row for error in errors[i]):
                total[name] += count
            frequent = frozenset(name for name, count in total.items() if count >= 2)
            neighbours = []
            for i, similarity, utility in row:
                (task_id, description, code, _), often = rows[i], tuple(error for error in errors[i] if error[0] in frequent)
                neighbours.append(Neighbour(task_id, similarity, utility, description, code, often))
            recalls.append(Recall(tuple(neighbours), frequent))
        return recalls

    def sync(self) -> VectorIndex:
        """The index, brought up to the table: loaded or rebuilt at first and after any process has restored another state, then
        every row that any process has added since."""
        version = self.store.number("schema_version")
        if version != self._version:
            self.reset()
            self._version = version
        if self.index is None:
            self.store.warm()
            self.index = self.load() or VectorIndex(self.dim, self.flat_limit)
            self._saved = len(self.index)
        last = int(self.index.keys[-1, 0]) if len(self.index) else 0
        if self.store.last() > last:
            for keys, vectors in self.store.vectors(last, self.dim):
                self.index.add(keys, vectors)
            if len(self.index) - self._saved > SAVE_EVERY:
                with suppress(FalconError):  # no room: a recall needs no file, and `close` says so
                    self.save()
        self._block_new()
        return self.index

    def load(self) -> VectorIndex | None:
        """The saved index if it belongs to the table: every row up to its last is in it, few others, and some vectors agree."""
        index = VectorIndex(self.dim, self.flat_limit)
        if not index.load(self.path, self.store.meta["embedder"]) or not len(index):
            return None
        last = int(index.keys[-1, 0])
        with self.store.transaction(write=False):
            table = self.store.keys(last)
            places = np.searchsorted(index.keys[:, 0], table[:, 0])
            some = table[:: max(1, len(table) // 16), 0].tolist()
            stored = dict(self.store.rows(f"SELECT id, embedding FROM task WHERE id IN {LISTED}", some))
            reused = self.store.last() < last  # after a restore: rows to come would have ids that the index knows
        if reused or len(index) > (1 + GHOSTS) * len(table) or not np.array_equal(index.keys[places], table):
            return None
        same = index.holds(np.array(list(stored), np.int64), self.store.matrix(list(stored.values()), self.dim))
        return index if same else None

    def save(self) -> None:
        """Writes the index file if it has changed. Raises FalconError on a full disk; nothing is lost then."""
        if self.index is None or self.store.read_only or len(self.index) == self._saved:
            return
        if self.store.number("schema_version") == self._version:  # else another state was restored: left to be rebuilt
            self.index.save(self.path, self.store.meta["embedder"])
            self._saved = len(self.index)

    def block(self, evaluation: np.ndarray) -> list[int]:
        """Holds back tasks with a cosine above NEAR to a row of `evaluation` [m, d], those added later too. Returns their ids."""
        self._evaluation, self._blocked, self._checked = evaluation, set(), 0
        self._block_new()
        return sorted(self._blocked)

    def _block_new(self) -> None:
        if len(self._evaluation):
            for keys, vectors in self.store.vectors(self._checked, self.dim):
                self._blocked.update(keys[(vectors @ self._evaluation.T).max(1) > NEAR, 0].tolist())
                self._checked = int(keys[-1, 0])
