"""Samples of a benchmark: run them, keep them, and say what they show. It generates nothing, trains nothing and opens no memory.

The raw samples are the record: anybody can score `samples.jsonl.gz` again. An infra_error is no verdict: such samples
are counted and left out, never taken as failures.
"""

from __future__ import annotations

import gzip
import io
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from falconlib.config import EvalConfig, SandboxConfig
from falconlib.errors import FalconError
from falconlib.evaluation.stats import interval, pass_at_k
from falconlib.feedback import NO_SCORES, make_feedback
from falconlib.files import write_bytes
from falconlib.judge import Judge
from falconlib.prompts import STOP
from falconlib.records import INFRA_ERROR, Report, Scores, Task, from_dict, to_dict, to_json
from falconlib.sandbox import Sandbox, program_for
from falconlib.tasks import fingerprint, version
from falconlib.tasks.files import read_rows

BROKEN = "BrokenTests"  # begins the error_class of a sample that its task's tests could not judge; the reason follows
REFUSED = "IntegrityError"  # error_class of a failed sample whose pass the program itself could have forged

FILES = {  # mode -> file with its scored samples
    "zero-shot": "samples.jsonl.gz",
    "+LTM": "samples-ltm.jsonl.gz",
    "+LTM adapt": "samples-ltm-adapt.jsonl.gz",
    "+STM adapt": "samples-stm-adapt.jsonl.gz",
    "best-of-K": "samples-best-of-k.jsonl.gz",
}


@dataclass(frozen=True)
class Sample:
    """One completion of one benchmark task, and its verdict once it is scored.

    index: number of the sample among those of its task; greedy: whether it was decoded greedily. completion: what the
    model said; code: the program in it. tokens: generated tokens (None when unknown). status: None until scored, then
    one of STATUSES or INFRA_ERROR; pass_ratio, error_class, scores: as in Feedback, but for an infra_error the class says
    why there is no verdict; a refused pass is a fail of the class REFUSED, so that nobody gains by one. hidden: whether it
    passed every test that the prompt did not show, whatever became of the shown ones; None when the prompt shows none or all.
    """

    task_id: str
    benchmark: str
    index: int
    completion: str
    code: str
    greedy: bool = False
    tokens: int | None = None
    status: str | None = None
    pass_ratio: float | None = None
    error_class: str = ""
    scores: Scores = NO_SCORES
    hidden: bool | None = None


def score_samples(
    tasks: Iterable[Task], samples: Sequence[Sample], sandbox: Sandbox, judge: Judge | None = None, progress: bool = False
) -> list[Sample]:
    """The samples with verdicts, in order; with judge scores too when there is a judge (for programs that load).

    Raises FalconError for a sample of a task that is not among `tasks`.
    """
    known = {task.task_id: task for task in tasks}
    if strange := next((s.task_id for s in samples if s.task_id not in known), None):
        raise FalconError(f"sample of task {strange!r}, which is not among the {len(known)} tasks", "take its own task set")
    reports = sandbox.run_many([program_for(known[s.task_id], s.code) for s in samples], progress=progress)
    scores = [NO_SCORES] * len(samples)
    if judge is not None:
        loaded = [i for i, report in enumerate(reports) if report.loaded]
        answers = judge.score_many([(known[samples[i].task_id], samples[i].code) for i in loaded])
        for i, found in zip(loaded, answers, strict=True):
            scores[i] = found
    scored = []
    for sample, report, found in zip(samples, reports, scores, strict=True):
        f = make_feedback(report, sample.code, found)
        kind = f.error_class
        if report.status == INFRA_ERROR and report.error:
            kind = report.error.type + (f": {report.error.message}" if report.error.type == BROKEN else "")
        status = "fail" if kind == REFUSED else f.status
        hidden = passed_hidden(known[sample.task_id], status, report)
        scored.append(replace(sample, status=status, pass_ratio=f.pass_ratio, error_class=kind, scores=f.scores, hidden=hidden))
    return scored


def passed_hidden(task: Task, status: str, report: Report) -> bool | None:
    """Whether every test that the prompt does not show has run and passed; None without verdict, or when it shows none or all."""
    if status == INFRA_ERROR or not 0 < task.visible < len(task.tests):
        return None
    failed = {t.snippet for t in report.tests if t.status != "pass"}
    passed = {t.snippet for t in report.tests} - failed
    blamed = status == "pass" or failed  # else the run failed where no single test did: nothing is known to be right
    return bool(blamed) and passed >= set(range(task.visible, len(task.tests)))


def save_samples(path: Path, samples: Sequence[Sample]) -> Path:
    """Writes samples as gzipped JSON lines, atomically; the same samples give the same bytes. Returns the path."""
    raw = io.BytesIO()
    with gzip.GzipFile(filename="", mode="wb", fileobj=raw, compresslevel=6, mtime=0) as packed:
        text = "".join(to_json(sample) + "\n" for sample in samples)
        packed.write(text.encode("utf-8", "backslashreplace"))  # half a surrogate pair becomes its JSON escape, "\\ud83d"
    return write_bytes(Path(path), raw.getvalue())


def load_samples(path: Path) -> list[Sample]:
    """The samples in a file that `save_samples` wrote. Raises FalconError when it is missing, empty or broken."""
    return [from_dict(Sample, row) for _, row in read_rows(Path(path))]


def summarise(
    runs: Sequence[Sequence[Sample]], ks: Sequence[int] = (1, 5), draws: int = 10000, seed: int = 0
) -> list[dict[str, Any]]:
    """One row per benchmark and metric ("greedy", "pass@k"), from the scored samples of one run per training seed.

    Row: benchmark, metric, value, ci_low, ci_high (95 %), interval (its method), seeds, n (problems), completions,
    timeouts (among the completions), unknown (completions without a verdict), by_seed (each seed's value). A problem enters
    when every seed has verdicts enough for it: one greedy, or k samples; a metric that no problem has samples for has no row.
    seed: of the bootstrap. Raises FalconError for unscored samples and for seeds that were run on different problems.
    """
    rows = []
    for benchmark, metric, k, chosen in cells(runs, ks):
        matrix = score_matrix(chosen, k)
        if matrix.size == 0:
            continue
        found = interval(matrix, draws, np.random.default_rng(seed))
        statuses = [s.status for samples in chosen for s in samples]
        row = {"benchmark": benchmark, "metric": metric, "value": found.value, "ci_low": found.low, "ci_high": found.high}
        row |= {"interval": found.method, "seeds": len(runs), "n": matrix.shape[1], "completions": len(statuses)}
        row |= {"timeouts": statuses.count("timeout"), "unknown": statuses.count(INFRA_ERROR), "by_seed": by_seed(matrix)}
        rows.append(row)
    return rows


def cells(runs: Sequence[Sequence[Sample]], ks: Sequence[int]) -> Iterator[tuple[str, str, int, list[list[Sample]]]]:
    """(benchmark, metric, k, its samples of each run) for "greedy" (k = 0) and every pass@k."""
    for benchmark in dict.fromkeys(s.benchmark for run in runs for s in run):
        for metric, k in [("greedy", 0), *((f"pass@{k}", k) for k in ks)]:
            yield benchmark, metric, k, [[s for s in r if s.benchmark == benchmark and s.greedy == (k == 0)] for r in runs]


def by_seed(matrix: np.ndarray) -> str:
    """The mean of each seed's row, in the order of the seeds: "0.1250 0.1875"."""
    return " ".join(f"{value:.4f}" for value in matrix.mean(axis=1))


def score_matrix(runs: Sequence[Sequence[Sample]], k: int) -> np.ndarray:
    """[seeds, problems] of unbiased pass@k per problem (k = 0: of the one greedy sample), problems in the first run's order.

    Problems without enough verdicts in some run are left out. Raises FalconError as `summarise` does.
    """
    verdicts: list[dict[str, list[bool]]] = []
    for run in runs:
        by_task: dict[str, list[bool]] = defaultdict(list)
        for sample in run:
            if sample.status is None:
                raise FalconError(f"sample {sample.index} of task {sample.task_id!r} has no verdict", "call score_samples first")
            by_task[sample.task_id] += [] if sample.status == INFRA_ERROR else [sample.status == "pass"]
        verdicts.append(by_task)
    if odd := next((v.keys() ^ verdicts[0].keys() for v in verdicts if v.keys() != verdicts[0].keys()), None):
        raise FalconError(f"the seeds were run on different problems: {min(odd)!r} is not in all", "evaluate the same tasks")
    need = max(k, 1)
    kept = [task_id for task_id in (verdicts[0] if verdicts else ()) if all(len(v[task_id]) >= need for v in verdicts)]
    return np.array([[pass_at_k(len(v[t]), sum(v[t]), need) for t in kept] for v in verdicts], dtype=np.float64)


def at_once(parameters: int) -> int:
    """Completions sampled together from a model of so many numbers: many end early, and a batch lasts as long as its longest, but
    the states of a large model fill the memory. 192 and 64 are [ours]: 192 are a sixth faster than
    128 for 135 M on one core, and more were slower: the longest prompt pads all."""
    return 192 if parameters <= 1 << 28 else 64


def evaluation_card(
    tasks: Sequence[Task],
    config: EvalConfig,
    limits: SandboxConfig,
    *,
    model: str,
    mode: str,
    seeds: Sequence[int],
    layers: Mapping[str, Any],
    judge: Judge | None = None,
    memory: str | None = None,
    ks: Sequence[int] = (1, 5),
) -> dict[str, Any]:
    """What somebody needs to repeat an evaluation, as JSON data without clock values.

    ks: of the pass@k that are told (as `summarise`'s), of which those up to the number of samples stand in the card.
    model: name or path with its adapter. mode: "zero-shot", "+LTM", ... layers: of the sandbox (`Sandbox.layers`).
    memory: SHA-256 of the long-term memory that was read, None without one.
    """
    sets: dict[str, list[Task]] = defaultdict(list)
    for task in tasks:
        sets[task.dataset].append(task)
    benchmarks = {
        name: {"tasks": len(own), "splits": sorted({t.split for t in own}), "version": version(name)}
        | {"fingerprint": fingerprint(own)}
        for name, own in sets.items()
    }
    return {
        "model": model,
        "mode": mode,
        "seeds": list(seeds),
        "benchmarks": benchmarks,
        "decoding": to_dict(config),
        "k": [k for k in ks if k <= config.samples],
        "stop": list(STOP),
        "extraction": "the prefilled code block, up to its closing fence (falconlib.prompts.extract_program)",
        "limits": to_dict(limits),
        "packages": "standard library only",
        "sandbox_layers": dict(layers),
        "judge": None if judge is None else judge.version,
        "memory": memory,
        "estimator": "unbiased pass@k; a program passes when every test does, shown and hidden; no verdict: left out and counted",
        "interval": "95 %: Wilson for one seed of greedy outcomes, else percentile bootstrap over seeds, then problems",
    }
