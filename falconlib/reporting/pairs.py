"""Two arms on the same problems: paired differences of pass rates and of judge scores, with intervals.

Reads scored samples; runs and judges nothing. A problem enters a comparison only when both sides know it: unknown
verdicts and unjudged programs are left out on both sides and counted.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from falconlib.evaluation.score import Sample, by_seed, score_matrix
from falconlib.evaluation.stats import detectable, holm, paired_difference
from falconlib.records import INFRA_ERROR

if TYPE_CHECKING:
    import pandas as pd

Runs = Sequence[Sequence[Sample]]  # the scored samples of one arm, one list per training seed
ASPECTS = ("style", "complexity", "instruction")
PASSES = ["comparison", "benchmark", "metric", "difference", "ci_low", "ci_high", "p", "p_holm", "n", "dropped"]
PLANNED = ("grpo", "rltf", "rft", "falcon-inner", "falcon-ltm")  # what FALCON is compared with, fixed before the first run
CONTRASTS = ["comparison", "benchmark", "metric", "difference", "ci_low", "ci_high", "p", "p_holm", "tests", "detectable"]
CONTRASTS += ["first_seeds", "second_seeds", "n", "samples", "dropped"]
SCORES = ["comparison", "aspect", "before", "after", "difference", "ci_low", "ci_high", "p", "p_holm", "better", "same", "worse"]
SCORES += ["n", "not_loaded", "unjudged"]


def pass_differences(
    pairs: Mapping[str, tuple[Runs, Runs]], ks: Sequence[int] = (1, 5), draws: int = 10000, seed: int = 0
) -> pd.DataFrame:
    """first - second in pass rate, one row (columns PASSES) per comparison, benchmark and metric ("greedy", "pass@k").

    pairs: name of the comparison -> its two arms. n: problems compared; dropped: those without enough verdicts on both
    sides. p: two-sided, None when no draw differs; p_holm: adjusted for all rows. seed: of the bootstrap.
    """
    rows = [row for name, (one, two) in pairs.items() for row in differences(name, one, two, ks, draws, seed)]
    return adjusted([[row[c] for c in PASSES if c != "p_holm"] for row in rows], [c for c in PASSES if c != "p_holm"], PASSES)


def differences(name: str, one: Runs, two: Runs, ks: Sequence[int], draws: int, seed: int) -> Iterator[dict[str, Any]]:
    """The comparison `name` of two arms, one dict per benchmark and metric: PASSES without p_holm, CONTRASTS, and se."""
    for benchmark in dict.fromkeys(s.benchmark for run in one for s in run):
        for metric, k in [("greedy", 0), *((f"pass@{k}", k) for k in ks)]:
            runs = [[s for s in run if s.benchmark == benchmark and s.greedy == (k == 0)] for run in [*one, *two]]
            kept = decided(runs, max(k, 1))
            if not kept:
                continue
            runs_kept = [[s for s in run if s.task_id in kept] for run in runs]
            first, second = score_matrix(runs_kept[: len(one)], k), score_matrix(runs_kept[len(one) :], k)
            found = paired_difference(first, second, draws, np.random.default_rng(seed))
            yield {
                **{"comparison": name, "benchmark": benchmark, "metric": metric, "difference": found.value},
                **{"ci_low": found.low, "ci_high": found.high, "p": found.p, "se": found.se, "n": len(kept)},
                "dropped": len({s.task_id for run in runs for s in run}) - len(kept),
                "samples": round(len(runs_kept[0]) / len(kept)),
                **{"first_seeds": by_seed(first), "second_seeds": by_seed(second)},
            }


def planned_contrasts(arms: Mapping[str, Runs], ks: Sequence[int] = (1, 5), draws: int = 10000, seed: int = 0) -> pd.DataFrame:
    """FALCON against each arm of PLANNED, one row (columns CONTRASTS) per benchmark and metric, as decided before any run.

    arms: zero-shot runs by arm. All rows of one metric are one family of m tests: p_holm is adjusted for m, and `detectable`
    is the difference that 80 % of such studies (these seeds, problems and samples) find at 5 % / m. A planned arm that was not
    run, or has no p, keeps its row and counts in m as p = 1: leaving it out may not make the others significant.
    """
    import pandas as pd

    rows: list[dict[str, Any]] = []
    falcon = arms.get("falcon", ())
    cells = [(row["benchmark"], row["metric"]) for row in differences("", falcon, falcon, ks, 1, seed)]
    for other in PLANNED:
        name = f"falcon - {other}"
        found = differences(name, falcon, arms[other], ks, draws, seed) if other in arms else ()
        known = {(row["benchmark"], row["metric"]): row for row in found}
        rows += [known.get(cell, {"comparison": name, "benchmark": cell[0], "metric": cell[1]}) for cell in cells]
    for family in [[row for row in rows if row["metric"] == metric] for metric in dict.fromkeys(m for _, m in cells)]:
        for row, p in zip(family, holm([1.0 if row.get("p") is None else row["p"] for row in family]), strict=True):
            row |= {"p_holm": None if row.get("p") is None else p, "tests": len(family)}
            row["detectable"] = detectable(row.get("se"), len(family))
    return pd.DataFrame(rows, columns=CONTRASTS).astype(dict.fromkeys(("n", "samples", "dropped"), "Int64"))


def decided(runs: Runs, need: int) -> set[str]:
    """The problems that have at least `need` verdicts in every run."""
    counts: list[dict[str, int]] = []
    for run in runs:
        own: dict[str, int] = defaultdict(int)
        for sample in run:
            own[sample.task_id] += sample.status != INFRA_ERROR
        counts.append(own)
    return {t for t in (counts[0] if counts else ()) if all(own.get(t, 0) >= need for own in counts)}


def score_differences(pairs: Mapping[str, tuple[Runs, Runs]], draws: int = 10000, seed: int = 0) -> pd.DataFrame:
    """After - before in judge scores (-1..2), one row (columns SCORES) per comparison and aspect.

    pairs: name -> (runs after, runs before). A problem enters when every run judged at least one program for it; its
    score is the mean over its programs. before, after: means over those n problems; better, same, worse: n of them by
    the sign of the difference. not_loaded, unjudged: programs of both sides without any score, and with one missing.
    """
    rows: list[list[Any]] = []
    for name, (after, before) in pairs.items():
        everything = [s for run in [*after, *before] for s in run]
        judged = [s for s in everything if any(getattr(s.scores, a) is not None for a in ASPECTS)]
        for aspect in ASPECTS:
            unjudged = sum(getattr(s.scores, aspect) is None for s in judged)
            counts = [len(everything) - len(judged), unjudged]
            means = [task_means(run, aspect) for run in [*after, *before]]
            kept = [task for task in means[0] if all(task in own for own in means)]
            if not kept:
                rows.append([name, aspect, *[None] * 6, 0, 0, 0, 0, *counts])
                continue
            matrix = np.array([[own[task] for task in kept] for own in means])
            one, two = matrix[: len(after)], matrix[len(after) :]
            found = paired_difference((one + 1) / 3, (two + 1) / 3, draws, np.random.default_rng(seed))
            signs = np.sign(np.round(one.mean(axis=0) - two.mean(axis=0), 9))
            spread = [int((signs == s).sum()) for s in (1, 0, -1)]
            values = [float(two.mean()), float(one.mean()), *(3 * v for v in (found.value, found.low, found.high)), found.p]
            rows.append([name, aspect, *values, *spread, len(kept), *counts])
    return adjusted(rows, [c for c in SCORES if c != "p_holm"], SCORES)


def task_means(run: Sequence[Sample], aspect: str) -> dict[str, float]:
    """task id -> mean score of its judged programs; tasks without one are left out."""
    found: dict[str, list[int]] = defaultdict(list)
    for sample in run:
        score = getattr(sample.scores, aspect)
        if score is not None:
            found[sample.task_id].append(score)
    return {task: sum(scores) / len(scores) for task, scores in found.items()}


def adjusted(rows: Sequence[Sequence[Any]], columns: Sequence[str], order: Sequence[str]) -> pd.DataFrame:
    """The rows as a table with p_holm, Holm's adjustment of the known p over all rows."""
    import pandas as pd

    frame = pd.DataFrame(rows, columns=list(columns))
    known = frame["p"].notna()
    frame["p_holm"] = None
    frame.loc[known, "p_holm"] = holm(frame.loc[known, "p"].tolist())
    return frame[list(order)].astype({"p": float, "p_holm": float})
