"""A Llama's layers as they are trained on a CPU: the same function with less memory traffic, most of all backward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, LlamaForCausalLM
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from falconlib.policy.models import Policy

GROUPED = "falcon_grouped"


def grouped_attention(_module, query, key, value, attention_mask, scaling=None, **_ignored):
    """softmax(s Q K^T + mask) V as plain products: query (R, heads, T, d), key and value (R, kv heads, W, d), mask (R, 1, T, W).

    The heads that share a key stand below each other, so that no key is repeated. torch's fused attention takes 3 times as long
    backward in bfloat16, transformers' plain one twice as long, which repeats the keys.
    """
    rows, heads, length, size = query.shape
    kv, width = key.shape[1], key.shape[2]
    scores = torch.matmul((query * scaling).reshape(rows, kv, -1, size), key.transpose(2, 3))
    weights = (scores.view(rows, heads, length, width) + attention_mask).softmax(-1)
    mixed = torch.matmul(weights.view(rows, kv, -1, width), value).view(rows, heads, length, -1)
    return mixed.transpose(1, 2).contiguous(), None


AttentionInterface.register(GROUPED, grouped_attention)
AttentionMaskInterface.register(GROUPED, ALL_MASK_ATTENTION_FUNCTIONS["eager"])  # always a mask, of numbers to add


class Norm(torch.autograd.Function):
    """w x / sqrt(mean(x^2) + eps) over the last axis of x (..., H) with a frozen w (H,), in float32 and then in the type of x.

    Kept for backward are x and one number per token; torch's own function is several on a CPU, and each keeps what it needs.
    """

    @staticmethod
    def forward(ctx, x, weight, eps):
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).to(x.dtype) * weight

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, scale = ctx.saved_tensors
        slope, wide = (grad * weight).float(), x.float()
        along = (slope * wide).mean(-1, keepdim=True) * scale.pow(3)
        return slope.mul_(scale).addcmul_(wide, along, value=-1).to(x.dtype), None, None


@contextmanager
def lean(policy: Policy) -> Iterator[None]:
    """Inside the block a Llama on a CPU attends by `grouped_attention` and normalises by `Norm`: the same but for rounding, half
    the time backward. Other models, and GPUs, have ways of their own."""
    model = policy.inner
    if type(model) is not LlamaForCausalLM or policy.device.type != "cpu":
        yield
        return
    attention = model.config._attn_implementation
    norms = [m for m in model.modules() if isinstance(m, LlamaRMSNorm) and not m.weight.requires_grad]
    try:
        model.set_attn_implementation(GROUPED)
        for norm in norms:
            norm.forward = lambda x, n=norm: Norm.apply(x, n.weight, n.variance_epsilon)
        yield
    finally:
        model.set_attn_implementation(attention)
        for norm in norms:
            norm.__dict__.pop("forward", None)
