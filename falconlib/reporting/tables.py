"""Tables from the results: the main table over arms, seeds, benchmarks and modes, as CSV, Markdown and plain text.

Reads the samples and budgets that the training stages wrote; runs and scores nothing.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from falconlib.config import ARMS
from falconlib.errors import FalconError
from falconlib.files import read_json, write_text

if TYPE_CHECKING:
    import pandas as pd

MAIN = [
    *("benchmark", "mode", "arm", "metric", "value", "ci_low", "ci_high", "seeds", "n"),
    *("completions", "trained_tokens", "wall_s", "configs_tried", "device"),
]
# mode -> file in train/<arm>-s<seed>/ that holds the scored samples (evaluation.save_samples)
SAMPLES = {
    "zero-shot": "samples.jsonl.gz",
    "+LTM": "samples-ltm.jsonl.gz",
    "+LTM adapt": "samples-ltm-adapt.jsonl.gz",
    "+STM adapt": "samples-stm-adapt.jsonl.gz",
}


def training_runs(train: Path) -> dict[str, list[Path]]:
    """arm -> its complete run folders below `train`, in the order of seeds; arms in the order of the comparison.

    Raises FalconError when there is none.
    """
    found: dict[str, list[tuple[int, Path]]] = {}
    for manifest in Path(train).glob("*-s*/manifest.json"):
        arm, _, seed = manifest.parent.name.rpartition("-s")
        found.setdefault(arm, []).append((int(seed), manifest.parent))
    if not found:
        raise FalconError(f"{train} holds no complete training run", "falconlib run --only 06")
    order = [arm for arm in ARMS if arm in found] + sorted(set(found) - set(ARMS))
    return {arm: [folder for _, folder in sorted(found[arm])] for arm in order}


def main_table(train: Path, draws: int = 10000, seed: int = 0) -> pd.DataFrame:
    """The main table with the columns MAIN, one row per benchmark, mode, arm and metric.

    value, ci_low, ci_high: in [0, 1] (95 %). n: problems. completions, trained_tokens, wall_s: what one seed's training
    and evaluation cost, mean over seeds. configs_tried: of the arm (run.json). Unknown cells are empty.

    Args:
        train: folder of the training runs. draws, seed: of the bootstrap.
    """
    import pandas as pd

    from falconlib.evaluation.score import load_samples, summarise

    rows = []
    for arm, folders in training_runs(train).items():
        cost = costs(folders)
        for mode, name in SAMPLES.items():
            runs = [load_samples(folder / name) for folder in folders if (folder / name).is_file()]
            for row in summarise(runs, draws=draws, seed=seed) if runs else ():
                rows.append({**row, "mode": mode, "arm": arm, **cost})
    frame = pd.DataFrame(rows, columns=MAIN)
    benchmarks = list(dict.fromkeys(frame["benchmark"]))
    return frame.sort_values("benchmark", key=lambda column: column.map(benchmarks.index), kind="stable", ignore_index=True)


def costs(folders: Sequence[Path]) -> dict[str, Any]:
    """Budget columns of an arm's runs: means over the seeds, None where no run knows."""
    runs = [read_json(folder / "run.json") for folder in folders]
    budgets = [read_json(f / "budget.json") if (f / "budget.json").is_file() else {} for f in folders]
    return {
        "completions": _mean([b.get("completions") for b in budgets]),
        "trained_tokens": _mean([b.get("trained_tokens") for b in budgets]),
        "wall_s": _mean([run["wall_s"] for run in runs]),
        "configs_tried": max((run["configs_tried"] for run in runs if run.get("configs_tried")), default=None),
        "device": ", ".join(dict.fromkeys(run["device"] for run in runs)),
    }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return round(sum(known) / len(known), 1) if known else None


def metrics_table(train: Path) -> pd.DataFrame:
    """All metrics.jsonl below `train` as one table: arm, seed, step, and the metrics that are numbers."""
    import pandas as pd

    from falconlib.files import JsonLines

    rows = []
    for arm, folders in training_runs(train).items():
        for folder in folders:
            run = int(folder.name.rpartition("-s")[2])
            for row in JsonLines(folder / "metrics.jsonl").rows():
                rows.append({"arm": arm, "seed": run, **{k: v for k, v in row.items() if not isinstance(v, dict | list)}})
    return pd.DataFrame(rows)


def write_csv(frame: pd.DataFrame, path: Path) -> Path:
    """A DataFrame as CSV, atomically, without its index; the same table gives the same bytes."""
    return write_text(path, frame.to_csv(index=False, lineterminator="\n"))


def markdown(frame: pd.DataFrame, digits: int = 3) -> str:
    """A DataFrame as a Markdown table; floats with `digits` digits, empty cells for the unknown."""

    def cell(value: Any) -> str:
        if value is None or value != value:
            return ""
        return f"{value:.{digits}f}" if isinstance(value, float) else str(value).replace("|", "\\|").replace("\n", " ")

    lines = [list(frame.columns), ["---"] * len(frame.columns), *frame.astype(object).itertuples(index=False)]
    return "\n".join("| " + " | ".join(cell(value) for value in line) + " |" for line in lines) + "\n"


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """The main table for readers: one row per arm and mode, one column per benchmark and metric, percent with interval."""
    shown = frame.assign(
        cell=[
            f"{100 * value:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
            for value, low, high in zip(frame["value"], frame["ci_low"], frame["ci_high"], strict=True)
        ],
        what=[f"{b} {m} (n = {n})" for b, m, n in zip(frame["benchmark"], frame["metric"], frame["n"], strict=True)],
    )
    wide = shown.pivot(index=["arm", "mode"], columns="what", values="cell")
    order = [tuple(pair) for pair in shown[["arm", "mode"]].drop_duplicates().itertuples(index=False)]
    return wide.loc[order, list(dict.fromkeys(shown["what"]))].fillna("").reset_index().rename_axis(columns=None)


def read_main(path: Path) -> list[dict[str, str]]:
    """The rows of a main table: `path` is a run folder or the CSV itself. Raises FalconError when it is no main table."""
    path = Path(path) / "tables" / "main.csv" if Path(path).is_dir() else Path(path)
    if not path.is_file():
        raise FalconError(f"{path} is missing", "give a run folder such as results/runs/quick, made by: falconlib run")
    with open(path, encoding="utf-8", newline="") as source:
        rows = list(csv.DictReader(source))
    if not rows or set(MAIN) - set(rows[0]):
        raise FalconError(f"{path} is no main table with the columns {', '.join(MAIN)}", "falconlib run --only 07")
    return rows


def as_text(path: Path) -> str:
    """A main table's CSV for the terminal: benchmark, mode, arm, metric, value with interval, seeds, n. Needs no pandas."""
    lines = [("benchmark", "mode", "arm", "metric", "value", "95 % interval", "seeds", "n")]
    for row in read_main(path):
        span = f"[{float(row['ci_low']):.3f}, {float(row['ci_high']):.3f}]"
        value = f"{float(row['value']):.3f}"
        lines.append((row["benchmark"], row["mode"], row["arm"], row["metric"], value, span, row["seeds"], row["n"]))
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in lines)
