"""A Llama's layers as they are trained on a CPU: the same function with less memory traffic, most of all backward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn import functional as F
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


@contextmanager
def lean(policy: Policy) -> Iterator[None]:
    """Inside the block a Llama on a CPU attends by `grouped_attention` and normalises by torch's own function: the same but for
    rounding (none in float32's norms), half the time backward. Other models, and GPUs, have ways of their own."""
    model = policy.inner
    if type(model) is not LlamaForCausalLM or policy.device.type != "cpu":
        yield
        return
    norms, attention = [m for m in model.modules() if isinstance(m, LlamaRMSNorm)], model.config._attn_implementation
    try:
        model.set_attn_implementation(GROUPED)
        for norm in norms:
            norm.forward = lambda x, n=norm: F.rms_norm(x, n.weight.shape, n.weight, n.variance_epsilon)
        yield
    finally:
        model.set_attn_implementation(attention)
        for norm in norms:
            norm.__dict__.pop("forward", None)
