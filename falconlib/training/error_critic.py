"""CodeRL's critic: predicts how a program ends, and its estimate at each token weights that token's part of the loss.

    v_t = softmax(W h_t + b) in R^4,  h_t the state that has read y_<=t;   q(u | y_<=t) = v_t[u]
    L_critic = -(1/N) sum_i log softmax(max_t (W h_t + b))[u_i];           A_it = (r(u_i) - r(u_greedy)) q(u_i | y_i,<=t)

The weight of a token is the estimate from before the critic has seen this program's outcome. The paper's critic is a model of its
own, trained before; here it is a head on the policy's states, trained on the way [ours].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch.nn import functional as F

from falconlib.records import Episode
from falconlib.training.advantages import RETURNS, outcome, sequence_advantages
from falconlib.training.batches import Batch, Example
from falconlib.training.critic import Critic


class ErrorCritic(Critic):
    """The critic of one CodeRL run. gain: r(u) - r(u_greedy) of the episodes at work, by id."""

    outputs = len(RETURNS)
    gain: dict[int, float]

    def examples(self, episodes: Sequence[Episode], index: Mapping[str, int]) -> list[Example]:
        """Those of the sampled episodes whose outcome and whose task's greedy outcome are known."""
        gains = zip(episodes, sequence_advantages(episodes, "critic"), strict=True)
        known = [(e, a) for e, a in gains if a is not None and e.tokens]
        self.gain = {id(e): a for e, a in known}
        return self.credit([e for e, _ in known], index)

    def look(self, chunk: Sequence[Episode], batch: Batch, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The class prediction's cross-entropy over N, and (r - r_greedy) q."""
        logits = self.head(states[:, 1:])
        truth = torch.tensor([outcome(e.feedback) for e in chunk], device=states.device)
        whole = logits.masked_fill(batch.mask[..., None] == 0, -torch.inf).amax(1)
        q = logits.detach().softmax(-1)[torch.arange(len(chunk)), :, truth]
        gain = torch.tensor([self.gain[id(e)] for e in chunk], device=states.device)
        return F.cross_entropy(whole, truth, reduction="sum") / len(self.gain), gain[:, None] * q
