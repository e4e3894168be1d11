"""The policy's adapters at work: theta folded into the weights, and fast weights delta_x per task on top.

    y = (W + s B A) x + s delta_x A x,   theta = (A, B), delta_x one additive tensor per `lora_B` and per task

`FastWeights.active` replaces the forward of every adapted layer inside its block. In float32 W + s B A is computed once, so
that theta costs nothing per token in forward and two thin products in backward, with the same gradients. One batched forward
and backward serves all tasks: each row sees its own task's delta. Nothing here updates theta.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

COPIED = 1 << 28  # [ours] so many numbers of weights (and of a head) are stored once more while sampling: 1 GB at most
PACKS = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()  # not on every processor
Deltas = dict[str, torch.Tensor]  # name of a lora_B layer -> (tasks, out, r)


class Adapted(torch.autograd.Function):
    """x -> W x + s B A x + s delta_row A x with the gradients of x, A, B and delta, none of them kept longer than needed.

    x (rows, T, in), weight (out, in): W, or W + s B A where that is `folded`; a (r, in), b (out, r), delta (tasks, out, r) or
    None; thin: the same three in the type of x, in which the products are taken, delta None where it is known to be zero; rows
    (rows,) of task indices; times: None, or by how much the gradient of delta is multiplied, (rows,). The gradients come in the
    type of what they belong to.
    """

    @staticmethod
    def forward(ctx, x, weight, a, b, delta, thin, rows, times, scale, folded):
        moved = thin[2] is not None
        out = F.linear(x, weight)
        low = F.linear(x, thin[0]) if moved or not folded or ctx.needs_input_grad[2] or ctx.needs_input_grad[4] else None
        if not folded:  # in place: a product of its own and a sum take 3 times as long in bfloat16
            out.view(-1, len(weight)).addmm_(low.flatten(0, -2), thin[1].T, alpha=scale)
        if moved:  # index_select, here and below: the backward of delta[rows] adds with atomics, and last bits would differ
            out.baddbmm_(low, thin[2].index_select(0, rows).transpose(1, 2), alpha=scale)
        ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, low, weight, a, b, delta, rows, times)
        ctx.thin, ctx.scale, ctx.folded = thin, scale, folded
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, low, weight, a, b, delta, rows, times = ctx.saved_tensors
        (low_a, low_b, low_delta), flat = ctx.thin, grad.flatten(0, -2)
        to_x, to_a, to_b, to_delta = grad @ weight if ctx.needs_input_grad[0] else None, None, None, None
        theta = ctx.needs_input_grad[2]
        by_delta = None
        if low_delta is not None:
            by_delta = torch.bmm(grad, low_delta.index_select(0, rows)).flatten(0, 1)
        whole = by_delta  # the gradient of A x: by W + s B A it has gone to x already where that is folded
        if theta or not ctx.folded:
            whole = flat @ low_b if by_delta is None else torch.addmm(by_delta, flat, low_b)
        to_low = by_delta if ctx.folded else whole
        if to_low is not None and to_x is not None:
            to_x.view(-1, low_a.shape[1]).addmm_(to_low, low_a, alpha=ctx.scale)
        if theta:
            to_a = (whole.T @ x.flatten(0, -2)).to(a.dtype).mul_(ctx.scale)
            to_b = (flat.T @ low.flatten(0, -2)).to(b.dtype).mul_(ctx.scale)
        if ctx.needs_input_grad[4]:
            found = torch.bmm(grad.transpose(1, 2), low).to(delta.dtype)
            found = found if times is None else found.mul_(times[:, None, None])
            to_delta = torch.zeros_like(delta).index_add_(0, rows, found, alpha=ctx.scale)
        return to_x, None, to_a, to_b, to_delta, None, None, None, None, None


class Now:
    """What the batch at work is of. rows: each row's task, (rows,); place, while sampling with deltas: what a row reads of B and
    each task's delta, (rows, 1 + tasks) of 0 and 1; times: None, or what its task's gradient is multiplied with, (rows,)."""

    rows = place = torch.empty(0, dtype=torch.long)
    times: torch.Tensor | None = None


class Own(Now, threading.local):
    """One for each thread: on a CPU batches run side by side. A GPU runs backward, and layers again in it, on a thread of torch's
    own, which has to see what the caller said."""


@dataclass(frozen=True)
class Part:
    """What sampling reads of a layer: weight (out, in), W or W + s B A; bias (out,) or None; down (r, in), A; up (r, out) each,
    s B^T (unless folded) and s delta^T of each task (unless all are zero)."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    down: torch.Tensor
    up: list[torch.Tensor]


class FastWeights:
    """theta and per-task deltas in all adapted layers of a peft model; a model without adapters has no layers."""

    def __init__(self, model: nn.Module):
        self.layers = {
            name: module for name, module in model.named_modules() if ".lora_B." in name and isinstance(module, nn.Linear)
        }
        self.owners: dict[str, Any] = {name: model.get_submodule(name.partition(".lora_B.")[0]) for name in self.layers}
        self.device = next(model.parameters()).device
        self.now = Own() if self.device.type == "cpu" else Now()
        self.adapted = sum(owner.get_base_layer().weight.numel() for owner in self.owners.values())
        self.copies, self.room = self.adapted <= COPIED, 0  # room: numbers that `together` may still copy
        self.tasks, self.moved = 0, False  # of the active deltas; the first inner step starts at 0
        self.parts: dict[Any, Part] = {}  # of the adapted layers, while sampling
        self.slots: tuple[torch.Tensor, ...] = ()

    def zeros(self, tasks: int) -> Deltas:
        """delta = 0 for so many tasks, (tasks, out, r) per layer, float32."""
        return {
            name: torch.zeros(tasks, *layer.weight.shape, device=layer.weight.device, dtype=torch.float32)
            for name, layer in self.layers.items()
        }

    def select(self, rows: torch.Tensor) -> None:
        """Says which task (or slot, see `active`) each row of this thread's next batch belongs to: (rows,) of indices."""
        self.now.rows, self.now.times = (self.slots[0][rows], self.slots[1][rows]) if self.slots else (rows, None)
        if self.moved and self.parts:  # of the type of the products: mixed types cost a copy each time
            kind = next(iter(self.parts.values())).weight.dtype
            self.now.place = F.pad(F.one_hot(self.now.rows, self.tasks).to(kind), (1, 0), value=1.0)  # all rows read B

    @contextmanager
    def active(
        self, deltas: Deltas | None = None, theta: bool = True, slots: Sequence[tuple[int, float]] = ()
    ) -> Iterator[FastWeights]:
        """theta + delta inside the block (theta alone without deltas). Keep it open until backward has finished: with gradient
        checkpointing, layers run again during backward, and without their deltas they would be silently wrong. Deltas that
        require gradients (inner loop) get them; theta: False where no gradient of it is wanted, so that none is computed. slots:
        (task, times) of each slot, where rows are slots: delta's gradient is then that of a loss which is so many times theirs.
        What is the same for all tokens is made when the block opens: theta must not change in it, and blocks of one model do not
        nest."""
        self.tasks, self.room = len(next(iter(deltas.values()))) if deltas else 0, COPIED - self.adapted
        self.moved = any(bool(d.any()) for d in deltas.values()) if deltas else False
        self.slots = tuple(torch.tensor(part, device=self.device) for part in zip(*slots, strict=True))
        try:
            for name, owner in self.owners.items():
                a, b = owner.lora_A["default"].weight, self.layers[name].weight
                a, b = (a, b) if theta else (a.detach(), b.detach())
                owner.forward = self.forward_of(owner, a, b, deltas[name] if deltas else None)
            yield self
        finally:
            self.parts = {}
            for owner in self.owners.values():
                owner.__dict__.pop("forward", None)

    def forward_of(self, owner: Any, a: torch.Tensor, b: torch.Tensor, delta: torch.Tensor | None):
        """The forward of one adapted layer: x (rows, T, in) -> (rows, T, out)."""
        base, scale = owner.get_base_layer(), owner.scaling["default"]
        weight, folded = base.weight, base.weight.dtype == torch.float32  # in bfloat16 the sum would round away what was learnt
        with torch.no_grad():
            if folded:
                weight = weight + scale * (b @ a)
            low_a, low_b = a.to(weight.dtype), b.to(weight.dtype)
            low_delta = delta.to(weight.dtype) if delta is not None and self.moved else None

        def learn(x: torch.Tensor, *_args, **_kwargs) -> torch.Tensor:
            out = Adapted.apply(x, weight, a, b, delta, (low_a, low_b, low_delta), self.now.rows, self.now.times, scale, folded)
            return out if base.bias is None else out + base.bias

        if torch.is_grad_enabled():
            return learn
        up = [*([] if folded else [low_b]), *([] if low_delta is None else low_delta)]
        self.parts[owner] = Part(weight, base.bias, low_a, [(scale * part).T for part in up])
        return self.product(self.parts[owner])

    @torch.no_grad()
    def product(self, part: Part) -> Callable[..., torch.Tensor]:
        """x (rows, T, in) -> (rows, T, out) by one product with (W, s B, s delta_0, ...) side by side: two and a sum take 1.15
        times as long."""
        weight, up = part.weight, part.up
        side = torch.cat(up).T if up else weight[:, :0]
        weight = torch.cat([weight, side], 1) if up and self.copies else weight
        keep = self.copies or weight.dtype == torch.float32  # where it is not the model's own
        times = stored(weight, part.bias) if keep else partial(F.linear, weight=weight, bias=part.bias)
        if not up:
            return lambda x, *_args, **_kwargs: times(x)
        down = stored(part.down, None)

        def sample(x: torch.Tensor, *_args, **_kwargs) -> torch.Tensor:
            low = down(x)
            if len(up) > 1:  # without B where that is folded
                low = (self.now.place[:, None, -len(up) :, None].to(low.dtype) * low[:, :, None]).flatten(2)
            return times(torch.cat([x, low], -1)) if self.copies else times(x) + F.linear(low, side)

        return sample

    @torch.no_grad()
    def together(self, layers: Sequence[Any]) -> Callable[[torch.Tensor], torch.Tensor]:
        """x -> what layers that read the same x say, side by side on the last axis: by one `product` where that takes less time
        and COPIED has room for it."""
        part = self.joined(layers)
        return self.product(part) if part else lambda x: torch.cat([layer(x) for layer in layers], -1)

    def joined(self, layers: Sequence[Any]) -> Part | None:
        """Layers that read the same x as one, with zeros for another layer's B and delta; None where those are wider than x or
        weights not packed: they would take more time than a product each."""
        plain = [x for x in layers if x not in self.parts]
        hooks = any(x._forward_hooks or x._forward_pre_hooks for x in layers)
        if not PACKS or hooks or any(type(x) is not nn.Linear or "forward" in vars(x) for x in plain):
            return None
        count = max(len(self.parts[x].up) if x in self.parts else 0 for x in layers)
        known = {x: Part(x.weight, x.bias, x.weight[:0], [x.weight.T[:0]] * count) for x in plain} | self.parts
        parts = [known[layer] for layer in layers]
        width, wide = parts[0].weight.shape[1], count * sum(len(p.down) for p in parts)
        size = (width + wide) * sum(len(p.weight) for p in parts)
        if wide > width or size > self.room or any(p.weight.dtype != torch.bfloat16 for p in parts):
            return None
        self.room -= size
        bias = [p.weight.new_zeros(len(p.weight)) if p.bias is None else p.bias for p in parts]
        up = [torch.block_diag(*column) for column in zip(*(p.up for p in parts), strict=True)]
        return Part(torch.cat([p.weight for p in parts]), torch.cat(bias), torch.cat([p.down for p in parts]), up)


def stored(weight: torch.Tensor, bias: torch.Tensor | None) -> Callable[[torch.Tensor], torch.Tensor]:
    """x -> W x + b for few rows x and the same W many times: on a CPU W is stored once more as its products want to read it, for
    a quarter less time in bfloat16 (oneDNN would put it in that order each time), an eighth less in float32 (by columns)."""
    if weight.device.type != "cpu" or weight.numel() > COPIED:
        return lambda x: F.linear(x, weight, bias)
    if weight.dtype == torch.bfloat16 and PACKS:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight)
        return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    by_columns = weight.T.contiguous().T if weight.dtype == torch.float32 else weight
    return lambda x: F.linear(x, by_columns, bias)


def normalised_step(deltas: Deltas, gradients: Deltas, alpha: float) -> tuple[Deltas, torch.Tensor]:
    """One inner step, delta - alpha * g / ||g||, the norm taken over all layers of a task together; 0 where g = 0.

    Returns the new (detached) deltas and the norms (tasks,).
    """
    norm = torch.stack([g.float().pow(2).sum((1, 2)) for g in gradients.values()]).sum(0).sqrt()
    scale = torch.where(norm > 0, alpha / norm.clamp(min=1e-30), torch.zeros_like(norm))
    return {name: (d - scale[:, None, None] * gradients[name]).detach() for name, d in deltas.items()}, norm.detach()
