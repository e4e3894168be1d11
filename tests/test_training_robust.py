"""Runs that go wrong and models of other kinds: memory that runs out, Ctrl-C, NaN, encoder-decoder models, profile `paper`."""

import json
import os
import signal
from dataclasses import replace

import pytest
import torch
from conftest import ScriptedSandbox
from test_exactness import policy_of
from test_mrlf import TASKS, make_run, metrics

from falconlib.config import load_profile, override
from falconlib.errors import FalconError
from falconlib.judge.static import StaticJudge
from falconlib.memory.embed import get_embedder
from falconlib.memory.long_term import LongTermMemory
from falconlib.memory.short_term import ShortTermMemory
from falconlib.policy import generate
from falconlib.records import Reward
from falconlib.rollout import Conductor
from falconlib.training import batches, checkpoint, inner, mrlf
from falconlib.training.advantages import scored
from falconlib.training.arms import configure
from falconlib.training.batches import Example, MicroBatches, collate, count_tokens, micro_batches, score_batch
from falconlib.training.inner import adapt
from falconlib.training.losses import policy_gradient_loss
from falconlib.training.mrlf import MRLF


@pytest.mark.parametrize(
    "kind", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_out_of_memory_halves_the_micro_batch_says_so_and_goes_on(tiny_policy, capsys, kind):
    examples, seen = [Example("def f", tuple(range(1, 5 + i))) for i in range(8)], []

    def work(chunk):
        if sum(len(e.tokens) for e in chunk) > 20:
            raise kind
        seen.extend(chunk)

    micro = MicroBatches(tiny_policy, 400)
    micro.each(examples, work)
    assert sorted(seen, key=lambda e: len(e.tokens)) == examples  # every example once
    assert micro.tokens < 100 and "out of memory; going on with" in capsys.readouterr().err
    with pytest.raises(FalconError, match="does not fit the memory"):
        micro.each([Example("def f", tuple(range(30)))], work)
    with pytest.raises(RuntimeError, match="something else"):
        micro.each(examples, lambda chunk: (_ for _ in ()).throw(RuntimeError("something else")))


@pytest.mark.parametrize("where", ["forward", "second backward"])
def test_a_step_that_runs_out_of_memory_has_the_same_gradients(tmp_path, profile, scripted_sandbox, monkeypatch, where):
    """What a micro-batch had computed when it failed leaves no trace, and what others had accumulated before it stays."""
    theta, rows, failed = [], [], []
    plain, gradients = batches.score, torch.autograd.grad
    profile = override(profile, {"train.micro_tokens": 1024 if where == "forward" else 400})
    for limited in (False, True):
        (tmp_path / str(limited)).mkdir()
        run = make_run(tmp_path / str(limited), profile, scripted_sandbox)

        def scarce(found, full):
            if full:
                failed.append(len(rows))
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return found

        def score(policy, prompts, *rest, limited=limited, **named):
            rows.append(len(prompts))
            return scarce(plain(policy, prompts, *rest, **named), limited and where == "forward" and len(prompts) > 3)

        def grad(*args, limited=limited, **named):
            found = gradients(*args, **named)
            return scarce(found, limited and where != "forward" and len(rows) % 2 == 0 and rows[-1] > 1)

        monkeypatch.setattr(batches, "score", score)
        monkeypatch.setattr(torch.autograd, "grad", grad)
        rows.clear()
        run.step(1)
        theta.append(torch.cat([p.grad.flatten() for p in run.parameters]))
        assert (run.micro.tokens < run.profile.train.micro_tokens) == limited == bool(failed)
    assert torch.allclose(*theta, atol=1e-6) and theta[0].abs().max() > 0


@pytest.mark.parametrize("micro", [4096, 120], ids=["one micro-batch", "several"])
@pytest.mark.parametrize("kept", [16, 2], ids=["all in the buffer", "two of three in the buffer"])
def test_forwards_that_the_inner_and_the_outer_loss_share_give_the_gradients_of_separate_ones(
    tmp_path, profile, scripted_sandbox, monkeypatch, micro, kept
):
    """The second step has older episodes in its buffers, and one program twice."""
    changes = {"train.micro_tokens": micro, "short_term.size": kept, "inner.support": 3, "train.group": 6}
    run, calls = make_run(tmp_path, override(profile, changes), scripted_sandbox), []
    monkeypatch.setattr(mrlf, "adapt", lambda *args: calls.append(args) or adapt(*args))
    tasks = run.choose(1)
    for step in (1, 2):
        support = run.conductor.collect(tasks, group="support", step=step, rollouts=range(3))
        support = [replace(e, reward=Reward(r, total=r)) for e, r in zip(support, (1.0, 0.5, -1.0, -1.0, 1.0, 0.7), strict=True)]
        support[-1] = replace(support[-2], reward=support[-1].reward)
        adapted, found = run.adapt(tasks, support), []
        half, known = adapted.half, {x.tokens for x in calls[-1][2]}
        assert max(t for _, t in half.slots) > 0 and any(e.tokens not in known for e in half.examples) == (kept == 2)
        assert step == 1 or any(x.logprobs for x in half.rest)  # older ones, and those whose tokens are of both signs
        deltas = adapt(*calls[-1][:-1]).deltas
        assert all(torch.allclose(d, deltas[n], atol=1e-6) for n, d in adapted.deltas.items())
        for adaptation in (adapted, replace(adapted, half=None)):
            losses = {
                k: v or 0.0 for k, v in run.update(0, tasks, tasks, support, support, adaptation).items()
            }  # step 0 of the warm-up: theta stays
            found.append((losses, torch.cat([p.grad.flatten() for p in run.parameters])))
        assert found[0][0] == pytest.approx(found[1][0], rel=1e-4, abs=1e-6)
        assert torch.allclose(found[0][1], found[1][1], atol=1e-6) and found[0][1].abs().max() > 1e-3
        run.conductor.remember(support, [])


def test_a_loss_that_is_not_finite_stops_the_run_before_theta_moves(tmp_path, profile, scripted_sandbox, monkeypatch):
    from falconlib.training import outer

    run = make_run(tmp_path, profile, scripted_sandbox)
    plain = outer.cross_entropy_loss
    monkeypatch.setattr(outer, "cross_entropy_loss", lambda *args: plain(*args).detach() * float("nan") + 0 * plain(*args))
    before = [p.clone() for p in run.parameters]
    with pytest.raises(FalconError, match="not finite"):
        run.run(progress=False)
    assert all(torch.equal(p, q) for p, q in zip(run.parameters, before, strict=True))
    saved = (tmp_path / "bad_batch_step1.jsonl").read_text().splitlines()
    assert len(saved) == 8 and json.loads(saved[0])["task_id"] and not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "preempted"])
def test_ctrl_c_ends_the_step_saves_it_and_the_run_goes_on_from_there(tmp_path, profile, scripted_sandbox, capsys, stop):
    profile = override(profile, {"train.steps": 3, "train.checkpoint_every": 50})
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir()
    cut.mkdir()
    make_run(whole, profile, scripted_sandbox).run(progress=False)
    run = make_run(cut, profile, scripted_sandbox)
    choose = run.choose
    run.choose = lambda step: os.kill(os.getpid(), stop) or choose(step)
    handler = signal.getsignal(stop)
    with pytest.raises(KeyboardInterrupt):
        run.run(progress=False)
    assert [p.name for p in checkpoint.existing(cut / "checkpoints")] == ["step-000001"] and len(metrics(cut)) == 1
    assert "stopping after this step" in capsys.readouterr().err and signal.getsignal(stop) is handler
    make_run(cut, profile, scripted_sandbox).run(progress=False)
    assert (cut / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_inner_gradient_that_is_not_finite_stops_the_run_before_the_query(
    tmp_path, profile, scripted_sandbox, monkeypatch, bad
):
    run = make_run(tmp_path, profile, scripted_sandbox)
    plain = inner.inner_loss
    monkeypatch.setattr(inner, "inner_loss", lambda *args: plain(*args) * bad)
    before = [p.clone() for p in run.parameters]
    with pytest.raises(FalconError, match="not finite"):
        run.run(progress=False)
    assert all(torch.equal(p, q) for p, q in zip(run.parameters, before, strict=True))
    saved = [json.loads(line) for line in (tmp_path / "bad_batch_step1.jsonl").read_text().splitlines()]
    assert {row["group"] for row in saved} == {"support"} and not any(run.conductor.short_term.get(t.task_id) for t in TASKS)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_logits_that_are_not_finite_write_no_program(tiny_policy, monkeypatch, temperature):
    head = tiny_policy.model.get_output_embeddings()
    monkeypatch.setattr(head, "forward", lambda x: torch.nn.functional.linear(x, head.weight) * float("nan"))
    with pytest.raises(FalconError, match="logits are not finite"):
        generate.generate(tiny_policy, ["def f"], [generate.Row(0, 1)], max_new_tokens=4, temperature=temperature)


def test_sampling_that_runs_out_of_memory_goes_on_with_fewer_rows_and_the_same_programs(tiny_policy, monkeypatch, capsys):
    rows, plain, sizes, room = [generate.Row(i % 2, i) for i in range(9)], generate.decode_batch, [], [9]

    def scarce(policy, encoded, rows, *rest):
        sizes.append(len(rows))
        if len(rows) > room[0]:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return plain(policy, encoded, rows, *rest)

    monkeypatch.setattr(generate, "decode_batch", scarce)
    found = []
    for room[0] in (9, 3):
        found.append(generate.generate(tiny_policy, ["def f", "class A"], rows, max_new_tokens=6, temperature=0.7))
    assert [c.text for c in found[0]] == [c.text for c in found[1]] and sizes == [9, 9, 4, 2, 2, 2, 2, 1]
    assert "going on with 2 completions" in capsys.readouterr().err
    room[0] = 0
    with pytest.raises(torch.OutOfMemoryError):
        generate.generate(tiny_policy, ["def f"], rows[:1], max_new_tokens=6, temperature=0.7)


def test_a_resumed_run_keeps_the_smaller_micro_batches(tmp_path, profile, scripted_sandbox):
    run = make_run(tmp_path, profile, scripted_sandbox)
    run.micro.tokens = 100
    run.run(progress=False)
    run = make_run(tmp_path, profile, scripted_sandbox)
    assert run.micro.tokens != 100 and run.resume() and run.micro.tokens == 100


def test_a_step_without_anything_to_learn_leaves_theta_to_no_momentum(tmp_path, profile, scripted_sandbox):
    run = make_run(tmp_path, profile, scripted_sandbox)
    run.step(1)
    before = [p.clone() for p in run.parameters]
    run.outer.gradient = lambda *_: {"loss_pg": 0.0}
    assert run.update(2, [], [], [], [], None)["grad_norm"] == 0
    assert all(torch.equal(p, q) for p, q in zip(run.parameters, before, strict=True))


def test_the_last_k_checkpoints_are_kept(tmp_path, profile, scripted_sandbox):
    make_run(tmp_path, override(profile, {"train.steps": 4, "train.keep": 3}), scripted_sandbox, "grpo").run(progress=False)
    assert [p.name for p in checkpoint.existing(tmp_path / "checkpoints")] == ["step-000002", "step-000003", "step-000004"]


def test_zero_inner_steps_are_plain_reinforcement_learning_bit_for_bit(tmp_path, profile, scripted_sandbox):
    off = {"long_term.enabled": False, "short_term.enabled": False, "train.b_sl": 0.0, "train.b_neg": 0.0, "inner.steps": 0}
    run = make_run(tmp_path, override(profile, off), scripted_sandbox)
    plain = make_run(tmp_path, override(profile, off), scripted_sandbox)
    run.step(1)
    p, policy = plain.profile, plain.policy
    tasks = plain.choose(1)
    episodes = plain.conductor.collect(tasks, group="support", step=1, rollouts=range(p.train.group))
    examples = scored(episodes, p)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=p.train.lr / p.train.warmup, betas=(0.9, 0.99), weight_decay=0.0)
    fast = batches.FastWeights(policy.model)
    for chunk in micro_batches(policy, [e for e in examples if any(e.advantages)], p.train.micro_tokens):
        batch = collate(policy, chunk, p.sample.temperature)
        with fast.active(), batches.learning(policy, p):
            logprobs, _ = score_batch(policy, batch, fast, p)
            policy_gradient_loss(logprobs, batch, count_tokens(examples), p.train.clip_low, p.train.clip_high)[0].backward()
    torch.nn.utils.clip_grad_norm_(policy.parameters(), p.train.clip_norm)
    optimizer.step()
    for one, other in zip(run.policy.parameters(), policy.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt_neox", "t5"])
def test_decoder_only_and_encoder_decoder_models_both_train(kind, tmp_path, profile, scripted_sandbox):
    policy = policy_of(kind, tmp_path)
    profile = configure(override(profile, {"sample.max_new_tokens": 24}), "falcon", 0)
    long = LongTermMemory(tmp_path / "memory.sqlite", get_embedder("hashed"))
    long.add_tasks(TASKS)
    long.add_golds(TASKS)
    conductor = Conductor(policy, scripted_sandbox, StaticJudge(), profile, 0, long, ShortTermMemory(16, 64))
    run = MRLF(policy, conductor, TASKS, profile, 0, tmp_path)
    before = {n: p.clone() for n, p in policy.model.named_parameters()}
    row = run.step(1)
    assert row["grad_norm"] > 0 and row["inner_norm"] > 0 and row["loss_sl"] > 0
    for name, p in policy.model.named_parameters():
        assert torch.equal(p, before[name]) != p.requires_grad, name


def test_profile_paper_runs_its_whole_graph_on_tiny_stand_ins(tmp_path, monkeypatch):
    """Every training arm with the profile's own settings; only model, data and sizes are stand-ins."""
    import contextlib

    from falconlib import sandbox, training

    sizes = {
        "model.name": "tiny",
        "model.dtype": "float32",
        "model.device": "cpu",
        "tasks.train": ["basics"],
        "tasks.benchmarks": ["basics"],
        "tasks.train_limit": 12,
    }
    sizes |= {"train.steps": 1, "train.tasks": 2, "sample.max_new_tokens": 96, "sft.max_steps": 1, "long_term.embedder": "hashed"}
    profile = load_profile("paper", sizes)
    monkeypatch.setattr(sandbox, "Sandbox", lambda *_: contextlib.nullcontext(ScriptedSandbox()))
    for arm in profile.arms:
        adapter = None if arm in ("base", "sft") else tmp_path / "sft" / "adapter"
        training.run_arm(profile, arm, 0, tmp_path / arm, adapter, progress=False)
        assert (tmp_path / arm / "budget.json").is_file()
        assert arm == "base" or (tmp_path / arm / "adapter" / "adapter_model.safetensors").is_file()
    assert metrics(tmp_path / "falcon")[0]["completions"] == 2 * profile.train.group
