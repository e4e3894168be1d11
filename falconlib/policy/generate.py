"""The generation engine: many sampled completions of few prompts, with their log-probabilities.

What makes it fast on small machines: each distinct prompt is prefilled once and its cache repeated for its completions,
the cache is preallocated instead of concatenated, adapters are folded into the weights (see `fast_weights`), and finished rows
leave the batch. Every row draws from its own random stream, so that adding or removing a row cannot shift another one's.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F
from transformers.cache_utils import DynamicCache, DynamicLayer

from falconlib.errors import FalconError
from falconlib.policy.fast_weights import Deltas, FastWeights
from falconlib.policy.layers import decoding
from falconlib.policy.models import Policy

PREFILL_TOKENS = 4096  # [ours] padded prompt tokens per forward: bounds memory, and keeps like lengths together
SAMPLE_ROWS = 8  # [ours] rows drawn at once on a CPU: all their words fit its cache, 4 times as fast as 64 rows at once
BLOCK = 256  # [ours] words whose weights are summed before one is looked for: about the root of a vocabulary
NUCLEUS = 256  # [ours] top_p looks among so many tokens first: a text model is rarely less sure


@dataclass(frozen=True)
class Row:
    """One completion. prompt: index of its prompt; seed: of its random stream; task: row of the fast weights; greedy: always the
    likeliest token."""

    prompt: int
    seed: int
    task: int = 0
    greedy: bool = False


@dataclass(frozen=True)
class Completion:
    """tokens: sampled ids, with the closing eos or stop text; logprobs: at the sampling temperature (empty when greedy).

    finished: whether it ended by eos or stop text rather than by length.
    """

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    finished: bool


class Preallocated(DynamicLayer):
    """A key/value layer that writes into a buffer made once for the whole completion instead of growing by copies."""

    def __init__(self, like: torch.Tensor, rows: int, width: int, room: int):
        """A buffer for `rows` rows of `width` prompt positions and `room` more; like: prompt states (P, heads, T, dim)."""
        super().__init__()
        shape = (rows, like.shape[1], width + room, like.shape[3])
        self.keys, self.values = like.new_zeros(shape), like.new_zeros(shape)  # zeros: a masked NaN would still be NaN
        self.dtype, self.device, self.is_initialized = like.dtype, like.device, True
        self.length = width

    def put(self, rows: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """The prompts' states of these rows, right-aligned at the end of the prompt positions."""
        place = slice(self.length - keys.shape[2], self.length)
        self.keys[rows, :, place], self.values[rows, :, place] = keys, values

    def update(self, key_states, value_states, *args, **kwargs):
        end = self.length + key_states.shape[2]
        self.keys[:, :, self.length : end], self.values[:, :, self.length : end] = key_states, value_states
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_seq_length(self) -> int:
        return self.length if self.is_initialized else 0

    def keep(self, count: int, holes: list[int], last: list[int]) -> None:
        """The first `count` rows, with the rows `last` moved into the `holes`: nothing else is copied."""
        for states in (self.keys, self.values):
            states[holes, :, : self.length] = states[last, :, : self.length]
        self.keys, self.values = self.keys[:count], self.values[:count]


@torch.no_grad()
def generate(
    policy: Policy,
    prompts: Sequence[str],
    rows: Sequence[Row],
    *,
    max_new_tokens: int,
    temperature: float,
    top_p: float = 1.0,
    stop: Sequence[str] = (),
    deltas: Deltas | None = None,
    batch_rows: int = 64,
    progress: Callable[[int], object] = lambda n: None,
) -> list[Completion]:
    """One completion per row, in the order of `rows`.

    Args:
        prompts: rendered texts. rows: which prompt, random stream and fast weights each completion uses.
        temperature: 0 makes every row greedy; log-probs are taken at it. top_p < 1 is off-policy: for evaluation only.
        stop: a completion ends behind the first of these texts. deltas: fast weights, one per `Row.task`.
        batch_rows: rows computed at once. progress: called with the number of rows that ended.

    Raises:
        FalconError: an empty prompt, or one that leaves no room in the model's context.
    """
    encoded = [policy.encode(p) for p in prompts]
    limit = getattr(policy.model.config, "max_position_embeddings", None) or 1 << 30
    for text, ids in zip(prompts, encoded, strict=True):
        if not ids:
            raise FalconError("a prompt is empty: there is no token to go on from", "render it with falconlib.prompts")
        if len(ids) + max_new_tokens > limit:
            raise FalconError(
                f"prompt of {len(ids)} tokens + {max_new_tokens} new ones; the context holds {limit}: {text[:60]!r}..."
            )
    done: list[Completion | None] = [None] * len(rows)
    # like lengths together: less padding
    order = sorted(range(len(rows)), key=lambda i: (len(encoded[rows[i].prompt]), rows[i].prompt, i))
    with FastWeights(policy.model).active(deltas) as adapted, decoding(policy, adapted):
        fast = adapted if deltas is not None else None  # theta alone: all tasks share it
        sampler = decode_seq2seq if policy.seq2seq else decode_batch
        while order:
            batch = order[:batch_rows]
            try:
                found = sampler(
                    policy, encoded, [rows[i] for i in batch], max_new_tokens, temperature, top_p, tuple(stop), fast, progress
                )
            except RuntimeError as error:
                if not out_of_memory(error) or len(batch) == 1:
                    raise
                batch_rows, found = len(batch) // 2, []
                sys.stderr.write(f"falconlib: out of memory; going on with {batch_rows} completions at once\n")
                continue
            for i, completion in zip(batch, found, strict=True):
                done[i] = completion
            order = order[len(batch) :]
    return done  # type: ignore[return-value]


def out_of_memory(error: RuntimeError) -> bool:
    """torch.OutOfMemoryError is a RuntimeError; the CPU's allocator and cuBLAS have no class of their own."""
    return any(words in str(error) for words in ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED"))


class Ending:
    """Per row: tokens, log-probs and the test whether the completion has ended."""

    def __init__(self, policy: Policy, count: int, stop: tuple[str, ...]):
        self.policy, self.stop = policy, stop
        self.tokens: list[list[int]] = [[] for _ in range(count)]
        self.logprobs: list[list[float]] = [[] for _ in range(count)]
        self.finished = [False] * count

    def add(self, row: int, token: int, logprob: float | None) -> bool:
        """Appends a token; True when the row has ended by eos or stop text."""
        self.tokens[row].append(token)
        if logprob is not None:
            self.logprobs[row].append(logprob)
        tail = self.policy.decode(self.tokens[row][-8:]) if self.stop else ""  # a stop text is far shorter than 8 tokens
        self.finished[row] = token == self.policy.eos or any(s in tail for s in self.stop)
        return self.finished[row]

    def completions(self) -> list[Completion]:
        text = self.policy.decode
        return [
            Completion(text(t), tuple(t), tuple(p), f) for t, p, f in zip(self.tokens, self.logprobs, self.finished, strict=True)
        ]


def prefill(policy, encoded, rows, room: int, fast) -> tuple[DynamicCache, torch.Tensor, torch.Tensor]:
    """Cache, last logits (R, V) and left-padded mask (R, W) of the rows' prompts.

    Each distinct prompt is computed once, prompts of like length together: padding all of them to the longest would cost
    most of the time. Fast weights make a prompt's states depend on its task: then it is one prefill per (prompt, task).
    """
    key_of = [(r.prompt, r.task if fast else 0) for r in rows]
    keys = sorted(set(key_of), key=lambda k: (len(encoded[k[0]]), k))
    width = len(encoded[keys[-1][0]])
    cache, mask = DynamicCache(), torch.zeros(len(rows), width, dtype=torch.long, device=policy.device)
    logits = torch.empty(0)
    last = torch.tensor([-1], device=policy.device)  # not 1: a slice is no block in memory, and bfloat16 would copy W per prompt
    while keys:
        size = max(n for n in range(1, len(keys) + 1) if n == 1 or n * len(encoded[keys[n - 1][0]]) <= PREFILL_TOKENS)
        chunk, keys = keys[:size], keys[size:]
        if fast:
            fast.select(torch.tensor([t for _, t in chunk], device=policy.device))
        ids, seen = left_pad([encoded[p] for p, _ in chunk], policy)
        part, position = DynamicCache(), (seen.cumsum(1) - 1).clamp(min=0)
        out = policy.model(input_ids=ids, attention_mask=seen, position_ids=position, past_key_values=part, logits_to_keep=last)
        places = {key: place for place, key in enumerate(chunk)}
        found = [(i, places[key]) for i, key in enumerate(key_of) if key in places]
        target, source = torch.tensor(found, device=policy.device).T
        if not len(logits):
            cache.layers = [Preallocated(layer.keys, len(rows), width, room) for layer in part.layers]
            logits = out.logits.new_empty(len(rows), out.logits.shape[-1])
        for layer, own in zip(cache.layers, part.layers, strict=True):
            layer.put(target, own.keys[source], own.values[source])
        logits[target], mask[target, width - ids.shape[1] :] = out.logits[source, -1], seen[source]
    return cache, logits, mask


def decode_batch(policy, encoded, rows, max_new_tokens, temperature, top_p, stop, fast, progress) -> list[Completion]:
    """Decoder-only sampling of one batch of rows."""
    cache, logits, mask = prefill(policy, encoded, rows, max_new_tokens, fast)
    position = mask.sum(1) - 1
    if fast:
        fast.select(torch.tensor([r.task for r in rows], device=policy.device))
    ending, alive = Ending(policy, len(rows), stop), list(range(len(rows)))
    uniform = torch.stack([stream(r.seed, max_new_tokens) for r in rows]).to(policy.device)
    for step in range(max_new_tokens):
        token, values = choose(logits, uniform[alive, step], [rows[i] for i in alive], temperature, top_p)
        open_rows = [k for k, (t, p) in enumerate(zip(token.tolist(), values, strict=True)) if not ending.add(alive[k], t, p)]
        progress(len(alive) - len(open_rows))
        if not open_rows or step == max_new_tokens - 1:
            progress(len(open_rows))
            break
        if len(open_rows) < len(alive):
            count = len(open_rows)
            filled = dict(zip(sorted({*range(count)} - {*open_rows}), [k for k in open_rows if k >= count], strict=True))
            order = [filled.get(k, k) for k in range(count)]
            keep = torch.tensor(order, device=policy.device)
            token, mask, position, alive = token[keep], mask[keep], position[keep], [alive[k] for k in order]
            for layer in cache.layers:
                layer.keep(count, [*filled], [*filled.values()])
            if fast:
                fast.select(torch.tensor([rows[i].task for i in alive], device=policy.device))
        mask = torch.cat([mask, mask.new_ones(len(alive), 1)], 1)
        position = position + 1
        step_input = {"input_ids": token[:, None], "attention_mask": mask, "position_ids": position[:, None]}
        logits = policy.model(**step_input, past_key_values=cache).logits[:, -1]
    return ending.completions()


def decode_seq2seq(policy, encoded, rows, max_new_tokens, temperature, top_p, stop, fast, progress) -> list[Completion]:
    """Encoder-decoder sampling of one batch of rows: the encoder runs once per row, the decoder keeps its cache."""
    if fast:
        fast.select(torch.tensor([r.task for r in rows], device=policy.device))
    ids, mask = left_pad([encoded[r.prompt] for r in rows], policy)
    encoder = policy.inner.get_encoder()(input_ids=ids, attention_mask=mask)
    token = torch.full((len(rows),), policy.inner.config.decoder_start_token_id, device=policy.device)
    ending, alive, cache = Ending(policy, len(rows), stop), set(range(len(rows))), None
    uniform = torch.stack([stream(r.seed, max_new_tokens) for r in rows]).to(policy.device)
    for step in range(max_new_tokens):
        step_input = {"encoder_outputs": encoder, "attention_mask": mask, "decoder_input_ids": token[:, None]}
        out = policy.inner(**step_input, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        token, values = choose(out.logits[:, -1], uniform[:, step], rows, temperature, top_p)
        for i in sorted(alive):
            if ending.add(i, int(token[i]), values[i]):
                alive.discard(i)
                progress(1)
        if not alive:
            break
    progress(len(alive))
    return ending.completions()


def stream(seed: int, count: int) -> torch.Tensor:
    """`count` uniform numbers of the random stream `seed`, float64."""
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def choose(logits, uniform, rows, temperature, top_p) -> tuple[torch.Tensor, list[float | None]]:
    """Tokens (R,) from logits (R, V) and each one's log-prob: None of a greedy row."""
    token, logprob = sample(logits, uniform, temperature, top_p)
    greedy = [row.greedy for row in rows]
    if any(greedy):
        token[greedy] = logits[greedy].argmax(-1)
    return token, [None if own or temperature == 0 else p for own, p in zip(greedy, logprob.tolist(), strict=True)]


def sample(logits: torch.Tensor, uniform: torch.Tensor, temperature: float, top_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (R,) and their log-probs (R,) from logits (R, V) by inverting the cumulative distribution at `uniform` (R,)."""
    rows = SAMPLE_ROWS if logits.device.type == "cpu" else len(logits)
    parts = zip(logits.split(rows), uniform.split(rows), strict=True)
    token, logprob = zip(*(draw(part.float(), u, temperature, top_p) for part, u in parts), strict=True)
    return torch.cat(token), torch.cat(logprob)


def draw(logits: torch.Tensor, uniform: torch.Tensor, temperature: float, top_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """`sample` of a few rows in float32."""
    top = logits.amax(-1, keepdim=True)
    if not torch.isfinite(top).all():  # the search below would answer with the last word of the vocabulary
        raise FalconError("the model's logits are not finite", "its weights are broken: lower train.lr, or load another adapter")
    if temperature == 0:
        return logits.argmax(-1), torch.zeros(len(logits), device=logits.device)
    shifted, order = (logits - top).div_(temperature), None
    weights = shifted.exp()
    total = in_blocks(weights).sum(-1).double().sum(-1)  # a block in float32: an error of 1e-7, and a ninth of the time
    if top_p < 1:
        whole, enough = weights, top_p * total[:, None]
        weights, order = whole.topk(min(NUCLEUS, whole.shape[-1]), -1)
        if (weights.sum(-1, keepdim=True) < enough).any():  # a flat distribution: sorting all words takes six times as long
            weights, order = whole.sort(-1, descending=True)
        weights = weights.masked_fill(weights.double().cumsum(-1) - weights >= enough, 0.0)  # the token that crosses top_p stays
    token = invert(weights, uniform)
    token = token if order is None else order.gather(-1, token)
    return token.squeeze(-1), (shifted.gather(-1, token).squeeze(-1) - total.log()).float()


def in_blocks(weights: torch.Tensor) -> torch.Tensor:
    """Weights (R, V) as (R, blocks, BLOCK), the last block filled with zeros."""
    short = -weights.shape[-1] % BLOCK
    return (F.pad(weights, (0, short)) if short else weights).unflatten(-1, (-1, BLOCK))  # padding by nothing would copy


def invert(weights: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """The first place (R, 1) up to which a row of weights (R, V) holds the share `uniform` (R,) of its sum.

    First the block of words, then the word within: summing blocks takes a tenth of the time of a cumulative sum over all words.
    """
    blocks = in_blocks(weights)
    ends = blocks.sum(-1).double().cumsum(-1)
    target = uniform[:, None] * ends[:, -1:]
    block = torch.searchsorted(ends, target)
    within = blocks.take_along_dim(block[:, :, None], 1).squeeze(1).double().cumsum(-1)
    rest = target - F.pad(ends, (1, 0)).gather(-1, block)
    return block * BLOCK + torch.searchsorted(within, rest.minimum(within[:, -1:]))  # minimum: the sums differ in their last bit


def left_pad(sequences: Sequence[Sequence[int]], policy: Policy) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and 0/1 mask (R, T), padded on the left; the mask comes from lengths, since pad may equal eos."""
    width = max(map(len, sequences))
    pad = policy.tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (width - len(s)) + list(s) for s in sequences], device=policy.device)
    mask = torch.tensor([[0] * (width - len(s)) + [1] * len(s) for s in sequences], device=policy.device)
    return ids, mask
