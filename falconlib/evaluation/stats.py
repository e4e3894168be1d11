"""Estimates with their uncertainty: unbiased pass@k, bootstrap over seeds and problems, score intervals, Holm.

Matrices are [seeds, problems] with values in [0, 1] and no gaps: the caller leaves out problems without a verdict.
A percentile bootstrap cannot see beyond its data (0 of 16 gives [0, 0]), so plain counts get score intervals instead: a
share Wilson's, a paired difference of shares Tango's, which is Wilson's where one side never wins.
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
Z = NormalDist().inv_cdf(0.5 + LEVEL / 2)
CHUNK = 2_000_000  # numbers drawn at a time: bounds the memory of a bootstrap


@dataclass(frozen=True)
class Interval:
    """An estimate with its interval. method: "wilson", "tango" (of plain counts), "bootstrap" (problems), "bootstrap-seeds"
    (seeds, then problems). p: two-sided p-value of a difference against 0, else None. se: standard error of a difference, over
    the draws or from the interval's width."""

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
    p, shrink = passes / n, 1 + Z * Z / n
    middle = (p + Z * Z / (2 * n)) / shrink
    half = Z / shrink * (p * (1 - p) / n + Z * Z / (4 * n * n)) ** 0.5
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

    One seed of plain outcomes (0 or 1): Tango's interval and McNemar's exact p. Else the bootstrap: each draw takes one set
    of problems for both (they are paired) and seeds of each arm by itself (they are not); p = 2 min(P(d <= 0), P(d >= 0)) over
    the draws, counting one more draw on each side. When no draw differs from the others, Tango's interval of as many problems
    that all agree, around the value, without p; se is never smaller than of those: a handful of differing samples does not tell
    how much others would. Raises FalconError as `interval` does, and when the numbers of problems differ.
    """
    one, two = checked(a), checked(b)
    if one.shape[1] != two.shape[1]:
        raise FalconError(f"{one.shape[1]} problems against {two.shape[1]}: a paired difference needs the same problems")
    value, n = float(one.mean() - two.mean()), one.shape[1]
    single = len(one) == len(two) == 1
    if single and np.isin([one, two], (0, 1)).all():
        wins, losses = int((one > two).sum()), int((one < two).sum())
        low, high = tango(wins, losses, n)
        return Interval(value, low, high, "tango", mcnemar(wins, losses), (high - low) / 2 / Z)
    parts = []
    for part in chunks(one.shape[1], draws):
        problems = rng.integers(one.shape[1], size=(part, one.shape[1]))
        parts.append(draw_means(one, part, rng, problems) - draw_means(two, part, rng, problems))
    differences = np.concatenate(parts)
    low, high = quantiles(differences)
    half = tango(0, 0, n)[1]
    if low == high:
        return Interval(value, max(-1.0, value - half), min(1.0, value + half), "tango", None, half / Z)
    sides = [int((differences <= 0).sum()), int((differences >= 0).sum())]
    p = min(1.0, 2 * (min(sides) + 1) / (draws + 1))
    return Interval(value, low, high, "bootstrap" if single else "bootstrap-seeds", p, max(float(differences.std()), half / Z))


def detectable(se: float | None, comparisons: int = 1) -> float | None:
    """The smallest true difference that a two-sided test finds with POWER: (z_(1 - a/2m) + z_POWER) * se, a = 1 - LEVEL.

    m: comparisons that share the error; the first step of Holm's procedure is the hardest, and it is the one meant here.
    None for an unknown standard error (of a comparison that was not made).
    """
    z = NormalDist().inv_cdf
    return None if se is None else (z(1 - (1 - LEVEL) / 2 / comparisons) + z(POWER)) * se


def tango(wins: int, losses: int, n: int) -> tuple[float, float]:
    """Score interval of (wins - losses) / n, a paired difference of shares (Tango 1998): what its test does not reject.

    (0, 0, 16) gives +-0.19, as Wilson's interval of 0 in 16; a bootstrap of one lost problem would end at 0.
    """

    def rejected(d: float) -> bool:
        b = (2 * n - wins + losses) * d - wins - losses
        share = (max(0.0, b * b + 8 * n * losses * d * (1 - d)) ** 0.5 - b) / (4 * n)  # of losses, likeliest under d
        return (wins - losses - n * d) ** 2 > Z * Z * n * (2 * share + d * (1 - d))

    ends = []
    for outside in (-1.0, 1.0):
        inside = (wins - losses) / n
        for _ in range(60):
            middle = (inside + outside) / 2
            inside, outside = (inside, middle) if rejected(middle) else (middle, outside)
        ends.append(inside)
    return ends[0], ends[1]


def mcnemar(wins: int, losses: int) -> float:
    """Exact two-sided p of paired outcomes: the problems on which they differ are fair coin tosses.

    A bootstrap of a handful of discordant problems is far too bold: 4 to 0 of 16 gives 0.02 where this gives 0.125.
    """
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
