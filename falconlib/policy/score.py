"""The scoring engine: log-probabilities of given completions, with gradients; what `generate` sampled, an update scores here.

What makes it fast on small machines: each distinct prompt is computed once and its completions attend to it through its
repeated cache (gradients flow back through it), and the vocabulary layer sees only the tokens that count, a chunk at a time,
so that no logits are kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import BaseModelOutput

from falconlib.errors import FalconError
from falconlib.policy.fast_weights import FastWeights
from falconlib.policy.generate import left_pad
from falconlib.policy.models import Policy

LIKE = 1.3  # [ours] prompts up to so much longer are padded to each other's length
CHUNK = 128  # [ours] tokens whose logits exist at once: 25 MB for 49,152 words


def score(
    policy: Policy,
    prompts: Sequence[str],
    tokens: torch.Tensor,
    mask: torch.Tensor,
    temperature: torch.Tensor,
    fast: FastWeights,
    tasks: torch.Tensor,
    *,
    shared: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """log p(token) and entropy in nats, (R, T) each, 0 where the mask is 0; only log p carries gradients.

    Args:
        prompts: rendered text of each row. tokens, mask: completions (R, T), right-padded, and what counts of them.
        temperature: of the softmax, (R,). fast: active fast weights; tasks: which of them each row uses, (R,).
        shared: compute each distinct (prompt, task) once; False computes every row with its own prompt.

    Raises FalconError when the model caps its logits: the chunked vocabulary layer would leave that out.
    """
    if getattr(policy.model.config, "final_logit_softcapping", None):
        raise FalconError(f"{policy.name} caps its logits, which the scoring engine does not do", "use another model")
    with bare(policy) as head:
        states = (shared_states if shared else plain_states)(policy, prompts, tokens, fast, tasks)
    where = mask.flatten().nonzero().squeeze(1)
    flat = states.flatten(0, 1).index_select(0, where)
    degrees = temperature.to(flat.device)[:, None].expand_as(tokens).flatten()[where]
    found = HeadLogprobs.apply(flat, head.weight, head.bias, tokens.flatten()[where], degrees)
    logprobs, entropy = (torch.zeros(tokens.numel(), device=flat.device).index_copy(0, where, f).view_as(tokens) for f in found)
    return logprobs, entropy


class HeadLogprobs(torch.autograd.Function):
    """log p(token) (N,) and entropy (N,) from states (N, H) and a frozen vocabulary layer, a chunk of tokens at a time.

    d log p(y) / d state = (W_y - sum_v p_v W_v) / temperature is taken at once, so that backward needs no logits.
    """

    @staticmethod
    def forward(ctx, states, weight, bias, tokens, temperature):
        logprobs, entropy = states.new_empty(len(states), dtype=torch.float32), states.new_empty(len(states), dtype=torch.float32)
        slope = torch.empty_like(states) if ctx.needs_input_grad[0] else None
        # once: fresh memory costs more than the exponentials
        shape = (min(CHUNK, len(states)), len(weight))
        room, thin = torch.empty(2, *shape, device=states.device), torch.empty(shape, dtype=weight.dtype, device=states.device)
        for start in range(0, len(states), CHUNK):
            part = slice(start, start + CHUNK)
            degrees = temperature[part, None]
            (logits, p), product = room[:, : len(degrees)], thin[: len(degrees)]
            into = (states[part], weight.T)
            torch.mm(*into, out=product) if bias is None else torch.addmm(bias, *into, out=product)
            logits.copy_(product).div_(degrees)
            own = logits.sub_(logits.amax(-1, keepdim=True)).gather(-1, tokens[part, None]).squeeze(-1)
            total = torch.exp(logits.clamp_(min=-1e4), out=p).sum(-1)  # a word that is masked with -inf adds 0, not 0 times it
            logprobs[part] = own - total.log()
            entropy[part] = total.log() - logits.mul_(p).sum(-1) / total  # two sums of one sign: nothing cancels
            if slope is not None:
                mean = (product.copy_(p) @ weight) / total[:, None]
                slope[part] = ((weight.index_select(0, tokens[part]) - mean) / degrees).to(slope.dtype)
        ctx.save_for_backward(slope)
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _entropy):
        (slope,) = ctx.saved_tensors
        return (grad[:, None] * slope).to(slope.dtype), None, None, None, None


@contextmanager
def bare(policy: Policy) -> Iterator[torch.nn.Module]:
    """The model without its vocabulary layer (yielded) inside the block: what it calls logits are the states before it. In a
    block of another one it stays as it is: a thread that ends must not give it back to those that run."""
    head = policy.model.get_output_embeddings()
    if "forward" in vars(head):
        yield head
        return
    head.forward = lambda states: states
    try:
        yield head
    finally:
        del head.forward


def plain_states(policy: Policy, prompts, tokens, fast: FastWeights, tasks) -> torch.Tensor:
    """States (R, T, H) that predict each completion token: every row with its own prompt, in one forward."""
    fast.select(tasks)
    prompt, seen = left_pad([policy.encode(p) for p in prompts], policy)
    if policy.seq2seq:
        return policy.model(input_ids=prompt, attention_mask=seen, decoder_input_ids=decoder_ids(policy, tokens)).logits
    mask = torch.cat([seen, torch.ones_like(tokens)], 1)  # right padding lies behind every token that counts
    position = (mask.cumsum(1) - 1).clamp(min=0)
    place = {"attention_mask": mask, "position_ids": position, "logits_to_keep": tokens.shape[1] + 1}
    return policy.model(input_ids=torch.cat([prompt, tokens], 1), use_cache=False, **place).logits[:, :-1]


def shared_states(policy: Policy, prompts, tokens, fast: FastWeights, tasks) -> torch.Tensor:
    """The same states with each distinct (prompt, task) computed once: all but its last token as a cache that its rows share."""
    keys = list(zip(prompts, tasks.tolist(), strict=True))
    places = {key: i for i, key in enumerate(dict.fromkeys(keys))}
    source = torch.tensor([places[key] for key in keys], device=policy.device)
    encoded = [policy.encode(prompt) for prompt, _ in places]
    if policy.seq2seq:
        fast.select(torch.tensor([task for _, task in places], device=policy.device))
        ids, seen = left_pad(encoded, policy)
        # index_select, here and below: see fast_weights.Adapted
        states = policy.inner.get_encoder()(input_ids=ids, attention_mask=seen).last_hidden_state.index_select(0, source)
        fast.select(tasks)
        decoder = {"attention_mask": seen[source], "decoder_input_ids": decoder_ids(policy, tokens)}
        return policy.model(encoder_outputs=BaseModelOutput(last_hidden_state=states), **decoder).logits
    cache, seen = prompt_cache(policy, [ids[:-1] for ids in encoded], [task for _, task in places], fast)
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys.index_select(0, source), layer.values.index_select(0, source)
    fast.select(tasks)
    last = torch.tensor([ids[-1] for ids in encoded], device=policy.device)[source]
    ids, mask = torch.cat([last[:, None], tokens[:, :-1]], 1), torch.cat([seen[source], torch.ones_like(tokens)], 1)
    position = seen.sum(1)[source][:, None] + torch.arange(tokens.shape[1], device=policy.device)
    return policy.model(input_ids=ids, attention_mask=mask, position_ids=position, past_key_values=cache, use_cache=True).logits


def prompt_cache(policy: Policy, prompts, tasks: Sequence[int], fast: FastWeights) -> tuple[DynamicCache, torch.Tensor]:
    """Cache and mask (P, W) of the prompts, padded on the left. Those of like length are computed together: a recalled text makes
    a prompt twice as long, and padding all others to it would cost more than they do."""
    width, todo, parts = max(map(len, prompts)), sorted(range(len(prompts)), key=lambda i: len(prompts[i])), []
    back = torch.tensor(todo, device=policy.device).argsort()
    seen = left_pad(prompts, policy)[1]
    while todo and width:
        shortest = len(prompts[todo[0]])  # nothing is left of a prompt of one token: it needs a longer one beside it
        chunk = [i for i in todo if len(prompts[i]) <= LIKE * shortest or not shortest]
        todo = todo[len(chunk) :]
        fast.select(torch.tensor([tasks[i] for i in chunk], device=policy.device))
        ids, mask = left_pad([prompts[i] for i in chunk], policy)
        part, position = DynamicCache(), (mask.cumsum(1) - 1).clamp(min=0)
        policy.model(input_ids=ids, attention_mask=mask, position_ids=position, past_key_values=part, logits_to_keep=1)
        parts.append(part)
    cache = parts[0] if parts else DynamicCache()
    for layers in zip(*(part.layers for part in parts), strict=True):
        for name in ("keys", "values"):
            padded = [F.pad(getattr(layer, name), (0, 0, width - getattr(layer, name).shape[2], 0)) for layer in layers]
            setattr(layers[0], name, torch.cat(padded).index_select(0, back))
    return cache, seen


def decoder_ids(policy: Policy, tokens: torch.Tensor) -> torch.Tensor:
    """What the decoder of an encoder-decoder model reads to predict `tokens`."""
    return torch.cat([tokens.new_full((len(tokens), 1), policy.model.config.decoder_start_token_id), tokens[:, :-1]], 1)
