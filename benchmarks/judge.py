"""How fast is the static judge? `python benchmarks/judge.py [--json] [--programs 1000]`: seconds per 1,000 distinct programs.

The programs are edited gold programs of HumanEval (every one different), in batches of 64 as a training step judges them.
Goal: under 10 s on 2 cores.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

from falconlib.judge import StaticJudge
from falconlib.records import Task
from falconlib.tasks import load_tasks


def programs(count: int) -> list[tuple[Task, str]]:
    """`count` different (task, program) pairs."""
    tasks = load_tasks("humaneval")
    return [(task, f"{task.gold}\n\nMARK = {i}\n") for i in range(count) for task in [tasks[i % len(tasks)]]]


def measure(count: int, batch: int) -> float:
    """Seconds for judging `count` programs in batches."""
    judge, pairs = StaticJudge(), programs(count)
    start = time.perf_counter()
    for place in range(0, count, batch):
        judge.score_many(pairs[place : place + batch])
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON line")
    parser.add_argument("--programs", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    if min(args.programs, args.batch, args.repeats) < 1:
        parser.error("--programs, --batch and --repeats: at least 1 is expected")
    seconds = [measure(args.programs, args.batch) * 1000 / args.programs for _ in range(args.repeats)]
    row = {
        "seconds_per_1000": round(statistics.median(seconds), 3),
        "worst": round(max(seconds), 3),
        "programs": args.programs,
        "batch": args.batch,
        "judge": StaticJudge().version,
    }
    print(json.dumps(row) if args.json else "\n".join(f"{name}: {value}" for name, value in row.items()))


if __name__ == "__main__":
    main()
