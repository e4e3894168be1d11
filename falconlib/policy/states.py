"""The policy's own hidden states as an embedder (the paper's way): mean over a text's tokens, after a third of the layers, less
what all texts have in common (the mean over SENTENCES): without that, any two tasks would look nearly the same.

A copy of the base model without adapters, cut off above that layer: the vectors of a model that is being trained would go stale.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from falconlib.config import ModelConfig
from falconlib.errors import FalconError
from falconlib.memory import LongTermMemory, get_embedder
from falconlib.memory.embed import Embedder, PolicyStates
from falconlib.policy.models import load_policy

# [ours] of many kinds, and fixed: a mean over the memory's own tasks would make stored vectors stale with every new one
SENTENCES = (
    "Return the largest number of a list.",
    "Count how often each letter occurs in a string.",
    "Write a function that checks whether a year is a leap year.",
    "Read pairs of integers from standard input and print their sums, one per line.",
    "Find the shortest path between two nodes of a weighted graph.",
    "Replace every space of a text by an underscore.",
    "Implement a stack class with the methods push, pop and peek.",
    "Convert a temperature from Celsius to Fahrenheit, rounded to two decimals.",
    "Remove all keys of a dictionary whose value is None.",
    "Given n and k, compute the number of ways to choose k of n items modulo 1000000007.",
    "Sort a list of tuples by their second element in descending order.",
    "Multiply two matrices given as lists of rows.",
)


def embedder_for(name: str, model: ModelConfig) -> Embedder:
    """The embedder `long_term.embedder` of a run whose policy is `model`: "minilm", "hashed" or "policy"."""
    return policy_states(model) if name == "policy" else get_embedder(name)


def recall_from(path: Path, model: ModelConfig) -> LongTermMemory:
    """The memory at `path`, read-only, with the embedder that it was written with. Raises FalconError when that was the states of
    another model than `model`."""
    memory = LongTermMemory(path, read_only=True)
    if memory.embedder_name != "policy":
        return memory
    memory.close()
    return LongTermMemory(path, policy_states(model), read_only=True)


def policy_states(config: ModelConfig) -> PolicyStates:
    """Hidden states of the encoder or decoder of `config`. Raises FalconError when the model cannot be loaded."""
    import torch
    from torch import nn

    policy = load_policy(config)
    body = policy.model.get_encoder() if policy.seq2seq else policy.model.base_model
    layers = next((m for m in body.modules() if isinstance(m, nn.ModuleList)), None)
    if layers is None:
        raise FalconError(f"model {config.name!r} has no list of layers to take states from", "--set long_term.embedder=minilm")
    depth = -(-len(layers) // 3)
    del layers[depth:]  # what lies above is not needed
    body.config.num_hidden_layers = depth

    def states(texts: Sequence[str]) -> np.ndarray:
        rows: dict[int, np.ndarray] = {}
        order = sorted(range(len(texts)), key=lambda i: (len(texts[i]), i))  # little padding
        for start in range(0, len(order), 32):
            batch = order[start : start + 32]
            ids = [torch.tensor(policy.encode(texts[i])[:512] or policy.encode("\n"), device=policy.device) for i in batch]
            ones = [torch.ones_like(x) for x in ids]
            padded, mask = (nn.utils.rnn.pad_sequence(x, batch_first=True) for x in (ids, ones))  # on the right: positions stay
            with torch.inference_mode():
                hidden = body(input_ids=padded, attention_mask=mask).last_hidden_state * mask.unsqueeze(-1)
            rows |= zip(batch, (hidden.sum(1) / mask.sum(1, keepdim=True)).float().cpu().numpy(), strict=True)
        return np.stack([rows[i] for i in range(len(texts))])

    centre, name = states(SENTENCES).mean(0), hashlib.sha256("\n".join(SENTENCES).encode()).hexdigest()[:8]
    kind = f"{policy.fingerprint}/layer{depth}/mean512/centre-{name}"
    return PolicyStates(lambda texts: states(texts) - centre, policy.model.config.hidden_size, kind)
