"""What a critic is: a linear head on the policy's states that gives each token its credit and learns from the same episodes.

The states are taken without gradients: a critic never moves theta [ours]. CodeRL and PPOCoder differ in what the head says; see
`training.error_critic`, `training.value_head`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.nn import functional as F

from falconlib.config import Profile
from falconlib.policy.fast_weights import FastWeights
from falconlib.policy.models import Policy
from falconlib.policy.score import bare, plain_states, shared_states
from falconlib.records import Episode, Task
from falconlib.training.batches import Batch, Example, MicroBatches, collate
from falconlib.training.distributed import gather

LR = 1e-3  # [ours] of the head's AdamW: from zero it must find its scale within tens of steps


class Critic(ABC):
    """One run's critic. log: what the last step's metrics get; tokens: how many it learnt from then.

    Subclasses say how many `outputs` the head has per token, in `examples` which episodes teach, and in `look` what the head
    makes of a micro-batch.
    """

    outputs: int

    def __init__(self, policy: Policy, profile: Profile, micro: MicroBatches, tasks: Mapping[str, Task]):
        self.policy, self.profile, self.micro, self.tasks = policy, profile, micro, tasks
        width = policy.model.get_output_embeddings().weight.shape[1]
        self.head = torch.nn.Linear(width, self.outputs, device=policy.device)
        for p in self.head.parameters():
            torch.nn.init.zeros_(p)  # knows nothing, prefers nothing, needs no seed
        self.optimizer = torch.optim.AdamW(self.head.parameters(), lr=LR, weight_decay=0.0)
        self.log: dict[str, float | None] = {}
        self.tokens = 0

    @abstractmethod
    def examples(self, episodes: Sequence[Episode], index: Mapping[str, int]) -> list[Example]:
        """Like `advantages.scored`: one example per episode that teaches, with its token advantages; those of other processes
        (not in `index`, task id -> row) have zeros. The head learns from them on the way."""

    @abstractmethod
    def look(self, chunk: Sequence[Episode], batch: Batch, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss of the head, normalised over the whole batch, and advantages (R, T), from states (R, T + 1, H)."""

    def credit(self, episodes: Sequence[Episode], index: Mapping[str, int]) -> list[Example]:
        """The episodes as examples with the advantages of `look`, and one step of the head."""
        parameters, loss = list(self.head.parameters()), [0.0]
        found: dict[int, tuple[float, ...]] = {}
        examples = [
            Example(e.prompt, e.tokens, index.get(e.task_id, -1), 1.0, (0.0,) * len(e.tokens), e.logprobs) for e in episodes
        ]
        source = {id(x): e for x, e in zip(examples, episodes, strict=True)}
        gradients = [torch.zeros_like(p) for p in parameters]

        def work(chunk: list[Example]) -> None:
            batch = collate(self.policy, chunk, self.profile.sample.temperature)
            part, advantages = self.look([source[id(x)] for x in chunk], batch, states_of(self.policy, batch, self.profile))
            for g, new in zip(gradients, torch.autograd.grad(part, parameters), strict=True):
                g += new
            loss[0] += float(part.detach())
            for x, row in zip(chunk, advantages.tolist(), strict=True):
                found[id(x)] = tuple(row[: len(x.tokens)])

        mine = [x for x in examples if x.task >= 0]
        if mine:
            self.micro.each(mine, work)
        for p, g in zip(parameters, gradients, strict=True):
            p.grad = sum(part.to(p.device) for part in gather([g.cpu()]))  # in rank order: the same head everywhere
        if examples:
            self.optimizer.step()
        self.tokens = sum(len(x.tokens) for x in examples)
        self.log = {"loss_critic": sum(gather(loss)) if examples else None}
        return [replace(x, advantages=found.get(id(x), x.advantages)) for x in examples]

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {"head": self.head.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts back what `state_dict` gave."""
        self.head.load_state_dict(state["head"])
        self.optimizer.load_state_dict(state["optimizer"])


@torch.no_grad()
def states_of(policy: Policy, batch: Batch, profile: Profile) -> torch.Tensor:
    """(R, T + 1, H): at t what the policy has read before token t, at t + 1 with it; scaled to mean 0 and variance 1."""
    fast, tokens = FastWeights(policy.model), F.pad(batch.tokens, (0, 1))  # one more, to have read the last one
    with fast.active(), bare(policy):
        states = shared_states if profile.train.shared_prefix else plain_states
        found = states(policy, batch.prompts, tokens, fast, batch.task)
    return F.layer_norm(found.float(), found.shape[-1:])
