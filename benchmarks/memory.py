"""Speed of the long-term memory beside a bare FAISS search, and its growth.

    python benchmarks/memory.py --sizes 1000 10000 100000 1000000 --json --figure growth.png --csv growth.csv

For every size, in a process of its own: a file of that many tasks (384 dimensions), each with as many programs as are kept, four
verified and four failed (2,500 tasks are filled through `add_episodes`, the others by copying their rows), recall of batches of
32, k = 2 (embedding excluded) against `search` of the very same index with k = 8 on other batches, inserts in batches of 1,000
episodes, the time to open and to build the index, sizes, and how many of the eight exact neighbours the index finds: for tasks
like the stored ones that it has never seen, and for queries that are like none of them.
`--json` prints one line: ratio_vs_faiss_<size>, insert_per_s, recall_ms_<size> (per query), and the rest.
A million tasks take 7 GiB of disk, 8 GiB of memory and ten minutes or more: `--sizes` without them for a quick look.
"""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing
import resource
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import psutil

from falconlib.memory import LongTermMemory
from falconlib.memory.embed import PolicyStates, unit
from falconlib.memory.long_term import KEPT
from falconlib.memory.store import EPISODE_COLUMNS
from falconlib.records import Episode, Feedback, Task

DIM, BATCH = 384, 32


def clustered(numbers: list[int]) -> np.ndarray:
    """Vectors in 500 loose clusters, as descriptions of tasks have; row i depends on number i only."""
    centres = np.random.default_rng(0).standard_normal((500, DIM))
    return np.stack([centres[i % 500] + 0.8 * np.random.default_rng(i + 1).standard_normal(DIM) for i in numbers])


def task(i: int, split: str = "train") -> Task:
    return Task(
        f"bench/{i}",
        "bench",
        split,
        f"Task number {i}. " + "It asks for something in many words. " * 5,
        "f",
        ("assert f(1) == 1",),
    )


def episodes(i: int) -> list[Episode]:
    """As many as memory keeps of a task."""
    code = f"def f(x):\n    total = 0\n    for value in range(x):\n        total += value * {i}\n    return total\n"
    good, bad = Feedback("pass", 1.0, 3), Feedback("runtime_error", 0.0, 3, "TypeError", "line", (4, 4), "unsupported operand")
    told = [(code.replace("0", str(n), 1), good) for n in range(KEPT)]
    told += [(code.replace("0", f"None, {n}", 1), bad) for n in range(KEPT)]
    return [Episode(f"bench/{i}", 0, n, "support", "", "", text, feedback=fate) for n, (text, fate) in enumerate(told)]


def median_ms(*actions, repeats: int = 15) -> list[float]:
    """Median wall time of each action in milliseconds; they take turns, so that a busy machine slows all of them alike. An action
    is called with the number of a batch that no other call gets: nobody finds what it needs in the processor's cache."""
    times: list[list[float]] = [[] for _ in actions]
    for repeat in range(repeats + 1):
        for place, (action, kept) in enumerate(zip(actions, times, strict=True)):
            start = time.perf_counter()
            action(repeat * len(actions) + place)
            kept.append(time.perf_counter() - start)
    return [1000 * statistics.median(kept[1:]) for kept in times]  # the first one warms up


def fill(memory: LongTermMemory, size: int) -> dict:
    """Stores the tasks and their episodes, and builds the index: what that took."""
    for start in range(0, size, 20_000):
        memory.add_tasks([task(i) for i in range(start, min(start + 20_000, size))])
    filled, batch = min(size, 2_500), 1_000 // (2 * KEPT)
    batches = [[e for i in range(start, start + batch) for e in episodes(i)] for start in range(0, filled, batch)]
    begin = time.perf_counter()
    for told in batches:
        memory.add_episodes(told)
    insert = filled * 2 * KEPT / (time.perf_counter() - begin)
    for start in range(filled, size, 20_000):
        with memory._store.transaction() as db:
            db.execute(
                f"""INSERT INTO episode(task, {EPISODE_COLUMNS}, run_id) SELECT t.id, {EPISODE_COLUMNS}, '' FROM task t
                    JOIN episode e ON e.task = 1 + t.id % ? WHERE t.id > ? AND t.id <= ? ORDER BY t.id, e.id""",
                (filled, start, start + 20_000),
            )
            memory._store.summarise("t.id > ? AND t.id <= ?", start, start + 20_000)
    begin = time.perf_counter()
    memory._search.sync()
    return {"insert_per_s": insert, "build_s": time.perf_counter() - begin}


def found_share(memory: LongTermMemory, queries: np.ndarray) -> float:
    """Share of the 8 exact neighbours of each query [n, d] that the memory's index finds."""
    best, names = np.full((len(queries), 8), -np.inf, np.float32), np.full((len(queries), 8), -1)
    for keys, vectors in memory._store.vectors(0, DIM):
        similar = np.hstack([best, queries @ vectors.T])
        known = np.hstack([names, np.broadcast_to(keys[:, 0], (len(queries), len(keys)))])
        order = np.argsort(-similar, axis=1)[:, :8]
        best, names = np.take_along_axis(similar, order, 1), np.take_along_axis(known, order, 1)
    _, found = memory._search.sync().search(queries, 8)
    return float(np.mean([len(set(a) & set(b)) / 8 for a, b in zip(names.tolist(), found.tolist(), strict=True)]))


def measure(size: int, folder: Path) -> dict:
    """The figures of one size."""
    path, mib = folder / f"{size}.sqlite", 2**20
    embedder = PolicyStates(lambda texts: clustered([int(t.split()[2].rstrip(".")) for t in texts]), DIM, "bench")
    with LongTermMemory(path, embedder) as memory:
        filled = fill(memory, size)
    begin = time.perf_counter()
    with LongTermMemory(path, embedder) as memory:
        index = memory._search.sync()
        open_s = time.perf_counter() - begin
        open_mb = psutil.Process().memory_info().rss / mib
        picks = np.random.default_rng(1).integers(0, size, (64, BATCH)).tolist()
        known, vectors = [[task(i) for i in pick] for pick in picks], [unit(clustered(pick)) for pick in picks]
        recall_ms, bare_ms = median_ms(lambda i: memory.recall(known[i], 2), lambda i: index._index.search(vectors[i], 8))
        unseen = unit(clustered(list(range(size, size + 64))))
        unlike = unit(np.random.default_rng(2).standard_normal((64, DIM)))
        found = {"found": found_share(memory, unseen), "found_unlike": found_share(memory, unlike)}
        stats = memory.stats()
    return {
        "size": size,
        "kind": index.kind,
        "ratio_vs_faiss": recall_ms / bare_ms,
        "recall_ms": recall_ms / BATCH,
        "bare_ms": bare_ms / BATCH,
        **filled,
        "open_s": open_s,
        **found,
        "file_mb": stats["file_mb"],
        "index_mb": stats["index_mb"],
        "process_mb": open_mb,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def draw(rows: list[dict], path: Path) -> None:
    """Growth curves: time per query and size on disk over the number of tasks."""
    import matplotlib.pyplot as plt

    sizes = [row["size"] for row in rows]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    left.loglog(sizes, [r["recall_ms"] for r in rows], "o-", label="recall")
    left.loglog(sizes, [r["bare_ms"] for r in rows], "s--", label="bare FAISS search")
    left.set(xlabel="tasks", ylabel="ms per query (batch of 32)")
    right.loglog(sizes, [r["file_mb"] for r in rows], "o-", label="SQLite file")
    right.loglog(sizes, [r["index_mb"] for r in rows], "s--", label="index file")
    right.set(xlabel="tasks", ylabel="MiB")
    for axes in (left, right):
        axes.legend(frameon=False)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[1_000, 10_000, 100_000, 1_000_000], help="numbers of tasks")
    parser.add_argument("--figure", type=Path, help="draw the growth curves into this file")
    parser.add_argument("--csv", type=Path, help="write the table into this file")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        fresh = {"mp_context": multiprocessing.get_context("spawn"), "max_tasks_per_child": 1}  # else memory sizes would add up
        with ProcessPoolExecutor(1, **fresh) as pool:
            rows = list(pool.map(measure, options.sizes, [Path(folder)] * len(options.sizes)))
    if options.csv:
        with open(options.csv, "w", newline="") as file:
            table = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            table.writeheader()
            table.writerows({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    if options.figure:
        draw(rows, options.figure)
    if options.json:
        short = {1_000_000: "1m", **{n * 1000: f"{n}k" for n in range(1, 1000)}}
        named = {
            f"{name}_{short.get(r['size'], r['size'])}": r[name]
            for r in rows
            for name in r
            if name not in ("size", "insert_per_s")
        }
        print(json.dumps({"insert_per_s": min(r["insert_per_s"] for r in rows), **named}))
    else:
        for row in rows:
            print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))


if __name__ == "__main__":
    main()
