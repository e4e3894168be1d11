"""Fast weights: one additive tensor per `lora_B` and per task, delta_x of the method; theta + delta_x is the adapted policy.

Forward hooks on every `lora_B` add the task's own delta to the rows of that task, so that one batched forward and backward
serves all tasks, with the same first-order gradients as one `functional_call` per task. Nothing here updates theta.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

Deltas = dict[str, torch.Tensor]  # name of a lora_B layer -> (tasks, out, r)


class FastWeights:
    """Hooks that add per-task deltas to the outputs of all `lora_B` layers of a peft model."""

    def __init__(self, model: nn.Module):
        self.layers = {
            name: module for name, module in model.named_modules() if ".lora_B." in name and isinstance(module, nn.Linear)
        }
        self.rows = torch.empty(0, dtype=torch.long)

    def zeros(self, tasks: int) -> Deltas:
        """delta = 0 for so many tasks, (tasks, out, r) per layer, float32."""
        return {
            name: torch.zeros(tasks, *layer.weight.shape, device=layer.weight.device, dtype=torch.float32)
            for name, layer in self.layers.items()
        }

    def select(self, rows: torch.Tensor) -> None:
        """Says which task each row of the next batch belongs to: (rows,) of indices."""
        self.rows = rows

    @contextmanager
    def active(self, deltas: Deltas) -> Iterator[FastWeights]:
        """theta + delta inside the block. Keep the block open until backward has finished: with gradient checkpointing,
        layers run again during backward, and without their deltas they would be silently wrong."""
        handles = [self.layers[name].register_forward_hook(self.hook(delta)) for name, delta in deltas.items()]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def hook(self, delta: torch.Tensor):
        """B h + delta_x h for every row: h is (rows, T, r), delta (tasks, out, r)."""

        def add(_layer: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            # not delta[rows]: its backward adds with atomics on several threads, and the last bits would differ from run to run
            own = delta.index_select(0, self.rows).to(output.dtype)
            return output + torch.bmm(inputs[0], own.transpose(1, 2))

        return add


def normalised_step(deltas: Deltas, gradients: Deltas, alpha: float) -> tuple[Deltas, torch.Tensor]:
    """One inner step, delta - alpha * g / ||g||, the norm taken over all layers of a task together; 0 where g = 0.

    Returns the new (detached) deltas and the norms (tasks,).
    """
    norm = torch.sqrt(sum(g.float().pow(2).sum((1, 2)) for g in gradients.values()))
    scale = torch.where(norm > 0, alpha / norm.clamp(min=1e-30), torch.zeros_like(norm))
    return {name: (d - scale[:, None, None] * gradients[name]).detach() for name, d in deltas.items()}, norm.detach()
