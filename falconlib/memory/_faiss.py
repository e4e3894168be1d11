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
    """Vectors [n, dim] with their keys, int64 [n, 2]: database ids (ascending) and text hashes, by which a saved index is known
    to fit. flat_limit: vectors up to which the search is exact.

    On a GPU the index is always flat, searched there, saved and loaded as the CPU's. The tests put a stand-in for faiss's calls
    in its place; no card has run this.
    """

    def __init__(self, dim: int, flat_limit: int):
        self.dim, self.flat_limit = dim, flat_limit
        self.keys = np.empty((0, 2), np.int64)
        self._faiss = load_faiss()
        self.gpu = hasattr(self._faiss, "StandardGpuResources") and self._faiss.get_num_gpus() > 0
        self._use("flat")

    def __len__(self) -> int:
        return len(self.keys)

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

    def add(self, keys: np.ndarray, vectors: np.ndarray) -> None:
        """Appends rows, whose ids are above all earlier ones. Growing past the limit moves every vector into the other kind."""
        if self.kind_for(len(self) + len(keys)) != self.kind:
            if len(self):
                vectors = np.concatenate([self.rows(np.arange(len(self))), vectors])
            self._use("hnsw")
        self._index.add(np.ascontiguousarray(vectors, np.float32))
        self.keys = np.concatenate([self.keys, keys])

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k nearest rows of each query, best first, ties by id: cosines float64 [n, k], ids int64 [n, k] (no row: -inf, -1).

        Cosines are computed again, row by row, so that batch size, device and kind of index cannot change a digit of them.
        """
        if not len(self) or not len(queries):
            return np.full((len(queries), k), -np.inf), np.full((len(queries), k), -1)
        _, found = self._index.search(np.ascontiguousarray(queries, np.float32), min(k, len(self)))
        rows = self.rows(np.maximum(found, 0).ravel()).reshape(*found.shape, self.dim)
        exact = np.where(found < 0, -np.inf, np.vecdot(rows, queries[:, None, :], dtype=np.float64))
        ids = np.where(found < 0, -1, self.keys[found, 0])
        order = np.lexsort((ids, -exact), axis=1)
        return np.take_along_axis(exact, order, 1), np.take_along_axis(ids, order, 1)

    def save(self, path: Path, embedder: str) -> None:
        """Writes the index to `path`, its kind, hash, keys and the embedder's fingerprint to `path`.json, each atomically. Raises
        FalconError on a full disk."""
        if self._faiss is None:
            return
        data = self._faiss.serialize_index(self._faiss.index_gpu_to_cpu(self._index) if self.gpu else self._index)
        write_bytes(path, data.data)
        stamp = _stamp(data, self.keys, self.kind_for(len(self)), embedder)
        write_text(Path(f"{path}.json"), json.dumps({**stamp, "keys": self.keys.tobytes().hex()}))

    def load(self, path: Path, embedder: str) -> bool:
        """Takes the saved index, keys too, if it is whole, of this embedder and of the kind for its size; else False."""
        if self._faiss is None or not (found := read(path, embedder)):
            return False
        data, keys, kind = found
        try:
            index = self._faiss.deserialize_index(data)
        except RuntimeError:
            return False  # of another version of faiss: the caller rebuilds
        if (index.d, index.ntotal, kind) != (self.dim, len(keys), self.kind_for(len(keys))):
            return False
        self.keys = keys
        self._use(kind, index)
        return True

    def holds(self, ids: np.ndarray, vectors: np.ndarray) -> bool:
        """Whether the rows of these ids, as far as the index goes, are these vectors [n, dim]."""
        known = ids <= self.keys[-1, 0]
        return np.array_equal(self.rows(np.searchsorted(self.keys[:, 0], ids[known])), vectors[known])

    def rows(self, positions: np.ndarray) -> np.ndarray:
        """The vectors at these places, float32 [n, dim]."""
        return self._index.reconstruct_batch(positions)


def _stamp(data: np.ndarray, keys: np.ndarray, kind: str, embedder: str) -> dict:
    """What the sidecar of an index with these bytes says beside its keys."""
    whole = hashlib.sha256(data.data)
    whole.update(keys.tobytes())
    return {"kind": kind, "count": len(keys), "embedder": embedder, "sha256": whole.hexdigest()}


def read(path: Path, embedder: str) -> tuple[np.ndarray, np.ndarray, str] | None:
    """(bytes, keys, kind) of a saved index; None unless it is whole and of this embedder."""
    try:
        sidecar = json.loads(Path(f"{path}.json").read_bytes())
        data = np.fromfile(path, np.uint8)
        keys = np.frombuffer(bytes.fromhex(sidecar.pop("keys")), np.int64).reshape(-1, 2)
        return (data, keys, sidecar["kind"]) if sidecar == _stamp(data, keys, sidecar["kind"], embedder) else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None  # missing, or half a sidecar
