"""From episodes with rewards to examples with token-level advantages; the equations themselves are in `rewards`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from falconlib import rewards
from falconlib.config import Profile
from falconlib.records import Episode, Feedback
from falconlib.training.batches import Example

RETURNS = (-1.0, -0.6, -0.3, 1.0)  # [CodeRL] does not parse, runtime error (time and memory too), fails a test, passes
OUTCOMES = {"syntax_error": 0, "runtime_error": 1, "timeout": 1, "memory": 1, "fail": 2, "pass": 3}
GREEDY = "greedy"  # the group of CodeRL's baseline episodes: they are compared with, and not learnt from


def sequence_advantages(episodes: Sequence[Episode], kind: str) -> list[float | None]:
    """a_i per episode, None where the reward is unknown or has nothing to be compared with.

    The comparison is among the episodes of the same task: "loo" subtracts the mean of the others, "critic" is CodeRL's (see
    `above_greedy`), "group" is GRPO's (R - mean) / std; what "gae" makes of the group is up to the value head.
    """
    advantages: list[float | None] = [None] * len(episodes)
    for task_id in dict.fromkeys(e.task_id for e in episodes):
        members = [i for i, e in enumerate(episodes) if e.task_id == task_id]
        totals = [r.total if r else None for r in (episodes[i].reward for i in members)]
        if kind == "critic":
            centred = above_greedy([episodes[i] for i in members])
        else:
            centred = rewards.leave_one_out(totals) if kind == "loo" else rewards.group_normalised(totals)
        for i, a in zip(members, centred, strict=True):
            advantages[i] = a
    return advantages


def outcome(feedback: Feedback | None) -> int | None:
    """u, the index into RETURNS of how a program ended; None without a verdict."""
    return OUTCOMES.get(feedback.status) if feedback is not None else None


def above_greedy(episodes: Sequence[Episode]) -> list[float | None]:
    """CodeRL: r(u_i) - r(u of the greedy episode), one per episode of one task; None for the greedy one, and where an outcome
    is unknown."""
    ends = [outcome(e.feedback) for e in episodes]
    baseline = next((u for u, e in zip(ends, episodes, strict=True) if e.group == GREEDY), None)
    return [
        None if e.group == GREEDY or u is None or baseline is None else RETURNS[u] - RETURNS[baseline]
        for u, e in zip(ends, episodes, strict=True)
    ]


def scored(
    episodes: Sequence[Episode], profile: Profile, kind: str = "loo", index: Mapping[str, int] = MappingProxyType({})
) -> list[Example]:
    """One example per episode with a known advantage, A_it = (a_i - rho_f m_it) / max(std_batch(a), floor).

    index: task id -> row of the fast weights (-1 when it is not there).
    Without short-term memory the error-line term is off as well: the lines come from it.
    """
    advantages = sequence_advantages(episodes, kind)
    spread = 1.0 if kind == "group" else standard_deviation([a for a in advantages if a is not None])
    rho_f = profile.reward.rho_f if profile.short_term.enabled else 0.0
    floor = 1.0 if kind == "group" else profile.reward.std_floor
    found = []
    for e, a in zip(episodes, advantages, strict=True):
        failed = e.feedback is not None and e.feedback.status != "pass"
        mask = (e.error_mask if rho_f else ()) or (0,) * len(e.tokens)  # off means off: no clamp of marked tokens either
        token_level = rewards.token_advantages(a, mask, failed, rho_f, max(spread, floor))
        if token_level:
            found.append(Example(e.prompt, e.tokens, index.get(e.task_id, -1), 1.0, token_level, e.logprobs))
    return found


def standard_deviation(values: Sequence[float]) -> float:
    """Population standard deviation, 0 for fewer than two values."""
    if len(values) < 2:
        return 0.0
    mean = sum(values) / len(values)
    return math.sqrt(sum((v - mean) ** 2 for v in values) / len(values))
