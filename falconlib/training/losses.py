"""The losses of METHOD section 4 as functions of log-probabilities (R, T): rows, completion tokens.

Nothing here runs a model, samples, reads memory or steps an optimizer.
"""

from __future__ import annotations

import torch

from falconlib.training.batches import Batch


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
