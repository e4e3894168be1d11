"""The fast ways equal the plain ones: TRL's losses, transformers' forward, one row at a time, finite differences."""

import contextlib
import itertools
import json
import math
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from transformers.cache_utils import DynamicCache

from falconlib.config import LoraConfig, ModelConfig, Profile, override
from falconlib.errors import FalconError
from falconlib.feedback import error_token_mask
from falconlib.policy.fast_weights import PACKS, FastWeights, normalised_step, stored
from falconlib.policy.generate import BLOCK, Row, generate, in_blocks
from falconlib.policy.layers import GROUPED, decoding
from falconlib.policy.models import Policy, load_policy, tiny_model
from falconlib.policy.score import HeadLogprobs, score
from falconlib.records import Episode, Feedback, Reward
from falconlib.rewards import leave_one_out
from falconlib.rollout import token_offsets
from falconlib.training.advantages import scored
from falconlib.training.batches import Example, MicroBatches, collate, learning, micro_batches, score_batch
from falconlib.training.losses import cross_entropy_loss, policy_gradient_loss
from falconlib.training.outer import multiples

PROMPTS = ["def add(a, b):", "Write a function that reverses a text.\n```python\n", "x"]
SHIFT = 0.3  # sampling log-probs differ from today's: the clip has something to cut


def gradient(loss, policy):
    found = torch.autograd.grad(loss, policy.parameters(), allow_unused=True)
    return torch.cat(
        [torch.zeros_like(p).flatten() if g is None else g.flatten() for p, g in zip(policy.parameters(), found, strict=True)]
    )


def transformers_row(policy, prompt, tokens, temperature):
    """log p and entropy of each completion token: one row, one forward as transformers and peft have it, all logits."""
    ids = policy.encode(prompt)
    if policy.seq2seq:
        start = policy.model.config.decoder_start_token_id
        logits = policy.model(input_ids=torch.tensor([ids]), decoder_input_ids=torch.tensor([[start, *tokens[:-1]]])).logits[0]
    else:
        logits = policy.model(input_ids=torch.tensor([[*ids, *tokens]])).logits[0, len(ids) - 1 : -1]
    logp = torch.log_softmax(logits / temperature, -1)
    return logp[torch.arange(len(tokens)), torch.tensor(tokens)], -(logp.exp() * logp).sum(-1)


def policy_of(kind, tmp_path):
    """A tiny random policy of a family, with adapters, biases and norms that are not as they begin: leaving one out shows."""
    from transformers import (
        GPTNeoXConfig,
        GPTNeoXForCausalLM,
        Qwen2Config,
        Qwen2ForCausalLM,
        T5Config,
        T5ForConditionalGeneration,
    )

    _, tokenizer, _ = tiny_model()
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    ends = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}
    t5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
    torch.manual_seed(0)
    if kind != "llama":
        model = {
            "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**sizes, num_key_value_heads=2, **ends)),
            "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, **ends)),
            "t5": lambda: T5ForConditionalGeneration(T5Config(vocab_size=len(tokenizer), **t5, eos_token_id=0, pad_token_id=0)),
        }[kind]()
        model.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
    policy = load_policy(
        ModelConfig(name="tiny" if kind == "llama" else str(tmp_path), threads=1), LoraConfig(r=4, alpha=8, top_layers=0)
    )
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if "lora_B" in name or name.endswith("bias"):
                parameter.copy_(0.3 * torch.randn(parameter.shape))
            elif "norm" in name:
                parameter.mul_(1 + 0.3 * torch.randn(parameter.shape))
    return policy


def rows_of(policy, width=7):
    """Examples of three prompts, groups of several lengths, a masked one among them."""
    generator = torch.Generator().manual_seed(4)
    rows = []
    for i in range(8):
        tokens = tuple(torch.randint(1, 500, (width - i % 3,), generator=generator).tolist())
        rows.append(Example(PROMPTS[i % 3], tokens, i % 2, mask=(0, *[1] * (len(tokens) - 1)) if i == 4 else ()))
    return rows


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt_neox", "t5"])
def test_shared_prefix_log_probs_entropies_and_gradients_equal_transformers(kind, tmp_path):
    policy = policy_of(kind, tmp_path)
    examples, fast = rows_of(policy), FastWeights(policy.model)
    batch = collate(policy, examples)
    temperature = torch.tensor([0.7, 1.0] * 4)
    plain = [transformers_row(policy, e.prompt, e.tokens, float(t)) for e, t in zip(examples, temperature, strict=True)]
    loss = sum((lp * torch.tensor(e.mask or [1] * len(lp))).sin().sum() for (lp, _), e in zip(plain, examples, strict=True))
    expected = gradient(loss, policy)
    for shared in (True, False):
        with fast.active(), learning(policy, Profile()):
            assert (policy.model.get_base_model().config._attn_implementation == GROUPED) == (kind == "llama")
            rest = (batch.tokens, batch.mask, temperature, fast, batch.task)
            found, entropy = score(policy, batch.prompts, *rest, shared=shared)
            ours = gradient(found.sin().sum(), policy)
        for i, (lp, h) in enumerate(plain):
            keep = batch.mask[i, : len(lp)] > 0
            assert torch.allclose(found[i, : len(lp)][keep], lp[keep], atol=1e-5)
            assert torch.allclose(entropy[i, : len(lp)][keep], h[keep], atol=1e-4)
            assert not found[i][batch.mask[i] == 0].any()
        assert not any("forward" in vars(m) for m in policy.model.modules())
        assert torch.allclose(ours, expected, atol=1e-5 * float(expected.abs().max())), shared


@pytest.mark.parametrize("moved", [None, 0.0, 0.1], ids=["theta", "zero deltas", "deltas"])
@pytest.mark.parametrize("model", ["llama bfloat16", "llama bfloat16 large", "llama float32", "qwen2 float32", "t5 float32"])
def test_sampling_sees_the_policy_that_scoring_sees(model, moved, tmp_path, monkeypatch):
    """Sampled log-probs equal those that transformers and peft give in float32 for lora_B + delta, one task of two at rest."""
    kind, dtype, *large = model.split()
    if large:  # the weights of a large model are not stored twice
        monkeypatch.setattr("falconlib.policy.fast_weights.COPIED", 0)
    exact, policy = policy_of(kind, tmp_path), policy_of(kind, tmp_path)
    if dtype == "bfloat16":
        for m in policy.model.modules():  # the base alone: adapters stay in float32, as load_policy has them
            for name, p in m.named_parameters(recurse=False):
                if not p.requires_grad:
                    setattr(m, name, torch.nn.Parameter(p.bfloat16(), requires_grad=False))
    fast = FastWeights(exact.model)
    deltas = None if moved is None else {n: moved * torch.randn(d.shape) for n, d in fast.zeros(2).items()}
    for d in deltas.values() if deltas else ():
        d[0] = 0.0
    rows = [Row(i % 3, i, i % 2) for i in range(6)]
    found = generate(policy, PROMPTS, rows, max_new_tokens=6, temperature=1.0, deltas=deltas)
    for row, completion in zip(rows, found, strict=True):
        with torch.no_grad():
            kept = [layer.weight.clone() for layer in fast.layers.values()]
            for name, layer in fast.layers.items():
                layer.weight += deltas[name][row.task] if deltas else 0
            expected = transformers_row(exact, PROMPTS[row.prompt], completion.tokens, 1.0)[0]
            for layer, weight in zip(fast.layers.values(), kept, strict=True):
                layer.weight.copy_(weight)
        assert torch.allclose(torch.tensor(completion.logprobs), expected, atol=0.06 if dtype == "bfloat16" else 1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [0.05, 1.0, 5.0])
def test_the_vocabulary_layer_is_exact_on_sharp_and_flat_distributions(dtype, temperature):
    """Against float64, on the logits of that type: tokens whose probability is 0 in float32 among them."""
    generator = torch.Generator().manual_seed(0)
    states, weight = (torch.randn(n, 16, generator=generator).to(dtype) for n in (300, 3000))  # chunks, the last one not full
    states, bias, tokens = (
        (3 * states).requires_grad_(),
        torch.randn(3000, generator=generator).to(dtype),
        torch.randint(3000, (300,), generator=generator),
    )
    bias[7], tokens[tokens == 7] = -torch.inf, 8  # a masked word
    exact = torch.nn.functional.linear(states, weight, bias).double() / temperature
    logp = torch.log_softmax(exact, -1)
    of_tokens = logp.gather(-1, tokens[:, None])[:, 0]
    found, entropy = HeadLogprobs.apply(states, weight, bias, tokens, torch.full((300,), temperature))
    assert torch.allclose(found.double(), of_tokens, rtol=1e-5, atol=1e-4)
    assert torch.allclose(entropy.double(), -torch.special.xlogy(logp.exp(), logp.exp()).sum(-1), atol=1e-3)
    assert entropy.min() > -1e-6
    ours, expected = (
        torch.autograd.grad(x.double().sin().sum(), states, retain_graph=True)[0].float() for x in (found, of_tokens)
    )
    assert (ours - expected).norm() < {torch.float32: 1e-4, torch.bfloat16: 0.05}[dtype] * expected.norm()


@pytest.mark.parametrize("scale", [0.1, 0.0], ids=["adapted", "first inner step"])
@pytest.mark.parametrize("shared", [True, False])
def test_fast_weights_and_their_gradients_equal_peft_with_shifted_adapters_one_row_at_a_time(tmp_path, shared, scale):
    """theta's gradient at theta + delta (outer loop) and delta's own (inner loop): what peft's lora_B + delta_x gives."""
    policy = policy_of("llama", tmp_path)
    fast, examples = FastWeights(policy.model), rows_of(policy)
    generator = torch.Generator().manual_seed(2)
    fixed = {n: scale * torch.randn(d.shape, generator=generator) for n, d in fast.zeros(2).items()}
    free = {n: d.clone().requires_grad_() for n, d in fixed.items()}
    values, of_theta, of_delta = {}, [], []
    for task in (0, 1):
        with torch.no_grad():
            kept = [layer.weight.clone() for layer in fast.layers.values()]
            for name, layer in fast.layers.items():
                layer.weight += fixed[name][task]
        mine = {i: e for i, e in enumerate(examples) if e.task == task}
        plain = {i: transformers_row(policy, e.prompt, e.tokens, 1.0)[0] for i, e in mine.items()}
        plain = {i: v * torch.tensor(mine[i].mask or [1] * len(v)) for i, v in plain.items()}
        total, weights = sum(v.sin().sum() for v in plain.values()), [layer.weight for layer in fast.layers.values()]
        of_delta.append(torch.autograd.grad(total, weights, retain_graph=True))
        of_theta.append(gradient(total, policy))
        values |= plain
        with torch.no_grad():
            for layer, weight in zip(fast.layers.values(), kept, strict=True):
                layer.weight.copy_(weight)
    expected = {"theta": sum(of_theta), "delta": torch.cat([torch.stack(pair).flatten() for pair in zip(*of_delta, strict=True)])}
    for name, deltas, leaves in (("theta", fixed, policy.parameters()), ("delta", free, list(free.values()))):
        batch = collate(policy, examples)
        with fast.active(deltas), learning(policy, Profile()):
            logprobs, _ = score_batch(policy, batch, fast, override(Profile(), {"train.shared_prefix": shared}))
            found = torch.cat([g.flatten() for g in torch.autograd.grad(logprobs.sin().sum(), leaves)])
        assert all(torch.allclose(logprobs[i, : len(v)], v, atol=1e-5) for i, v in values.items())
        assert torch.allclose(found, expected[name], atol=1e-5 * float(expected[name].abs().max())), name


@pytest.mark.parametrize("moved", [False, True])
def test_bfloat16_gives_float32s_log_probs_and_gradients_of_theta_and_deltas_to_its_own_precision(tiny_policy, moved):
    ways: list[str] = []

    def found(dtype):
        policy = load_policy(ModelConfig(name="tiny", dtype=dtype), LoraConfig(r=4, alpha=8, top_layers=0))
        generator = torch.Generator().manual_seed(0)
        for p in policy.parameters():
            p.data = 0.1 * torch.randn(p.shape, generator=generator)
        fast = FastWeights(policy.model)
        deltas = fast.zeros(2)
        for d in deltas.values():
            d.copy_(0.1 * moved * torch.randn(d.shape, generator=generator)).requires_grad_()
        tokens, rows = torch.tensor([[5, 6, 7], [8, 9, 10], [11, 12, 13]]), torch.tensor([0, 1, 0])
        with fast.active(deltas), learning(policy, Profile()):
            logp, _ = score(policy, PROMPTS, tokens, torch.ones_like(tokens), torch.ones(3), fast, rows)
            grads = torch.autograd.grad(logp.sum(), [*policy.parameters(), *deltas.values()])
            ways.append(policy.model.config._attn_implementation)
        assert policy.model.config._attn_implementation == "sdpa"
        assert {g.dtype for g in grads} == {torch.float32}
        theta, local = grads[: len(policy.parameters())], grads[len(policy.parameters()) :]
        return logp.detach(), *(torch.cat([g.flatten() for g in part]) for part in (theta, local))

    for exact, rough in zip(found("float32"), found("bfloat16"), strict=True):
        assert (exact - rough).norm() < 0.03 * exact.norm()  # bfloat16 keeps 8 bits
    assert ways == [GROUPED] * 2


def test_one_backward_gives_theta_its_gradient_and_each_delta_so_many_times_its_rows(tiny_policy):
    """Two slots of one task, one of another: what the inner loop learns is a multiple of what theta learns from the same rows."""
    fast = FastWeights(tiny_policy.model)
    leaves = {n: d.requires_grad_() for n, d in fast.zeros(2).items()}
    every = [*tiny_policy.parameters(), *leaves.values()]
    slots, kinds = [(0, 0.5), (1, 2.0), (0, 0.0)], [2, 0, 1, 0] * 2
    batch = collate(tiny_policy, rows_of(tiny_policy))

    def found(chosen, slots, tasks):
        weight = torch.tensor([float(k in chosen) for k in kinds])[:, None]
        with fast.active(leaves, slots=slots), learning(tiny_policy, Profile()):
            part = replace(batch, task=torch.tensor(tasks))
            loss = (score_batch(tiny_policy, part, fast, Profile())[0] * weight).sum()
            gradients = torch.autograd.grad(loss, every)
        return [torch.cat([g.flatten() for g in part]) for part in (gradients[: -len(leaves)], gradients[-len(leaves) :])]

    theta, local = found({0, 1, 2}, slots, kinds)
    tasks = [slots[k][0] for k in kinds]
    plain = [found({k}, (), tasks) for k in range(3)]
    assert torch.allclose(theta, sum(t for t, _ in plain), atol=1e-5) and theta.abs().max() > 1e-2
    assert torch.allclose(local, 0.5 * plain[0][1] + 2.0 * plain[1][1], atol=1e-5) and local.abs().max() > 1e-2


@pytest.mark.parametrize(
    ("inner", "outer", "found"),
    [
        ((0.2, -0.4, 0.0), (1.0, -2.0, 0.0), {0.1: ()}),
        ((0.0, 0.0, 0.0), (1.0, -2.0, 0.0), {0.0: ()}),
        ((0.2, -0.1, 0.0), (1.0, -2.0, 0.0), {0.1: (1, 0, 1), 0.025: (0, 1, 0)}),  # damped
        ((0.0, -0.1, 0.3), (0.0, -2.0, 1.5), {0.025: (1, 1, 0), 0.1: (0, 0, 1)}),
        ((0.2, -0.4, 0.1), (1.0, -2.0, 0.0), {}),  # a token that theta does not learn from
        ((-0.2, 0.4, 0.0), (1.0, -2.0, 0.0), {}),  # the other way
        ((0.2, math.nan, 0.0), (1.0, -2.0, 0.0), {}),
        ((math.nan, -0.4, 0.0), (1.0, -2.0, 0.0), {}),
    ],
)
def test_tokens_share_a_backward_where_their_inner_terms_are_as_many_times_their_outer_ones(inner, outer, found):
    of = Example("p", (1, 2, 3), advantages=outer, weight=4.0)
    pieces = multiples(replace(of, weight=1.0, advantages=inner), of, 0.5)
    assert {t: piece.mask for t, piece in pieces} == found and all(replace(p, mask=()) == of for _, p in pieces)


def test_a_row_of_many_multiples_is_not_taken_to_pieces():
    of = Example("p", tuple(range(6)), advantages=(1.0,) * 6)
    for values, pieces in ((4, 4), (5, 0)):
        assert len(multiples(replace(of, advantages=tuple(1.0 + min(i, values - 1) for i in range(6))), of, 1.0)) == pieces


def test_gradient_checkpointing_gives_the_same_gradients_and_no_shared_prefix(tiny_policy):
    with pytest.raises(FalconError, match="shared_prefix"):
        override(Profile(), {"train.gradient_checkpointing": True})
    fast, found = FastWeights(tiny_policy.model), []
    deltas = {n: 0.1 * torch.ones_like(d) for n, d in fast.zeros(2).items()}
    ran = []
    layer = next(m for n, m in tiny_policy.model.named_modules() if n.endswith("layers.0.mlp"))
    layer.register_forward_pre_hook(lambda *_: ran.append(1))
    for checkpointing in (False, True):
        profile = override(Profile(), {"train.shared_prefix": False, "train.gradient_checkpointing": checkpointing})
        batch = collate(tiny_policy, rows_of(tiny_policy))
        with fast.active(deltas), learning(tiny_policy, profile):
            logprobs, _ = score_batch(tiny_policy, batch, fast, profile)
            found.append(gradient(cross_entropy_loss(logprobs, batch, 3.0), tiny_policy))
    assert torch.equal(*found) and len(ran) == 3  # the layer ran once without, twice with
    assert not any(m.training for m in tiny_policy.model.modules())


def trl_loss(policy, trainer_class, config_class, tmp_path, inputs, **settings):
    """TRL's own loss of a fixed batch: a trainer that never trains."""
    from datasets import Dataset

    base = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "report_to": "none", "temperature": 0.7, "beta": 0.0}
    trainer = trainer_class(
        model=policy.model, args=config_class(**base, **settings), processing_class=policy.tokenizer,
        reward_funcs=lambda completions, **_: [0.0] * len(completions), train_dataset=Dataset.from_list([{"prompt": "x"}] * 8),
    )  # fmt: skip
    policy.model.eval()
    return trainer._compute_loss(policy.model, inputs)


def fixed_batch(policy):
    """Two groups of four with rewards, completions of several lengths, and log-probs as of an older policy."""
    examples, rewards = rows_of(policy), [1.0, 0.2, -0.3, -1.0, 0.5, 0.5, -0.6, 1.0]
    prompts = [PROMPTS[i // 4] for i in range(8)]
    old = [
        transformers_row(policy, p, e.tokens, 0.7)[0].detach() + SHIFT * (-1) ** i
        for i, (p, e) in enumerate(zip(prompts, examples, strict=True))
    ]
    return [
        Episode(
            prompts[i], 1, i, "support", prompts[i], "", "", e.tokens, tuple(old[i].tolist()),
            feedback=Feedback("fail", None, 3), reward=Reward(r, total=r),
        )
        for i, (e, r) in enumerate(zip(examples, rewards, strict=True))
    ]  # fmt: skip


def trl_inputs(policy, episodes, advantages):
    from falconlib.policy.generate import left_pad

    batch = collate(policy, [Example(e.prompt, e.tokens, logprobs=e.logprobs) for e in episodes])
    ids, seen = left_pad([policy.encode(e.prompt) for e in episodes], policy)
    return {
        "prompt_ids": ids, "prompt_mask": seen, "completion_ids": batch.tokens, "completion_mask": batch.mask.long(),
        "advantages": torch.tensor(advantages), "old_per_token_logps": batch.old_logprobs,
        "old_logps": batch.old_logprobs.sum(1), "num_items_in_batch": batch.mask.sum(),
    }  # fmt: skip


def ours(policy, episodes, kind, changes, normaliser=None):
    profile = override(Profile(), {"reward.rho_f": 0.0, "short_term.enabled": False, "sample.temperature": 0.7, **changes})
    examples, fast = scored(episodes, profile, kind), FastWeights(policy.model)
    batch = collate(policy, examples, 0.7)
    with fast.active():
        logprobs, _ = score_batch(policy, batch, fast, profile)
        loss, cut = policy_gradient_loss(logprobs, batch, normaliser or float(batch.mask.sum()), 0.2, 0.28)
        return loss, gradient(loss, policy), int(cut), [e.advantages[0] for e in examples]


def test_the_grpo_loss_equals_trls_on_a_fixed_batch(tiny_policy, tmp_path):
    from trl import GRPOConfig, GRPOTrainer

    episodes = fixed_batch(tiny_policy)
    loss, grad, cut, advantages = ours(tiny_policy, episodes, "group", {})
    groups = torch.tensor([e.reward.total for e in episodes]).view(2, 4)  # TRL's own formula, in torch
    expected = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)
    assert torch.allclose(torch.tensor(advantages), expected.flatten(), atol=1e-6)
    settings = {"loss_type": "dapo", "epsilon": 0.2, "epsilon_high": 0.28, "num_generations": 4}
    theirs = trl_loss(tiny_policy, GRPOTrainer, GRPOConfig, tmp_path, trl_inputs(tiny_policy, episodes, advantages), **settings)
    assert cut > 0 and float(loss.detach()) == pytest.approx(float(theirs.detach()), rel=1e-5)
    assert torch.allclose(grad, gradient(theirs, tiny_policy), atol=1e-5 * float(grad.abs().max()))


def test_the_leave_one_out_loss_equals_trls_rloo_on_a_fixed_batch(tiny_policy, tmp_path):
    """On policy: TRL clips one ratio per sequence, we one per token; at ratio 1 both gradients are the same."""
    from trl import RLOOConfig, RLOOTrainer

    episodes = [
        Episode(**{**vars(e), "logprobs": tuple((torch.tensor(e.logprobs) - SHIFT * (-1) ** i).tolist())})
        for i, e in enumerate(fixed_batch(tiny_policy))
    ]
    # a_i / max(std, floor) with the scale taken out again: RLOO does not scale
    _, grad, cut, advantages = ours(tiny_policy, episodes, "loo", {"reward.std_floor": 1e3}, normaliser=8 / 1e3)
    groups = torch.tensor([e.reward.total for e in episodes]).view(2, 4)  # TRL's own formula, in torch
    expected = (groups - (groups.sum(1, keepdim=True) - groups) / 3).flatten()
    assert torch.allclose(torch.tensor(advantages) * 1e3, expected, atol=1e-6)
    inputs = trl_inputs(tiny_policy, episodes, expected.tolist())
    theirs = trl_loss(tiny_policy, RLOOTrainer, RLOOConfig, tmp_path, inputs, epsilon=0.2, epsilon_high=0.28, num_generations=4)
    assert cut == 0 and torch.allclose(grad, gradient(theirs, tiny_policy), atol=1e-5 * float(grad.abs().max()))


def test_second_order_equals_finite_differences_and_first_order_is_the_gradient_at_the_adapted_point():
    """Two parameters, two bowls L_x with their own centres: F(theta) = mean_x L_x(theta - alpha g_x / |g_x|)."""
    double = {"dtype": torch.float64}
    centres, steep = torch.tensor([[2.0, 0.5], [-1.0, 1.5]], **double), torch.tensor([[3.0, 0.3], [0.3, 3.0]], **double)

    def bowls(points):  # (2 tasks, 2) -> (2,)
        return 0.5 * (steep * (points - centres) ** 2).sum(1)

    def after(theta, through):
        g = steep * (theta - centres)
        delta = -0.8 * g / g.norm(dim=1, keepdim=True)
        ours_, _ = normalised_step({"x": torch.zeros(2, 1, 2, **double)}, {"x": g[:, None].detach()}, 0.8)
        assert torch.allclose(ours_["x"][:, 0], delta.detach(), atol=1e-7)
        return bowls(theta + (delta if through else ours_["x"][:, 0])).mean()

    theta = torch.tensor([0.5, 2.2], **double, requires_grad=True)
    exact, first = (torch.autograd.grad(after(theta, through), theta)[0] for through in (True, False))
    steps = 1e-5 * torch.eye(2, **double)
    finite = torch.stack([(after(theta.detach() + e, True) - after(theta.detach() - e, True)) / 2e-5 for e in steps])
    assert torch.allclose(exact, finite, atol=1e-7)
    g = steep * (theta.detach() - centres)
    adapted = theta.detach() - 0.8 * g / g.norm(dim=1, keepdim=True)
    assert torch.allclose(first, (steep * (adapted - centres)).mean(0), atol=1e-7)
    assert not torch.allclose(first, exact, atol=1e-2)


@pytest.mark.parametrize("members", [[1.0, 0.0, -1.0], [0.3, 0.3, 0.3, 0.31], [1.0, None, -0.6, -0.3]])
def test_advantages_sum_to_zero_per_group(members):
    found = [a for a in leave_one_out(members) if a is not None]
    assert len(found) == sum(m is not None for m in members) and sum(found) == pytest.approx(0.0, abs=1e-12)


ODD = [
    "def f(x):\n\tif x:\n\t\treturn 'tab'\n\treturn  x  +  1\n",
    "def größe(x):\n    s = 'ä€😀 naïve'\n    return s + '漢字' * x\n",
    "\n\n\ndef f():\n\n\n    return undefined\n\n\n",
    "x = [" + ", ".join(str(i) for i in range(120)) + "]\ny = x +  'long'\n",
    "a=1\r\nb = a +   'x'\nprint( b )  # \u00a0 wide space\n",
]


def tokenizer_of(kind):
    """A byte-level BPE (the tiny model's), a metaspace one with byte fallback, SmolLM2's own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    from falconlib.policy import embedded

    if kind == "byte-level":
        return tiny_model()[1]
    if kind == "SmolLM2":
        try:
            return AutoTokenizer.from_pretrained(embedded.model_dir())
        except FalconError as error:
            pytest.skip(str(error))
    raw = Tokenizer(models.BPE(unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    words = ["def f(x):", "return x + 1", "print(b)", "    return s"]
    raw.train_from_iterator(words, trainers.BpeTrainer(vocab_size=60, special_tokens=["<unk>", "<end>"], show_progress=False))
    content = json.loads(raw.to_str())
    known = content["model"]["vocab"]
    content["model"] |= {"byte_fallback": True, "vocab": known | {f"<0x{i:02X}>": len(known) + i for i in range(256)}}
    raw = Tokenizer.from_str(json.dumps(content))
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", eos_token="<end>", pad_token="<end>")


@pytest.mark.parametrize("kind", ["byte-level", "metaspace", "SmolLM2"])
@pytest.mark.parametrize("text", ODD, ids=["tabs", "unicode", "empty lines", "long line", "blanks"])
def test_the_error_line_mask_decodes_to_the_line(kind, text):
    policy = Policy(None, tokenizer_of(kind), torch.device("cpu"), kind, "")
    tokens = policy.encode(text)
    decoded = policy.decode(tokens)
    assert decoded == text
    spans = token_offsets(policy, tokens)
    assert all(a[1] == b[0] or a == b for a, b in itertools.pairwise(spans)) and spans[-1][1] == len(text)
    lines = text.split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        feedback = Feedback("runtime_error", 0.0, 3, "NameError", "line", (number, number))
        mask = error_token_mask(spans, text, text, feedback, 1.0)
        marked = [i for i, m in enumerate(mask) if m]
        assert marked == list(range(marked[0], marked[-1] + 1))
        covered = text[spans[marked[0]][0] : spans[marked[-1]][1]]
        assert line.strip() in covered  # the whole line, and no token that does not touch it
        start = sum(len(x) + 1 for x in lines[: number - 1])
        assert all(spans[i][1] > start and spans[i][0] < start + len(line) + 1 for i in marked)


def gradients_of(policy, micro, examples, deltas):
    """Gradient of cross-entropy with respect to the deltas and to theta, and which threads computed it."""
    fast, threads, total = FastWeights(policy.model), [], []
    leaves = {name: d.clone().requires_grad_() for name, d in deltas.items()}
    both = [*leaves.values(), *policy.parameters()]

    def work(chunk):
        threads.append((threading.get_ident(), torch.get_num_threads()))
        batch = collate(policy, chunk)
        loss = cross_entropy_loss(score_batch(policy, batch, fast, Profile())[0], batch, 5.0)
        meeting.wait()  # no thread goes on before the other one has chosen its tasks and read its prompts
        return torch.autograd.grad(loss, both)

    meeting = threading.Barrier(micro.at_once, timeout=60)
    with fast.active(leaves), learning(policy, Profile()):
        micro.each(examples, work, total.append)
    return [sum(parts) for parts in zip(*total, strict=True)], threads


def test_micro_batches_side_by_side_have_the_gradients_of_one_after_another(tiny_policy, monkeypatch):
    own = torch.get_num_threads
    monkeypatch.setattr(torch, "get_num_threads", lambda: max(own(), 2))
    generator = torch.Generator().manual_seed(0)
    deltas = {n: 0.1 * torch.randn(d.shape, generator=generator) for n, d in FastWeights(tiny_policy.model).zeros(2).items()}
    examples = [e for _ in range(4) for e in rows_of(tiny_policy)]
    before = torch.get_num_threads()
    alone, one = gradients_of(tiny_policy, MicroBatches(tiny_policy, 200, 1), examples, deltas)
    found = [gradients_of(tiny_policy, MicroBatches(tiny_policy, 200, 2), examples, deltas) for _ in range(2)]
    assert len({i for i, _ in one}) == 1 and all(len({i for i, _ in threads}) == 2 for _, threads in found)
    for ours, again, expected in zip(found[0][0], found[1][0], alone, strict=True):
        assert torch.allclose(ours, expected, atol=1e-5 * float(expected.abs().max()))
        assert torch.equal(ours, again)  # whichever ends first
    assert torch.get_num_threads() == before and "forward" not in vars(tiny_policy.model.get_output_embeddings())
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(own).result() == before  # a thread to come is not held to one core


def test_side_by_side_the_work_is_shared_out_evenly_within_the_bound(tiny_policy):
    def cost(chunk):
        prompts = {(e.prompt, e.task) for e in chunk}
        size = len(prompts) * max(len(tiny_policy.encode(p)) for p, _ in prompts)
        return len(chunk) * max(len(e.tokens) for e in chunk) + size

    examples = [e for _ in range(4) for e in rows_of(tiny_policy)]
    for bound in (60, 100, 200, 10_000):
        pieces, plain = micro_batches(tiny_policy, examples, bound, 2), micro_batches(tiny_policy, examples, bound)
        assert sorted(e.tokens for c in pieces for e in c) == sorted(e.tokens for e in examples)
        assert len(pieces) % 2 == 0 or pieces == plain
        assert all(cost(c) <= bound for c in pieces if len(c) > 1)
    assert len(pieces) == 2 and max(map(cost, pieces)) < 1.3 * min(map(cost, pieces))


def test_what_works_side_by_side_and_runs_out_of_memory_is_done_again_in_smaller_pieces(tiny_policy, monkeypatch, capsys):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    examples, seen = rows_of(tiny_policy), []

    def work(chunk):
        if len(chunk) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return chunk

    MicroBatches(tiny_policy, 100, 2).each(examples, work, seen.extend)
    assert sorted(e.tokens for e in seen) == sorted(e.tokens for e in examples)
    assert "going on with" in capsys.readouterr().err
    alone, busy, micro = threading.Semaphore(1), threading.Barrier(2, timeout=60), MicroBatches(tiny_policy, 1, 2)

    def work_alone(chunk):  # memory for one of them
        if micro.at_once == 2:
            busy.wait()
            if not alone.acquire(blocking=False):
                raise torch.OutOfMemoryError("CUDA out of memory.")
        return chunk

    seen.clear()
    micro.each(examples, work_alone, seen.extend)
    assert sorted(e.tokens for e in seen) == sorted(e.tokens for e in examples) and micro.at_once == 1
    assert "one micro-batch at a time" in capsys.readouterr().err
    begun = []

    def broken(chunk):
        begun.append(chunk)
        return chunk[len(chunk)] if len(begun) == 1 else time.sleep(0.1)

    with pytest.raises(IndexError):
        MicroBatches(tiny_policy, 1, 2).each(examples, broken, seen.extend)
    assert len(begun) < len(examples)  # what has not begun does not begin


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("moved", [False, True])
def test_a_token_read_by_the_lean_layer_equals_the_models_own(dtype, moved):
    policy = load_policy(ModelConfig(name="tiny", dtype=dtype), LoraConfig(r=4, alpha=8, top_layers=0))
    generator = torch.Generator().manual_seed(0)
    for p in policy.parameters():
        p.data = 0.1 * torch.randn(p.shape, generator=generator)
    fast = FastWeights(policy.model)
    deltas = {n: 0.1 * torch.randn(d.shape, generator=generator) for n, d in fast.zeros(2).items()} if moved else None
    ids = torch.randint(1, 500, (3, 9), generator=generator)
    mask = torch.tensor([[0] * k + [1] * (9 - k) for k in (0, 2, 4)])
    ran = []

    def logits(block):
        cache, found = DynamicCache(), []
        with torch.no_grad(), fast.active(deltas), block:
            fast.select(torch.tensor([0, 1, 0]))
            for end in (6, 7, 8, 9):
                part = {"input_ids": ids[:, 0 if end == 6 else end - 1 : end], "attention_mask": mask[:, :end]}
                place = (mask[:, :end].cumsum(1) - 1).clamp(min=0)[:, -part["input_ids"].shape[1] :]
                found.append(policy.model(**part, position_ids=place, past_key_values=cache).logits[:, -1].float())
                ran.append("forward" in vars(policy.inner.model.layers[0]))
        return torch.stack(found)

    own, lean = logits(contextlib.nullcontext()), logits(decoding(policy, fast))
    assert ran == [False] * 4 + [True] * 4 and not vars(policy.inner.model.layers[0]).get("forward")
    assert policy.inner.config._attn_implementation == "sdpa"
    assert torch.allclose(own, lean, atol={"float32": 1e-5, "bfloat16": 0.06}[dtype] * float(own.abs().max()))


def attention_of(targets, r=4):
    """A tiny model in bfloat16, its weights drawn anew, with adapters on `targets`; q, k and v of a layer; states for them."""
    base, _, _ = tiny_model()
    model = get_peft_model(base, PeftConfig(r=r, lora_alpha=2 * r, target_modules=targets)) if targets else base
    generator = torch.Generator().manual_seed(0)
    layers = [getattr(base.model.layers[1].self_attn, f"{name}_proj") for name in "qkv"]
    getattr(layers[0], "base_layer", layers[0]).bias = torch.nn.Parameter(torch.zeros(layers[0].out_features))  # one of three
    for p in model.to(torch.bfloat16).parameters():
        p.data = (0.1 * torch.randn(p.shape, generator=generator)).to(p.dtype)
    return model, layers, torch.randn(3, 1, base.config.hidden_size, generator=generator).bfloat16()


def deltas_of(fast, tasks=2):
    generator = torch.Generator().manual_seed(1)
    return {n: torch.randn(d.shape, generator=generator) for n, d in fast.zeros(tasks).items()}


def said_together(fast, layers, x, deltas=None):
    """What layers say side by side for rows of tasks 0, 1, 0, and how often one of them was called for that."""
    ran = []
    with torch.no_grad(), fast.active(deltas):
        fast.select(torch.tensor([0, 1, 0]))
        together = fast.together(layers)
        hooks = [layer.register_forward_pre_hook(lambda *_: ran.append(1)) for layer in layers]
        said = together(x).float()
    for hook in hooks:
        hook.remove()
    assert fast.parts == {}  # copies of weights outlive no block
    return said, len(ran)


def each_by_hand(fast, layers, x, deltas=None):
    """W x + bias + s (B + delta_row) A x of each layer in float32, one row after another."""
    names, x, said = {owner: name for name, owner in fast.owners.items()}, x.float(), []
    for layer in layers:
        base = getattr(layer, "base_layer", layer)
        out = torch.nn.functional.linear(x, base.weight.float(), None if base.bias is None else base.bias.float())
        if layer in names:
            name, a = names[layer], layer.lora_A["default"].weight.float()
            for row, task in enumerate((0, 1, 0)):
                up = layer.lora_B["default"].weight.float() + (0 if deltas is None else deltas[name][task])
                out[row] += layer.scaling["default"] * x[row] @ a.T @ up.T
        said.append(out)
    return torch.cat(said, -1)


def close(one, other):
    return torch.allclose(one, other, atol=0.02 * float(other.abs().max()))


@pytest.mark.skipif(not PACKS, reason="no packed weights on this processor")
@pytest.mark.parametrize("targets", [["q_proj", "k_proj", "v_proj"], ["q_proj", "v_proj"], ["o_proj"], []])
@pytest.mark.parametrize("moved", [False, True])
def test_layers_that_read_the_same_states_are_one_product(monkeypatch, targets, moved):
    model, layers, x = attention_of(targets)
    fast = FastWeights(model)
    deltas = deltas_of(fast) if moved and targets else None
    expected = each_by_hand(fast, layers, x, deltas).detach()
    for packs, calls in ((True, 0), (False, 3)):
        monkeypatch.setattr("falconlib.policy.fast_weights.PACKS", packs)
        said, ran = said_together(fast, layers, x, deltas)
        assert ran == calls and close(said, expected), (packs, ran)
    monkeypatch.undo()
    plain = all(type(layer) is torch.nn.Linear for layer in layers)
    assert (fast.joined(layers) is not None) == plain  # outside a block adapters are peft's own


@pytest.mark.skipif(not PACKS, reason="no packed weights on this processor")
@pytest.mark.parametrize("why", ["hook", "forward", "another kind of layer", "many columns"])
def test_layers_are_read_one_by_one_where_a_product_of_all_would_say_something_else_or_take_longer(why):
    model, layers, x = attention_of(["q_proj", "k_proj"], r=12 if why == "many columns" else 4)  # 3 x (12 + 12) of 64
    fast, last = FastWeights(model), layers[2]
    if why == "hook":
        last.register_forward_hook(lambda _layer, _inputs, out: 2 * out)
    elif why == "forward":
        last.forward = lambda x: 2 * torch.nn.Linear.forward(last, x)
    elif why == "another kind of layer":
        last.__class__ = type("Twice", (torch.nn.Linear,), {"forward": lambda self, x: 2 * super(type(self), self).forward(x)})
    deltas = deltas_of(fast)
    expected = each_by_hand(fast, layers, x, deltas).detach()
    if why != "many columns":
        expected[..., -last.out_features :] *= 2
    said, ran = said_together(fast, layers, x, deltas)
    assert ran == 3 and close(said, expected)


@pytest.mark.skipif(not PACKS, reason="no packed weights on this processor")
def test_a_block_joins_layers_while_there_is_room_and_the_next_block_has_as_much(monkeypatch):
    model, layers, x = attention_of(["q_proj", "v_proj"])
    fast = FastWeights(model)
    width = 2 * (4 + 4)  # of theta and one delta
    one = (x.shape[-1] + width) * sum(layer.out_features for layer in layers)
    monkeypatch.setattr("falconlib.policy.fast_weights.COPIED", fast.adapted + one)
    for _ in range(2):
        with torch.no_grad(), fast.active(deltas_of(fast, tasks=1)):
            assert [fast.joined(layers) is None for _ in range(2)] == [False, True]
    monkeypatch.setattr("falconlib.policy.fast_weights.COPIED", fast.adapted + one - 1)
    with torch.no_grad(), fast.active(deltas_of(fast, tasks=1)):
        assert fast.joined(layers) is None


def test_one_layers_delta_alone_moves_what_is_sampled():
    model, layers, x = attention_of(["q_proj", "v_proj"])
    fast = FastWeights(model)
    deltas = {name: delta if fast.owners[name] is layers[2] else 0 * delta for name, delta in deltas_of(fast).items()}
    said, plain = (said_together(fast, layers, x, found)[0] for found in (deltas, None))
    assert close(said, each_by_hand(fast, layers, x, deltas).detach()) and not close(said, plain)


@pytest.mark.parametrize("first", [torch.bfloat16, torch.float32])
def test_layers_of_two_types_are_each_sampled_in_their_own(first):
    model, layers, x = attention_of(["q_proj", "v_proj"])
    fast, second = FastWeights(model), torch.float32 if first == torch.bfloat16 else torch.bfloat16
    for name, owner in fast.owners.items():  # the first adapted layer of all is a q_proj
        owner.base_layer.to(first if "q_proj" in name else second)
    deltas = deltas_of(fast)
    with torch.no_grad(), fast.active(deltas):
        fast.select(torch.tensor([0, 1, 0]))
        assert fast.joined(layers) is None
        for layer, kind in ((layers[0], first), (layers[2], second)):
            said = layer(x.to(kind))
            assert said.dtype == kind and close(said.float(), each_by_hand(fast, [layer], x, deltas)), kind


@pytest.mark.parametrize("words", [1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK - 1])
def test_weights_in_blocks_are_the_weights_and_zeros(words):
    weights = torch.rand(2, words) + 1
    blocks = in_blocks(weights).flatten(1)
    assert torch.equal(blocks[:, :words], weights) and not blocks[:, words:].any() and blocks.shape[1] % BLOCK == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stored_weights_give_the_same_products(dtype):
    generator = torch.Generator().manual_seed(0)
    weight, bias, x = (torch.randn(s, generator=generator).to(dtype) for s in ((96, 64), (96,), (5, 1, 64)))
    for b in (None, bias):
        assert torch.allclose(stored(weight, b)(x), torch.nn.functional.linear(x, weight, b), rtol=1e-5, atol=1e-5)


def test_a_failed_attempt_keeps_no_memory_while_the_next_one_runs(tiny_policy):
    class Graph:
        pass

    made: list[weakref.ref] = []

    def work(chunk):
        assert not any(old() for old in made)
        graph = Graph()
        made.append(weakref.ref(graph))
        if len(chunk) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return chunk

    MicroBatches(tiny_policy, 100).each(rows_of(tiny_policy), work, list)
    assert len(made) > len(rows_of(tiny_policy))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_gpus_backward_thread_sees_what_the_batch_is_of_and_a_cpus_threads_have_their_own(device):
    model = load_policy(ModelConfig(name="tiny"), LoraConfig(r=4, alpha=8, top_layers=0)).model.to(device)
    fast = FastWeights(model)
    fast.select(torch.tensor([1, 0]))
    with ThreadPoolExecutor(1) as pool:
        seen = pool.submit(lambda: len(fast.now.rows)).result()
    assert seen == (0 if device == "cpu" else 2) and len(fast.now.rows) == 2
