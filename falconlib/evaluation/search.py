"""The learning rate of each arm, from one grid on validation tasks: the same grid, tasks, seed and updates for every arm.

    falconlib search --profile small --arms grpo,rft,rltf,falcon

Each configuration is a row of <run>/search/search.jsonl when it is done; one that stands there is not run again. `best` reads
the log; its answer goes into `rates` of the profile by hand. No test task is loaded here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from falconlib.config import Profile, override
from falconlib.errors import FalconError
from falconlib.evaluation.evaluate import evaluate
from falconlib.evaluation.score import save_samples, summarise
from falconlib.files import JsonLines, read_json, sha256_of
from falconlib.sandbox import Sandbox
from falconlib.training import run_arm
from falconlib.typed import leaves

GRID = (3e-5, 1e-4, 3e-4)  # [ours] half decades around METHOD's 1e-4; three per arm is what a study of this size can pay


def search(profile: Profile, run: Path, arms: Sequence[str], grid: Sequence[float] = GRID, seed: int = 0, progress: bool = True):
    """Trains every arm with every rate that the log lacks and scores it on the validation splits of `tasks.train`.

    run: run folder; the SFT adapter of this seed lies in it, and the log, adapters and validation samples go to its search/.
    A row: arm, lr, seed, steps, metric ("pass@1", or "greedy" when `eval.samples` is 0), settings (hash of all), value (mean over
    the sets), sets (value of each), n, trained_tokens. Returns all rows of the log; raises FalconError when one that it would
    take for done was made with other settings.
    """
    log = JsonLines(run / "search" / "search.jsonl")
    metric = "pass@1" if profile.eval.samples else "greedy"
    for arm, lr in [(arm, lr) for arm in arms for lr in grid]:
        tried = dataclasses.replace(override(profile, {"train.lr": lr}), rates=())
        settings = sha256_of({name: value for name, (_, value) in leaves(tried).items()})[:16]
        known = [row for row in log.rows() if (row["arm"], row["lr"], row["seed"]) == (arm, lr, seed)]
        if known and known[-1].get("settings", settings) != settings:
            raise FalconError(f"{log.path} holds {arm} at {lr:g} with other settings", "search in another folder: FALCON_RESULTS")
        if known:
            continue
        folder = run / "search" / f"{arm}-lr{lr:g}"
        policy = run_arm(tried, arm, seed, folder, run / "train" / f"sft-s{seed}" / "adapter", progress)
        with Sandbox(tried.sandbox) as sandbox:
            sets = tried.tasks.train
            samples = evaluate(policy, tried, seed, sandbox, benchmarks=sets, split="validation", progress=progress)
        save_samples(folder / "validation.jsonl.gz", samples)
        found = {r["benchmark"]: r for r in summarise([samples], (1,), draws=2) if r["metric"] == metric}
        values = {name: r["value"] for name, r in found.items()}
        row = {"arm": arm, "lr": lr, "seed": seed, "steps": tried.train.steps, "metric": metric}
        row |= {"settings": settings, "value": sum(values.values()) / len(values), "sets": values}
        row |= {"n": sum(r["n"] for r in found.values())}
        log.append(row | {"trained_tokens": read_json(folder / "budget.json")["trained_tokens"]})
    return log.rows()


def best(rows: Iterable[dict[str, Any]]) -> dict[str, float]:
    """arm -> the rate with the highest value; of equal ones the smallest."""
    chosen: dict[str, dict[str, Any]] = {}
    for row in sorted(rows, key=lambda row: (-row["value"], row["lr"])):
        chosen.setdefault(row["arm"], row)
    return {arm: row["lr"] for arm, row in chosen.items()}
