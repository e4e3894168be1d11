"""The global level: the gradient of the outer loss, accumulated in theta's `.grad`.

    L_outer(theta) = b_pg ((K_s/G) L_pg(S; theta) + (K_q/G) L_pg(Q; theta + stop(delta))) + b_sl CE + b_neg L_negative

First order: the gradient is taken while the detached deltas are active, and what reaches `lora_B` is the gradient at the
adapted point. Each process adds its share of the examples; normalisers count those of all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from falconlib import prompts
from falconlib.config import Profile
from falconlib.policy.fast_weights import Deltas, FastWeights
from falconlib.policy.models import Policy
from falconlib.records import Episode, Feedback, Task
from falconlib.rollout import Conductor
from falconlib.training.advantages import scored
from falconlib.training.batches import Batch, Example, MicroBatches, collate, count_tokens, learning, score_batch
from falconlib.training.critic import Critic
from falconlib.training.distributed import gather, rank, world
from falconlib.training.inner import Adaptation
from falconlib.training.losses import cross_entropy_loss, negative_loss, policy_gradient_loss

LossOf = Callable[[torch.Tensor, Batch], tuple[torch.Tensor, torch.Tensor | float]]  # loss and tokens that the clip cut off
PIECES = 4  # [ours] of a row at most: each is one more forward of it, and damping and error lines make up to four
SUMS = ("loss", "clipped", "entropy", "tokens")  # of a micro-batch
Share = tuple[tuple[float, ...], Sequence[torch.Tensor | None]]  # what one adds: its SUMS, and its gradients


@dataclass
class Outer:
    """What L_outer depends on besides the step's episodes. tasks: by id. micro: shared with the inner loop. critic: of the arms
    that have one; it gives the tokens their advantages."""

    policy: Policy
    conductor: Conductor
    tasks: dict[str, Task]
    profile: Profile
    micro: MicroBatches
    critic: Critic | None = None

    def gradient(
        self, own: Sequence[Task], tasks: Sequence[Task], support: Sequence[Episode], query: Sequence[Episode],
        adaptation: Adaptation | None,
    ) -> dict[str, float | None]:  # fmt: skip
        """Accumulates the gradient of L_outer; returns the losses, entropy, clipped share and trained tokens.

        Args:
            own: this process's tasks, in the order of the deltas; tasks: those of all. support, query: episodes of all.
        """
        train, known = self.profile.train, [*support, *query]
        b_sl = train.b_sl * (not train.alternate or support[0].step % 2 == 0)
        share = len(support) / len(known)
        half = adaptation.half if adaptation is not None else None
        found = half.total if half is not None else self.accumulate(*self.policy_gradient(support, share, own))
        if adaptation is not None:
            more = self.accumulate(*self.policy_gradient(query, 1 - share, own), adaptation.deltas)
            found = {k: found[k] + more[k] for k in found}
        gold = [(t.task_id, t.gold) for t in tasks] if b_sl and "gold" in train.targets else []
        written = self.conductor.own_programs(tasks, known) if b_sl and "own" in train.targets else []
        right = [x for i, code in [*gold, *written] for x in self.supervised(i, code)]
        wrong = [x for failure in self.conductor.failures(tasks) for x in self.failure_example(*failure)] if train.b_neg else []
        sl = self.auxiliary(right, b_sl, cross_entropy_loss)
        neg = self.auxiliary(wrong, train.b_neg, negative_loss)
        tokens = found["tokens"]
        return {
            "loss_pg": found["loss"],
            "loss_sl": sl["loss"] if right else None,
            "loss_neg": neg["loss"] if wrong and train.b_neg else None,
            "entropy": found["entropy"] / tokens if tokens else None,  # of the rows that teach something
            "clipped": found["clipped"] / tokens if tokens else None,
            "trained_tokens": int(tokens + sl["tokens"] + neg["tokens"]) + (self.critic.tokens if self.critic else 0),
            **(self.critic.log if self.critic else {}),
        }

    def policy_gradient(
        self, episodes: Sequence[Episode], share: float, own: Sequence[Task]
    ) -> tuple[list[Example], LossOf, float]:
        """This process's examples (1/Z in their weights), loss and weight of b_pg * share * L_pg; rows without advantage
        (zero-variance groups) add nothing and are skipped."""
        train, index = self.profile.train, {t.task_id: i for i, t in enumerate(own)}
        b_pg = train.b_pg * (not train.alternate or episodes[0].step % 2 == 1)
        if self.critic is not None:
            examples = self.critic.examples(episodes, index)
        else:
            examples = scored(episodes, self.profile, train.advantage, index)
        normaliser = count_tokens(examples) / share
        mine = [e for e in examples if b_pg and e.task >= 0 and any(e.advantages)]
        mine = [replace(e, weight=e.weight / normaliser) for e in mine]
        return mine, lambda lp, batch: policy_gradient_loss(lp, batch, 1.0, train.clip_low, train.clip_high), b_pg

    def auxiliary(self, examples: Sequence[Example], weight: float, loss_of: Callable[..., torch.Tensor]) -> dict[str, float]:
        """weight * loss at theta of this process's share of the examples; the loss is reported without its weight."""
        normaliser, mine = count_tokens(examples), examples[rank() :: world()] if weight else []
        return self.accumulate(mine, lambda lp, batch: (loss_of(lp, batch, normaliser), 0.0), weight)

    def accumulate(
        self,
        examples: Sequence[Example],
        loss_of: LossOf,
        weight: float,
        deltas: Deltas | None = None,
        slots: Sequence[tuple[int, float]] = (),
    ) -> dict[str, float]:
        """Adds the gradient of weight * loss to the `.grad` of theta, and of the deltas that require one (slots: see
        `FastWeights.active`); returns sums over all processes."""
        total, fast = dict.fromkeys(SUMS, 0.0), FastWeights(self.policy.model)
        learnt = [*self.policy.parameters(), *(d for d in (deltas or {}).values() if d.requires_grad)]

        def work(chunk: list[Example]) -> Share:
            batch = collate(self.policy, chunk, self.profile.sample.temperature)
            logprobs, entropy = score_batch(self.policy, batch, fast, self.profile)
            loss, cut = loss_of(logprobs, batch)
            # pieces of a row (see SupportHalf) are one row together
            tokens = sum(sum(e.mask) if e.mask and e.advantages else len(e.tokens) for e in chunk)
            sums = (float(loss.detach()), float(cut), float(entropy.sum()), tokens)
            return sums, torch.autograd.grad(weight * loss, learnt, allow_unused=True)

        def add(share: Share) -> None:
            sums, gradients = share
            for p, g in zip(learnt, gradients, strict=True):
                if g is not None:
                    p.grad = g if p.grad is None else p.grad.add_(g)
            total.update({k: total[k] + v for k, v in zip(total, sums, strict=True)})

        if examples:
            with fast.active(deltas, slots=slots), learning(self.policy, self.profile):
                self.micro.each(examples, work, add)
        return {k: sum(part[k] for part in gather([total])) for k in total}

    # ---- targets

    def supervised(self, task_id: str, code: str | None) -> list[Example]:
        """The program as a target under the task's plain prompt; nothing when it is missing or longer than we sample."""
        task = self.tasks[task_id]
        if not code or not code.startswith(prompts.program_prefix(task)):  # a completion may have restated its header
            return []
        tokens = target_tokens(self.policy, task, code)
        if len(tokens) > self.profile.sample.max_new_tokens + 1:  # + 1: the closing eos
            return []
        return [Example(prompts.render(self.policy.tokenizer, task).text, tokens)]

    def failure_example(self, task_id: str, code: str, feedback: Feedback) -> list[Example]:
        """A stored failure as a target whose mask covers its error lines; nothing when it has no located error."""
        task = self.tasks[task_id]
        if feedback.scope != "line" or not code.startswith(prompts.program_prefix(task)):
            return []
        tokens = target_tokens(self.policy, task, code)[:-1]  # without eos: only the program can be wrong
        mask = self.conductor.error_mask(tokens, self.policy.decode(tokens), code, feedback)
        return [Example(prompts.render(self.policy.tokenizer, task).text, tokens, mask=mask)] if any(mask) else []


class SupportHalf:
    """(K_s/G) L_pg(S; theta) of L_outer, taken at the first inner step: delta = 0, the same point. The inner loss of a row is a
    multiple of its outer one, another one where damping or an error line says so: one backward pass gives both gradients.

    examples: of L_outer, their tasks are `slots`; rest: the examples of L_in that are none of them.
    """

    def __init__(self, outer: Outer, inner: Sequence[Example], own: Sequence[Task], support: Sequence[Episode]):
        """inner: the examples of L_in. Theta's `.grad` starts anew."""
        self.outer = outer
        self.rest: list[Example] = []  # of L_in
        share = outer.profile.inner.support / outer.profile.train.group
        mine, self.loss_of, self.weight = outer.policy_gradient(support, share, own)
        slots: dict[tuple[int, float], int] = {}
        same: dict[tuple, list[Example]] = {}  # what the forward sees of an example: any two alike may stand for each other
        for e in mine:
            same.setdefault((e.task, e.prompt, e.tokens, e.logprobs), []).append(e)
        pieces: list[tuple[float, Example]] = []
        for x in inner:
            twins = same.get((x.task, x.prompt, x.tokens, x.logprobs))
            found = multiples(x, twins[-1], self.weight) if twins else []
            if twins and found:
                twins.pop()
                pieces += found
            else:
                self.rest.append(x)
        pieces += [(0.0, e) for twins in same.values() for e in twins]
        self.examples = [replace(e, task=slots.setdefault((e.task, times), len(slots))) for times, e in pieces]
        self.slots = list(slots)
        for p in outer.policy.parameters():
            p.grad = torch.zeros_like(p)

    def gradient(self, leaves: Deltas) -> list[Example]:
        """Adds the gradient to theta's `.grad`, and L_in's of these rows to that of the leaves; returns what is left of L_in."""
        self.total = self.outer.accumulate(self.examples, self.loss_of, self.weight, leaves, self.slots)
        return self.rest


def multiples(inner: Example, outer: Example, weight: float) -> list[tuple[float, Example]]:
    """The outer example in pieces of tokens whose inner terms are as many times `weight` x their outer ones: (times, piece).

    Empty where some are none, or of the other sign (the clip would cut off at another ratio), or where there would be too many.
    """
    pairs = zip(inner.advantages, outer.advantages, strict=True)
    ratios = [inner.weight * a / (weight * outer.weight * b) if b else -abs(a) for a, b in pairs]
    if not all(0 <= r < math.inf for r in ratios):
        return []
    known = next(i for i, b in enumerate(outer.advantages) if b)  # a token that neither learns from goes with any other
    times = [float(f"{ratios[i if b else known]:.6e}") for i, b in enumerate(outer.advantages)]  # equal but for rounding
    if len(set(times)) == 1:
        return [(times[0], outer)]
    counts = outer.mask or (1,) * len(times)
    pieces = {t: tuple(m * (t == own) for m, own in zip(counts, times, strict=True)) for t in dict.fromkeys(times)}
    return [(t, replace(outer, mask=mask)) for t, mask in pieces.items()] if len(pieces) <= PIECES else []


def target_tokens(policy: Policy, task: Task, code: str) -> tuple[int, ...]:
    """Token ids of a program as a completion of its task: closing fence and eos included."""
    return (*policy.encode(prompts.target_text(code, task)), policy.eos)


def fitting(policy: Policy, tasks: Sequence[Task], max_new_tokens: int) -> list[Task]:
    """The tasks whose gold program fits the sampled length: the others could never be solved in training."""

    def fits(task: Task) -> bool:
        gold = task.gold or ""
        usable = gold and gold.startswith(prompts.program_prefix(task))
        return bool(usable) and len(target_tokens(policy, task, gold)) - 1 <= max_new_tokens

    return [t for t in tasks if fits(t)]
