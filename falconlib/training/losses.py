"""The losses of METHOD section 4 as functions of log-probabilities, and the batched forward that yields them.

Shapes: R rows, T completion tokens. Masks come from lengths, never from token ids, since pad may equal eos. Nothing here
samples, reads memory or steps an optimizer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from falconlib.policy.generate import left_pad
from falconlib.policy.models import Policy


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
    """Right-padded tensors (R, T) of some examples; mask holds their weights, 0 on padding; task is (R,)."""

    tokens: torch.Tensor
    mask: torch.Tensor
    task: torch.Tensor
    advantages: torch.Tensor
    old_logprobs: torch.Tensor

    def rows(self, keep: torch.Tensor) -> Batch:
        """Only the rows that `keep` (R,) selects."""
        return Batch(self.tokens[keep], self.mask[keep], self.task[keep], self.advantages[keep], self.old_logprobs[keep])


def micro_batches(policy: Policy, examples: Sequence[Example], micro_tokens: int) -> Iterator[list[Example]]:
    """Examples of like length together, at most `micro_tokens` padded tokens at once (always at least one example)."""
    length = [len(policy.encode(e.prompt)) + len(e.tokens) for e in examples]
    order = sorted(range(len(examples)), key=lambda i: -length[i])
    while order:
        rows = max(1, micro_tokens // length[order[0]])
        yield [examples[i] for i in order[:rows]]
        order = order[rows:]


def collate(policy: Policy, examples: Sequence[Example]) -> Batch:
    """The tensors of a micro-batch."""
    width = max(len(e.tokens) for e in examples)

    def pad(rows, dtype):
        return torch.tensor([list(r) + [0] * (width - len(r)) for r in rows], dtype=dtype, device=policy.device)

    return Batch(
        tokens=pad([e.tokens for e in examples], torch.long),
        mask=pad([[e.weight * m for m in e.mask or [1] * len(e.tokens)] for e in examples], torch.float32),
        task=torch.tensor([e.task for e in examples], device=policy.device),
        advantages=pad([e.advantages for e in examples], torch.float32),
        old_logprobs=pad([e.logprobs for e in examples], torch.float32),
    )


def completion_logits(policy: Policy, examples: Sequence[Example], tokens: torch.Tensor) -> torch.Tensor:
    """Logits (R, T, V) that predict each completion token; only those positions reach the vocabulary layer."""
    prompt, seen = left_pad([policy.encode(e.prompt) for e in examples], policy)
    if policy.seq2seq:
        start = tokens.new_full((len(tokens), 1), policy.model.config.decoder_start_token_id)
        return policy.model(input_ids=prompt, attention_mask=seen, decoder_input_ids=torch.cat([start, tokens[:, :-1]], 1)).logits
    mask = torch.cat([seen, torch.ones_like(tokens)], 1)  # right padding lies behind every token that counts
    ids = torch.cat([prompt, tokens], 1)
    position = (mask.cumsum(1) - 1).clamp(min=0)
    out = policy.model(
        input_ids=ids, attention_mask=mask, position_ids=position, logits_to_keep=tokens.shape[1] + 1, use_cache=False
    )
    return out.logits[:, :-1]


def token_logprobs(logits: torch.Tensor, tokens: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """log p(token) (R, T) at a temperature, from logits (R, T, V)."""
    flat = logits.float().flatten(0, 1) / temperature
    return -F.cross_entropy(flat, tokens.flatten(), reduction="none").view_as(tokens)


@torch.no_grad()
def mean_entropy(logits: torch.Tensor, mask: torch.Tensor, temperature: float) -> float:
    """Mean entropy in nats over the tokens of `mask`, row by row to bound memory."""
    total = 0.0
    for row, keep in zip(logits, mask, strict=True):
        logprobs = torch.log_softmax(row.float() / temperature, -1)
        total += float((-(logprobs.exp() * logprobs).sum(-1) * (keep > 0)).sum())
    return total / max(float((mask > 0).sum()), 1.0)


def policy_gradient_loss(
    logprobs: torch.Tensor, batch: Batch, normaliser: float, clip_low: float, clip_high: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """L_pg = -(1/Z) sum_{i,t} min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), r = pi_phi / pi_sampling.

    Returns the loss and the number of tokens whose ratio the clip cut off. Z is `normaliser`: tokens of the whole batch,
    so that micro-batches add up.
    """
    ratio = torch.exp((logprobs - batch.old_logprobs) * (batch.mask > 0))  # 1 on padding, where it counts for nothing
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    gain = torch.minimum(ratio * batch.advantages, clipped * batch.advantages)
    cut = ((clipped * batch.advantages < ratio * batch.advantages) & (batch.mask > 0)).sum()
    return -(gain * batch.mask).sum() / normaliser, cut.detach()


def cross_entropy_loss(logprobs: torch.Tensor, batch: Batch, normaliser: float) -> torch.Tensor:
    """CE = -(1/Z) sum log p over the tokens of the mask."""
    return -(logprobs * batch.mask).sum() / normaliser


def negative_loss(logprobs: torch.Tensor, batch: Batch, normaliser: float, floor: float = 0.1) -> torch.Tensor:
    """L_negative = (1/Z) sum over error tokens with p > floor of -log(1 - min(p, 0.99)): bounded unlikelihood.

    Tokens that the policy would hardly write again (p <= floor) need no push, and 0.99 keeps the loss finite. [ours] Z counts
    all error tokens, not only the kept ones: the term fades as the errors are unlearnt, instead of pressing on the last one.
    """
    p = logprobs.exp()
    keep = batch.mask * (p.detach() > floor)
    return -(torch.log1p(-p.clamp(max=0.99)) * keep).sum() / normaliser


def count_tokens(examples: Sequence[Example]) -> int:
    """Tokens that count in a batch of examples: its normaliser Z (at least 1)."""
    return max(sum(sum(e.mask) if e.mask else len(e.tokens) for e in examples), 1)
