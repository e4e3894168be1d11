"""Samples -> verdicts -> rows: nothing invented, nothing lost, same bytes."""

import json
from dataclasses import replace

import pytest

from falconlib.config import EvalConfig, SandboxConfig
from falconlib.errors import FalconError
from falconlib.evaluation import (
    Sample,
    compare_rows,
    evaluation_card,
    in_short,
    load_samples,
    save_samples,
    score,
    score_samples,
    summarise,
)
from falconlib.judge import StaticJudge
from falconlib.records import INFRA_ERROR, Report, Scores, Task, TestResult
from falconlib.sandbox import Sandbox

TASKS = [Task(f"t/{i}", "toy", "test", "One.", "one", ("assert one() == 1",)) for i in range(4)]
GOOD = "def one():\n    return 1\n"


class FakeSandbox:
    """Verdicts by what the program's text says."""

    def run_many(self, programs, progress=False):
        return [self.verdict(code) for code in programs]

    @staticmethod
    def verdict(code):
        if "return 1" in code:
            return Report("pass", (TestResult(0, 0, "pass"),), 1, loaded=True)
        status = {"loop": "timeout", "harness": INFRA_ERROR, "(": "syntax_error"}.get(code, "fail")
        return Report(status, (), 1, loaded=status == "fail")


@pytest.fixture
def sandbox(monkeypatch):
    monkeypatch.setattr(score, "program_for", lambda task, code: code)
    return FakeSandbox()


def sample(task=0, index=0, code=GOOD, **more):
    return Sample(f"t/{task}", "toy", index, code + "```", code, **more)


def scored(statuses, greedy=False, benchmark="toy"):
    """One scored sample per status; statuses is a list (problems) of texts (samples): p pass, f fail, t timeout, ? none."""
    names = {"p": "pass", "f": "fail", "t": "timeout", "?": INFRA_ERROR}
    return [
        Sample(f"{benchmark}/{i}", benchmark, j, "", "", greedy, status=names[s])
        for i, row in enumerate(statuses)
        for j, s in enumerate(row)
    ]


def test_score_samples(sandbox):
    codes = [GOOD, "wrong", "loop", "harness", "("]
    found = score_samples(TASKS, [sample(0, i, code) for i, code in enumerate(codes)], sandbox)
    assert [s.status for s in found] == ["pass", "fail", "timeout", INFRA_ERROR, "syntax_error"]
    assert [s.pass_ratio for s in found] == [1.0, 0.0, 0.0, None, 0.0]
    assert [s.index for s in found] == [0, 1, 2, 3, 4] and all(s.scores == Scores() for s in found)
    assert score_samples(TASKS, [], sandbox) == []


def test_the_judge_sees_programs_that_load_and_no_others(sandbox):
    class Judge(StaticJudge):
        seen = ()

        def score_many(self, pairs):
            self.seen = [(task.task_id, code) for task, code in pairs]
            return super().score_many(pairs)

    judge = Judge()
    found = score_samples(TASKS, [sample(1), sample(2, code="("), sample(3, code="wrong")], sandbox, judge)
    assert judge.seen == [("t/1", GOOD), ("t/3", "wrong")]
    assert [s.scores.instruction for s in found] == [2, None, -1]


def test_a_sample_of_another_task_set_is_refused(sandbox):
    with pytest.raises(FalconError, match="'t/9', which is not among the 4 tasks"):
        score_samples(TASKS, [sample(0), sample(9)], sandbox)


def test_real_sandbox():
    """The same with real programs."""
    codes = [GOOD, "def one():\n    return 2\n", "def one(:", "raise ValueError"]
    with Sandbox(SandboxConfig(workers=1)) as sandbox:
        found = score_samples(TASKS, [sample(i, code=code) for i, code in enumerate(codes)], sandbox, StaticJudge())
    assert [s.status for s in found] == ["pass", "fail", "syntax_error", "runtime_error"]
    assert [s.error_class for s in found] == ["", "fail", "SyntaxError", "ValueError"]
    assert found[0].scores == Scores(2, 2, 2) and found[2].scores == found[3].scores == Scores()


def test_samples_are_kept_to_the_byte(tmp_path):
    samples = [
        sample(0, greedy=True, tokens=7, status="pass", pass_ratio=1 / 3, scores=Scores(2, None, -1)),
        sample(1, code="é漢😀\r\n\t\x00"),
    ]
    a, b = save_samples(tmp_path / "a.jsonl.gz", samples), save_samples(tmp_path / "deep" / "b.jsonl.gz", samples)
    assert a.read_bytes() == b.read_bytes() and load_samples(a) == samples
    assert a.read_bytes()[4:8] == bytes(4)  # gzip's time stamp


def test_broken_sample_files_are_named(tmp_path):
    path = save_samples(tmp_path / "a.jsonl.gz", [sample()])
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(FalconError, match=r"a\.jsonl\.gz"):
        load_samples(path)
    with pytest.raises(FalconError, match=r"none\.jsonl\.gz"):
        load_samples(tmp_path / "none.jsonl.gz")
    (tmp_path / "b.jsonl").write_text('{"task_id": "t/1"}\n')
    with pytest.raises(FalconError, match="Sample"):
        load_samples(tmp_path / "b.jsonl")


def row(rows, metric, benchmark="toy"):
    return next(r for r in rows if r["metric"] == metric and r["benchmark"] == benchmark)


def test_summarise_worked_example():
    samples = [*scored(["pf", "ff", "pp", "tf"]), *scored(["p", "f", "p", "t"], greedy=True)]
    rows = summarise([samples], ks=(1, 2), draws=500)
    assert [r["metric"] for r in rows] == ["greedy", "pass@1", "pass@2"]
    greedy, one, two = rows
    assert (greedy["value"], greedy["n"], greedy["completions"], greedy["timeouts"]) == (0.5, 4, 4, 1)
    assert (one["value"], two["value"]) == (0.375, 0.5)
    assert (one["n"], one["completions"], one["timeouts"], one["unknown"], one["seeds"]) == (4, 8, 1, 0, 1)
    assert greedy["interval"] == "wilson" and one["interval"] == "bootstrap"
    assert all(r["ci_low"] < r["value"] < r["ci_high"] for r in rows)
    assert rows == summarise([samples], ks=(1, 2), draws=500)
    json.dumps(rows)


def test_no_verdict_is_neither_pass_nor_failure():
    rows = summarise([scored(["p?", "??", "f?"])], ks=(1, 2), draws=100)
    one = row(rows, "pass@1")
    assert (one["value"], one["n"], one["unknown"], one["completions"]) == (0.5, 2, 4, 6)
    assert len(rows) == 1  # no problem has two verdicts
    assert summarise([scored(["?"], greedy=True)]) == [] == summarise([]) == summarise([[]])


def test_nothing_solved_is_not_certainly_nothing():
    greedy = row(summarise([scored(["f"] * 16, greedy=True)]), "greedy")
    assert (greedy["value"], greedy["ci_low"]) == (0.0, 0.0) and greedy["ci_high"] == pytest.approx(0.1936, abs=1e-4)


def test_seeds_and_benchmarks_are_kept_apart():
    runs = [
        [*scored(["p", "f", "f"], True), *scored(["p", "p"], True, "other")],
        [*scored(["p", "p", "f"], True), *scored(["p", "?"], True, "other")],
    ]
    rows = summarise(runs, draws=200)
    assert (row(rows, "greedy")["value"], row(rows, "greedy")["seeds"]) == (0.5, 2)
    assert row(rows, "greedy")["interval"] == "bootstrap-seeds"
    assert (row(rows, "greedy", "other")["n"], row(rows, "greedy", "other")["unknown"]) == (1, 1)
    shuffled = [list(reversed(run)) for run in runs]
    assert {r["benchmark"]: r["value"] for r in summarise(shuffled, draws=200)} == {r["benchmark"]: r["value"] for r in rows}


def test_unscored_samples_and_unlike_seeds_are_refused():
    with pytest.raises(FalconError, match="no verdict"):
        summarise([[sample()]])
    with pytest.raises(FalconError, match="'toy/1' is not in all"):
        summarise([scored(["p", "f"], True), scored(["p"], True)])


def test_evaluation_card():
    tasks = [*TASKS, replace(TASKS[0], dataset="other")]
    card = evaluation_card(
        tasks, EvalConfig(samples=2), SandboxConfig(), model="tiny", mode="zero-shot", seeds=(0, 1), layers={"fake": "on"},
        judge=StaticJudge(),
    )  # fmt: skip
    assert json.dumps(card) and card["seeds"] == [0, 1]
    assert card["benchmarks"]["toy"]["tasks"] == 4 and card["decoding"]["samples"] == 2 and card["judge"] == StaticJudge().version
    assert card["benchmarks"]["toy"]["fingerprint"] != card["benchmarks"]["other"]["fingerprint"] and card["memory"] is None


def table(value, low, high, **more):
    return {"benchmark": "toy", "mode": "zero-shot", "arm": "falcon", "metric": "greedy"} | {
        "value": value, "ci_low": low, "ci_high": high, **more
    }  # fmt: skip


@pytest.mark.parametrize(
    "b, verdict",
    [
        ((0.5, 0.4, 0.6), "within"),
        ((0.6, 0.5, 0.7), "within"),
        ((0.9, 0.8, 0.95), "outside"),
        (("0.1", "0.05", "0.2"), "outside"),
    ],
)
def test_compare_rows(b, verdict):
    (found,) = compare_rows([table(0.5, 0.4, 0.6)], [table(*b)])
    assert found["verdict"] == verdict and found["difference"] == pytest.approx(float(b[0]) - 0.5)
    assert found["low"] < found["difference"] < found["high"]
    (back,) = compare_rows([table(*b)], [table(0.5, 0.4, 0.6)])
    assert back["verdict"] == verdict and back["difference"] == -found["difference"]


def test_compare_rows_without_counterpart_or_number():
    a, b = [table(0.5, 0.4, 0.6), table(0.5, 0.4, 0.6, arm="grpo")], [table("", "", "")]
    found = compare_rows(a, b + [table(0.5, 0.4, 0.6, arm="rltf")])
    assert [r["verdict"] for r in found] == ["unknown", "only in A", "only in B"]
    assert all(r["difference"] is None for r in found)
    with pytest.raises(FalconError, match="twice"):
        compare_rows([a[0], a[0]], b)
    with pytest.raises(FalconError, match="could not convert"):
        compare_rows([table("n/a", 0, 1)], b)
    for value in ("nan", "1.7", "-0.1", "inf"):
        with pytest.raises(FalconError, match=r"lie in \[0, 1\]"):
            compare_rows([table(value, 0, 1)], b)


@pytest.mark.parametrize(
    "status, ends, hidden",
    [
        ("fail", ("fail", "pass", "pass"), True),
        ("pass", ("pass", "pass", "pass"), True),
        ("fail", ("pass", "pass", "fail"), False),
        ("fail", ("fail", "pass"), False),
        ("timeout", ("pass", "pass", "pass"), False),
        (INFRA_ERROR, (), None),
    ],
)
def test_hidden_tests_are_judged_by_themselves(status, ends, hidden):
    task = Task("t", "toy", "test", "One.", "one", ("a", "b", "c"), visible=1)
    report = Report(status, tuple(TestResult(i, i, end, i == 0) for i, end in enumerate(ends)), 3, loaded=True)
    assert score.passed_hidden(task, status, report) is hidden
    assert score.passed_hidden(replace(task, visible=3), status, report) is None, "nothing is hidden"


def test_a_refused_pass_has_no_hidden_pass_either():
    task = Task("t", "toy", "test", "One.", "one", ("a", "b"), visible=1)
    assert score.passed_hidden(task, "fail", Report(INFRA_ERROR)) is False


def test_compare_says_how_many_rows_chance_puts_outside():
    rows = [{"verdict": v} for v in ["within"] * 18 + ["outside"] * 2 + ["only in A", "unknown"]]
    assert in_short(rows) == "2 of 20 rows outside the expected range; chance alone explains about 1.0; 2 rows not comparable"
    assert in_short(rows[-2:]) == "nothing to compare: no row is in both runs with its interval"
