"""Examples to learn from and their way through memory: tensors of a micro-batch, like lengths and like prompts together.

`MicroBatches` runs a piece of work on one micro-batch after another, on a CPU on some of them side by side, and halves them when
memory runs out.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from falconlib.config import Profile
from falconlib.errors import FalconError
from falconlib.policy.fast_weights import FastWeights
from falconlib.policy.generate import out_of_memory
from falconlib.policy.layers import is_lean, lean
from falconlib.policy.models import Policy
from falconlib.policy.score import bare, score

Found = TypeVar("Found")


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
        with lean(policy), bare(policy):
            yield
    finally:
        for layer in layers:
            layer.gradient_checkpointing = layer.training = False


def micro_batches(policy: Policy, examples: Sequence[Example], micro_tokens: int, at_once: int = 1) -> list[list[Example]]:
    """Examples in pieces of at most `micro_tokens` padded tokens (always at least one example): those of one prompt side by
    side, since its tokens count once, the groups with the longest completions first. at_once: pieces that run side by side,
    among which the work is shared out."""
    size = {p: len(policy.encode(p)) for p in dict.fromkeys(e.prompt for e in examples)}
    longest = {p: max(len(e.tokens) for e in examples if e.prompt == p) for p in size}
    order = sorted(examples, key=lambda e: (-longest[e.prompt], e.prompt, e.task, -len(e.tokens)))

    def cost(rows: Sequence[Example]) -> int:
        prompts = {(x.prompt, x.task) for x in rows}
        return len(rows) * max(len(x.tokens) for x in rows) + len(prompts) * max(size[p] for p, _ in prompts)

    def cut(bound: float) -> list[list[Example]]:
        found: list[list[Example]] = []
        for e in order:
            if found and cost([*found[-1], e]) <= bound:
                found[-1].append(e)
            else:
                found.append([e])
        return found

    found = cut(micro_tokens)
    if at_once == 1 or len(examples) < 2:
        return found
    rounds = -(-len(found) // at_once)
    bound = max(sum(map(cost, found)) / (rounds * at_once), 1)
    while bound < micro_tokens and len(even := cut(bound)) > rounds * at_once:
        bound *= 1.05
    return even if bound < micro_tokens else found


def count_tokens(examples: Sequence[Example]) -> int:
    """Tokens that count in a batch of examples: its normaliser Z (at least 1)."""
    return max(sum(sum(e.mask) if e.mask else len(e.tokens) for e in examples), 1)


@dataclass
class MicroBatches:
    """How many padded tokens go through the model at once; fewer after it ran out of memory, for the rest of the run.

    at_once: micro-batches of so many tokens side by side, where the policy is a Llama on a CPU of as many threads.
    """

    policy: Policy
    tokens: int
    at_once: int = 1

    def each(
        self, examples: Sequence[Example], work: Callable[[list[Example]], Found], add: Callable[[Found], object] | None = None
    ) -> None:
        """`work` on every micro-batch, and `add` on what it found, in their order: the sums do not depend on which ends first.
        With `add`, `work` may run on several threads, and must change nothing that others see; without, it may change what it
        likes. Where it raises it must leave no trace: then it is called again with fewer examples.

        Raises FalconError when a single example does not fit the memory.
        """
        threads = torch.get_num_threads()
        at_once = min(self.at_once, threads) if add is not None and is_lean(self.policy) else 1
        todo = micro_batches(self.policy, examples, self.tokens, at_once)
        while todo:
            failed = []
            with side_by_side(at_once, threads) as run:
                for chunk, (found, fits) in zip(todo, run(partial(attempt, work), todo), strict=True):
                    if not fits:
                        failed.append(chunk)
                    elif add is not None:
                        add(found)
            todo = self.smaller(failed, at_once) if failed else []
            at_once = min(at_once, self.at_once)

    def smaller(self, todo: list[list[Example]], at_once: int) -> list[list[Example]]:
        """What did not fit the memory, in smaller pieces or for one at a time."""
        if len(todo[0]) == 1 and at_once > 1:
            self.at_once = 1
            sys.stderr.write("falconlib: out of memory; going on with one micro-batch at a time\n")
            return todo
        if len(todo[0]) == 1:
            raise FalconError("one example alone does not fit the memory", "lower sample.max_new_tokens, or use a smaller model")
        self.tokens //= 2
        sys.stderr.write(f"falconlib: out of memory; going on with {self.tokens} tokens at once\n")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return micro_batches(self.policy, [e for chunk in todo for e in chunk], self.tokens, at_once)


def attempt(work: Callable[[list[Example]], Found], chunk: list[Example]) -> tuple[Found | None, bool]:
    """What `work` found, and whether it fitted the memory. Not the error: it would keep alive all that the work had made."""
    try:
        return work(chunk), True
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
    return None, False


@contextmanager
def side_by_side(at_once: int, threads: int) -> Iterator[Callable]:
    """A `map` whose calls run on so many threads, which share torch's: one product on two cores waits for the slower one at each
    of its thousand small operations, two on a core each do not."""
    if at_once == 1:
        yield map
        return
    try:
        with ThreadPoolExecutor(at_once, initializer=torch.set_num_threads, initargs=(threads // at_once,)) as pool:
            yield pool.map
    finally:
        torch.set_num_threads(threads)  # of threads to come: those of the pool have changed it
