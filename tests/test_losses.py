"""The losses against hand sums, and the inner loop against one `functional_call` per task."""

import math

import pytest
import torch
from torch.func import functional_call

from falconlib.policy.fast_weights import FastWeights
from falconlib.records import Episode, Feedback, Reward
from falconlib.training.advantages import scored, sequence_advantages
from falconlib.training.batches import Batch, Example, MicroBatches, collate, count_tokens, micro_batches, score_batch
from falconlib.training.inner import adapt, damp, inner_examples, inner_gradient
from falconlib.training.losses import cross_entropy_loss, negative_loss, policy_gradient_loss

ONES = torch.ones(1, 2)


def batch(advantages, old, mask=ONES):
    rest = (torch.zeros(1).long(), torch.ones(1), torch.tensor([advantages]), torch.tensor([old]))
    return Batch([""], torch.zeros_like(mask).long(), mask, *rest)


def logprobs_of(policy, examples, deltas=None, profile=None):
    b, fast = collate(policy, examples), FastWeights(policy.model)
    with fast.active(deltas):
        return score_batch(policy, b, fast, profile or profile_of())[0]


def episode(total, tokens=(5, 6, 7), task="t", status="fail", mask=(), prompt="def f", logprobs=None):
    reward = Reward(total, total=total)
    return Episode(
        task, 1, 0, "support", prompt, "", "", tokens, logprobs or (-1.0,) * len(tokens),
        feedback=Feedback(status, None, 3), reward=reward, error_mask=mask,
    )  # fmt: skip


def test_policy_gradient_on_policy_is_minus_the_mean_advantage():
    logprobs = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    loss, cut = policy_gradient_loss(logprobs, batch([0.5, -1.0], [-1.0, -2.0]), 2.0, 0.2, 0.28)
    assert float(loss.detach()) == pytest.approx(-(0.5 - 1.0) / 2) and int(cut) == 0
    loss.backward()
    assert torch.allclose(logprobs.grad, torch.tensor([[-0.25, 0.5]]))


def test_the_clip_cuts_what_has_moved_too_far_in_the_rewarded_direction():
    logprobs = torch.tensor([[math.log(1.5), math.log(0.5)]], requires_grad=True)
    loss, cut = policy_gradient_loss(logprobs, batch([1.0, -1.0], [0.0, 0.0]), 1.0, 0.2, 0.28)
    assert float(loss.detach()) == pytest.approx(-(1.28 - 0.8)) and int(cut) == 2
    loss.backward()
    assert torch.equal(logprobs.grad, torch.zeros(1, 2))


def test_masked_tokens_count_for_nothing():
    mask = torch.tensor([[1.0, 0.0]])
    loss, _ = policy_gradient_loss(torch.tensor([[0.0, 5.0]]), batch([1.0, 9.0], [0.0, 0.0], mask), 1.0, 0.2, 0.28)
    assert float(loss) == -1.0
    assert float(cross_entropy_loss(torch.tensor([[-2.0, -50.0]]), batch([0.0, 0.0], [0.0, 0.0], mask), 1.0)) == 2.0


def test_the_negative_loss_is_bounded_and_leaves_unlikely_tokens_alone():
    logprobs = torch.log(torch.tensor([[0.999999, 0.05]]))
    value = float(negative_loss(logprobs, batch([0.0, 0.0], [0.0, 0.0]), 1.0))
    assert value == pytest.approx(-math.log(0.01), rel=1e-4)


def test_micro_batches_hold_every_example_once_and_respect_the_bound(tiny_policy):
    examples = [Example("def f" * (i % 3 + 1), tuple(range(1, 3 + i))) for i in range(9)]
    chunks = micro_batches(tiny_policy, examples, 60)
    assert sorted((e.prompt, e.tokens) for c in chunks for e in c) == sorted((e.prompt, e.tokens) for e in examples)
    assert 1 < len(chunks) < 9
    for chunk in chunks:
        prompts = {e.prompt for e in chunk}
        cost = len(chunk) * max(len(e.tokens) for e in chunk) + len(prompts) * max(len(tiny_policy.encode(p)) for p in prompts)
        assert len(chunk) == 1 or cost <= 60


def test_micro_batches_add_up_to_the_whole_batch(tiny_policy):
    examples = [Example("def f", (5, 6, 7), advantages=(1.0, -1.0, 0.5), logprobs=(-6.0, -6.5, -7.0)), Example("x", (8, 9))]
    whole = gradient(tiny_policy, [examples])
    assert torch.allclose(whole, gradient(tiny_policy, [[e] for e in examples]), atol=1e-6)
    assert whole.abs().max() > 0


def gradient(policy, chunks):
    policy.model.zero_grad()
    fast = FastWeights(policy.model)
    for chunk in chunks:
        b = collate(policy, chunk)
        with fast.active():
            cross_entropy_loss(score_batch(policy, b, fast, profile_of())[0], b, 5.0).backward()
    return torch.cat([p.grad.flatten().clone() for p in policy.parameters()])


def test_padding_on_either_side_changes_no_log_prob(tiny_policy):
    short, long = Example("x", (5, 6)), Example("def add(a, b): return", (7, 8, 9, 10))
    together, alone = logprobs_of(tiny_policy, [short, long]), logprobs_of(tiny_policy, [short])
    assert torch.allclose(together[0, :2], alone[0], atol=1e-5)


def test_the_completion_may_hold_the_pad_token(tiny_policy):
    pad = tiny_policy.tokenizer.pad_token_id
    assert pad == tiny_policy.eos
    b = collate(tiny_policy, [Example("x", (5, pad, pad)), Example("x", (5,))])
    assert b.mask.tolist() == [[1, 1, 1], [1, 0, 0]]


def test_advantages_compare_within_a_task_only_and_unknown_stays_unknown():
    episodes = [episode(1.0), episode(0.0), episode(5.0, task="u"), episode(None, task="t")]
    assert sequence_advantages(episodes, "loo") == [1.0, -1.0, None, None]
    assert len(scored(episodes, profile_of())) == 2


def profile_of(**changes):
    from falconlib.config import Profile, override

    return override(Profile(), changes)


def test_the_error_line_term_goes_off_with_its_switch_and_with_short_term_memory():
    episodes = [episode(0.5, mask=(0, 1, 0)), episode(-0.5)]
    on = scored(episodes, profile_of())[0].advantages
    assert on[0] == on[2] > on[1] and on[1] <= 0
    for off in ({"reward.rho_f": 0.0}, {"short_term.enabled": False}):
        first = scored(episodes, profile_of(**off))[0].advantages
        assert first == (on[0],) * 3


def test_grpo_gives_every_token_of_a_completion_the_same_advantage():
    from falconlib.training.arms import configure

    profile = configure(profile_of(), "grpo", 0)
    episodes = [episode(0.5, mask=(1, 1, 1), status="runtime_error"), episode(-1.0, mask=(0, 1, 0), status="syntax_error")]
    found = [e.advantages for e in scored(episodes, profile, "group")]
    assert all(len(set(a)) == 1 for a in found) and found[0][0] > 0 > found[1][0]


def terms():
    """Scored and supervised terms of three tasks; the third has none."""
    buffers = [[episode(1.0), episode(-1.0, (8, 9))], [episode(0.3, (4, 4, 4, 4)), episode(0.1, (3,)), episode(-0.9, (2, 2))], []]
    positives = [[Example("x", (7, 7))], [], []]
    return inner_examples(buffers, positives, profile_of())


def test_the_batched_inner_gradient_equals_a_loop_over_tasks(tiny_policy):
    profile, fast = profile_of(), FastWeights(tiny_policy.model)
    together = inner_gradient(tiny_policy, fast, fast.zeros(3), terms(), profile, MicroBatches(tiny_policy, 4096))
    for task in range(3):
        alone = per_task_gradient(tiny_policy, [e for e in terms() if e.task == task], profile)
        for name, grad in together.items():
            assert torch.allclose(grad[task], alone[name], atol=1e-6), name
    assert all(float(g[2].abs().max()) == 0 for g in together.values())


def per_task_gradient(policy, examples, profile):
    """The same gradient by shifting the `lora_B` weights themselves with `functional_call`: no hooks, one row at a time."""
    names = [f"{n}.weight" for n in FastWeights(policy.model).layers]
    weights = dict(policy.model.named_parameters())
    total = {n.removesuffix(".weight"): torch.zeros_like(weights[n]) for n in names}
    for e in examples:
        shifted = {n: weights[n].detach().clone().requires_grad_() for n in names}
        ids = torch.tensor([[*policy.encode(e.prompt), *e.tokens]])
        logits = functional_call(policy.model, shifted, (), {"input_ids": ids}).logits[0, -len(e.tokens) - 1 : -1]
        temperature = profile.sample.temperature if e.logprobs else 1.0
        logp = torch.log_softmax(logits / temperature, -1)[torch.arange(len(e.tokens)), torch.tensor(e.tokens)]
        if e.logprobs:
            ratio, a = torch.exp(logp - torch.tensor(e.logprobs)), torch.tensor(e.advantages)
            loss = -e.weight * torch.minimum(ratio * a, ratio.clamp(0.8, 1.28) * a).sum()
        else:
            loss = -e.weight * logp.sum()
        for n, g in zip(names, torch.autograd.grad(loss, list(shifted.values())), strict=True):
            total[n.removesuffix(".weight")] += g
    return total


def test_adapting_touches_no_parameter_and_leaves_tasks_without_terms_at_zero(tiny_policy):
    before = {n: p.clone() for n, p in tiny_policy.model.named_parameters()}
    found = adapt(tiny_policy, 3, terms(), profile_of(), MicroBatches(tiny_policy, 4096))
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in tiny_policy.model.named_parameters())
    length = torch.sqrt(sum(d.pow(2).sum((1, 2)) for d in found.deltas.values()))
    assert torch.allclose(length, torch.tensor([0.1, 0.1, 0.0]), atol=1e-6)
    assert found.norms[0] > 0 and found.norms[2] == 0


def test_an_inner_step_makes_the_rewarded_completion_likelier(tiny_policy):
    good, bad = episode(1.0, (5, 6, 7)), episode(-1.0, (8, 9, 10))
    terms_ = inner_examples([[good, bad]], [[]], profile_of())
    found = adapt(tiny_policy, 1, terms_, profile_of(**{"inner.alpha": 0.3}), MicroBatches(tiny_policy, 4096))
    examples = [Example(e.prompt, e.tokens) for e in (good, bad)]
    plain, adapted = logprobs_of(tiny_policy, examples).sum(1), logprobs_of(tiny_policy, examples, found.deltas).sum(1)
    assert adapted[0] - plain[0] > adapted[1] - plain[1] and adapted[0] > plain[0]


def test_negative_advantages_are_damped_and_weights_are_per_task():
    assert damp((1.0, -1.0), 0.3) == (1.0, -0.3)
    found = terms()
    own = [e for e in found if e.task == 0 and e.logprobs]
    assert {round(e.weight * count_tokens(own), 9) for e in own} == {1.0}


def test_the_outer_gradient_is_the_gradient_at_the_adapted_point(tiny_policy):
    """First order: with detached deltas active, `backward` gives d loss / d lora_B evaluated at lora_B + delta."""
    fast, example = FastWeights(tiny_policy.model), Example("def f", (5, 6, 7))
    generator = torch.Generator().manual_seed(2)
    deltas = {n: 0.1 * torch.randn(d.shape, generator=generator) for n, d in fast.zeros(1).items()}
    cross_entropy_loss(logprobs_of(tiny_policy, [example], deltas), collate(tiny_policy, [example]), 3.0).backward()
    hooked = {n: p.grad.clone() for n, p in tiny_policy.model.named_parameters() if p.requires_grad}
    tiny_policy.model.zero_grad()
    with torch.no_grad():
        for name, layer in fast.layers.items():
            layer.weight += deltas[name][0]
    cross_entropy_loss(logprobs_of(tiny_policy, [example]), collate(tiny_policy, [example]), 3.0).backward()
    for n, p in tiny_policy.model.named_parameters():
        if p.requires_grad:
            assert torch.allclose(p.grad, hooked[n], atol=1e-6), n


def test_two_threads_give_the_same_bits_every_time(tiny_policy):
    """Many rows of few tasks on two threads: a gradient that adds with atomics differs in its last bits from run to run."""
    examples = [Example("def f" * (1 + i % 4 // 2), tuple(range(5, 17)), i % 4) for i in range(64)]
    fast, threads, seen = FastWeights(tiny_policy.model), torch.get_num_threads(), set()
    torch.set_num_threads(2)
    try:
        for _ in range(12):
            deltas = {n: d.requires_grad_() for n, d in fast.zeros(4).items()}
            found = torch.autograd.grad(logprobs_of(tiny_policy, examples, deltas).sin().sum(), list(deltas.values()))
            found += torch.autograd.grad(logprobs_of(tiny_policy, examples).sin().sum(), tiny_policy.parameters())
            seen.add(b"".join(g.numpy().tobytes() for g in found))
    finally:
        torch.set_num_threads(threads)
    assert len(seen) == 1
