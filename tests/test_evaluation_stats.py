"""The estimators against exact answers, and the intervals against simulations in which the truth is known."""

import math
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from falconlib.errors import FalconError
from falconlib.evaluation import stats
from falconlib.evaluation.stats import bootstrap_interval, holm, interval, newcombe, paired_difference, pass_at_k, tango, wilson


def rng(seed=0):
    return np.random.default_rng(seed)


@given(st.integers(1, 60), st.data())
def test_pass_at_k_is_exact(n, data):
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    assert pass_at_k(n, c, k) == pytest.approx(float(1 - Fraction(math.comb(n - c, k), math.comb(n, k))), abs=1e-12)


def test_pass_at_k_edges():
    assert pass_at_k(10, 0, 5) == 0.0 and pass_at_k(10, 10, 5) == 1.0 and pass_at_k(10, 6, 5) == 1.0
    assert pass_at_k(10, 3, 1) == pytest.approx(0.3)
    assert pass_at_k(100_000, 1, 1) == pytest.approx(1e-5)  # factorials of this size would overflow
    for n, c, k in [(4, 1, 5), (0, 0, 1), (5, 6, 1), (5, -1, 1), (5, 1, 0)]:
        with pytest.raises(FalconError, match=f"pass@{k}"):
            pass_at_k(n, c, k)


def test_pass_at_k_is_unbiased():
    """Mean over many draws of n = 6 samples with p = 0.2 meets the true 1 - (1 - p)^3."""
    passes = rng().binomial(6, 0.2, size=20_000)
    assert np.mean([pass_at_k(6, int(c), 3) for c in passes]) == pytest.approx(1 - 0.8**3, abs=0.01)


def test_wilson():
    """Textbook values, and the ends that a bootstrap gets wrong."""
    assert wilson(0, 16) == (0.0, pytest.approx(0.1936, abs=1e-4))
    assert wilson(16, 16) == (pytest.approx(0.8064, abs=1e-4), 1.0)
    assert wilson(8, 16) == (pytest.approx(0.2800, abs=1e-4), pytest.approx(0.7200, abs=1e-4))
    assert wilson(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.parametrize("seeds", [1, 3])
def test_sixteen_equal_outcomes_do_not_give_certainty(value, seeds):
    found = interval(np.full((seeds, 16), value), 200, rng())
    assert found.value == value and found.method == "wilson" and found.high - found.low == pytest.approx(0.1936, abs=1e-4)


def test_the_method_follows_the_data():
    assert interval([[0, 1, 1, 0]], 100, rng()).method == "wilson"
    assert interval([[0.1, 0.9, 0.5, 0.0]], 100, rng()).method == "bootstrap"
    assert interval([[0, 1, 1, 0], [0, 1, 0, 0]], 100, rng()).method == "bootstrap-seeds"
    assert interval([[0.5] * 8], 100, rng()) == stats.Interval(0.5, *wilson(4, 8), "wilson")


def test_bootstrap_is_reproducible_whatever_the_chunks(monkeypatch):
    data = rng(1).random((3, 20))
    first = bootstrap_interval(data, 2000, rng())
    assert first == bootstrap_interval(data, 2000, rng()) != bootstrap_interval(data, 2000, rng(7))
    low, high = first
    assert low < data.mean() < high
    monkeypatch.setattr(stats, "CHUNK", 20 * 300)
    assert bootstrap_interval(data, 2000, rng()) == pytest.approx(first, abs=0.02)


def test_one_seed_bootstrap_meets_the_normal_theory():
    data = rng(2).random((1, 400))
    low, high = bootstrap_interval(data, 4000, rng())
    half = 1.96 * data.std() / 20
    assert (low, high) == (pytest.approx(data.mean() - half, abs=0.003), pytest.approx(data.mean() + half, abs=0.003))


def simulate(number, problems=40, seeds=5, spread=0.08):
    """Scores with a problem effect (shared by the seeds), a seed effect and noise; the expected mean is 0.5."""
    r = rng(number)
    return np.clip(
        0.5 + r.normal(0, 0.15, (1, problems)) + r.normal(0, spread, (seeds, 1)) + r.normal(0, 0.05, (seeds, problems)), 0, 1
    )


def coverage(bounds):
    return np.mean([low <= 0.5 <= high for low, high in bounds])


def test_hierarchical_intervals_cover_the_truth_where_problem_only_ones_do_not():
    runs = [simulate(i) for i in range(300)]
    hierarchical = coverage(bootstrap_interval(m, 400, rng(i)) for i, m in enumerate(runs))
    problems_only = coverage(bootstrap_interval(m.mean(0, keepdims=True), 400, rng(i)) for i, m in enumerate(runs))
    assert hierarchical > 0.88 > 0.8 > problems_only, (hierarchical, problems_only)


def test_paired_difference_is_zero_for_equal_arms_in_95_of_100_pairs():
    pairs = [(simulate(2 * i), simulate(2 * i + 1)) for i in range(200)]
    found = [paired_difference(a, b, 400, rng(i)) for i, (a, b) in enumerate(pairs)]
    assert np.mean([d.low <= 0 <= d.high for d in found]) > 0.88
    assert np.mean([d.p < 0.05 for d in found]) < 0.12


def test_three_seeds_are_not_taken_for_more_than_they_are():
    """Equal arms, 3 seeds, seeds that differ: a plain bootstrap calls one pair in ten different, this one about one in twenty."""
    found = [paired_difference(simulate(2 * i, seeds=3), simulate(2 * i + 1, seeds=3), 300, rng(i)) for i in range(200)]
    assert np.mean([d.p < 0.05 for d in found]) < 0.09
    low, high = bootstrap_interval([[0] * 10, [0] * 9 + [1]], 400, rng())
    assert low == 0 < high < 1, "stretched seeds do not leave [0, 1]"


def test_pairing_makes_the_interval_narrower():
    easy = np.linspace(0, 0.9, 50)[None]
    paired = paired_difference(easy + 0.05 + 0.05 * rng(3).random((1, 50)), easy, 1000, rng())
    low, high = newcombe(
        (easy.mean(), *bootstrap_interval(easy, 1000, rng())), (easy.mean(), *bootstrap_interval(easy, 1000, rng()))
    )
    assert 0 < paired.low < paired.value < paired.high and paired.p < 0.01
    assert paired.high - paired.low < (high - low) / 4


def test_difference_of_two_blank_arms_is_not_certain():
    nothing = np.zeros((1, 16))
    found = paired_difference(nothing, nothing, 100, rng())
    assert found.value == 0 and found.method == "tango" and found.p == 1.0
    assert (found.low, found.high) == (pytest.approx(-0.1936, abs=1e-4), pytest.approx(0.1936, abs=1e-4))
    seeds = paired_difference(np.full((3, 16), 0.5), np.full((2, 16), 0.25), 100, rng())
    assert seeds.method == "tango" and seeds.p is None and seeds.value == 0.25 and seeds.low == pytest.approx(0.25 - found.high)
    assert paired_difference(np.ones((2, 4)), np.zeros((1, 4)), 100, rng()).high == 1.0


def test_one_method_for_all_paired_outcomes_of_one_seed():
    """A lost problem moves the interval down, it does not cut it off at 0; the sides may change places."""
    ends = [tango(0, losses, 16) for losses in range(17)]
    assert all(low2 < low1 and high2 < high1 for (low1, high1), (low2, high2) in pairwise(ends) if low1 > -1)
    assert ends[0][1] == pytest.approx(wilson(0, 16)[1]) and ends[1][1] > 0.1 and ends[16][0] == -1
    assert [low < 0 < high for low, high in ends[:6]] == [True] * 4 + [False] * 2, "four to none is where 0 leaves it"
    for wins, losses in [(3, 1), (5, 5), (0, 2), (16, 0)]:
        assert tango(wins, losses, 16) == pytest.approx([-end for end in tango(losses, wins, 16)[::-1]])
        one, two = [1] * wins + [0] * (16 - wins), [0] * wins + [1] * losses + [0] * (16 - wins - losses)
        first = paired_difference([one], [two], 9, rng())
        assert (first.low, first.high) == tango(wins, losses, 16) and first.method == "tango"


@pytest.mark.parametrize("wins, losses, n", [(3, 1, 16), (0, 2, 16), (10, 4, 48), (1, 0, 30)])
def test_tango_inverts_the_score_test(wins, losses, n):
    """By brute force: at an end of the interval, with the likeliest shares under that difference, the test stands at 1.96."""
    for d in tango(wins, losses, n):
        q = np.linspace(max(0, -d), (1 - d) / 2, 400_001)[1:-1]  # share of losses; wins have q + d, draws the rest
        draws = n - wins - losses
        q = q[np.argmax(wins * np.log(np.maximum(q + d, 1e-300)) + losses * np.log(q) + draws * np.log(1 - d - 2 * q))]
        assert abs((wins - losses) / n - d) / math.sqrt((2 * q + d - d * d) / n) == pytest.approx(1.96, abs=0.005)


def test_tango_holds_the_truth_in_95_of_100_studies():
    outcomes = rng(1).multinomial(48, (0.12, 0.06, 0.82), size=400)  # wins, losses, as often; the truth is 0.06
    ends = [tango(int(wins), int(losses), 48) for wins, losses, _ in outcomes]
    assert 0.92 < np.mean([low <= 0.06 <= high for low, high in ends]) < 0.98


def test_arms_may_have_different_numbers_of_seeds_but_not_of_problems():
    assert paired_difference(np.ones((3, 5)) * 0.9, rng().random((2, 5)), 100, rng()).method == "bootstrap-seeds"
    with pytest.raises(FalconError, match="5 problems against 4"):
        paired_difference(np.ones((1, 5)), np.ones((1, 4)), 10, rng())


@pytest.mark.parametrize("bad", [[], [[]], [0.5], [[0.5, np.nan]], [[1.5]], [[-0.1]], [[[0.5]]]])
def test_bad_matrices_are_refused(bad):
    with pytest.raises(FalconError):
        interval(bad, 10, rng())


def test_no_draws_are_refused():
    with pytest.raises(FalconError, match="0 bootstrap draws"):
        bootstrap_interval([[0.1, 0.9]], 0, rng())


def test_holm():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == [] and holm([0.2]) == [0.2]


@given(st.lists(st.floats(0, 1), max_size=8))
def test_holm_is_between_no_correction_and_bonferroni(p):
    assert all(x <= y <= min(1, len(p) * x) + 1e-12 for x, y in zip(p, holm(p), strict=True))


@pytest.mark.parametrize("wins, losses, p", [(4, 0, 0.125), (0, 5, 0.0625), (3, 3, 1.0), (6, 0, 0.03125), (1, 0, 1.0)])
def test_few_discordant_problems_of_one_seed_get_the_exact_p(wins, losses, p):
    a = [[1] * wins + [0] * losses + [0] * (16 - wins - losses)]
    b = [[0] * wins + [1] * losses + [0] * (16 - wins - losses)]
    found = paired_difference(a, b, 500, np.random.default_rng(0))
    assert found.p == pytest.approx(p) and found.value == pytest.approx((wins - losses) / 16)
