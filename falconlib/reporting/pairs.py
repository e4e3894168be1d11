"""Two arms on the same problems: paired differences of pass rates and of judge scores, with intervals.

Reads scored samples; runs and judges nothing. A problem enters a comparison only when both sides know it: unknown
verdicts and unjudged programs are left out on both sides and counted.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from falconlib.evaluation.score import Sample, by_seed, cells, score_matrix
from falconlib.evaluation.stats import detectable, holm, paired_difference

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
    sides. p: two-sided, None when no draw of a bootstrap differs; p_holm: adjusted for all rows. seed: of the bootstrap.
    """
    return adjusted([row for name, (one, two) in pairs.items() for row in differences(name, one, two, ks, draws, seed)], PASSES)


def differences(name: str, one: Runs, two: Runs, ks: Sequence[int], draws: int, seed: int) -> Iterator[dict[str, Any]]:
    """The comparison `name` of two arms, one dict per benchmark and metric: PASSES without p_holm, CONTRASTS, and se."""
    for benchmark, metric, k, runs in cells([*one, *two], ks):
        tasks = [{s.task_id for s in run} for run in runs]
        common = set.intersection(*tasks)
        runs = [[s for s in run if s.task_id in common] for run in runs]
        matrix = score_matrix(runs, k)
        if not matrix.size:
            continue
        first, second, n = matrix[: len(one)], matrix[len(one) :], matrix.shape[1]
        found = paired_difference(first, second, draws, np.random.default_rng(seed))
        yield {
            **{"comparison": name, "benchmark": benchmark, "metric": metric, "difference": found.value},
            **{"ci_low": found.low, "ci_high": found.high, "p": found.p, "se": found.se, "n": n},
            **{"dropped": len(set.union(*tasks)) - n, "samples": round(len(runs[0]) / len(common))},
            **{"first_seeds": by_seed(first), "second_seeds": by_seed(second)},
        }


def planned_contrasts(arms: Mapping[str, Runs], ks: Sequence[int] = (1, 5), draws: int = 10000, seed: int = 0) -> pd.DataFrame:
    """FALCON against each arm of PLANNED, one row (columns CONTRASTS) per benchmark and metric, as decided before any run.

    arms: zero-shot runs by arm. All rows of one metric are one family of m tests: p_holm is adjusted for m, and `detectable`
    is the difference that 80 % of such studies (these seeds, problems and samples) find at 5 % / m. A planned arm that was not
    run, or has no p, keeps its row and counts in m as p = 1: leaving it out may not make the others significant.
    """
    rows: list[dict[str, Any]] = []
    falcon = arms.get("falcon", ())
    places = [(row["benchmark"], row["metric"]) for row in differences("", falcon, falcon, ks, 1, seed)]
    for other in PLANNED:
        name = f"falcon - {other}"
        found = differences(name, falcon, arms[other], ks, draws, seed) if falcon and other in arms else ()
        known = {(row["benchmark"], row["metric"]): row for row in found}
        rows += [known.get(cell, {"comparison": name, "benchmark": cell[0], "metric": cell[1]}) for cell in places]
    for family in [[row for row in rows if row["metric"] == metric] for metric in dict.fromkeys(m for _, m in places)]:
        for row, p in zip(family, holm([1.0 if row.get("p") is None else row["p"] for row in family]), strict=True):
            row |= {"p_holm": None if row.get("p") is None else p, "tests": len(family)}
            row["detectable"] = detectable(row.get("se"), len(family))
    return pd.DataFrame(rows, columns=CONTRASTS).astype(dict.fromkeys(("n", "samples", "dropped"), "Int64"))


def score_differences(pairs: Mapping[str, tuple[Runs, Runs]], draws: int = 10000, seed: int = 0) -> pd.DataFrame:
    """After - before in judge scores (-1..2), one row (columns SCORES) per comparison and aspect.

    pairs: name -> (runs after, runs before). A problem enters when every run judged at least one program for it; its
    score is the mean over its programs. before, after: means over those n problems; better, same, worse: n of them by
    the sign of the difference. not_loaded, unjudged: programs of both sides without any score, and with one missing.
    """
    rows: list[dict[str, Any]] = []
    for name, (after, before) in pairs.items():
        everything = [s for run in [*after, *before] for s in run]
        judged = [s for s in everything if any(getattr(s.scores, a) is not None for a in ASPECTS)]
        for aspect in ASPECTS:
            unjudged = sum(getattr(s.scores, aspect) is None for s in judged)
            row = {"comparison": name, "aspect": aspect, "better": 0, "same": 0, "worse": 0, "n": 0}
            rows.append(row | {"not_loaded": len(everything) - len(judged), "unjudged": unjudged})
            means = pd.DataFrame([task_means(run, aspect) for run in [*after, *before]]).dropna(axis="columns").to_numpy()
            if not means.size:
                continue
            one, two = means[: len(after)], means[len(after) :]
            found = paired_difference((one + 1) / 3, (two + 1) / 3, draws, np.random.default_rng(seed))
            signs = np.sign(np.round(one.mean(axis=0) - two.mean(axis=0), 9))
            rows[-1] |= {key: int((signs == sign).sum()) for key, sign in (("better", 1), ("same", 0), ("worse", -1))}
            rows[-1] |= {"before": float(two.mean()), "after": float(one.mean()), "difference": 3 * found.value, "p": found.p}
            rows[-1] |= {"ci_low": 3 * found.low, "ci_high": 3 * found.high, "n": means.shape[1]}
    return adjusted(rows, SCORES)


def task_means(run: Sequence[Sample], aspect: str) -> dict[str, float]:
    """task id -> mean score of its judged programs; tasks without one are left out."""
    found: dict[str, list[int]] = defaultdict(list)
    for sample in run:
        score = getattr(sample.scores, aspect)
        if score is not None:
            found[sample.task_id].append(score)
    return {task: sum(scores) / len(scores) for task, scores in found.items()}


def adjusted(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> pd.DataFrame:
    """The rows as a table with p_holm, Holm's adjustment of the known p over all rows."""
    frame = pd.DataFrame(rows, columns=list(columns)).astype({"p": float, "p_holm": float})
    known = frame["p"].notna()
    frame.loc[known, "p_holm"] = holm(frame.loc[known, "p"].tolist())
    return frame
