"""One row of metrics per outer step, from the step's episodes. No clock values: the same seed gives the same bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from falconlib.config import Profile
from falconlib.records import INFRA_ERROR, Episode, Reward
from falconlib.rewards import shares
from falconlib.training.advantages import sequence_advantages
from falconlib.watch import watch

COMPONENTS = ("unit", "style", "complexity", "instruction", "long_term")
UNKNOWN = Reward(None)


def step_metrics(
    support: Sequence[Episode],
    query: Sequence[Episode],
    inner_norms: Sequence[float],
    memory_effect: float | None,
    outer: dict[str, Any],
    profile: Profile,
) -> dict[str, Any]:
    """Means over the step's episodes; None where nothing is known.

    inner_gain: mean R_unit of query rollouts minus that of plain support rollouts (memory text would mix in its own
    effect). zero_variance: share of half-groups whose advantages all vanish. infra_errors: verdicts that are unknown.
    unjudged: programs that load but lack an AI score that was asked for. share_*: see rewards.shares; of arms whose advantage
    is a comparison of rewards. duplicates, visible_gap, addressed: see falconlib/watch.py.
    """
    episodes = [*support, *query]
    rewards, verdicts = [e.reward or UNKNOWN for e in episodes], [e.feedback for e in episodes if e.feedback is not None]
    row: dict[str, Any] = {
        "reward": mean([r.total for r in rewards]),
        "pass_rate": mean(
            [float(f.status == "pass") if r.unit is not None else None for r, f in zip(rewards, verdicts, strict=True)]
        ),
    }
    row |= {f"reward_{name}": mean([getattr(r, name) for r in rewards]) for name in COMPONENTS}
    row |= {
        "reward_std": spread(units(episodes)),
        "zero_variance": zero_variance([support, query], profile.train.advantage),
        "length": mean([float(len(e.tokens)) for e in episodes]),
        "truncated": mean([float(not e.finished) for e in episodes]),
        "inner_gain": difference(units(query), units([e for e in support if not e.memory_text])),
        "inner_norm": mean(inner_norms),
        "memory_effect": memory_effect,
        "memory_prompts": sum(bool(e.memory_text) for e in episodes),
        "infra_errors": sum(f.status == INFRA_ERROR for f in verdicts),
        "unjudged": sum(
            profile.reward.ai and f.loaded and None in (r.style, r.complexity, r.instruction)
            for r, f in zip(rewards, verdicts, strict=True)
        ),
        "errors": dict(sorted(Counter(f.error_class or f.status for f in verdicts).items())),
    }
    if profile.train.advantage in ("loo", "group"):
        rho_f = profile.reward.rho_f if profile.short_term.enabled else 0.0
        row |= shares([by_task([support]), by_task([query])], profile.reward, rho_f, profile.train.advantage)
    return row | watch(episodes) | outer


def units(episodes: Sequence[Episode]) -> list[float | None]:
    """R_unit of each episode."""
    return [(e.reward or UNKNOWN).unit for e in episodes]


def mean(values: Sequence[float | None]) -> float | None:
    """Mean of the known values, None when there is none."""
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None


def spread(values: Sequence[float | None]) -> float | None:
    """Population standard deviation of the known values."""
    known = [v for v in values if v is not None]
    return (sum((v - sum(known) / len(known)) ** 2 for v in known) / len(known)) ** 0.5 if known else None


def difference(a: Sequence[float | None], b: Sequence[float | None]) -> float | None:
    """mean(a) - mean(b), None when one of them has no known value."""
    first, second = mean(a), mean(b)
    return None if first is None or second is None else first - second


def zero_variance(halves: Sequence[Sequence[Episode]], kind: str) -> float | None:
    """Share of (half, task) groups in which every advantage is 0 or unknown: they teach nothing."""
    flat = [not any(a for a in sequence_advantages(group, kind)) for group in by_task(halves)]
    return sum(flat) / len(flat) if flat else None


def by_task(halves: Sequence[Sequence[Episode]]) -> list[list[Episode]]:
    """The (half, task) groups, within which rewards are compared."""
    return [[e for e in half if e.task_id == t] for half in halves for t in dict.fromkeys(e.task_id for e in half)]
