"""The vector index of the long-term memory, and the only place where faiss is imported.

An index is derived from the database and can be thrown away at any time. Exact (flat) up to `flat_limit` vectors, HNSW above
(approximate; its graph depends on thread timing), flat on a GPU where faiss sees one. Without faiss, numpy searches exactly and
nothing is saved.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import numpy as np

from falconlib.errors import FalconError
from falconlib.files import write_bytes, write_text

BUILDS = ("faiss", "faiss-cpu", "faiss-gpu", "faiss-gpu-cu11", "faiss-gpu-cu12", "faiss-gpu-cuvs")
# [ours] graph degree; candidates while building; while searching. Among 100,000 tasks 512 candidates find 0.88 of the eight exact
# neighbours of a query unlike all of them, 128 find 0.55; queries like stored ones find all with either. Generating takes
# seconds, so the milliseconds are well spent: the closer to exact, the less does a graph built by racing threads show.
HNSW_LINKS, HNSW_BUILD, HNSW_SEARCH = 32, 64, 512


def load_faiss():
    """The faiss module, or None when it is not installed. Raises FalconError when two builds of it overwrite each other."""
    builds = [name for name in BUILDS if next(iter(metadata.distributions(name=name)), None)]
    if len(builds) > 1:
        names = " ".join(builds)
        raise FalconError(f"{len(builds)} builds of faiss are installed: {names}", f"pip uninstall -y {names}; then install one")
    if importlib.util.find_spec("faiss") is None:
        return None
    torch = None
    if importlib.util.find_spec("torch") is not None:
        import torch  # before faiss: a CUDA 12 faiss imported before a CUDA 13 torch ends in a segmentation fault
    if sys.platform == "darwin":
        os.environ.setdefault("KMP_DUPLICATE_LIB_OK", "TRUE")  # torch and faiss each bring an OpenMP there
    import faiss

    if torch is not None:  # one setting rules both
        faiss.omp_set_num_threads(1 if sys.platform == "darwin" else torch.get_num_threads())
    return faiss


class NumpyFlat:
    """Exact inner-product search with the few names of a faiss flat index that we use."""

    def __init__(self, dim: int):
        self._vectors = np.empty((0, dim), np.float32)

    def add(self, vectors: np.ndarray) -> None:
        self._vectors = np.concatenate([self._vectors, vectors])

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        similarity = queries @ self._vectors.T
        positions = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
        return np.take_along_axis(similarity, positions, axis=1), positions

    def reconstruct_batch(self, positions: np.ndarray) -> np.ndarray:
        return self._vectors[positions]


class VectorIndex:
    """Vectors [n, dim] with database ids (int64 [n], ascending). flat_limit: vectors up to which the search is exact."""

    def __init__(self, dim: int, flat_limit: int):
        self.dim, self.flat_limit = dim, flat_limit
        self.ids = np.empty(0, np.int64)
        self._faiss = load_faiss()
        self.gpu = hasattr(self._faiss, "StandardGpuResources") and self._faiss.get_num_gpus() > 0
        self._use("flat")

    def __len__(self) -> int:
        return len(self.ids)

    def _use(self, kind: str, index=None) -> None:
        """Takes `index` (None: a new one of this kind), moved to the GPU where there is one."""
        self.kind = kind
        if self._faiss is None:
            index = NumpyFlat(self.dim)
        elif index is None and kind == "hnsw":
            index = self._faiss.IndexHNSWFlat(self.dim, HNSW_LINKS, self._faiss.METRIC_INNER_PRODUCT)
            index.hnsw.efConstruction = HNSW_BUILD
        elif index is None:
            index = self._faiss.IndexFlatIP(self.dim)
        if kind == "hnsw":
            index.hnsw.efSearch = HNSW_SEARCH
        if self.gpu:
            self._resources = self._faiss.StandardGpuResources()
            index = self._faiss.index_cpu_to_gpu(self._resources, 0, index)
        self._index = index

    def kind_for(self, count: int) -> str:
        """The kind of index that `count` vectors should have."""
        return "flat" if count <= self.flat_limit or self.gpu or self._faiss is None else "hnsw"

    def add(self, ids: np.ndarray, vectors: np.ndarray) -> None:
        """Appends rows, whose ids are above all earlier ones. Growing past the limit moves every vector into the other kind."""
        if self.kind_for(len(self) + len(ids)) != self.kind:
            if len(self):
                vectors = np.concatenate([self.rows(np.arange(len(self))), vectors])
            self._use("hnsw")
        self._index.add(np.ascontiguousarray(vectors, np.float32))
        self.ids = np.concatenate([self.ids, ids])

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k nearest rows of each query, best first, ties by id: cosines float64 [n, k], ids int64 [n, k] (no row: -inf, -1).

        Cosines are computed again, row by row, so that batch size, device and kind of index cannot change a digit of them.
        """
        if not len(self) or not len(queries):
            return np.full((len(queries), k), -np.inf), np.full((len(queries), k), -1)
        _, found = self._index.search(np.ascontiguousarray(queries, np.float32), min(k, len(self)))
        rows = self.rows(np.maximum(found, 0).ravel()).reshape(*found.shape, self.dim)
        exact = np.vecdot(rows.astype(np.float64), queries[:, None, :].astype(np.float64))
        exact = np.where(found < 0, -np.inf, exact)
        ids = np.where(found < 0, -1, self.ids[found])
        order = np.lexsort((ids, -exact), axis=1)
        return np.take_along_axis(exact, order, 1), np.take_along_axis(ids, order, 1)

    def save(self, path: Path, stamp: dict) -> None:
        """Writes the index to `path`, `stamp` and that file's hash to `path`.json, each atomically. FalconError: full disk."""
        if self._faiss is None:
            return
        data = self._faiss.serialize_index(self._faiss.index_gpu_to_cpu(self._index) if self.gpu else self._index)
        sidecar = {**stamp, "kind": self.kind, "sha256": hashlib.sha256(data).hexdigest()}
        write_bytes(path, memoryview(data))
        write_text(Path(f"{path}.json"), json.dumps(sidecar))

    def load(self, path: Path, expected: Callable[[int], tuple[np.ndarray, dict]]) -> bool:
        """Takes the saved index if it is whole and fits the database; else False, and the index stays empty.

        expected: last id that the file holds -> (ids up to it, stamp that the sidecar must carry).
        """
        if self._faiss is None:
            return False
        try:
            sidecar = json.loads(Path(f"{path}.json").read_bytes())
            data = np.fromfile(path, np.uint8)
            ids, stamp = expected(sidecar["last"])
        except (OSError, ValueError, TypeError, KeyError, FalconError):
            return False  # missing, half a sidecar, or a number that SQLite cannot hold: the caller rebuilds
        if sidecar != {**stamp, "kind": self.kind_for(len(ids)), "sha256": hashlib.sha256(data).hexdigest()}:
            return False
        try:
            index = self._faiss.deserialize_index(data)
        except RuntimeError:  # of another version of faiss
            return False
        if (index.d, index.ntotal) != (self.dim, len(ids)):
            return False
        self._use(sidecar["kind"], index)
        self.ids = ids
        return True

    def rows(self, positions: np.ndarray) -> np.ndarray:
        """The vectors at these places, float32 [n, dim]."""
        return self._index.reconstruct_batch(positions)
