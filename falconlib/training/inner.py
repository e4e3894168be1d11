"""The local level: fast weights delta_x adapted to each task on its short-term memory and its neighbours' programs.

    L_in(x; delta) = L_pg^-(M_S(x); theta + delta) + eta * CE(LTM positives of the nearest tasks; theta + delta)
    delta_x        = - sum_{j < J} alpha * g_j / ||g_j||,  g_j = grad_delta L_in,  delta = 0 where g = 0

All tasks share one batched forward and backward (see policy.fast_weights). theta is never touched here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from falconlib.config import Profile
from falconlib.policy.fast_weights import Deltas, FastWeights, normalised_step
from falconlib.policy.models import Policy
from falconlib.records import Episode
from falconlib.training.advantages import scored
from falconlib.training.batches import Batch, Example, MicroBatches, collate, count_tokens, learning, score_batch
from falconlib.training.losses import cross_entropy_loss, policy_gradient_loss

if TYPE_CHECKING:
    from falconlib.training.outer import SupportHalf


@dataclass(frozen=True)
class Adaptation:
    """deltas: one per task. norms: of the last inner gradient per task (0: nothing to adapt to). tokens: of its terms, J times.
    half: the outer loss that the first step's passes served too; None: the outer step computes all of it."""

    deltas: Deltas
    norms: tuple[float, ...]
    tokens: int
    half: SupportHalf | None = None


def inner_examples(
    buffers: Sequence[Sequence[Episode]], positives: Sequence[Sequence[Example]], profile: Profile
) -> list[Example]:
    """The terms of L_in as examples with one task index each; a task's terms are divided by its own token count.

    Args:
        buffers: M_S(x) per task, with sampling log-probs; empty when short-term memory is off.
        positives: verified programs of the nearest tasks, per task; empty when long-term memory is off.
    """
    examples = []
    for index, episodes in enumerate(buffers):
        own = [
            Example(e.prompt, e.tokens, index, 1.0, damp(e.advantages, profile.inner.negative_scale), e.logprobs)
            for e in scored(episodes, profile)
        ]
        examples += reweighted(own, index, 1.0)
    for index, programs in enumerate(positives):
        examples += reweighted(programs, index, profile.inner.eta)
    return examples


def reweighted(examples: Sequence[Example], task: int, weight: float) -> list[Example]:
    """The examples as terms of task `task`, weight / tokens each."""
    tokens = count_tokens(examples)
    return [Example(e.prompt, e.tokens, task, weight / tokens, e.advantages, e.logprobs, e.mask) for e in examples]


def damp(advantages: Sequence[float], scale: float) -> tuple[float, ...]:
    """Negative advantages times `scale`: negatives move log-probs faster than positives."""
    return tuple(a * scale if a < 0 else a for a in advantages)


def adapt(
    policy: Policy,
    tasks: int,
    examples: Sequence[Example],
    profile: Profile,
    micro: MicroBatches,
    half: SupportHalf | None = None,
) -> Adaptation:
    """J normalised steps on L_in for all tasks at once; returns detached deltas. The first one, at delta = 0, serves `half`."""
    fast = FastWeights(policy.model)
    deltas, norm = fast.zeros(tasks), torch.zeros(tasks)
    for step in range(profile.inner.steps):
        gradients = inner_gradient(policy, fast, deltas, examples, profile, micro, half if step == 0 else None)
        deltas, norm = normalised_step(deltas, gradients, profile.inner.alpha)
    return Adaptation(deltas, tuple(norm.tolist()), profile.inner.steps * sum(len(e.tokens) for e in examples), half)


def inner_gradient(
    policy: Policy,
    fast: FastWeights,
    deltas: Deltas,
    examples: Sequence[Example],
    profile: Profile,
    micro: MicroBatches,
    half: SupportHalf | None = None,
) -> Deltas:
    """grad_delta of the sum of L_in over the tasks: each task's delta gets its own gradient, theta gets that of `half` alone."""
    leaves = {name: d.detach().requires_grad_() for name, d in deltas.items()}
    total = {name: torch.zeros_like(d) for name, d in deltas.items()}
    for name, leaf in leaves.items():
        leaf.grad = total[name]  # what `half` finds is added to it

    def work(chunk: list[Example]) -> Sequence[torch.Tensor]:
        batch = collate(policy, chunk, profile.sample.temperature)
        logprobs, _ = score_batch(policy, batch, fast, profile)
        return torch.autograd.grad(inner_loss(logprobs, batch, chunk, profile), list(leaves.values()))

    def add(parts: Sequence[torch.Tensor]) -> None:
        for name, part in zip(leaves, parts, strict=True):
            total[name] += part

    rest = half.gradient(leaves) if half is not None else examples
    rest = [e for e in rest if any(e.advantages) or not e.logprobs]  # what has no advantage adds 0: it only counts in Z
    with fast.active(leaves, theta=False), learning(policy, profile):
        micro.each(rest, work, add)
    return total


def inner_loss(logprobs: torch.Tensor, batch: Batch, chunk: Sequence[Example], profile: Profile) -> torch.Tensor:
    """L_pg^- of the scored rows plus CE of the supervised ones; the weights are in the mask, so Z = 1."""
    own = torch.tensor([bool(e.logprobs) for e in chunk], device=logprobs.device)
    loss, _ = policy_gradient_loss(logprobs[own], batch.rows(own), 1.0, profile.train.clip_low, profile.train.clip_high)
    return loss + cross_entropy_loss(logprobs[~own], batch.rows(~own), 1.0)
