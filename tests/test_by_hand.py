"""The two levels recomputed by hand: from the episodes, with peft's own forward, one row at a time."""

import contextlib
import functools
from collections import Counter
from dataclasses import replace

import pytest
import torch
from test_exactness import gradient, transformers_row
from test_losses import episode
from test_mrlf import TASKS, make_run

from falconlib.config import Profile, override
from falconlib.policy.fast_weights import FastWeights
from falconlib.records import Reward
from falconlib.training import batches, outer
from falconlib.training.advantages import scored
from falconlib.training.batches import Example, MicroBatches
from falconlib.training.inner import adapt, inner_examples
from falconlib.training.losses import negative_loss
from falconlib.training.metrics import step_metrics


@contextlib.contextmanager
def shifted(policy, deltas, task):
    """lora_B + delta of the task inside the block, in the weights themselves; yields these weights."""
    weights = {name: layer.weight for name, layer in FastWeights(policy.model).layers.items()}
    kept = {name: w.detach().clone() for name, w in weights.items()}
    with torch.no_grad():
        for name, d in (deltas or {}).items():
            weights[name] += d[task]
    yield list(weights.values())
    with torch.no_grad():
        for name, w in weights.items():
            w.copy_(kept[name])


def clipped_gain(example, logp, low=0.2, high=0.28):
    """min(r A, clip(r) A) per token, and how many tokens the clip cut off."""
    ratio, a = (logp - torch.tensor(example.logprobs)).exp(), torch.tensor(example.advantages)
    gain = torch.minimum(ratio * a, ratio.clamp(1 - low, 1 + high) * a)
    return gain, int((gain < ratio * a).sum())


# ---- the local level


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_deltas_are_steps_on_the_damped_policy_gradient_and_eta_times_the_neighbours(tiny_policy, steps, monkeypatch):
    """The middle one of the first task's rewards has no advantage: it counts in the divisor and costs no forward. The third task
    has nothing to learn from."""
    profile = override(Profile(), {"inner.steps": steps, "inner.alpha": 0.3, "inner.eta": 0.4, "inner.negative_scale": 0.25})
    hot, eta, damping = profile.sample.temperature, 0.4, 0.25
    rewards = [{(5, 6, 7): 1.0, (11, 12): 0.0, (8, 9): -1.0}, {(4, 4, 4, 4): 0.3, (3,): 0.1, (2, 2): -0.9}]
    buffers = [
        [episode(r, t, logprobs=tuple((transformers_row(tiny_policy, "def f", t, hot)[0] + 0.1).tolist())) for t, r in of.items()]
        for of in rewards
    ]
    near = [[Example("x", (7, 7)), Example("def g", (3, 4, 5))], [Example("x", (9,))]]
    terms = inner_examples([*buffers, []], [*near, []], profile)
    rows, score = [], batches.score
    monkeypatch.setattr(batches, "score", lambda *a, **k: rows.append(len(a[1])) or score(*a, **k))
    found = adapt(tiny_policy, 3, terms, profile, MicroBatches(tiny_policy, 4096))
    assert sum(rows) == steps * (len(terms) - 1)

    hand = FastWeights(tiny_policy.model).zeros(3)
    for task in [0, 1] * steps:
        own, count = scored(buffers[task], profile), sum(map(len, rewards[task]))
        with shifted(tiny_policy, hand, task) as weights:
            loss = torch.zeros(())
            for e in own:
                e = replace(e, advantages=tuple(a if a > 0 else damping * a for a in e.advantages))
                loss = loss - clipped_gain(e, transformers_row(tiny_policy, e.prompt, e.tokens, hot)[0])[0].sum() / count
            for e in near[task]:
                z = sum(len(x.tokens) for x in near[task])
                loss = loss - eta * transformers_row(tiny_policy, e.prompt, e.tokens, 1.0)[0].sum() / z
            grads = torch.autograd.grad(loss, weights)
        norm = torch.cat([g.flatten() for g in grads]).norm()
        for d, g in zip(hand.values(), grads, strict=True):
            d[task] -= 0.3 * g / norm
    assert all(torch.allclose(found.deltas[name], d, atol=1e-5) for name, d in hand.items())
    assert max(float(d.abs().max()) for d in hand.values()) > 1e-2


def test_a_program_that_only_the_outer_loss_learns_from_keeps_its_gradient(tmp_path, profile, scripted_sandbox):
    """The middle one of three has no advantage among the four of its buffer."""
    run = make_run(tmp_path, override(profile, {"inner.support": 3, "train.group": 6}), scripted_sandbox)
    tasks, found = run.choose(1), []
    support = run.conductor.collect(tasks, group="support", step=1, rollouts=range(3))
    support = [replace(e, reward=Reward(r, total=r), error_mask=()) for e, r in zip(support, (1.0, 0.0, -0.5) * 2, strict=True)]
    run.conductor.buffers = lambda *_: [[replace(of[2], prompt="older"), *of] for of in (support[:3], support[3:])]
    adapted = run.adapt(tasks, support)
    for adaptation in (adapted, replace(adapted, half=None)):
        run.update(0, tasks, tasks, support, support, adaptation)  # step 0 of the warm-up: theta stays
        found.append(torch.cat([p.grad.flatten() for p in run.parameters]))
    assert torch.allclose(*found, atol=1e-6) and [t for _, t in adapted.half.slots].count(0.0) == 2


# ---- the global level


def second_step(folder, profile, sandbox, arm):
    """The second step of a run whose adapters are not zero: the memories hold the first one's episodes.

    Sampling log-probs are moved, so that the clip cuts, and one group has no variance. Returns the run with theta as before the
    step and the step's gradient in `.grad`, the row, the episodes, the adaptations and the supervised targets.
    """
    changes = {"train.group": 8, "inner.support": 3, "train.clip_norm": 1e9}
    changes |= {"train.b_pg": 0.9, "train.b_sl": 0.3, "train.b_neg": 0.7}
    run = make_run(folder, override(profile, changes), sandbox, arm, tasks=TASKS[:2])
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for layer in FastWeights(run.policy.model).layers.values():
            layer.weight.copy_(0.3 * torch.randn(layer.weight.shape, generator=generator))
    episodes, adapted, targets = {}, [], []
    collect, adapt_, auxiliary = run.conductor.collect, run.adapt, run.outer.auxiliary

    def moved(tasks, **k):
        found = [
            replace(e, logprobs=tuple(p + 0.35 * (-1) ** (i + j) for j, p in enumerate(e.logprobs)))
            for i, e in enumerate(collect(tasks, **k))
        ]
        if k["group"] == "query" or arm != "falcon":
            flat = Reward(-1.0, total=-1.0)
            found = [replace(e, reward=flat, error_mask=()) if e.task_id == TASKS[0].task_id else e for e in found]
        episodes[k["group"]] = found
        return found

    run.conductor.collect = moved
    run.adapt = lambda *a: adapted.append(adapt_(*a)) or adapted[-1]
    run.outer.auxiliary = lambda *a: targets.append(a[0]) or auxiliary(*a)
    spent = run.step(1) and run.totals["trained_tokens"]
    before = [p.detach().clone() for p in run.parameters]
    adapted.clear()
    targets.clear()
    row = run.step(2)
    row["trained_tokens"] -= spent
    with torch.no_grad():
        for p, b in zip(run.parameters, before, strict=True):
            p.copy_(b)
    return run, row, episodes, adapted, targets


@pytest.mark.parametrize("arm", ["falcon", "grpo", "grpo+sl"])
def test_the_outer_gradient_and_its_sums_equal_rows_of_peft_one_at_a_time(tmp_path, profile, scripted_sandbox, arm, monkeypatch):
    floor = 1e-4  # an untrained policy gives no token more than 0.1
    monkeypatch.setattr(outer, "negative_loss", functools.partial(negative_loss, floor=floor))
    run, row, episodes, adapted, (right, wrong) = second_step(tmp_path, profile, scripted_sandbox, arm)
    policy, p = run.policy, run.profile
    deltas, b_sl, b_neg = (adapted[0].deltas, 0.3, 0.7) if adapted else (None, p.train.b_sl, p.train.b_neg)
    index = {t.task_id: i for i, t in enumerate(run.choose(2))}
    expected, sums = torch.zeros(sum(x.numel() for x in run.parameters)), Counter()
    for half, at, share in (("support", None, 3 / 8 if adapted else 1.0), ("query", deltas, 5 / 8)):
        examples = scored(episodes.get(half, []), p, p.train.advantage, index)
        z = sum(len(e.tokens) for e in examples)  # those without advantage too
        for e in (e for e in examples if any(e.advantages)):
            with shifted(policy, at, e.task):
                logp, entropy = transformers_row(policy, e.prompt, e.tokens, p.sample.temperature)
                gain, cut = clipped_gain(e, logp)
                loss = -share * gain.sum() / z
                expected += gradient(p.train.b_pg * loss, policy)
            sums.update(loss=float(loss.detach()), entropy=float(entropy.detach().sum()), cut=cut, tokens=len(e.tokens))
    for e in right if b_sl else ():
        logp = transformers_row(policy, e.prompt, e.tokens, 1.0)[0]
        loss = -logp.sum() / sum(len(x.tokens) for x in right)
        expected += gradient(b_sl * loss, policy)
        sums.update(sl=float(loss.detach()), supervised=len(e.tokens))
    for e in wrong if b_neg else ():
        prob = transformers_row(policy, e.prompt, e.tokens, 1.0)[0].exp()
        keep = torch.tensor(e.mask) * (prob.detach() > floor)
        loss = -(torch.log(1 - prob.clamp(max=0.99)) * keep).sum() / sum(sum(x.mask) for x in wrong)
        expected += gradient(b_neg * loss, policy)
        sums.update(neg=float(loss.detach()), supervised=len(e.tokens))
    found = torch.cat([x.grad.flatten() for x in run.parameters])
    assert torch.allclose(found, expected, atol=1e-5 * float(expected.abs().max()))
    assert row["grad_norm"] == pytest.approx(float(expected.norm()), rel=1e-4)
    means = {"loss_pg": sums["loss"], "entropy": sums["entropy"] / sums["tokens"], "clipped": sums["cut"] / sums["tokens"]}
    assert {k: row[k] for k in means} == pytest.approx(means, rel=1e-4) and sums["cut"] > 0
    assert (row["loss_sl"] or 0.0, row["loss_neg"] or 0.0) == pytest.approx((sums["sl"], sums["neg"]), rel=1e-4)
    assert (sums["sl"] > 0) == (b_sl > 0) and (sums["neg"] > 0) == (b_neg > 0)
    assert row["trained_tokens"] == sums["tokens"] + sums["supervised"] + (adapted[0].tokens if adapted else 0)


def test_the_optimizer_gets_a_gradient_no_longer_than_clip_norm(tmp_path, profile, scripted_sandbox):
    run, norms = make_run(tmp_path, override(profile, {"train.clip_norm": 0.01}), scripted_sandbox), []
    step = run.optimizer.step
    run.optimizer.step = lambda: norms.append(float(torch.cat([p.grad.flatten() for p in run.parameters]).norm())) or step()
    assert run.step(1)["grad_norm"] > 0.02  # the row tells what it was
    assert norms == pytest.approx([0.01], rel=1e-3)


def test_the_curriculum_goes_on_from_the_pass_rates_of_the_checkpoint(tmp_path, profile, scripted_sandbox):
    run, again = (make_run(tmp_path, profile, scripted_sandbox, "grpo") for _ in range(2))
    run.pass_rate = {t.task_id: 0.5 * (t is TASKS[3]) for t in TASKS}
    run.totals["completions"] = 7
    run.metrics.append({"step": 1})
    run.save(1)
    fresh = [again.choose(step) for step in range(2, 12)]
    assert again.resume() == 1 and again.totals["completions"] == 7
    assert [again.choose(step) for step in range(2, 12)] == [run.choose(step) for step in range(2, 12)] != fresh


# ---- metrics


def judged(task, unit, tokens, status, text="", finished=True):
    """An episode with this R_unit as its whole reward."""
    e = episode(unit, tokens, task, status)
    return replace(e, memory_text=text, finished=finished, neighbours=("t/5",))


def test_the_metrics_of_a_step_on_seven_episodes():
    """Task a: with memory text 1.0 and -0.5, plain 0.5; task b: plain only, both the same; one verdict is unknown."""
    support = [
        judged("a", 1.0, (1, 2, 3), "pass", "text"), judged("a", -0.5, (1,), "fail", "text"), judged("a", 0.5, (1, 2), "pass"),
        judged("b", -1.0, (1, 2), "syntax_error"), judged("b", -1.0, (1, 2), "syntax_error", finished=False),
    ]  # fmt: skip
    query = [judged("a", 0.7, (1, 2), "pass"), judged("a", None, (1, 2, 3, 4), "infra_error")]
    row = step_metrics(support, query, [2.0, 4.0], None, {}, Profile())
    expected = {
        "reward": -0.3 / 6, "pass_rate": 3 / 6, "reward_unit": -0.3 / 6, "length": 16 / 7, "truncated": 1 / 7,
        "zero_variance": 2 / 3,  # b, and a's query half: one known reward has nothing to be compared with
        "inner_gain": 0.7 - (0.5 - 1.0 - 1.0) / 3,  # the plain ones only
        "inner_norm": 3.0, "memory_prompts": 2, "infra_errors": 1,
    }  # fmt: skip
    assert {name: row[name] for name in expected} == pytest.approx(expected)
    assert row["errors"] == {"fail": 1, "infra_error": 1, "pass": 3, "syntax_error": 2}


def test_the_memory_effect_is_the_mean_gain_of_tasks_seen_with_and_without_text(tmp_path, profile, scripted_sandbox):
    run = make_run(tmp_path, profile, scripted_sandbox)
    support = [judged(i, u, (1,), "fail", text) for i, u, text in (("t/0", 0.9, "text"), ("t/0", 0.5, "text"), ("t/0", 0.3, ""))]
    support += [judged("t/1", -0.6, (1,), "fail", "text"), judged("t/1", -0.4, (1,), "fail"), judged("t/2", 1.0, (1,), "pass")]
    assert run.conductor.remember(support, []) == pytest.approx(((0.7 - 0.3) + (-0.6 + 0.4)) / 2)
