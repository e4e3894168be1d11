"""A Llama's layers on a CPU: the same function with less memory traffic in training, fewer operations per sampled token."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, LlamaForCausalLM
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from falconlib.policy.fast_weights import FastWeights, stored
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


def is_lean(policy: Policy) -> bool:
    """Whether `lean` changes anything."""
    return type(policy.inner) is LlamaForCausalLM and policy.device.type == "cpu"


@contextmanager
def lean(policy: Policy) -> Iterator[None]:
    """Inside the block a Llama on a CPU attends by `grouped_attention` and normalises by `Norm`: the same but for rounding, half
    the time backward. Other models, and GPUs, have ways of their own."""
    if not is_lean(policy):
        yield
        return
    model = policy.inner
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


def attend(query, keys, values, mask, scale: float) -> torch.Tensor:
    """softmax(scale Q K^T + mask) V of query (R kv heads, heads / kv heads, d), keys and values (R, kv heads, W, d), mask
    (R, 1, 1, W). As K Q^T: oneDNN copies the few queries into the order that it wants, and not all keys."""
    rows, heads, width, _ = keys.shape
    scores = mask.expand(rows, heads, 1, width).reshape(-1, width, 1).expand(-1, -1, query.shape[1])
    scores = torch.baddbmm(scores, keys.flatten(0, 1), query.transpose(1, 2), alpha=scale)
    return torch.bmm(scores.transpose(1, 2).softmax(-1), values.flatten(0, 1))


def one_token(layer, adapted: FastWeights) -> Callable[..., torch.Tensor]:
    """The forward of a LlamaDecoderLayer for one token per row, states (R, 1, H); the layer's own one where there are more, or no
    cache.

    Queries and keys are rotated together, x cos + swap(x) sin with the sign in sin; queries that share a key stand side by side.
    """
    own, attention, mlp = layer.forward, layer.self_attn, layer.mlp
    size, place = attention.head_dim, attention.layer_idx
    heads, kv = (linear.out_features // size for linear in (attention.q_proj, attention.k_proj))
    project, widen = (
        adapted.together([attention.q_proj, attention.k_proj, attention.v_proj]),
        adapted.together([mlp.gate_proj, mlp.up_proj]),
    )
    sign = torch.ones(size).index_fill_(0, torch.arange(size // 2), -1.0)

    def forward(states, attention_mask=None, past_key_values=None, position_embeddings=None, **rest):
        if states.shape[1] > 1 or past_key_values is None:
            rest |= {"past_key_values": past_key_values, "position_embeddings": position_embeddings}
            return own(states, attention_mask=attention_mask, **rest)
        x = layer.input_layernorm(states)
        both, value = project(x).view(len(x), -1, size).split([heads + kv, kv], 1)  # (R, heads of queries and keys, d)
        cos, sin = position_embeddings
        both = (both * cos).addcmul_(both.roll(size // 2, -1), sin * sign.to(sin.dtype))
        query, key = both.split([heads, kv], 1)
        keys, values = past_key_values.update(key[:, :, None], value[:, :, None], place)
        mixed = attend(query.reshape(len(x) * kv, -1, size), keys, values, attention_mask, attention.scaling)
        states = states + attention.o_proj(mixed.view(len(x), 1, -1))
        x = layer.post_attention_layernorm(states)
        gate, up = widen(x).chunk(2, -1)
        return states + mlp.down_proj(mlp.act_fn(gate).mul_(up))

    return forward


@contextmanager
def decoding(policy: Policy, adapted: FastWeights) -> Iterator[None]:
    """Inside the block a Llama on a CPU reads one more token per row by `one_token`, several by `grouped_attention` (as in
    training), and its vocabulary layer is `stored`: the same but for rounding, in four fifths of the time. Without gradients."""
    if not is_lean(policy):
        yield
        return
    head, attention = policy.model.get_output_embeddings(), policy.inner.config._attn_implementation
    ours = {layer: one_token(layer, adapted) for layer in policy.inner.model.layers}
    if "forward" not in vars(head):  # somebody else's stays
        ours[head] = stored(head.weight, head.bias)
    try:
        policy.inner.set_attn_implementation(GROUPED)  # for its mask of numbers to add
        for module, forward in ours.items():
            module.forward = forward
        yield
    finally:
        policy.inner.set_attn_implementation(attention)
        for module in ours:
            module.__dict__.pop("forward", None)
