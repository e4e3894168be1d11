"""Every arm trains through the one loop, resumes to the same bytes, counts its budget alike, and its special part matters."""

import contextlib
import functools
import json
import shutil
from itertools import count

import pytest
import torch
from conftest import SMALL, ScriptedSandbox
from test_mrlf import TASKS, make_run, metrics

from falconlib.config import ARMS, Profile, build, load_profile, override
from falconlib.errors import FalconError
from falconlib.graph import GRAPH, steps_of
from falconlib.memory.embed import get_embedder
from falconlib.memory.long_term import LongTermMemory
from falconlib.records import Episode, Feedback, Reward
from falconlib.training import checkpoint, spent_by, value_head
from falconlib.training.advantages import GREEDY, RETURNS, above_greedy, outcome, sequence_advantages
from falconlib.training.arms import MODULES, SETTINGS, configure
from falconlib.training.batches import Example, MicroBatches, collate
from falconlib.training.critic import states_of
from falconlib.training.error_critic import ErrorCritic
from falconlib.training.similarity import ast_match, dataflow_match
from falconlib.training.value_head import KL_HORIZON, KL_TARGET, ValueHead, gae, next_beta

LEARNING = [arm for arm in ARMS if SETTINGS[arm][1] is not None]
NEW = ["rft", "coderl", "ppocoder", "rloo", "grpo+sl", "grpo+knn"]
CRITICS = {"coderl": ErrorCritic, "ppocoder": ValueHead}


@pytest.fixture(scope="module")
def quick():
    """Four steps, so that a head that is still zero at first has time to matter."""
    return override(build(Profile, SMALL), {"train.steps": 4, "train.keep": 9, "train.warmup": 0, "train.lr": 3e-3})


@pytest.fixture(scope="module")
def whole(quick, tmp_path_factory):
    """arm -> folder of its finished run, which its tests share and leave alone."""
    root = tmp_path_factory.mktemp("whole")
    return functools.cache(lambda arm: trained(root / arm, quick, arm) and root / arm)


def trained(folder, profile, arm, before=lambda run: None, **changes):
    """Metrics of a finished run of the arm, some of its settings changed."""
    folder.mkdir()
    run = make_run(folder, profile, ScriptedSandbox(), arm)
    if changes:
        settings = override(run.profile, {name.replace("__", "."): value for name, value in changes.items()})
        run = type(run)(run.policy, run.conductor, run.tasks, settings, run.seed, folder)
        run.conductor.profile = settings
    before(run)
    run.run(progress=False)
    return metrics(folder)


def theta(folder):
    return (checkpoint.existing(folder / "checkpoints")[-1] / "theta.safetensors").read_bytes()


def episode(policy, tokens, status="fail", task="t/0", group="support", code=""):
    policy_says = (-1.0,) * len(tokens)
    return Episode(
        task, 1, 0, group, "def f", "", code, tuple(tokens), policy_says,
        feedback=Feedback(status, None, 3), reward=Reward(0.0, total=0.0),
    )  # fmt: skip


BATCH = [((5, 6, 7), "fail"), ((8, 9), "pass"), ((10, 11, 12, 13), "syntax_error"), ((14,), "timeout")]


def batch_of(policy):
    return [episode(policy, [20, 21], "runtime_error", group=GREEDY), *(episode(policy, *e) for e in BATCH)]


def critic_for(policy, profile, arm, tokens=4096, blank=True):
    settings = configure(profile, arm, 0)
    critic = CRITICS[arm](policy, settings, MicroBatches(policy, tokens), {t.task_id: t for t in TASKS})
    if not blank:
        with torch.no_grad():
            critic.head.weight.copy_(0.1 * torch.randn(critic.head.weight.shape, generator=torch.Generator().manual_seed(1)))
            critic.head.bias.fill_(0.2)
    return critic


# ---- all arms alike


def test_every_arm_is_a_file_that_says_what_it_changes_and_sets_what_exists(profile):
    assert list(SETTINGS) == list(ARMS) and len(set(ARMS)) == len(ARMS)
    for module in MODULES:
        assert module.__doc__.count("\n") >= 1 or module.__name__.endswith(".base")
    for arm, (what, settings) in SETTINGS.items():
        assert what
        own = configure(profile, arm, 3)
        for dotted, value in (settings or {}).items():
            group, name = dotted.split(".")
            assert getattr(getattr(own, group), name) == value


@pytest.mark.parametrize("arm", LEARNING)
def test_every_arm_spends_the_same_completions_and_counts_its_budget_alike(tmp_path, profile, arm):
    rows = trained(tmp_path / "run", profile, arm)
    last = rows[-1]
    assert last["completions"] == 2 * 2 * 4 and 0 < last["programs"] <= last["completions"]
    assert isinstance(last["trained_tokens"], int)
    timings = [json.loads(line) for line in (tmp_path / "run" / "timings.jsonl").read_text().splitlines()]
    assert [row["step"] for row in timings] == [1, 2] and all(row["total"] >= row["update"] > 0 for row in timings)


@pytest.mark.parametrize("arm", NEW)
def test_every_new_arm_moves_theta_and_resumes_to_the_same_bytes(tmp_path, quick, whole, arm):
    whole, cut = whole(arm), tmp_path / "cut"
    rows = metrics(whole)
    assert rows[-1]["trained_tokens"] > 0 and any(row["grad_norm"] > 0 for row in rows)
    shutil.copytree(whole, cut)
    for late in ("step-000003", "step-000004"):
        shutil.rmtree(cut / "checkpoints" / late)
    resumed = make_run(cut, quick, ScriptedSandbox(), arm)
    resumed.run(progress=False)
    assert metrics(cut) == rows and theta(cut) == theta(whole)
    if arm in CRITICS:
        heads = [torch.load(f / "checkpoints" / "step-000004" / "critic.pt") for f in (whole, cut)]
        assert torch.equal(heads[0]["head"]["weight"], heads[1]["head"]["weight"]) and heads[0]["head"]["weight"].any()
        assert heads[0].get("beta") == heads[1].get("beta")


@pytest.mark.parametrize("arm", CRITICS)
def test_a_resume_without_the_critics_state_would_be_another_run(tmp_path, quick, whole, arm, monkeypatch):
    rows = metrics(shutil.copytree(whole(arm), tmp_path / "run"))
    for late in ("step-000003", "step-000004"):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / late)
    monkeypatch.setattr(CRITICS[arm], "load_state_dict", lambda *_: None)
    make_run(tmp_path / "run", quick, ScriptedSandbox(), arm).run(progress=False)
    assert [row["loss_critic"] for row in metrics(tmp_path / "run")][2:] != [row["loss_critic"] for row in rows][2:]


@pytest.mark.parametrize(
    "arm, off",
    [
        ("rft", {"train__targets": "gold+own"}),
        ("rft", {"train__b_pg": 1.0}),
        ("coderl", {"train__advantage": "loo"}),
        ("coderl", {"train__alternate": False}),
        ("ppocoder", {"train__advantage": "loo"}),
        ("rloo", {"train__advantage": "group"}),
        ("grpo+sl", {"train__b_sl": 0.0}),
        ("grpo+sl", {"train__targets": "gold"}),
        ("grpo+knn", {"long_term__prompt_share": 0.0}),
    ],
)
def test_what_is_special_to_an_arm_matters(tmp_path, quick, whole, arm, off):
    assert trained(tmp_path / "off", quick, arm, **off)
    assert theta(whole(arm)) != theta(tmp_path / "off")


# ---- RFT, GRPO + SL


def test_rft_learns_from_its_own_verified_programs_alone(tmp_path, quick):
    targets, passed = set(), set()

    def watch(run):
        supervised, collect = run.outer.supervised, run.conductor.collect
        run.outer.supervised = lambda i, code: targets.add((i, code)) or supervised(i, code)

        def collected(*args, **kwargs):
            found = collect(*args, **kwargs)
            passed.update((e.task_id, e.code) for e in found if e.feedback.status == "pass")
            return found

        run.conductor.collect = collected

    rows = trained(tmp_path / "run", quick, "rft", watch)
    assert targets == passed and passed and all(row["loss_pg"] == 0 for row in rows)


def test_grpo_sl_has_falcons_term_and_grpo_everything_else(tmp_path, profile):
    rows = {arm: trained(tmp_path / arm, profile, arm) for arm in ("grpo", "grpo+sl")}
    assert all(row["loss_sl"] is None for row in rows["grpo"]) and all(row["loss_sl"] > 0 for row in rows["grpo+sl"])
    grpo, sl, falcon = (configure(profile, arm, 0).train for arm in ("grpo", "grpo+sl", "falcon"))
    assert (sl.b_sl, sl.targets) == (falcon.b_sl, falcon.targets) and sl.advantage == grpo.advantage
    assert rows["grpo"][0]["reward_unit"] == rows["grpo+sl"][0]["reward_unit"]  # the first step samples alike


# ---- GRPO + nearest neighbour


def test_grpo_knn_shows_a_neighbours_gold_and_remembers_nothing(tmp_path, profile):
    seen, hashes = [], {}

    def watch(run):
        hashes["before"] = run.conductor.long_term.content_hash()
        collect = run.conductor.collect
        run.conductor.collect = lambda *a, **k: seen.extend(found := collect(*a, **k)) or found

    rows = trained(tmp_path / "knn", profile, "grpo+knn", watch)
    after = LongTermMemory(tmp_path / "knn" / "memory.sqlite", get_embedder("hashed")).content_hash()
    assert after == hashes["before"]
    gold, shown = {t.task_id: t.gold for t in TASKS}, [e for e in seen if e.memory_text]
    assert len(shown) == len(seen) / 2 and all(row["memory_prompts"] == 4 for row in rows)
    for e in shown:
        assert e.task_id not in e.neighbours and gold[e.neighbours[0]].strip() in e.prompt
        assert gold[e.task_id].strip() not in e.prompt
    trained(tmp_path / "learns", profile, "grpo+knn", long_term__learns=True)
    other = LongTermMemory(tmp_path / "learns" / "memory.sqlite", get_embedder("hashed")).content_hash()
    assert other != hashes["before"]


# ---- CodeRL


def test_coderl_compares_with_the_greedy_program_by_outcome_class(tiny_policy):
    ends = ["pass", "fail", "timeout", "syntax_error", "infra_error"]
    group = [episode(tiny_policy, [5], s) for s in ends] + [episode(tiny_policy, [5], "fail", group=GREEDY)]
    expected = [1.3, 0.0, -0.3, -0.7, None, None]
    assert above_greedy(group) == [x if x is None else pytest.approx(x) for x in expected]
    assert sequence_advantages(group, "critic") == above_greedy(group) != sequence_advantages(group, "group")
    assert above_greedy(group[:5]) == [None] * 5 and outcome(None) is None
    assert [RETURNS[outcome(Feedback(s, None, 1))] for s in ("memory", "runtime_error")] == [-0.6, -0.6]


def test_coderls_last_rollout_is_the_likeliest_program_and_teaches_no_policy_gradient(tmp_path, profile):
    run = make_run(tmp_path, profile, ScriptedSandbox(), "coderl")
    seen, scored = [], []
    collect, credit = run.conductor.collect, run.critic.credit
    run.conductor.collect = lambda *a, **k: seen.extend(found := collect(*a, **k)) or found
    run.critic.credit = lambda episodes, index: scored.extend(episodes) or credit(episodes, index)
    run.step(1)
    best = [e for e in seen if e.group == GREEDY]
    assert len(best) == 2 and len(seen) == 8 and not any(e.group == GREEDY for e in scored)
    for e in best:
        assert e.logprobs == () and e.rollout == 3
        before = make_run(tmp_path, profile, ScriptedSandbox(), "coderl").policy
        ids = torch.tensor([[*before.encode(e.prompt), *e.tokens]])
        with torch.no_grad():
            likeliest = before.model(input_ids=ids).logits[0, -len(e.tokens) - 1 : -1].argmax(-1)
        assert tuple(likeliest.tolist()) == e.tokens


def test_the_critics_take_turns_with_the_cross_entropy(whole):
    rows = metrics(whole("coderl"))
    assert [row["loss_sl"] is not None for row in rows] == [False, True, False, True]
    assert all(row["loss_pg"] == 0 for row in rows[1::2]) and rows[0]["loss_pg"] != 0


def test_the_error_critic_weights_tokens_by_its_estimate_of_the_true_class(tiny_policy, profile):
    critic, episodes = critic_for(tiny_policy, profile, "coderl", blank=False), batch_of(tiny_policy)
    head = [p.detach().clone() for p in critic.head.parameters()]
    found = critic.examples(episodes, {"t/0": 0})
    gains = [a for a in above_greedy(episodes) if a is not None]
    assert len(found) == 4
    loss = 0.0
    for x, gain, (tokens, status) in zip(found, gains, BATCH, strict=True):
        ids = torch.tensor([[*tiny_policy.encode("def f"), *tokens]])
        with torch.no_grad():
            h = tiny_policy.model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0, -len(tokens) :]
        logits, truth = torch.nn.functional.layer_norm(h, h.shape[-1:]) @ head[0].T + head[1], outcome(Feedback(status, None, 1))
        assert x.advantages == pytest.approx((gain * logits.softmax(-1)[:, truth]).tolist(), abs=1e-5)
        loss -= float(logits.amax(0).log_softmax(-1)[truth]) / 4
    assert critic.log["loss_critic"] == pytest.approx(loss, rel=1e-4)
    assert critic.tokens == 10 and len(set(found[0].advantages)) == 3


# ---- PPOCoder


def test_gae_by_hand_and_at_its_ends():
    rewards, values = torch.tensor([[0.0, 0.0, 1.0], [0.5, 0.0, 0.0]]), torch.tensor([[0.2, 0.4, 0.6], [0.1, 9.0, 9.0]])
    mask = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]])
    last = 1.0 - 0.6
    middle = 0.6 - 0.4 + 0.95 * last
    first = 0.4 - 0.2 + 0.95 * middle
    assert torch.allclose(gae(rewards, values, mask, 1.0, 0.95), torch.tensor([[first, middle, last], [0.4, 0.0, 0.0]]))
    assert torch.allclose(gae(rewards, values, mask, 1.0, 1.0)[0], 1.0 - values[0])  # lambda 1: what is still to come, less V
    assert torch.allclose(gae(rewards, values, mask, 0.5, 0.0)[0], torch.tensor([0.0, -0.1, 0.4]), atol=1e-6)


def test_the_kl_coefficient_follows_the_drift_within_its_clip():
    assert next_beta(0.1, KL_TARGET, 100) == 0.1
    assert next_beta(0.1, KL_TARGET * 1.1, 100) == pytest.approx(0.1 * (1 + 0.1 * 100 / KL_HORIZON))
    assert next_beta(0.1, 99.0, 100) == pytest.approx(0.1 * (1 + 0.2 * 100 / KL_HORIZON))
    assert next_beta(0.1, -99.0, 100) == pytest.approx(0.1 * (1 - 0.2 * 100 / KL_HORIZON))


def test_the_value_heads_advantages_are_gae_of_the_end_reward_less_the_drift(tiny_policy, profile):
    critic = critic_for(tiny_policy, profile, "ppocoder", blank=False)
    head = [p.detach().clone() for p in critic.head.parameters()]
    start = [p.detach().clone() for p in tiny_policy.parameters()]
    with torch.no_grad():
        for p in tiny_policy.parameters():
            p.add_(0.05)  # theta has moved since the run began
    gold = TASKS[0].gold
    episodes = [episode(tiny_policy, tokens, status, code=gold if status == "pass" else "") for tokens, status in BATCH]
    moved = [p.detach().clone() for p in tiny_policy.parameters()]
    found = critic.examples(episodes, {"t/0": 0})
    assert all(torch.equal(p, q) for p, q in zip(tiny_policy.parameters(), moved, strict=True))  # theta is itself again
    expected = []
    for e, (tokens, status) in zip(episodes, BATCH, strict=True):
        ids = torch.tensor([[*tiny_policy.encode("def f"), *tokens]])
        with torch.no_grad():
            h = tiny_policy.model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0, -len(tokens) - 1 : -1]
            for p, q in zip(tiny_policy.parameters(), start, strict=True):
                p.copy_(q)
            logits = tiny_policy.model(input_ids=ids).logits[0, -len(tokens) - 1 : -1] / profile.sample.temperature
            for p, q in zip(tiny_policy.parameters(), moved, strict=True):
                p.copy_(q)
        before = logits.log_softmax(-1)[torch.arange(len(tokens)), torch.tensor(tokens)]
        rewards = -value_head.KL_START * (torch.tensor(e.logprobs) - before)
        rewards[-1] += RETURNS[outcome(e.feedback)] + (1.0 if status == "pass" else 0.0)  # ast = 1; gold has no data flow
        values = (torch.nn.functional.layer_norm(h, h.shape[-1:]) @ head[0].T + head[1]).squeeze(-1)
        expected += gae(rewards[None], values[None], torch.ones(1, len(tokens)), 1.0, 0.95)[0].tolist()
    flat = torch.tensor(expected)
    flat = (flat - flat.mean()) / flat.std()
    assert [a for x in found for a in x.advantages] == pytest.approx(flat.tolist(), abs=1e-3)
    assert critic.log["kl_beta"] == value_head.KL_START and critic.log["kl"] != 0


@pytest.mark.parametrize("name", ["ast_match", "dataflow_match"])
def test_the_match_with_gold_matters(tmp_path, quick, whole, monkeypatch, name):
    on = theta(whole("ppocoder"))
    monkeypatch.setattr(value_head, name, lambda code, gold: len(code) % 5 / 4)
    trained(tmp_path / "off", quick, "ppocoder")
    assert on != theta(tmp_path / "off")


def test_the_drift_from_the_start_matters(tmp_path, quick, whole, monkeypatch):
    rows = metrics(whole("ppocoder"))
    assert abs(rows[0]["kl"]) < 1e-4 < max(abs(row["kl"]) for row in rows[1:])
    assert rows[0]["kl_beta"] > rows[-1]["kl_beta"]  # far below the target
    monkeypatch.setattr(value_head, "KL_START", 0.0)
    trained(tmp_path / "off", quick, "ppocoder")
    assert theta(whole("ppocoder")) != theta(tmp_path / "off")


# ---- both critics


@pytest.mark.parametrize("arm", CRITICS)
def test_a_critic_learns_what_it_is_shown_and_leaves_theta_alone(tiny_policy, profile, arm):
    critic, episodes = critic_for(tiny_policy, profile, arm), batch_of(tiny_policy)
    losses = [critic.examples(episodes, {"t/0": 0}) and critic.log["loss_critic"] for _ in range(60)]
    assert losses[-1] < 0.6 * losses[0]
    assert all(p.grad is None for p in tiny_policy.model.parameters())


@pytest.mark.parametrize("arm", CRITICS)
def test_a_critics_credit_does_not_depend_on_micro_batches_and_is_zero_for_tasks_of_others(tiny_policy, profile, arm):
    found = []
    for tokens in (4096, 1):
        critic = critic_for(tiny_policy, profile, arm, tokens, blank=False)
        found.append(([x.advantages for x in critic.examples(batch_of(tiny_policy), {"t/0": 0})], critic.head.weight.detach()))
    for one, other in zip(found[0][0], found[1][0], strict=True):
        assert one == pytest.approx(other, abs=1e-5)
    assert torch.allclose(found[0][1], found[1][1], atol=1e-6)
    critic = critic_for(tiny_policy, profile, arm)
    assert all(x.task == -1 and not any(x.advantages) for x in critic.examples(batch_of(tiny_policy), {}))


@pytest.mark.parametrize("arm", CRITICS)
def test_a_batch_without_any_verdict_teaches_a_critic_nothing(tiny_policy, profile, arm):
    critic = critic_for(tiny_policy, profile, arm)
    assert critic.examples([episode(tiny_policy, [5], "infra_error")], {"t/0": 0}) == []
    assert critic.log["loss_critic"] is None and critic.tokens == 0 and not critic.head.weight.any()


def test_states_are_the_models_own_before_and_after_each_token(tiny_policy, profile):
    batch = collate(tiny_policy, [Example("def f", (5, 6, 7)), Example("x", (8,))])
    for shared in (True, False):
        found = states_of(tiny_policy, batch, override(profile, {"train.shared_prefix": shared}))
        ids = torch.tensor([[*tiny_policy.encode("def f"), 5, 6, 7]])
        with torch.no_grad():
            states = tiny_policy.model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0, -4:]
        assert found.shape[:2] == (2, 4)
        assert torch.allclose(found[0], torch.nn.functional.layer_norm(states, states.shape[-1:]), atol=1e-4)


# ---- likeness of programs

GOLD = "def f(a, b):\n    c = a + b\n    return c\n"


def test_a_program_is_like_itself_and_names_do_not_count():
    renamed = "def g(x, y):\n    z = x + y\n    return z\n"
    for match in (ast_match, dataflow_match):
        assert match(GOLD, GOLD) == match(renamed, GOLD) == 1.0
        assert match("def f(a, b:", GOLD) == match(GOLD, "not python (") == match("", GOLD) == 0.0
    assert dataflow_match(GOLD, "x = 1\n") == 0.0  # no edges to match


def test_data_flow_sees_where_values_come_from_and_syntax_does_not():
    wrong = "def f(a, b):\n    c = a + a\n    return c\n"
    assert ast_match(wrong, GOLD) == 1.0
    assert dataflow_match(wrong, GOLD) == pytest.approx(2 / 3)  # c <- a and return <- c, not c <- b
    assert dataflow_match("def f(a, b):\n    c = len(a)\n    return c\n", "def f(a, b):\n    c = sum(a)\n    return c\n") < 1
    half = "def f(a, b):\n    return a + b\n"
    assert 0 < ast_match(half, GOLD) < 1


@pytest.mark.parametrize("code", ["x = " + "(" * 5000 + ")" * 5000, "x = " + "1+" * 5000 + "1", "\0", "x = '\ud800'"])
def test_hostile_programs_are_unlike_anything(code):
    assert ast_match(code, GOLD) == 0.0 and 0.0 <= dataflow_match(code, GOLD) <= 1.0


# ---- GRPO at equal time


def test_a_budget_in_tokens_ends_the_run_with_the_step_that_spends_it(tmp_path, quick):
    four = [row["trained_tokens"] for row in trained(tmp_path / "four", quick, "grpo")]
    run = make_run(
        tmp_path,
        override(quick, {"train.budget": "trained_tokens", "train.steps": 1, "train.checkpoint_every": 9}),
        ScriptedSandbox(),
        "grpo-time",
    )
    run.budget = four[2] - 0.5
    run.run(progress=False)
    assert [row["trained_tokens"] for row in metrics(tmp_path)] == four[:3]  # more steps than train.steps, and no fourth
    again = make_run(tmp_path, run.profile, ScriptedSandbox(), "grpo-time")
    again.budget = run.budget
    again.run(progress=False)
    assert len(metrics(tmp_path)) == 3 and checkpoint.existing(tmp_path / "checkpoints")[-1].name == "step-000003"


def test_a_budget_in_seconds_counts_the_steps_alone(tmp_path, quick):
    run = make_run(tmp_path, quick, ScriptedSandbox(), "grpo-time")
    ticks = count()
    run.conductor.clock = lambda: float(next(ticks))
    run.budget = 20.0
    run.run(progress=False)
    seconds = [json.loads(line)["total"] for line in (tmp_path / "timings.jsonl").read_text().splitlines()]
    assert sum(seconds[:-1]) < 20 <= sum(seconds) and len(seconds) > 1


def test_what_a_run_spent_is_read_from_its_folder(tmp_path):
    with pytest.raises(FalconError, match="no finished run"):
        spent_by(tmp_path, "wall_s")
    (tmp_path / "budget.json").write_text('{"trained_tokens": 7}')
    (tmp_path / "timings.jsonl").write_text('{"step": 1, "total": 2.5}\n{"step": 2, "total": 3.0}\n')
    assert spent_by(tmp_path, "trained_tokens") == 7 and spent_by(tmp_path, "wall_s") == 5.5


def test_grpo_time_runs_after_falcon_and_as_long(tmp_path, monkeypatch):
    from falconlib import sandbox, training

    smoke = load_profile("smoke", {"train.budget": "trained_tokens", "sample.max_new_tokens": 96})
    monkeypatch.setattr(sandbox, "Sandbox", lambda *_: contextlib.nullcontext(ScriptedSandbox()))
    adapter = tmp_path / "sft-s0" / "adapter"
    training.run_arm(smoke, "sft", 0, tmp_path / "sft-s0", progress=False)
    with pytest.raises(FalconError, match="no finished run"):
        training.run_arm(smoke, "grpo-time", 0, tmp_path / "grpo-time-s0", adapter, progress=False)
    training.run_arm(smoke, "falcon", 0, tmp_path / "falcon-s0", adapter, progress=False)
    training.run_arm(smoke, "grpo-time", 0, tmp_path / "grpo-time-s0", adapter, progress=False)
    spent = [json.loads((tmp_path / f / "budget.json").read_text()) for f in ("falcon-s0", "grpo-time-s0")]
    assert spent[0].keys() == spent[1].keys() and spent[1]["trained_tokens"] >= spent[0]["trained_tokens"]
    steps = steps_of(GRAPH, load_profile("smoke", {"arms": ["falcon", "grpo-time"]}))
    assert "train/falcon-s0" in next(s for s in steps if s.arm == "grpo-time").needs


def test_an_unknown_arm_to_equal_is_an_error(profile):
    with pytest.raises(FalconError, match="unknown arm"):
        override(profile, {"train.budget_of": "falcom"})


def test_what_a_critic_learns_from_counts_as_trained(tmp_path, profile):
    run = make_run(tmp_path, profile, ScriptedSandbox(), "ppocoder")
    assert run.step(1)["trained_tokens"] == 2 * run.critic.tokens > 0  # once for the policy, once for the head
