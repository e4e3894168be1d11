"""Examples to learn from and their way through memory: tensors of a micro-batch, like lengths and like prompts together.

`MicroBatches` runs a piece of work on one micro-batch after another and halves them when memory runs out.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from falconlib.config import Profile
from falconlib.errors import FalconError
from falconlib.policy.fast_weights import FastWeights
from falconlib.policy.generate import out_of_memory
from falconlib.policy.layers import lean
from falconlib.policy.models import Policy
from falconlib.policy.score import score


@dataclass(frozen=True)
class Example:
    """One scored or supervised completion. prompt: rendered text; tokens: completion ids; task: row of the fast weights.

    advantages, logprobs: one per token for policy gradients (empty for supervised examples). mask: one 0/1 per token
    where only some tokens count (empty: all). weight: factor of this example's terms in the sum.
    """

    prompt: str
    tokens: tuple[int, ...]
    task: int = 0
    weight: float = 1.0
    advantages: tuple[float, ...] = ()
    logprobs: tuple[float, ...] = ()
    mask: tuple[int, ...] = ()


@dataclass
class Batch:
    """Right-padded tensors (R, T) of some examples; mask holds their weights, 0 on padding; task and temperature are (R,)."""

    prompts: list[str]
    tokens: torch.Tensor
    mask: torch.Tensor
    task: torch.Tensor
    temperature: torch.Tensor
    advantages: torch.Tensor
    old_logprobs: torch.Tensor

    def rows(self, keep: torch.Tensor) -> Batch:
        """Only the rows that `keep` (R,) selects."""
        prompts = [p for p, k in zip(self.prompts, keep.tolist(), strict=True) if k]
        parts = (self.tokens, self.mask, self.task, self.temperature, self.advantages, self.old_logprobs)
        return Batch(prompts, *(part[keep] for part in parts))


def collate(policy: Policy, examples: Sequence[Example], temperature: float = 1.0) -> Batch:
    """The tensors of a micro-batch. Masks come from lengths, never from token ids, since pad may equal eos. Sampled completions
    are scored at the sampling temperature, supervised ones at 1."""
    width = max(len(e.tokens) for e in examples)

    def pad(rows, dtype):
        return torch.tensor([list(r) + [0] * (width - len(r)) for r in rows], dtype=dtype, device=policy.device)

    return Batch(
        prompts=[e.prompt for e in examples],
        tokens=pad([e.tokens for e in examples], torch.long),
        mask=pad([[e.weight * m for m in e.mask or [1] * len(e.tokens)] for e in examples], torch.float32),
        task=torch.tensor([e.task for e in examples], device=policy.device),
        temperature=torch.tensor([temperature if e.logprobs else 1.0 for e in examples], device=policy.device),
        advantages=pad([e.advantages for e in examples], torch.float32),
        old_logprobs=pad([e.logprobs for e in examples], torch.float32),
    )


def score_batch(policy: Policy, batch: Batch, fast: FastWeights, profile: Profile) -> tuple[torch.Tensor, torch.Tensor]:
    """log p and entropy (R, T) of a batch under theta + delta: see policy.score."""
    parts = (batch.prompts, batch.tokens, batch.mask, batch.temperature, fast, batch.task)
    return score(policy, *parts, shared=profile.train.shared_prefix)


@contextmanager
def learning(policy: Policy, profile: Profile) -> Iterator[None]:
    """How the model's layers run while they are trained, forward and backward inside this block; generation has its own ways.

    With `train.gradient_checkpointing`, they run again during backward, and save memory: only their own flags are set, so that
    dropout stays off.
    """
    layers = [m for m in policy.model.modules() if isinstance(m, GradientCheckpointingLayer)]
    for layer in layers if profile.train.gradient_checkpointing else ():
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
        layer.gradient_checkpointing = layer.training = True
    try:
        with lean(policy):
            yield
    finally:
        for layer in layers:
            layer.gradient_checkpointing = layer.training = False


def micro_batches(policy: Policy, examples: Sequence[Example], micro_tokens: int) -> list[list[Example]]:
    """Examples in pieces of at most `micro_tokens` padded tokens (always at least one example): those of one prompt side by
    side, since its tokens count once, the groups with the longest completions first."""
    size = {p: len(policy.encode(p)) for p in dict.fromkeys(e.prompt for e in examples)}
    longest = {p: max(len(e.tokens) for e in examples if e.prompt == p) for p in size}
    order = sorted(examples, key=lambda e: (-longest[e.prompt], e.prompt, e.task, -len(e.tokens)))
    found: list[list[Example]] = []
    for e in order:
        if found:
            rows = [*found[-1], e]
            prompts = {(x.prompt, x.task) for x in rows}
            cost = len(rows) * max(len(x.tokens) for x in rows) + len(prompts) * max(size[p] for p, _ in prompts)
            if cost <= micro_tokens:
                found[-1].append(e)
                continue
        found.append([e])
    return found


def count_tokens(examples: Sequence[Example]) -> int:
    """Tokens that count in a batch of examples: its normaliser Z (at least 1)."""
    return max(sum(sum(e.mask) if e.mask else len(e.tokens) for e in examples), 1)


@dataclass
class MicroBatches:
    """How many padded tokens go through the model at once; fewer after it ran out of memory, for the rest of the run."""

    policy: Policy
    tokens: int

    def each(self, examples: Sequence[Example], work: Callable[[list[Example]], None]) -> None:
        """`work` on every micro-batch. It must leave no trace when it raises: then it is called again with fewer examples.

        Raises FalconError when a single example does not fit the memory.
        """
        todo = micro_batches(self.policy, examples, self.tokens)
        while todo:
            try:
                work(todo[0])
                todo = todo[1:]
                continue
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
            if len(todo[0]) == 1:
                raise FalconError(
                    "one example alone does not fit the memory", "lower sample.max_new_tokens, or use a smaller model"
                )
            self.tokens //= 2
            sys.stderr.write(f"falconlib: out of memory; going on with {self.tokens} tokens at once\n")
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            todo = micro_batches(self.policy, [e for chunk in todo for e in chunk], self.tokens)
