"""Paired differences between arms: pairing, what is left out and counted, and the judge's scale."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from falconlib.evaluation.score import Sample, score_matrix
from falconlib.evaluation.stats import detectable, paired_difference, tango
from falconlib.records import INFRA_ERROR, Scores
from falconlib.reporting.pairs import CONTRASTS, PASSES, PLANNED, SCORES, pass_differences, planned_contrasts, score_differences


def run_of(statuses: str, scores: list[Scores] | None = None) -> list[Sample]:
    """One greedy sample per letter: p(ass), f(ail), u(nknown)."""
    names = {"p": "pass", "f": "fail", "u": INFRA_ERROR}
    given = scores or [Scores()] * len(statuses)
    return [
        Sample(f"t/{i}", "basics", 0, "", "", True, status=names[letter], scores=found)
        for i, (letter, found) in enumerate(zip(statuses, given, strict=True))
    ]


def test_difference_of_four_problems_by_hand():
    frame = pass_differences({"a - b": ([run_of("ppff")], [run_of("pfff")])}, draws=500)
    assert list(frame.columns) == PASSES and len(frame) == 1
    row = frame.iloc[0]
    assert row["difference"] == 0.25 and row["metric"] == "greedy" and row["n"] == 4 and row["dropped"] == 0
    assert (row["ci_low"], row["ci_high"]) == tango(1, 0, 4), "one problem won, none lost, two alike"
    assert row["p_holm"] == row["p"]


def test_a_problem_without_verdict_on_one_side_leaves_both():
    frame = pass_differences({"a - b": ([run_of("uppf")], [run_of("pfff")])}, draws=200)
    row = frame.iloc[0]
    assert row["n"] == 3 and row["dropped"] == 1
    assert row["difference"] == pytest.approx(2 / 3)  # pp f against ff f


def test_holm_counts_every_comparison():
    pair = ([run_of("pppppppf")], [run_of("ffffffff")])
    alone = pass_differences({"a": pair}, draws=200).iloc[0]
    twice = pass_differences({"a": pair, "b": pair}, draws=200)
    assert list(twice["p_holm"]) == pytest.approx([min(1, 2 * alone["p"])] * 2)


def test_two_seeds_against_one():
    frame = pass_differences({"a - b": ([run_of("pp"), run_of("pf")], [run_of("ff")])}, draws=200)
    assert frame.iloc[0]["difference"] == 0.75


def test_scores_are_compared_where_both_sides_were_judged():
    before = run_of("ppff", [Scores(0, 2, 2), Scores(1, 2, 2), Scores(), Scores(2, 2, 2)])
    after = run_of("ppff", [Scores(2, 2, 1), Scores(1, 2, 2), Scores(2, 2, 2), Scores(None, 2, 2)])
    frame = score_differences({"after - before": ([after], [before])}, draws=300).set_index("aspect")
    assert {*frame.reset_index().columns} == {*SCORES}
    style = frame.loc["style"]
    assert (style["before"], style["after"], style["difference"]) == (0.5, 1.5, pytest.approx(1.0))
    assert (style["better"], style["same"], style["worse"], style["n"]) == (1, 1, 0, 2)
    assert (style["not_loaded"], style["unjudged"]) == (1, 1)
    assert frame.loc["instruction", "difference"] == pytest.approx(-1 / 3) and frame.loc["complexity", "same"] == 3


def test_nothing_judged_is_unknown_not_zero():
    frame = score_differences({"x": ([run_of("ff")], [run_of("ff")])})
    assert frame["difference"].isna().all() and frame["p_holm"].isna().all()
    assert (frame["n"] == 0).all() and (frame["not_loaded"] == 4).all()


def sampled(rates, seed, n=10, seeds=3):
    """Runs of n samples per problem with the given true pass rates."""
    r = np.random.default_rng(seed)
    return [
        [
            Sample(f"t/{i}", "basics", j, "", "", status="pass" if r.random() < rate else "fail")
            for i, rate in enumerate(rates)
            for j in range(n)
        ]
        for _ in range(seeds)
    ]


def test_planned_contrasts_find_the_differences_that_are_there():
    """Truth: FALCON is 20 points above GRPO and equal to RLTF; RFT was not run."""
    easy = np.linspace(0.1, 0.7, 40)
    arms = {"falcon": sampled(easy + 0.2, 1), "rltf": sampled(easy + 0.2, 2), "grpo": sampled(easy, 3), "base": sampled(easy, 4)}
    frame = planned_contrasts(arms, ks=(1,), draws=500)
    assert list(frame.columns) == CONTRASTS and frame["comparison"].tolist() == [f"falcon - {arm}" for arm in PLANNED]
    grpo, rltf, rft = (frame.iloc[i] for i in range(3))
    assert grpo["ci_low"] < 0.2 < grpo["ci_high"] and grpo["p_holm"] < 0.05 < rltf["p_holm"]
    assert (grpo["n"], grpo["samples"], grpo["tests"], len(grpo["first_seeds"].split())) == (40, 10, 5, 3)
    assert pd.isna(rft["difference"]) and pd.isna(rft["p_holm"]) and pd.isna(rft["detectable"])
    assert grpo["p_holm"] == pytest.approx(5 * grpo["p"]), "a contrast that was not run still counts"


def test_families_are_the_rows_of_one_metric():
    greedy = [run_of("pppppppf")]
    arms = {"falcon": greedy, "grpo": [run_of("ffffffff")]}
    two = {arm: [[*run, *(replace(s, benchmark="other") for s in run)] for run in runs] for arm, runs in arms.items()}
    assert planned_contrasts(arms, draws=50)["tests"].unique().tolist() == [5]
    assert planned_contrasts(two, draws=50)["tests"].unique().tolist() == [10]
    assert len(planned_contrasts({"grpo": greedy}, draws=50)) == 0, "without FALCON nothing was planned"


def test_a_difference_of_the_detectable_size_is_found_in_about_80_of_100_studies():
    """Power by simulation: 3 seeds, 60 problems, true differences set to what a first study called detectable."""
    easy = np.linspace(0.2, 0.6, 60)

    def study(number, gain):
        arms = {"falcon": sampled(easy + gain, 2 * number), "grpo": sampled(easy, 2 * number + 1)}
        return pass_differences({"x": (arms["falcon"], arms["grpo"])}, ks=(1,), draws=300).iloc[0]

    def se(number):
        first, second = (score_matrix(sampled(easy, 2 * number + i), 1) for i in (0, 1))
        return paired_difference(first, second, 300, np.random.default_rng(0)).se

    gain = detectable(float(np.mean([se(i) for i in range(20)])))
    found = [study(i + 100, gain)["p"] < 0.05 for i in range(60)]
    assert 0.65 < np.mean(found) <= 1.0
    assert detectable(0.01) == pytest.approx(0.028, abs=1e-3) and detectable(None) is None
    assert detectable(0.01, 5) == pytest.approx(0.0342, abs=1e-3), "five tests share the error"
