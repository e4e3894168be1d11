"""The reward equations: worked values, and the properties that make them safe to train on."""

import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from falconlib.config import Profile, RewardConfig, override, validate
from falconlib.errors import FalconError
from falconlib.records import INFRA_ERROR, Episode, Feedback, Reward, Scores
from falconlib.rewards import (
    ai_reward,
    components,
    compose,
    group_normalised,
    leave_one_out,
    long_term_reward,
    shares,
    token_advantages,
    unit_reward,
)
from falconlib.training import arms

CONFIG = RewardConfig()
GRADES = st.sampled_from([None, -1, 0, 1, 2])
TOTALS = st.lists(st.none() | st.floats(-2, 2, allow_subnormal=False), max_size=12)


def feedback(status, ratio=0.0, tests=3, error="", scores=Scores()):  # noqa: B008
    return Feedback(status, ratio, tests, error_class=error, scores=scores)


@pytest.mark.parametrize(
    "status, ratio, value",
    [
        ("pass", 1.0, 1.0),
        ("pass", None, 1.0),
        ("fail", 0.0, -0.3),
        ("fail", 0.5, 0.35),
        ("fail", None, None),
        ("runtime_error", 0.9, -0.6),
        ("timeout", 0.9, -0.6),
        ("memory", 0.9, -0.6),
        ("syntax_error", 0.0, -1.0),
        (INFRA_ERROR, None, None),
    ],
)
def test_unit_reward(status, ratio, value):
    assert unit_reward(feedback(status, ratio)) == (value if value is None else pytest.approx(value))


def test_unknown_statuses_and_grades_are_refused():
    with pytest.raises(FalconError, match="unknown status 'passed'"):
        unit_reward(feedback("passed"))
    for score in (3, -2, 0.5):
        with pytest.raises(FalconError, match="judge score"):
            ai_reward(score)


@pytest.mark.parametrize("ratio", [1.0, 1.5, -0.1, float("nan")])
def test_a_failure_is_never_worth_a_pass(ratio):
    with pytest.raises(FalconError, match="failed program with pass ratio"):
        unit_reward(feedback("fail", ratio))


def test_ai_reward_is_the_rubric_on_minus_one_to_one():
    assert [ai_reward(s) for s in (-1, 0, 1, 2)] == [-1.0, pytest.approx(-1 / 3), pytest.approx(1 / 3), 1.0]
    assert ai_reward(None) is None


def test_long_term_reward():
    wrong = feedback("runtime_error", error="IndexError")
    assert long_term_reward(wrong, {"IndexError"}) == -1.0
    assert long_term_reward(wrong, {"KeyError"}) == 0.0
    assert long_term_reward(wrong, None) is None
    assert long_term_reward(feedback("pass"), {"", "IndexError"}) == 0.0
    assert long_term_reward(feedback(INFRA_ERROR, error=INFRA_ERROR), {INFRA_ERROR}) is None


def test_compose_worked_example():
    """Two of three hidden tests, style 2, complexity 0, no instruction score, a frequent error; 3 tests, so scale 1."""
    reward = compose(feedback("fail", 2 / 3, 3, "fail", Scores(2, 0, None)), {"fail"}, CONFIG)
    unit, judged = -0.3 + 1.3 * 2 / 3, 0.04 - 0.04 / 3
    expected = Reward(pytest.approx(unit), 1.0, pytest.approx(-1 / 3), None, -1.0, pytest.approx(unit + judged - 0.05))
    assert reward == expected
    many = compose(feedback("fail", 2 / 3, 43, "fail", Scores(2, 0, None)), {"fail"}, CONFIG)
    assert many.total - many.unit == pytest.approx((reward.total - reward.unit) / 10)


def classes(tests):
    """Every unit outcome that a task with so many tests can have, of which `hidden` count for rho: (status, rho)."""
    for hidden in range(1, tests + 1):
        yield [("syntax_error", 0.0), ("runtime_error", 0.0), *[("fail", i / hidden) for i in range(hidden)], ("pass", 1.0)]


@pytest.mark.parametrize("tests", range(1, 51))
def test_no_combination_of_judge_terms_reverses_the_unit_order(tests):
    """Best judged against worst judged, for every pair of neighbouring classes: ordered pairs then follow."""
    best, worst = Scores(2, 2, 2), Scores(-1, -1, -1)
    for outcomes in classes(tests):
        for (low, rho_low), (high, rho_high) in itertools.pairwise(outcomes):
            praised = compose(feedback(low, rho_low, tests, "E", best), set(), CONFIG)
            blamed = compose(feedback(high, rho_high, tests, "E", worst), {"E"}, CONFIG)
            assert praised.unit < blamed.unit and praised.total < blamed.total


@given(st.integers(1, 50), st.data())
def test_order_holds_for_any_scores(tests, data):
    outcomes = data.draw(st.sampled_from(list(classes(tests))))
    (i, j) = sorted(data.draw(st.lists(st.integers(0, len(outcomes) - 1), min_size=2, max_size=2, unique=True)))
    totals = []
    for status, rho in (outcomes[i], outcomes[j]):
        scores = Scores(*(data.draw(GRADES) for _ in range(3)))
        frequent = data.draw(st.sampled_from([None, frozenset(), frozenset({"E"})]))
        totals.append(compose(feedback(status, rho, tests, "E", scores), frequent, CONFIG).total)
    assert totals[0] < totals[1]


def test_twice_the_weights_would_reverse_it():
    """The property above is tight enough to be worth testing."""
    heavy = replace(CONFIG, w_style=0.08, w_complexity=0.08, w_instruction=0.08)
    praised = compose(feedback("runtime_error", 0, 3, "E", Scores(2, 2, 2)), set(), heavy)
    blamed = compose(feedback("fail", 0, 3, "E", Scores(-1, -1, -1)), {"E"}, heavy)
    assert praised.unit < blamed.unit and praised.total > blamed.total


@given(GRADES, GRADES, GRADES, st.integers(0, 50), st.floats(0, 1, exclude_max=True))
def test_weight_zero_changes_nothing(style, complexity, instruction, tests, ratio):
    f = feedback("fail", ratio, tests, "E", Scores(style, complexity, instruction))
    off = replace(CONFIG, w_style=0.0, w_complexity=0.0, w_instruction=0.0, w_long_term=0.0)
    assert compose(f, {"E"}, off).total == unit_reward(f)
    for name in ("style", "complexity", "instruction"):
        absent = replace(f, scores=replace(f.scores, **{name: None}))
        one_off = replace(CONFIG, **{f"w_{name}": 0.0})
        assert compose(f, {"E"}, one_off).total == compose(absent, {"E"}, one_off).total == compose(absent, {"E"}, CONFIG).total
    assert compose(f, {"E"}, replace(CONFIG, w_long_term=0.0)).total == compose(f, None, CONFIG).total


def test_the_table_of_components_is_true():
    """Ranges by trying everything, switches by setting them: then only that component's effect is gone."""
    table = {row["component"]: row for row in components(CONFIG)}
    everything = [
        compose(feedback(status, ratio, 3, "E", Scores(a, b, c)), known, CONFIG)
        for status in ("pass", "fail", "timeout", "syntax_error")
        for ratio in (0.0, 0.5, 0.99)
        for a, b, c in itertools.product((None, -1, 0, 1, 2), repeat=3)
        for known in (None, set(), {"E"})
    ]
    for name in ("unit", "style", "complexity", "instruction", "long_term"):
        values = [value for reward in everything if (value := getattr(reward, name)) is not None]
        assert (min(values), max(values)) == (table[name]["low"], table[name]["high"]), name
    loved = feedback("runtime_error", 0.0, 3, "E", Scores(2, 2, 2))
    for name in ("style", "complexity", "instruction", "long_term"):
        setting, value = table[name]["switch"].split(";")[0].removeprefix("reward.").split(" = ")
        on, off = (compose(loved, {"E"}, config) for config in (CONFIG, replace(CONFIG, **{setting: float(value)})))
        assert on.total - off.total == pytest.approx(table[name]["weight"] * getattr(on, name)) and on.total != off.total
    on, off = (token_advantages(0.5, (1,), False, rho, 1.0)[0] for rho in (table["line"]["weight"], 0.0))
    assert on - off == pytest.approx(table["line"]["low"] * CONFIG.rho_f)


def test_one_switch_turns_ai_feedback_off():
    """reward.ai = false is the same as three weights of 0, in the sum, in the table, and in the arm that is made of it."""
    scored = feedback("fail", 0.5, 3, "E", Scores(2, -1, 2))
    zero = replace(CONFIG, w_style=0.0, w_complexity=0.0, w_instruction=0.0)
    off = replace(CONFIG, ai=False)
    assert compose(scored, {"E"}, off) == compose(scored, {"E"}, zero) != compose(scored, {"E"}, CONFIG)
    assert [row["weight"] for row in components(off)] == [row["weight"] for row in components(zero)]
    assert all("reward.ai = false" in row["switch"] for row in components(CONFIG)[1:4])
    assert arms.configure(Profile(), "falcon-ai", 0).reward == off
    assert arms.configure(Profile(), "falcon", 0).reward == CONFIG


@pytest.mark.parametrize("name", ["w_style", "w_complexity", "w_instruction", "w_long_term", "rho_f", "line_cap", "std_floor"])
def test_settings_out_of_range_are_refused(name):
    with pytest.raises(FalconError, match=f"reward.{name}"):
        override(Profile(), {f"reward.{name}": -0.01})
    if name in ("rho_f", "line_cap"):
        with pytest.raises(FalconError, match=f"reward.{name}"):
            override(Profile(), {f"reward.{name}": 1.01})


def test_weights_that_reverse_the_order_of_the_tests_are_refused_and_no_others():
    """The bound that a profile must keep is the one at which `compose` reverses an order."""
    for weight, good in ((0.0415, True), (0.0417, False)):
        weights = {f"w_{name}": weight for name in ("style", "complexity", "instruction")}
        heavy = replace(CONFIG, **weights)
        praised = compose(feedback("runtime_error", 0, 3, "E", Scores(2, 2, 2)), set(), heavy)
        blamed = compose(feedback("fail", 0, 3, "E", Scores(-1, -1, -1)), {"E"}, heavy)
        assert (praised.total < blamed.total) == good
        if good:
            validate(replace(Profile(), reward=heavy))
        else:
            with pytest.raises(FalconError, match=r"tests lose to style"):
                validate(replace(Profile(), reward=heavy))
            validate(replace(Profile(), reward=replace(heavy, ai=False)))


def test_none_propagates():
    broken = compose(feedback(INFRA_ERROR, None, 3, INFRA_ERROR, Scores(2, 2, 2)), {INFRA_ERROR}, CONFIG)
    assert broken.unit is None and broken.total is None
    assert compose(feedback("fail", None, 3, scores=Scores(2, 2, 2)), set(), CONFIG).total is None
    assert compose(feedback("pass", 1.0), None, CONFIG) == Reward(1.0, None, None, None, None, 1.0)
    assert leave_one_out([None, 1.0, 0.0])[0] is None and group_normalised([None, 1.0, 0.0])[0] is None
    assert token_advantages(None, (0, 1), True, 0.3, 1.0) is None


def test_leave_one_out():
    assert leave_one_out([1.0, 0.0, -1.0, None]) == [1.5, 0.0, -1.5, None]
    for few in ([], [1.0], [None, None], [None, 1.0]):
        assert leave_one_out(few) == [None] * len(few) == group_normalised(few)


def test_group_normalised_is_grpo():
    numpy = pytest.importorskip("numpy")
    totals = [1.0, -0.3, 0.35, -0.6]
    expected = (numpy.array(totals) - numpy.mean(totals)) / (numpy.std(totals, ddof=1) + 1e-4)
    assert group_normalised(totals) == pytest.approx(expected.tolist())
    assert group_normalised([0.5, 0.5, None]) == [0.0, 0.0, None]


@pytest.mark.parametrize("advantages", [leave_one_out, group_normalised])
@given(totals=TOTALS, order=st.randoms(use_true_random=False))
def test_permuting_a_group_permutes_its_advantages(advantages, totals, order):
    places = list(range(len(totals)))
    order.shuffle(places)
    plain = advantages(totals)
    assert advantages([totals[i] for i in places]) == [plain[i] for i in places]  # to the last bit


@pytest.mark.parametrize("advantages", [leave_one_out, group_normalised])
@given(totals=TOTALS)
def test_advantages_sum_to_zero(advantages, totals):
    found = advantages(totals)
    assert [a is None for a in found] == [t is None or sum(u is not None for u in totals) < 2 for t in totals]
    assert sum(a for a in found if a is not None) == pytest.approx(0, abs=1e-9)


def test_token_advantages():
    assert token_advantages(0.5, (0, 1, 0), True, 0.3, 0.25) == (2.0, 0.0, 2.0)  # an error is never rewarded
    assert token_advantages(0.5, (0, 1), False, 0.3, 0.25) == (2.0, pytest.approx(0.8))
    assert token_advantages(-0.5, (0, 1), True, 0.3, 1.0) == (-0.5, -0.8)
    assert token_advantages(-0.5, (0, 1), True, 0.0, 1.0) == (-0.5, -0.5)
    assert token_advantages(0.5, (), True, 0.3, 1.0) == ()
    for scale in (0.0, -1.0, float("nan")):
        with pytest.raises(FalconError, match="above 0"):
            token_advantages(0.5, (0,), True, 0.3, scale)


@given(st.floats(-3, 3), st.lists(st.integers(0, 1), max_size=20), st.booleans(), st.floats(0, 1), st.floats(0.25, 3))
def test_the_line_term_only_ever_lowers_its_own_tokens(a, mask, failed, rho_f, scale):
    for m, value in zip(mask, token_advantages(a, mask, failed, rho_f, scale), strict=True):
        assert value == a / scale if m == 0 else value <= a / scale
        assert not (m and failed and value > 0)


def scored(status, ratio, scores=Scores(), tokens=4, mask=(), error="", frequent=()):  # noqa: B008
    f = feedback(status, ratio, 3, error, scores)
    made = Episode("t", 1, 0, "support", "", "", "", tokens=tuple(range(tokens)), feedback=f, error_mask=mask)
    return replace(made, reward=compose(f, frequent, CONFIG))


def test_shares_of_the_gradient_worked_example():
    """Two programs, 4 tokens each: a pass with the worst style, a failure (0 of 2) with the best, whose error memory knows and of
    which one token is marked. |a_unit| = 1.3, |a_judge| = 0.04 * 2, |a_lt| = 0.05 on all 8 tokens, the line 0.3 on one."""
    pair = [scored("pass", 1.0, Scores(style=-1)), scored("fail", 0.0, Scores(style=2), 4, (0, 1, 0, 0), "E", {"E"})]
    sizes = {"share_unit": 1.3 * 8, "share_judge": 0.08 * 8, "share_long_term": 0.05 * 8, "share_line": 0.3}
    whole = sum(sizes.values())
    assert shares([[pair]], CONFIG, 0.3) == {name: pytest.approx(size / whole) for name, size in sizes.items()}
    assert shares([[pair, pair]], CONFIG, 0.3) == shares([[pair]], CONFIG, 0.3)
    off = shares([[pair]], replace(CONFIG, ai=False, w_long_term=0.0), 0.0)
    assert off == {"share_unit": 1.0, "share_judge": 0.0, "share_long_term": 0.0, "share_line": 0.0}


def test_shares_of_groups_that_teach_only_by_the_judge():
    """Where no program passes, the small terms steer: their share says so."""
    equal = [scored("fail", 0.0, Scores(style=s)) for s in (-1, 0, 2)]
    assert shares([[equal]], CONFIG, 0.3)["share_judge"] == pytest.approx(1)
    nothing = dict.fromkeys(("share_unit", "share_judge", "share_long_term", "share_line"))
    assert shares([[]], CONFIG, 0.3) == shares([[equal[:1]]], CONFIG, 0.3) == shares([[equal[:1] * 3]], CONFIG, 0.3) == nothing
    unknown = scored(INFRA_ERROR, None)
    assert shares([[[unknown, *equal]]], CONFIG, 0.3) == shares([[equal]], CONFIG, 0.3)


BEST, WORST = Scores(2, 2, 2), Scores(-1, -1, -1)


def test_shares_weigh_each_half_by_its_own_scale_and_tokens():
    """Support: one task, a = +-1.3 by the tests alone, 100 tokens each, on the scale of their deviation 1.3: 1 a token.
    Query: two tasks, a = +-0.24 by the judge alone, 10 tokens each, on the floor 0.25: 0.96 a token. K is 2 and 4 of 6."""
    support = [[scored("pass", 1.0, BEST, 100), scored("fail", 0.0, BEST, 100)]]
    query = [[scored("fail", 0.0, BEST, 10), scored("fail", 0.0, WORST, 10)]] * 2
    assert CONFIG.std_floor == 0.25
    found = shares([support, query], CONFIG, 0.3)
    assert found["share_unit"] == pytest.approx(2 / (2 + 4 * 0.96)) and found["share_judge"] == pytest.approx(
        1 - found["share_unit"]
    )


def test_shares_of_normalised_groups_do_not_depend_on_their_size():
    """Two members: (R - mean) / std is 1 / sqrt(2) whatever lies between them; the line's 0.3 is on no scale."""
    tests = [scored("pass", 1.0, BEST, 10), scored("fail", 0.0, BEST, 20, (1,) + (0,) * 19)]
    judge = [scored("fail", 0.0, BEST, 10), scored("fail", 0.0, WORST, 10)]
    found, whole = shares([[tests, judge]], CONFIG, 0.3, "group"), 50 / 2**0.5 + 0.3
    assert found["share_unit"] == pytest.approx(30 / 2**0.5 / whole, rel=1e-3)
    assert found["share_judge"] == pytest.approx(20 / 2**0.5 / whole, rel=1e-3)
    assert found["share_line"] == pytest.approx(0.3 / whole, rel=1e-3)


@given(st.lists(st.tuples(st.sampled_from(["pass", "fail", "timeout"]), GRADES, st.integers(1, 5)), max_size=8))
def test_shares_sum_to_one(members):
    group = [scored(status, 0.5, Scores(style=grade), n, (1,) * n, "E", {"E"}) for status, grade, n in members]
    for kind in ("loo", "group"):
        found = shares([[group], [group[:3]]], CONFIG, 0.3, kind)
        assert set(found.values()) == {None} or sum(found.values()) == pytest.approx(1)
