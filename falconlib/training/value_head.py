"""PPOCoder's value head: GAE on the reward at the end, less the drift from the SFT policy at each token.

    R_t = [t = T] (r(u) + ast(y, y*) + dfg(y, y*)) - beta (log pi(y_t) - log pi_sft(y_t))
    A_t = R_t + gamma V_{t+1} - V_t + gamma lambda A_{t+1};   L_V = (1/2Z) sum_t (V_t - (A_t + V_t)_fixed)^2
    beta <- beta (1 + clip(KL / target - 1, -0.2, 0.2) n / horizon),  KL the mean over the n programs

V_t = W h_t + b with h_t the state that has read y_<t. One update per batch: there is nothing for the clip of V to cut [ours].
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from falconlib.config import Profile
from falconlib.policy.fast_weights import FastWeights
from falconlib.policy.models import Policy
from falconlib.records import Episode, Task
from falconlib.training.advantages import RETURNS, outcome
from falconlib.training.batches import Batch, Example, MicroBatches, score_batch
from falconlib.training.critic import Critic
from falconlib.training.distributed import gather
from falconlib.training.similarity import ast_match, dataflow_match

GAMMA, LAMBDA = 1.0, 0.95  # the paper's
KL_TARGET, KL_HORIZON = 6.0, 10000  # the paper's code
KL_START = 0.05  # [ours] 0.05 of reward per nat of drift


def gae(rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, gamma: float, lam: float) -> torch.Tensor:
    """Generalised advantages A_t = delta_t + gamma lam A_{t+1}, delta_t = R_t + gamma V_{t+1} - V_t, of right-padded (R, T)."""
    found, after, value = torch.zeros_like(rewards), torch.zeros_like(rewards[:, 0]), torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        after = (rewards[:, t] + gamma * value - values[:, t] + gamma * lam * after) * mask[:, t]
        found[:, t], value = after, values[:, t] * mask[:, t]
    return found


def next_beta(beta: float, kl: float, count: int) -> float:
    """The adaptive KL coefficient (Ziegler et al. 2019) after `count` programs with this mean KL."""
    return beta * (1 + max(-0.2, min(kl / KL_TARGET - 1, 0.2)) * count / KL_HORIZON)


class ValueHead(Critic):
    """The value head of one PPOCoder run. beta: its KL coefficient. start: theta when the run began, the SFT policy."""

    outputs = 1

    def __init__(self, policy: Policy, profile: Profile, micro: MicroBatches, tasks: Mapping[str, Task]):
        super().__init__(policy, profile, micro, tasks)
        self.beta, self.start = KL_START, [p.detach().clone() for p in self.policy.parameters()]
        self.tokens_in_batch, self.kl = 1, 0.0

    def examples(self, episodes: Sequence[Episode], index: Mapping[str, int]) -> list[Example]:
        """All episodes with a verdict; their advantages have mean 0 and variance 1 over the batch."""
        known = [e for e in episodes if e.tokens and outcome(e.feedback) is not None]
        self.tokens_in_batch, self.kl = max(sum(len(e.tokens) for e in known), 1), 0.0
        found = self.credit(known, index)
        count, kl = max(len(known), 1), sum(gather([self.kl]))
        self.log |= {"kl": kl / count, "kl_beta": self.beta}
        self.beta = next_beta(self.beta, kl / count, len(known))
        flat = torch.tensor(gather([a for x in found if x.task >= 0 for a in x.advantages]), dtype=torch.float64)
        if len(flat) < 2:
            return found
        mean, std = float(flat.mean()), float(flat.std()) + 1e-8
        return [replace(x, advantages=tuple((a - mean) / std for a in x.advantages)) if x.task >= 0 else x for x in found]

    def look(self, chunk: Sequence[Episode], batch: Batch, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The squared error of the values over Z, and the advantages."""
        with torch.no_grad(), weights(self.policy, self.start), FastWeights(self.policy.model).active() as fast:
            drift = (batch.old_logprobs - score_batch(self.policy, batch, fast, self.profile)[0]) * batch.mask
        rewards = -self.beta * drift
        for row, e in enumerate(chunk):
            rewards[row, len(e.tokens) - 1] += self.reward(e)
        values = self.head(states[:, :-1]).squeeze(-1)
        advantages = gae(rewards, values.detach(), batch.mask, GAMMA, LAMBDA)
        error = (values - (advantages + values.detach())) * batch.mask
        self.kl += float(drift.sum())
        return 0.5 * error.pow(2).sum() / self.tokens_in_batch, advantages

    def reward(self, episode: Episode) -> float:
        """r(u) + ast(y, y*) + dfg(y, y*), in [-1, 3]."""
        end, gold = outcome(episode.feedback), self.tasks[episode.task_id].gold or ""
        return RETURNS[end or 0] + ast_match(episode.code, gold) + dataflow_match(episode.code, gold)

    def state_dict(self) -> dict[str, Any]:
        """The head's, and beta; `start` is the adapter that every run of the arm begins with."""
        return super().state_dict() | {"beta": self.beta}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts back what `state_dict` gave."""
        super().load_state_dict(state)
        self.beta = state["beta"]


@contextmanager
def weights(policy: Policy, values: Sequence[torch.Tensor]) -> Iterator[None]:
    """theta is `values` inside the block."""
    own = policy.parameters()
    mine = [p.data for p in own]
    try:
        for p, value in zip(own, values, strict=True):
            p.data = value
        yield
    finally:
        for p, value in zip(own, mine, strict=True):
            p.data = value
