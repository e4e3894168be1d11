"""Paired differences between arms: pairing, what is left out and counted, and the judge's scale."""

from __future__ import annotations

import pytest

from falconlib.evaluation.score import Sample
from falconlib.records import INFRA_ERROR, Scores
from falconlib.reporting.pairs import PASSES, SCORES, pass_differences, score_differences


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
    assert row["ci_low"] == 0 and row["ci_high"] > 0.25  # the second arm solves nothing that the first does not
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
