"""The reward equations and token advantages of METHOD section 3. Pure functions; None is "unknown" and stays None.

Nothing here runs, judges or remembers. Sums are exact (math.fsum), so the order of a group does not move a bit.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import replace
from statistics import pstdev, stdev

from falconlib.config import RewardConfig
from falconlib.errors import FalconError, did_you_mean
from falconlib.records import INFRA_ERROR, STATUSES, Episode, Feedback, Reward

TEST_SCALE = 4.3  # [ours] with m tests a unit step is 1.3 / m: judge terms must stay below it, 0.29 * 4.3 / m < 1.3 / m
EPS = 1e-4  # added to GRPO's standard deviation, as TRL has it
JUDGED = ("style", "complexity", "instruction")


def unit_reward(feedback: Feedback) -> float | None:
    """R_unit = 1 for a pass | -0.3 + 1.3 rho for failed tests | -0.6 runtime error, time-out, memory | -1 does not parse.

    In [-1, 1]; None when the harness broke or rho is unknown. [RLTF, CodeRL] Raises FalconError for an unknown status, and for
    a failure with rho outside [0, 1): it would be worth a pass.
    """
    if feedback.status == INFRA_ERROR:
        return None
    if feedback.status not in STATUSES:
        raise did_you_mean("status", feedback.status, (*STATUSES, INFRA_ERROR))
    if feedback.status == "fail":
        rho = feedback.pass_ratio
        if rho is not None and not 0 <= rho < 1:
            raise FalconError(
                f"a failed program with pass ratio {rho!r}: at least 0 and below 1 is expected", "see feedback.pass_ratio"
            )
        return None if rho is None else -0.3 + 1.3 * rho
    return {"pass": 1.0, "syntax_error": -1.0}.get(feedback.status, -0.6)


def ai_reward(score: int | None) -> float | None:
    """R_k = (score - 0.5) / 1.5 in [-1, 1] for a score in {-1, 0, 1, 2}; None for a missing answer. [paper: rubric]"""
    if score is None:
        return None
    if score not in (-1, 0, 1, 2):
        raise FalconError(f"judge score {score!r}: -1, 0, 1, 2 or None is expected", "a judge must not invent grades")
    return (score - 0.5) / 1.5


def long_term_reward(feedback: Feedback, frequent_errors: Collection[str] | None) -> float | None:
    """R_lt = -1 when the program fails with an error class that is frequent among the nearest tasks in memory, else 0.

    None without a memory (frequent_errors is None) or without a verdict. [ours]
    """
    if frequent_errors is None or feedback.status == INFRA_ERROR:
        return None
    return -1.0 if feedback.status != "pass" and feedback.error_class in frequent_errors else 0.0


def compose(feedback: Feedback, frequent_errors: Collection[str] | None, config: RewardConfig) -> Reward:
    """R_i = R_unit + min(1, 4.3 / m) * (sum_k w_k R_k + w_lt R_lt), an absent component counting 0; m tests.

    With weights that a profile may have (2 (w_s + w_c + w_i) + w_lt < 0.3) no combination of judge terms and R_lt reverses the
    order of R_unit. A weight of 0 switches its component off, config.ai = False all R_k; the component is reported all the
    same. total is None when R_unit is.
    """
    unit, scores = unit_reward(feedback), feedback.scores
    style, complexity, instruction = ai_reward(scores.style), ai_reward(scores.complexity), ai_reward(scores.instruction)
    reward = Reward(unit, style, complexity, instruction, long_term_reward(feedback, frequent_errors), unit)
    extra = math.fsum(weight * (getattr(reward, name) or 0.0) for name, weight in weights(config).items())
    return reward if unit is None else replace(reward, total=unit + scale_of(feedback) * extra)


def weights(config: RewardConfig) -> dict[str, float]:
    """What each component but the tests is multiplied with, before `scale_of`; 0 for one that is switched off."""
    return {k: config.ai * getattr(config, f"w_{k}") for k in JUDGED} | {"long_term": config.w_long_term}


def scale_of(feedback: Feedback) -> float:
    """min(1, 4.3 / m) for m tests."""
    return min(1.0, TEST_SCALE / max(feedback.tests, 1))


def shares(
    halves: Sequence[Sequence[Sequence[Episode]]], config: RewardConfig, rho_f: float, kind: str = "loo"
) -> dict[str, float | None]:
    """Share of unit, judge (its three terms together), long_term and line in what moves the policy; they sum to 1.

    A part's size is the sum over all tokens of its absolute summand in A_it, as L_outer weighs them: a half counts K / G over its
    tokens. a_i is linear in R_i once its scale is known, so each component is centred by itself. Left out is the clamp of
    failed lines. None where nothing moves.
    halves: support and query, each as its groups: scored episodes of one task each. rho_f: as in
    `token_advantages`. kind: "loo", all of a half on one scale, or "group", each group on its own and the line on none.
    """
    sizes = dict.fromkeys(("unit", "judge", "long_term", "line"), 0.0)
    weight, parts = weights(config) | {"unit": 1.0}, {"unit": ("unit",), "judge": JUDGED, "long_term": ("long_term",)}
    for half in halves:
        known = [
            [
                (e, e.reward, e.reward.total, scale_of(e.feedback))
                for e in g
                if e.reward and e.feedback and e.reward.total is not None
            ]
            for g in half
        ]
        groups = [group for group in known if len(group) > 1]
        centred = [a for group in groups for a in leave_one_out([total for _, _, total, _ in group]) if a is not None]
        tokens = sum(len(e.tokens) for group in groups for e, *_ in group)
        spread = max(pstdev(centred), config.std_floor) if kind == "loo" and centred else 1.0
        unit = sum(map(len, half)) / (tokens * spread) if tokens else 0.0  # K; the G of all halves is the same
        for group in groups:
            n = len(group)
            own = 1.0 if kind == "loo" else (1 - 1 / n) / (stdev(total for _, _, total, _ in group) + EPS)
            for part, names in parts.items():
                summands = [sum(weight[k] * (getattr(r, k) or 0.0) for k in names) for _, r, *_ in group]
                if part != "unit":
                    summands = [scale * x for (*_, scale), x in zip(group, summands, strict=True)]
                alone = leave_one_out([x - summands[0] for x in summands])  # equal ones: exactly 0
                moved = sum(abs(a or 0.0) * len(e.tokens) for (e, *_), a in zip(group, alone, strict=True))
                sizes[part] += unit * own * moved
            sizes["line"] += unit * rho_f * sum(sum(e.error_mask) for e, *_ in group)
    whole = math.fsum(sizes.values())
    return {f"share_{part}": size / whole if whole else None for part, size in sizes.items()}


def components(config: RewardConfig) -> list[dict[str, object]]:
    """The parts of the reward, one row each: component, low and high (its range), gate (when it is known at all), weight,
    switch (the setting that turns it off). The line term is the last row: it acts on tokens, not on R_i."""
    judged = "the program loads and the judge answers"
    rows: list[tuple[str, float, float, str, float, str]] = [("unit", -1.0, 1.0, "the sandbox has a verdict", 1.0, "none")]
    for name in JUDGED:
        rows.append((name, -1.0, 1.0, judged, weights(config)[name], f"reward.w_{name} = 0; all three: reward.ai = false"))
    remembers = "long-term memory is on and the sandbox has a verdict"
    rows.append(("long_term", -1.0, 0.0, remembers, config.w_long_term, "reward.w_long_term = 0"))
    rows.append(("line", -1.0, 0.0, "tokens of the error's line, or all if it is global", config.rho_f, "reward.rho_f = 0"))
    return [dict(zip(("component", "low", "high", "gate", "weight", "switch"), row, strict=True)) for row in rows]


def leave_one_out(totals: Sequence[float | None]) -> list[float | None]:
    """a_i = R_i - mean of the other known members of the half-group; all None with fewer than two known.

    The a_i of a half-group sum to zero.
    """
    known = [total for total in totals if total is not None]
    if len(known) < 2:
        return [None] * len(totals)
    whole = math.fsum(known)
    return [None if total is None else total - (whole - total) / (len(known) - 1) for total in totals]


def group_normalised(totals: Sequence[float | None], eps: float = EPS) -> list[float | None]:
    """GRPO: a_i = (R_i - mean) / (std + eps) over the known members, std with Bessel's correction (as TRL has it);
    all None with fewer than two known."""
    known = [total for total in totals if total is not None]
    if len(known) < 2:
        return [None] * len(totals)
    mean = math.fsum(known) / len(known)
    std = math.sqrt(math.fsum((total - mean) ** 2 for total in known) / (len(known) - 1))
    return [None if total is None else (total - mean) / (std + eps) for total in totals]


def token_advantages(a: float | None, mask: Sequence[int], failed: bool, rho_f: float, scale: float) -> tuple[float, ...] | None:
    """A_it = (a_i - rho_f m_it) / scale; where the program failed and m_it = 1: min(A_it, 0). One per token.

    a: a_i of the episode; None (skipped half-group, unknown reward) gives None. mask: m_it, one 0/1 per token.
    scale: max(std_batch(a), RewardConfig.std_floor). Raises FalconError unless scale is above 0.
    """
    if a is None:
        return None
    if not scale > 0:
        raise FalconError(f"advantage scale {scale!r}: above 0 is expected", "use max(standard deviation, reward.std_floor)")
    plain, marked = a / scale, (a - rho_f) / scale
    marked = min(marked, 0.0) if failed else marked
    return tuple(marked if m else plain for m in mask)
