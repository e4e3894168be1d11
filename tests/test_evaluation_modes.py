"""Test-time modes on the tiny model: only shown tests are run, theta and memory stay, the control only chooses."""

import pytest

from falconlib import config
from falconlib.config import LoraConfig, ModelConfig, Profile
from falconlib.errors import FalconError
from falconlib.evaluation import evaluate, modes
from falconlib.evaluation.evaluate import content_hash, mode_name
from falconlib.evaluation.score import Sample
from falconlib.memory import HashedTfidf, LongTermMemory
from falconlib.policy.models import load_policy
from falconlib.prompts import render
from falconlib.records import Episode, Feedback, Report, Task, TestResult
from falconlib.sandbox import Sandbox
from falconlib.tasks import load_tasks, visible_tests

SMALL = {"model.name": "tiny", "eval.max_new_tokens": 12, "eval.samples": 2, "sample.max_new_tokens": 64}
SMALL |= {"tasks.eval_limit": 2, "model.threads": 1, "sandbox.workers": 1, "inner.support": 2, "train.tasks": 2}
SMALL |= {"inner.alpha": 30.0, "tasks.benchmarks": ("basics",)}


@pytest.fixture(scope="module")
def profile():
    return config.override(Profile(), SMALL)


@pytest.fixture(scope="module")
def policy():
    return load_policy(ModelConfig("tiny", threads=1), LoraConfig(top_layers=0))


@pytest.fixture(scope="module")
def memory(tmp_path_factory):
    path = tmp_path_factory.mktemp("memory") / "memory.sqlite"
    tasks = [t for t in load_tasks("basics", "train") if len(t.gold) < 60]
    with LongTermMemory(path, HashedTfidf()) as store:
        store.add_tasks(tasks)
        store.add_golds(tasks)
    return path


class Spy:
    """A sandbox that notes every test it is handed; programs of even length pass the first test alone."""

    def __init__(self):
        self.calls = []

    def run_many(self, programs, progress=False):
        self.calls.append([p.tests for p in programs])
        return [self.verdict(p) for p in programs]

    @staticmethod
    def verdict(p):
        ends = ["pass" if i == 0 and len(p.code) % 2 == 0 else "fail" for i in range(len(p.tests))]
        tests = tuple(TestResult(i, i, end, i < p.visible) for i, end in enumerate(ends))
        return Report("pass" if set(ends) == {"pass"} else "fail", tests, len(tests), loaded=True)


def texts(samples):
    return [s.completion for s in samples]


@pytest.mark.parametrize("mode, practises", [("+STM adapt", True), ("best-of-K", True), ("+LTM adapt", False)])
def test_only_shown_tests_meet_a_program_before_the_final_score(policy, profile, memory, mode, practises):
    spy, before, theta = Spy(), content_hash(memory), [p.detach().clone() for p in policy.parameters()]
    samples = evaluate.evaluate(policy, profile, 0, spy, mode=mode, memory=memory, progress=False)
    tasks = evaluate.benchmark_tasks(profile, "basics")
    seen = {visible_tests(t) for t in tasks}
    assert len(samples) == 2 * 3 and all(s.status for s in samples)
    *early, last = spy.calls
    assert bool(early) == practises and {tests for call in early for tests in call} <= seen
    assert {tests for tests in last} == {t.tests for t in tasks}
    assert content_hash(memory) == before and all((a == b).all() for a, b in zip(theta, policy.parameters(), strict=True))


def test_adaptation_changes_the_answers_and_the_same_seed_repeats_them(policy, profile, memory):
    def run(mode, seed=0):
        return texts(evaluate.evaluate(policy, profile, seed, Spy(), mode=mode, memory=memory, progress=False))

    plain = run("zero-shot")
    assert run("+LTM adapt") == run("+LTM adapt") != plain
    assert plain != run("zero-shot", seed=1)


def test_a_task_that_shows_no_test_is_answered_as_zero_shot(policy, profile, monkeypatch):
    monkeypatch.setattr(modes, "visible_tests", lambda task: ())
    plain, *others = (
        texts(evaluate.evaluate(policy, profile, 0, Spy(), mode=mode, progress=False))
        for mode in ("zero-shot", "+STM adapt", "best-of-K")
    )
    assert others == [plain, plain]


def test_the_shown_task_has_the_same_prompt_and_no_answer(policy):
    for task in [load_tasks("basics", "test")[0], load_tasks("humaneval")[0]]:
        cut = modes.shown(task)
        assert render(policy.tokenizer, cut) == render(policy.tokenizer, task)
        assert cut.gold is None and cut.tests == visible_tests(task) and cut.tests and set(cut.tests) != set(task.tests)


def test_the_control_takes_a_rollout_only_when_it_passes_more_shown_tests():
    task = Task("t", "toy", "test", "One.", "one", ("assert one() == 1", "assert one() != 2"), visible=1)

    class Tools:
        sandbox = Spy()

    def rollout(text, ratio):
        return Episode("t", 0, 0, "support", "", text, text, (1,), feedback=Feedback("fail", ratio, 1))

    samples = [Sample("t", "toy", i, code, code) for i, code in enumerate(("odd", "even"))]  # "even" passes the shown test
    chosen = modes.best_of(Tools, samples, [task], [[rollout("bad", 0.0), rollout("good", 1.0), rollout("late", 1.0)]])
    assert texts(chosen) == ["good", "even"] and chosen[0].tokens == 1
    assert texts(modes.best_of(Tools, samples, [task], [[rollout("bad", 0.0), rollout("none", None)]])) == ["odd", "even"]
    assert Tools.sandbox.calls == [[task.tests[:1]] * 2] * 2


def test_modes_that_cannot_work_say_why(policy, profile, memory, monkeypatch):
    with pytest.raises(FalconError, match="adapts LoRA weights"):
        evaluate.evaluate(load_policy(ModelConfig("tiny")), profile, 0, Spy(), mode="+LTM adapt", memory=memory)
    with pytest.raises(FalconError, match="needs a long-term memory"):
        evaluate.evaluate(policy, profile, 0, Spy(), mode="+LTM adapt")
    assert [mode_name(m) for m in ("ltm-adapt", "+STM adapt", "LTM", "best-of-k")] == [
        "+LTM adapt",
        "+STM adapt",
        "+LTM",
        "best-of-K",
    ]
    with pytest.raises(FalconError, match="use 'stm-adapt'"):
        mode_name("stm-adap")
    monkeypatch.setattr(modes, "load_tasks", lambda *_: [])
    with pytest.raises(FalconError, match=r"which is not in tasks\.train"):
        evaluate.evaluate(policy, profile, 0, Spy(), mode="+LTM adapt", memory=memory, progress=False)


def test_hidden_asserts_are_scored_apart_in_the_real_sandbox():
    task = Task("t", "toy", "test", "One.", "one", ("assert one() == 1", "assert one() > 0", "assert one() < 9"), visible=1)
    codes = {"def one():\n    return 1\n": True, "def one():\n    return 2\n": True, "def one():\n    return 0\n": False}
    codes |= {"def one(:\n": False}
    samples = [Sample("t", "toy", i, code, code) for i, code in enumerate(codes)]
    with Sandbox(config.SandboxConfig(workers=1)) as sandbox:
        scored = evaluate.score_samples([task], samples, sandbox)
    assert [s.hidden for s in scored] == list(codes.values())
    assert [s.status == "pass" for s in scored] == [True, False, False, False]
