"""The MRLF loop on the tiny model: what moves and what does not, off switches, determinism, resume."""

import contextlib
import functools
import itertools
import json
import multiprocessing
import os
import shutil
import signal

import pytest
import torch
from conftest import SMALL, ScriptedSandbox

from falconlib.config import Profile, build, override
from falconlib.errors import FalconError
from falconlib.judge.static import StaticJudge
from falconlib.memory.embed import get_embedder
from falconlib.memory.long_term import LongTermMemory
from falconlib.memory.short_term import ShortTermMemory
from falconlib.policy.models import load_policy
from falconlib.records import Task
from falconlib.rollout import Conductor, memory_effects, stream_seed, token_offsets
from falconlib.training import checkpoint
from falconlib.training.arms import SETTINGS, configure
from falconlib.training.mrlf import MRLF
from falconlib.training.outer import fitting, target_tokens

WORDS = ["one", "two", "three", "four", "five", "six"]
TASKS = [
    Task(f"t/{i}", "t", "train", f"Return the number {w}.", w, (f"assert {w}() == {i}",), 1, gold=f"def {w}():\n    return {i}\n")
    for i, w in enumerate(WORDS)
]


def make_run(folder, profile, sandbox, arm="falcon", seed=0, tasks=TASKS, adapter_seed=3):
    profile = override(configure(profile, arm, seed), {"sample.max_new_tokens": 24})
    policy = load_policy(profile.model, profile.lora, seed=adapter_seed)
    long = short = None
    if profile.long_term.enabled:
        long = LongTermMemory(folder / "memory.sqlite", get_embedder("hashed"))
        long.add_tasks(tasks)
        long.add_golds(tasks)
    if profile.short_term.enabled:
        short = ShortTermMemory(profile.short_term.size, profile.short_term.total)
    conductor = Conductor(policy, sandbox, StaticJudge(), profile, seed, long, short)
    return MRLF(policy, conductor, tasks, profile, seed, folder)


def keep(seen, key, episodes):
    seen.setdefault(key, episodes)
    return episodes


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_every_adapter_moves_and_no_base_weight_does(tmp_path, profile, scripted_sandbox):
    run = make_run(tmp_path, profile, scripted_sandbox)
    before = {n: p.clone() for n, p in run.policy.model.named_parameters()}
    run.run(progress=False)
    for name, p in run.policy.model.named_parameters():
        assert torch.equal(p, before[name]) != p.requires_grad, name


def test_same_seed_same_bytes_and_another_seed_other_ones(tmp_path, profile, scripted_sandbox):
    texts = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        (tmp_path / name).mkdir()
        make_run(tmp_path / name, profile, scripted_sandbox, seed=seed).run(progress=False)
        texts.append((tmp_path / name / "metrics.jsonl").read_bytes())
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("arm", ["falcon", "grpo"])
def test_a_run_killed_between_checkpoints_resumes_to_the_same_bytes(tmp_path, profile, scripted_sandbox, arm):
    profile = override(profile, {"train.steps": 4, "train.keep": 9})
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir()
    make_run(whole, profile, scripted_sandbox, arm).run(progress=False)
    shutil.copytree(whole, cut)
    for late in ("step-000003", "step-000004"):
        shutil.rmtree(cut / "checkpoints" / late)
    with (cut / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "half a li')
    resumed = make_run(cut, profile, scripted_sandbox, arm)
    assert resumed.resume() == 2
    resumed.run(progress=False)
    assert (cut / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    theta = [checkpoint.existing(f / "checkpoints")[-1] / "theta.safetensors" for f in (whole, cut)]
    assert theta[0].read_bytes() == theta[1].read_bytes()
    if arm == "falcon":
        hashes = [LongTermMemory(f / "memory.sqlite", get_embedder("hashed")).content_hash() for f in (whole, cut)]
        assert hashes[0] == hashes[1]


KILLED_AT = {  # what dies, at which of its calls: within the third step, or while a checkpoint is half written
    "update": (lambda run: run.optimizer, "step", 3),
    "memory": (lambda run: run.conductor, "remember", 3),
    "record": (lambda run: run.timings, "append", 3),
    "checkpoint": (lambda run: checkpoint.os, "fsync", 8),
}


def run_and_die(folder, profile, place):
    """In a process of its own: a run that is killed by SIGKILL."""
    run = make_run(folder, profile, ScriptedSandbox())
    owner, name, last = KILLED_AT[place]
    work, calls = getattr(owner(run), name), itertools.count(1)

    def fatal(*args, **kwargs):
        if next(calls) == last:
            os.kill(os.getpid(), signal.SIGKILL)
        return work(*args, **kwargs)

    setattr(owner(run), name, fatal)
    run.run(progress=False)


@pytest.mark.slow
def test_a_run_killed_anywhere_resumes_to_the_same_bytes(tmp_path, profile, scripted_sandbox):
    profile, whole = override(profile, {"train.steps": 4, "train.keep": 9}), tmp_path / "whole"
    whole.mkdir()
    make_run(whole, profile, scripted_sandbox).run(progress=False)
    for place in KILLED_AT:
        cut = tmp_path / place
        cut.mkdir()
        process = multiprocessing.get_context("spawn").Process(target=run_and_die, args=(cut, profile, place))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL, place
        assert not (cut / "checkpoints" / "step-000004").exists()
        resumed = make_run(cut, profile, scripted_sandbox)
        assert resumed.resume() == (1 if place == "checkpoint" else 2), place
        resumed.run(progress=False)
        assert (cut / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes(), place
        theta = [checkpoint.existing(f / "checkpoints")[-1] / "theta.safetensors" for f in (whole, cut)]
        assert theta[0].read_bytes() == theta[1].read_bytes(), place


def test_a_run_killed_before_its_first_checkpoint_starts_anew(tmp_path, monkeypatch):
    """Its memory already holds the first step's episodes: they must not meet the second attempt."""
    from falconlib import sandbox, training
    from falconlib.config import load_profile

    profile = load_profile("smoke", {"train.steps": 2, "sample.max_new_tokens": 96})
    monkeypatch.setattr(sandbox, "Sandbox", lambda *_: contextlib.nullcontext(ScriptedSandbox()))
    training.run_arm(profile, "sft", 0, tmp_path / "sft", progress=False)
    adapter = tmp_path / "sft" / "adapter"
    training.run_arm(profile, "falcon", 0, tmp_path / "whole", adapter, progress=False)
    with monkeypatch.context() as patch:
        patch.setattr(MRLF, "save", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            training.run_arm(profile, "falcon", 0, tmp_path / "cut", adapter, progress=False)
    training.run_arm(profile, "falcon", 0, tmp_path / "cut", adapter, progress=False)
    assert (tmp_path / "cut" / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()


def test_a_checkpoint_of_other_settings_is_refused(tmp_path, profile, scripted_sandbox):
    make_run(tmp_path, profile, scripted_sandbox, "grpo").run(progress=False)
    longer = override(profile, {"train.steps": 3})
    make_run(tmp_path, longer, scripted_sandbox, "grpo").run(progress=False)  # more steps are no other settings
    assert len(metrics(tmp_path)) == 3
    with pytest.raises(FalconError, match=r"other settings: train.lr \S+ -> 0.5"):
        make_run(tmp_path, override(profile, {"train.lr": 0.5}), scripted_sandbox, "grpo").run(progress=False)


def test_a_program_that_restates_its_header_is_no_target(tmp_path, profile, scripted_sandbox):
    task = Task(
        "t/c", "t", "train", "def six():\n", "six", ("assert six() == 6",), kind="completion", gold="def six():\n    return 6\n"
    )
    run = make_run(tmp_path, profile, scripted_sandbox, "grpo", tasks=[task])
    assert len(run.outer.supervised("t/c", task.gold)) == 1
    assert run.outer.supervised("t/c", "import math\n\ndef six():\n    return 6\n") == []


def test_without_the_inner_loop_a_step_is_one_group_of_plain_rollouts(tmp_path, profile, scripted_sandbox):
    run = make_run(tmp_path, profile, scripted_sandbox, "falcon-inner")
    calls = []
    collect = run.conductor.collect
    run.conductor.collect = lambda tasks, **k: calls.append(k) or collect(tasks, **k)
    row = run.step(1)
    assert [(c["group"], len(c["rollouts"]), c.get("deltas")) for c in calls] == [("support", 4, None)]
    assert row["inner_gain"] is None and row["inner_norm"] is None


def test_falcon_uses_as_many_rollouts_as_grpo(tmp_path, profile, scripted_sandbox):
    totals = {}
    for arm in ("falcon", "grpo"):
        (tmp_path / arm).mkdir()
        run = make_run(tmp_path / arm, profile, scripted_sandbox, arm)
        run.run(progress=False)
        totals[arm] = run.totals["completions"]
    assert totals["falcon"] == totals["grpo"] == 2 * 2 * 4


def test_query_rollouts_come_from_the_adapted_policy(tmp_path, profile, scripted_sandbox):
    """alpha so small that nothing changes gives the plain policy's query rollouts; a large one gives others."""
    found = {}
    for alpha in (1e-9, 1e-8, 3.0):
        folder = tmp_path / str(alpha)
        folder.mkdir()
        run = make_run(folder, override(profile, {"inner.alpha": alpha}), scripted_sandbox)
        collect = run.conductor.collect
        run.conductor.collect = lambda tasks, _c=collect, _a=alpha, **k: keep(found, (_a, k["group"]), _c(tasks, **k))
        run.step(1)
    text = {key: [e.completion for e in episodes] for key, episodes in found.items()}
    assert text[1e-9, "support"] == text[3.0, "support"]
    assert text[1e-9, "query"] == text[1e-8, "query"] != text[3.0, "query"]


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    """arm -> its first plain rollouts and its metrics; run once."""

    def trace(arm):
        folder, first = tmp_path_factory.mktemp(arm), {}
        run = make_run(folder, build(Profile, SMALL), ScriptedSandbox(), arm)
        collect = run.conductor.collect
        run.conductor.collect = lambda tasks, **k: keep(first, k["group"], collect(tasks, **k))
        run.run(progress=False)
        return {(e.task_id, e.rollout): e.completion for e in first["support"] if not e.memory_text}, metrics(folder)

    return functools.cache(trace)


@pytest.mark.parametrize("arm", [a for a in SETTINGS if a.startswith("falcon-")])
def test_a_switch_changes_the_run_but_not_the_first_plain_rollouts(traced, arm):
    """Random streams are per task and rollout: a part that is off shifts nobody else's randomness."""
    (plain, rows), (others, other_rows) = traced("falcon"), traced(arm)
    shared = plain.keys() & others.keys()
    assert shared and all(plain[k] == others[k] for k in shared) and rows != other_rows


def test_without_long_term_memory_nothing_is_recalled_stored_or_rewarded(tmp_path, profile, scripted_sandbox):
    run = make_run(tmp_path, profile, scripted_sandbox, "falcon-ltm")
    run.run(progress=False)
    assert not (tmp_path / "memory.sqlite").exists()
    for row in metrics(tmp_path):
        assert row["memory_prompts"] == 0 and row["memory_effect"] is None
        assert row["loss_neg"] is None and row["reward_long_term"] is None
        assert row["loss_sl"] is not None  # gold stays


def test_without_ai_feedback_the_judge_is_never_asked(tmp_path, profile, scripted_sandbox):
    run = make_run(tmp_path, profile, scripted_sandbox, "falcon-ai")

    def refuse(pairs):
        raise AssertionError("the judge was asked")

    run.conductor.judge.score_many = refuse
    run.run(progress=False)
    assert all(row["reward_style"] is None for row in metrics(tmp_path))


def test_episodes_carry_everything_and_unknown_verdicts_teach_nothing(tmp_path, profile, scripted_sandbox):
    run = make_run(tmp_path, profile, scripted_sandbox)
    episodes = run.conductor.collect(TASKS, group="support", step=1, rollouts=range(6), memory_share=0.5)
    assert [e.task_id for e in episodes[:6]] == ["t/0"] * 6 and len(episodes) == 36
    assert sum(bool(e.memory_text) for e in episodes) == 18
    assert all(e.memory_text in e.prompt for e in episodes)
    assert all(t.task_id not in e.neighbours for t in TASKS for e in episodes if e.task_id == t.task_id)
    for e in episodes:
        assert len(e.tokens) == len(e.logprobs) and e.code
        assert (e.reward.total is None) == (e.feedback.status == "infra_error")
    assert any(e.feedback.status == "infra_error" for e in episodes)


def test_utility_follows_the_effect_of_memory_text(tmp_path, profile, scripted_sandbox):
    run = make_run(tmp_path, profile, scripted_sandbox)
    episodes = run.conductor.collect(TASKS, group="support", step=1, rollouts=range(6), memory_share=0.5)
    effects = memory_effects(episodes)
    assert effects
    run.conductor.remember(episodes, [])
    touched = {n for _, names in effects for n in names}
    utilities = {n.task_id: n.utility for r in run.conductor.long_term.recall(TASKS, 5) for n in r.neighbours}
    for name in touched & utilities.keys():
        own = [e for (_, names), e in effects.items() if name in names]
        assert utilities[name] == pytest.approx(0.2 * sum(own) / len(own))


def test_fresh_successes_are_distilled_under_the_plain_prompt(tmp_path, profile, scripted_sandbox):
    run = make_run(tmp_path, profile, scripted_sandbox)
    episodes = run.conductor.collect(TASKS, group="support", step=1, rollouts=range(6), memory_share=0.5)
    passed = {(e.task_id, e.code) for e in episodes if e.feedback.status == "pass"}
    assert passed and set(run.conductor.own_programs(TASKS, episodes)) == passed
    with_text = [e for e in episodes if e.feedback.status == "pass" and e.memory_text]
    assert all(e.memory_text not in x.prompt for e in with_text for x in run.outer.supervised(e.task_id, e.code))
    run.conductor.remember(episodes, [])
    assert {i for i, _ in run.conductor.own_programs(TASKS, [])} == {i for i, _ in passed}
    run.conductor.long_term = None  # nothing is stored: what this step verified is all there is
    assert set(run.conductor.own_programs(TASKS, episodes)) == passed and run.conductor.own_programs(TASKS, []) == []


def test_the_curriculum_prefers_half_solved_tasks(tmp_path, profile, scripted_sandbox):
    run = make_run(tmp_path, profile, scripted_sandbox)
    run.pass_rate = {t.task_id: 0.0 for t in TASKS} | {"t/3": 0.5}
    chosen = [t.task_id for step in range(200) for t in run.choose(step)]
    assert chosen.count("t/3") > 2 * max(chosen.count(t.task_id) for t in TASKS if t.task_id != "t/3") / 1.5
    assert len(set(chosen)) == len(TASKS)


def test_an_infinite_gradient_stops_the_run_and_saves_the_batch(tmp_path, profile, scripted_sandbox):
    run = make_run(tmp_path, profile, scripted_sandbox)
    next(iter(run.parameters)).register_hook(lambda g: g * float("nan"))
    with pytest.raises(FalconError, match="not finite"):
        run.step(1)
    assert (tmp_path / "bad_batch_step1.jsonl").stat().st_size > 0


def damaged(data, damage):
    return {"truncated": data[: len(data) // 2], "foreign": b"{}", "one bit": data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]}[
        damage
    ]


@pytest.mark.parametrize("damage", ["truncated", "foreign", "one bit"])
@pytest.mark.parametrize("name", ["theta.safetensors", "optimizer.pt", "state.json", "long_term.sqlite"])
def test_a_broken_checkpoint_is_named_with_the_one_before_it(tmp_path, profile, scripted_sandbox, name, damage):
    run = make_run(tmp_path, override(profile, {"train.steps": 2}), scripted_sandbox)
    run.run(progress=False)
    file = checkpoint.existing(tmp_path / "checkpoints")[-1] / name
    file.write_bytes(damaged(file.read_bytes(), damage))
    with pytest.raises(FalconError, match="step-000002 cannot be loaded") as caught:
        make_run(tmp_path, profile, scripted_sandbox).run(progress=False)
    assert "step-000001" in caught.value.remedy


def test_a_checkpoint_under_another_steps_name_is_refused(tmp_path, profile, scripted_sandbox):
    make_run(tmp_path, profile, scripted_sandbox, "grpo").run(progress=False)
    last = checkpoint.existing(tmp_path / "checkpoints")[-1]
    last.rename(last.with_name("step-000009"))
    with pytest.raises(FalconError, match="of another step"):
        make_run(tmp_path, profile, scripted_sandbox, "grpo").run(progress=False)


def test_a_run_does_not_go_on_from_other_weights_or_without_its_log(tmp_path, profile, scripted_sandbox):
    make_run(tmp_path, profile, scripted_sandbox, "grpo").run(progress=False)
    with pytest.raises(FalconError, match="other settings: theta at the start"):
        make_run(tmp_path, profile, scripted_sandbox, "grpo", adapter_seed=4).run(progress=False)
    other = make_run(tmp_path, profile, scripted_sandbox, "grpo")
    other.policy.fingerprint = "other base"
    with pytest.raises(FalconError, match=r"other settings: model .* -> other base"):
        other.run(progress=False)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(FalconError, match="lacks steps"):
        make_run(tmp_path, profile, scripted_sandbox, "grpo").run(progress=False)


def test_a_checkpoint_of_another_arm_is_refused(tmp_path, profile, scripted_sandbox):
    make_run(tmp_path, profile, scripted_sandbox, "grpo").run(progress=False)
    with pytest.raises(FalconError, match="belongs to arm"):
        make_run(tmp_path, profile, scripted_sandbox, "falcon-ltm").run(progress=False)


def test_only_tasks_whose_gold_fits_are_trained_on(tiny_policy):
    lengths = {t.task_id: len(target_tokens(tiny_policy, t, t.gold)) - 1 for t in TASKS}
    limit = sorted(lengths.values())[2]
    assert {t.task_id for t in fitting(tiny_policy, TASKS, limit)} == {i for i, n in lengths.items() if n <= limit}


def test_tasks_that_are_left_out_are_told_and_counted(tmp_path, tiny_policy, monkeypatch, capsys):
    from falconlib import training
    from falconlib.config import load_profile
    from falconlib.tasks import load_tasks

    (adapter := tmp_path / "sft").mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    monkeypatch.setattr("falconlib.policy.models.load_policy", lambda *_: tiny_policy)
    monkeypatch.setattr(training, "train_rl", lambda policy, tasks, *_: {"trained_tokens": len(tasks)})
    for limit in (40, 500):
        smoke = load_profile("smoke", {"sample.max_new_tokens": limit, "tasks.train_limit": 0})
        training.run_arm(smoke, "grpo", 0, tmp_path / "run", adapter, progress=False)
        budget, told = json.loads((tmp_path / "run" / "budget.json").read_text()), capsys.readouterr().out
        used, given = budget["tasks_used"], budget["tasks_given"]
        assert given == len(load_tasks("basics", "train")) and used == budget["trained_tokens"]
        assert (0 < used < given and f"{used} of {given} training tasks" in told) if limit == 40 else (used == given and not told)


def test_token_offsets_cover_the_text_on_odd_characters(tiny_policy):
    text = "def f():\n\treturn 'ä€😀'  # tab\n"
    tokens = tiny_policy.encode(text)
    spans = token_offsets(tiny_policy, tokens)
    assert spans[0][0] == 0 and spans[-1][1] == len(text)
    assert all(a <= b for a, b in spans) and all(x[1] == y[0] or x == y for x, y in itertools.pairwise(spans))
    smile = [i for i, (a, b) in enumerate(spans) if "😀" in text[a:b]]
    assert len(smile) > 1 and tiny_policy.decode([tokens[i] for i in smile]).count("😀") == 1  # all bytes of it share its span


def test_streams_differ_by_seed_step_task_and_rollout():
    base = (0, 1, "t", 2)
    others = [(1, 1, "t", 2), (0, 2, "t", 2), (0, 1, "u", 2), (0, 1, "t", 3)]
    assert stream_seed(*base) == stream_seed(*base) and stream_seed(*base) not in {stream_seed(*o) for o in others}


def test_an_unknown_arm_is_an_error(profile):
    with pytest.raises(FalconError, match="unknown arm"):
        configure(profile, "falcom", 0)
