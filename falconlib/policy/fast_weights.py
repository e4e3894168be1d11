"""The policy's adapters at work: theta folded into the weights, and fast weights delta_x per task on top.

    y = (W + s B A) x + s delta_x A x,   theta = (A, B), delta_x one additive tensor per `lora_B` and per task

`FastWeights.active` replaces the forward of every adapted layer inside its block. In float32 W + s B A is computed once, so
that theta costs nothing per token in forward and two thin products in backward, with the same gradients. One batched forward
and backward serves all tasks: each row sees its own task's delta. Nothing here updates theta.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

Deltas = dict[str, torch.Tensor]  # name of a lora_B layer -> (tasks, out, r)


class Adapted(torch.autograd.Function):
    """x -> W x + s B A x + s delta_row A x with the gradients of x, A, B and delta, none of them kept longer than needed.

    x (rows, T, in), weight (out, in): W, or W + s B A where that is `folded`; a (r, in), b (out, r), delta (tasks, out, r) or
    None, rows (rows,) of task indices; moved: False where delta is known to be zero, whose product is then left out. The thin
    products are taken in the type of x; the gradients come in that of what they belong to.
    """

    @staticmethod
    def forward(ctx, x, weight, a, b, delta, rows, scale, folded, moved):
        theta, local = ctx.needs_input_grad[2], ctx.needs_input_grad[4]
        out, low = F.linear(x, weight), F.linear(x, a.to(x.dtype)) if moved or local or not folded else None
        if not folded:  # in place: a product of its own and a sum take 3 times as long in bfloat16
            out.view(-1, len(weight)).addmm_(low.flatten(0, -2), b.to(x.dtype).T, alpha=scale)
        if moved:
            add_per_row(out, low, delta, rows, scale)
        ctx.save_for_backward(x if theta else None, low if local else None, weight, a, b, delta, rows)
        ctx.scale, ctx.folded, ctx.moved = scale, folded, moved
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, low, weight, a, b, delta, rows = ctx.saved_tensors
        to_x, to_a, to_b, to_delta = grad @ weight if ctx.needs_input_grad[0] else None, None, None, None
        flat, low_a, low_b = grad.flatten(0, -2), a.to(grad.dtype), b.to(grad.dtype)
        by_theta = ctx.scale * (flat @ low_b) if x is not None or not ctx.folded else None
        by_delta = None
        if ctx.moved:  # index_select, not delta[rows]: see add_per_row
            by_delta = torch.bmm(grad, delta.index_select(0, rows).to(grad.dtype)).flatten(0, 1).mul_(ctx.scale)
        for thin in (None if ctx.folded else by_theta, by_delta):
            if thin is not None and to_x is not None:
                to_x.view(-1, a.shape[1]).addmm_(thin, low_a)
        if x is not None:
            whole = by_theta if by_delta is None else by_theta + by_delta
            to_a = (whole.T @ x.flatten(0, -2)).to(a.dtype)
            to_b = (flat.T @ F.linear(x.flatten(0, -2), low_a)).to(b.dtype).mul_(ctx.scale)
        if low is not None:
            found = torch.bmm(grad.transpose(1, 2), low).to(delta.dtype)
            to_delta = torch.zeros_like(delta).index_add_(0, rows, found, alpha=ctx.scale)
        return to_x, None, to_a, to_b, to_delta, None, None, None, None


def add_per_row(out: torch.Tensor, low: torch.Tensor, delta: torch.Tensor, rows: torch.Tensor, scale: float) -> None:
    """out += scale delta_x h for every row: out (rows, T, out), low = h (rows, T, r), delta (tasks, out, r), rows: the tasks."""
    if low.shape[1] == 1:  # decoding: one product with all deltas side by side reads each of them once, not once per row
        place = F.one_hot(rows, len(delta)).to(low.dtype)
        side_by_side = delta.transpose(1, 2).flatten(0, 1).to(low.dtype)
        out.squeeze(1).addmm_((place[:, :, None] * low).flatten(1), side_by_side, alpha=scale)
    else:  # not delta[rows]: its backward adds with atomics on several threads, and the last bits would differ from run to run
        out.baddbmm_(low, delta.index_select(0, rows).to(low.dtype).transpose(1, 2), alpha=scale)


class FastWeights:
    """theta and per-task deltas in all adapted layers of a peft model; a model without adapters has no layers."""

    def __init__(self, model: nn.Module):
        self.layers = {
            name: module for name, module in model.named_modules() if ".lora_B." in name and isinstance(module, nn.Linear)
        }
        self.owners: dict[str, Any] = {name: model.get_submodule(name.partition(".lora_B.")[0]) for name in self.layers}
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
    def active(self, deltas: Deltas | None = None, theta: bool = True) -> Iterator[FastWeights]:
        """theta + delta inside the block (theta alone without deltas). Keep it open until backward has finished: with gradient
        checkpointing, layers run again during backward, and without their deltas they would be silently wrong. Deltas that
        require gradients (inner loop) get them; theta: False where no gradient of it is wanted, so that none is computed."""
        try:
            for name, owner in self.owners.items():
                a, b = owner.lora_A["default"].weight, self.layers[name].weight
                a, b = (a, b) if theta else (a.detach(), b.detach())
                owner.forward = self.forward_of(owner, a, b, deltas[name] if deltas else None)
            yield self
        finally:
            for owner in self.owners.values():
                owner.__dict__.pop("forward", None)

    def forward_of(self, owner: Any, a: torch.Tensor, b: torch.Tensor, delta: torch.Tensor | None):
        """The forward of one adapted layer: x (rows, T, in) -> (rows, T, out)."""
        base, scale = owner.get_base_layer(), owner.scaling["default"]
        folded = base.weight.dtype == torch.float32  # the sum in bfloat16 would round away most of what the adapters learnt
        with torch.no_grad():
            weight = base.weight + scale * (b @ a) if folded else base.weight
            if folded and not torch.is_grad_enabled():  # decoding multiplies few rows: 12 % faster with W stored by columns
                weight = weight.T.contiguous().T
        moved = delta is not None and bool(delta.any())  # the first inner step starts at 0

        def forward(x: torch.Tensor, *_args, **_kwargs) -> torch.Tensor:
            out = Adapted.apply(x, weight, a, b, delta, self.rows, scale, folded, moved)
            return out if base.bias is None else out + base.bias

        return forward


def normalised_step(deltas: Deltas, gradients: Deltas, alpha: float) -> tuple[Deltas, torch.Tensor]:
    """One inner step, delta - alpha * g / ||g||, the norm taken over all layers of a task together; 0 where g = 0.

    Returns the new (detached) deltas and the norms (tasks,).
    """
    norm = torch.stack([g.float().pow(2).sum((1, 2)) for g in gradients.values()]).sum(0).sqrt()
    scale = torch.where(norm > 0, alpha / norm.clamp(min=1e-30), torch.zeros_like(norm))
    return {name: (d - scale[:, None, None] * gradients[name]).detach() for name, d in deltas.items()}, norm.detach()
