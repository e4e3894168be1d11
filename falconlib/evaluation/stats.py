"""Estimates with their uncertainty: unbiased pass@k, bootstrap over seeds and problems, score intervals, Holm.

Matrices are [seeds, problems] with values in [0, 1] and no gaps: the caller leaves out problems without a verdict.
A percentile bootstrap cannot see beyond its data (0 of 16 gives [0, 0]), so plain counts get Wilson's interval instead.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from falconlib.errors import FalconError

LEVEL, POWER = 0.95, 0.8  # of every interval; of the tests that `detectable` speaks of
CHUNK = 2_000_000  # numbers drawn at a time: bounds the memory of a bootstrap


@dataclass(frozen=True)
class Interval:
    """An estimate with its interval. method: "wilson", "bootstrap" (problems), "bootstrap-seeds" (seeds, then problems),
    "newcombe" (difference of two Wilson intervals). p: two-sided p-value of a difference against 0, else None. se: standard
    error of a difference, over the draws or from the interval's width."""

    value: float
    low: float
    high: float
    method: str
    p: float | None = None
    se: float | None = None


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased pass@k = 1 - C(n - c, k) / C(n, k) for c passes in n samples (Chen et al. 2021), as a stable product.

    Raises FalconError unless 0 <= c <= n and 1 <= k <= n: fewer samples than k have no unbiased estimate.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise FalconError(f"pass@{k} of {c} passes in {n} samples: 0 <= passes <= samples and 1 <= k <= samples are expected")
    if n - c < k:
        return 1.0
    return 1.0 - float(np.prod(1.0 - k / np.arange(n - c + 1, n + 1)))


def wilson(passes: float, n: int) -> tuple[float, float]:
    """Wilson's score interval for a share of n: honest at 0 of n and n of n. (0, 1) for n = 0."""
    if n == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.5 + LEVEL / 2)
    p, shrink = passes / n, 1 + z * z / n
    middle = (p + z * z / (2 * n)) / shrink
    half = z / shrink * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    return (0.0 if passes == 0 else max(0.0, middle - half)), (1.0 if passes == n else min(1.0, middle + half))


def interval(matrix: Any, draws: int, rng: np.random.Generator) -> Interval:
    """Mean of a [seeds, problems] matrix with its interval.

    One seed of plain outcomes (0 or 1), and a matrix whose bootstrap has no width: Wilson with n = problems (seeds are
    no further problems). Else the bootstrap. Raises FalconError for an empty matrix, gaps, or values outside [0, 1].
    """
    data = checked(matrix)
    value, problems = float(data.mean()), data.shape[1]
    if not (len(data) == 1 and np.isin(data, (0, 1)).all()):
        low, high = bootstrap_interval(data, draws, rng)
        if low < high:
            return Interval(value, low, high, "bootstrap" if len(data) == 1 else "bootstrap-seeds")
    return Interval(value, *wilson(value * problems, problems), "wilson")


def bootstrap_interval(matrix: Any, draws: int, rng: np.random.Generator) -> tuple[float, float]:
    """Percentile interval of the mean: each draw takes seeds and problems with replacement; problems only for one seed.

    All seeds of a draw meet the same problems: every seed was scored on one problem set, so its luck is shared.
    """
    data = checked(matrix)
    means = np.concatenate([draw_means(data, part, rng) for part in chunks(data.shape[1], draws)])
    return quantiles(np.clip(means, 0, 1))


def paired_difference(a: Any, b: Any, draws: int, rng: np.random.Generator) -> Interval:
    """mean(a) - mean(b) of two [seeds, problems] matrices over the same problems, in the same order.

    Each draw takes one set of problems for both (they are paired) and seeds of each arm by itself (they are not).
    p = 2 min(P(d <= 0), P(d >= 0)) over the draws, counting one more draw on each side; for one seed of plain outcomes
    McNemar's exact p. When no draw differs from the
    others, Newcombe's interval from the two Wilson intervals, without p. Raises FalconError as `interval` does, and when
    the numbers of problems differ.
    """
    one, two = checked(a), checked(b)
    if one.shape[1] != two.shape[1]:
        raise FalconError(f"{one.shape[1]} problems against {two.shape[1]}: a paired difference needs the same problems")
    parts = []
    for part in chunks(one.shape[1], draws):
        problems = rng.integers(one.shape[1], size=(part, one.shape[1]))
        parts.append(draw_means(one, part, rng, problems) - draw_means(two, part, rng, problems))
    differences = np.concatenate(parts)
    value = float(one.mean() - two.mean())
    low, high = quantiles(differences)
    if low == high:
        n = one.shape[1]
        marks = [(float(m.mean()), *wilson(float(m.mean()) * n, n)) for m in (one, two)]
        low, high = newcombe(*marks)
        return Interval(value, low, high, "newcombe", None, (high - low) / 2 / NormalDist().inv_cdf(0.5 + LEVEL / 2))
    single, se = len(one) == len(two) == 1, float(differences.std())
    if single and np.isin([one, two], (0, 1)).all():
        return Interval(value, low, high, "bootstrap", mcnemar(one[0], two[0]), se)
    sides = [int((differences <= 0).sum()), int((differences >= 0).sum())]
    p = min(1.0, 2 * (min(sides) + 1) / (draws + 1))
    return Interval(value, low, high, "bootstrap" if single else "bootstrap-seeds", p, se)


def detectable(se: float | None, comparisons: int = 1) -> float | None:
    """The smallest true difference that a two-sided test finds with POWER: (z_(1 - a/2m) + z_POWER) * se, a = 1 - LEVEL.

    m: comparisons that share the error; the first step of Holm's procedure is the hardest, and it is the one meant here.
    None for an unknown standard error (of a comparison that was not made).
    """
    z = NormalDist().inv_cdf
    return None if se is None else (z(1 - (1 - LEVEL) / 2 / comparisons) + z(POWER)) * se


def mcnemar(a: np.ndarray, b: np.ndarray) -> float:
    """Exact two-sided p of two paired rows of outcomes (0 or 1): the problems on which they differ are fair coin tosses.

    A bootstrap of a handful of discordant problems is far too bold: 4 to 0 of 16 gives 0.02 where this gives 0.125.
    """
    wins, losses = int((a > b).sum()), int((a < b).sum())
    tosses = wins + losses
    return min(1.0, 2 * sum(math.comb(tosses, i) for i in range(min(wins, losses) + 1)) / 2**tosses)


def newcombe(a: tuple[float, float, float], b: tuple[float, float, float]) -> tuple[float, float]:
    """Interval of a - b from two (value, low, high), taken as independent (Newcombe 1998, method 10)."""
    (x, x_low, x_high), (y, y_low, y_high) = a, b
    low = x - y - ((x - x_low) ** 2 + (y_high - y) ** 2) ** 0.5
    high = x - y + ((x_high - x) ** 2 + (y - y_low) ** 2) ** 0.5
    return low, high


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p-values, in the order given: reject below alpha, whatever depends on what."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, running = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = running
    return adjusted


def checked(matrix: Any) -> np.ndarray:
    """The matrix as float64 [seeds, problems]. Raises FalconError for an empty one, gaps, or values outside [0, 1]."""
    data = np.asarray(matrix, dtype=np.float64)
    if data.ndim != 2 or data.size == 0:
        raise FalconError(f"scores of shape {data.shape}: a filled [seeds, problems] matrix is expected")
    if not ((data >= 0) & (data <= 1)).all():
        raise FalconError("scores outside [0, 1] or missing (NaN)", "leave out problems without a verdict, and count them")
    return data


def chunks(problems: int, draws: int) -> list[int]:
    """`draws` cut into parts that draw at most CHUNK numbers each. Raises FalconError for no draws."""
    if draws < 1:
        raise FalconError(f"{draws} bootstrap draws: at least 1 is expected")
    size = max(1, CHUNK // problems)
    return [min(size, draws - start) for start in range(0, draws, size)]


def draw_means(data: np.ndarray, draws: int, rng: np.random.Generator, problems: np.ndarray | None = None) -> np.ndarray:
    """Means [draws] of the matrix over drawn seeds and drawn problems (`problems` [draws, P]; drawn here when None).

    S drawn seeds vary (S - 1)/S as much as new seeds would: at 3 seeds two equal arms then differ "significantly" in 10 % of
    all cases (simulated) instead of 5 %. So the seeds' distance from their mean is stretched by sqrt(S / (S - 1)) first.
    """
    seeds, count = data.shape
    if problems is None:
        problems = rng.integers(count, size=(draws, count))
    if seeds == 1:
        return data[0][problems].mean(axis=1)
    middle = data.mean(axis=0)
    data = middle + (data - middle) * (seeds / (seeds - 1)) ** 0.5
    weights = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=draws) / seeds
    return np.take_along_axis(weights @ data, problems, axis=1).mean(axis=1)


def quantiles(values: np.ndarray) -> tuple[float, float]:
    """The central LEVEL of the values."""
    low, high = np.quantile(values, [0.5 - LEVEL / 2, 0.5 + LEVEL / 2])
    return float(low), float(high)
