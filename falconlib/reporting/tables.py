"""Tables from the results: the main table over arms, seeds, benchmarks and modes, as CSV, Markdown and plain text.

Reads the samples and budgets that the training stages wrote; runs and scores nothing.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from falconlib.config import ARMS
from falconlib.errors import FalconError
from falconlib.files import JsonLines, read_json, write_text
from falconlib.reporting.run import reference_roots

if TYPE_CHECKING:
    from falconlib.evaluation.score import Sample

MAIN = [
    *("benchmark", "mode", "arm", "metric", "value", "ci_low", "ci_high", "seeds", "n"),
    *("completions", "trained_tokens", "wall_s", "configs_tried", "device", "executed", "by_seed"),
]
NEEDED = MAIN[: MAIN.index("device") + 1]  # what a table of an earlier version has as well
HIDDEN, FAR = " (hidden asserts)", " (cosine <= 0.9)"  # of a benchmark's name: the same samples, counted another way


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


def sample_file(folder: Path, mode: str = "zero-shot") -> Path | None:
    """A run's samples in this mode: what `falconlib eval --out` drew into modes/ beside train/, else its own; None: none."""
    from falconlib.evaluation.score import FILES

    files = [place / FILES[mode] for place in (folder.parent.parent / "modes" / folder.name, folder)]
    return next((file for file in files if file.is_file()), None)


def mode_samples(folders: Sequence[Path]) -> dict[str, dict[int, list[Sample]]]:
    """mode -> seed -> its samples; a mode may have been sampled for some seeds only."""
    from falconlib.evaluation.score import FILES, load_samples

    found: dict[str, dict[int, list[Sample]]] = {}
    for mode in FILES:
        for folder, file in [(f, file) for f in folders if (file := sample_file(f, mode))]:
            found.setdefault(mode, {})[int(folder.name.rpartition("-s")[2])] = load_samples(file)
    return found


def zero_shot_like(folder: Path, drawn: Sequence[Sample]) -> list[Sample]:
    """What the samples of a mode are paired with: the run's own zero-shot ones where those are as many of the same problems, else
    those that `sample_file` finds."""
    from falconlib.evaluation.score import FILES, load_samples

    own = load_samples(folder / FILES["zero-shot"])
    one, two = ({(s.task_id, s.index, s.greedy) for s in part} for part in (own, drawn))
    return own if one == two else load_samples(sample_file(folder) or folder / FILES["zero-shot"])


def main_table(train: Path, draws: int = 10000, seed: int = 0) -> pd.DataFrame:
    """The main table with the columns MAIN, one row per benchmark, mode, arm and metric.

    value, ci_low, ci_high: in [0, 1] (95 %). n: problems. completions, executed, trained_tokens, wall_s: what one seed's
    training cost (the seconds with its evaluation), mean over seeds; executed: distinct programs. configs_tried: of the arm, in
    the search or by run.json. by_seed: each seed's value. Unknown cells are empty. Rows of `views` come last.

    Args:
        train: folder of the training runs. draws, seed: of the bootstrap.
    """

    from falconlib.evaluation.score import summarise

    rows, close = [], too_close(train)
    for arm, folders in training_runs(train).items():
        cost = costs(folders)
        for mode, runs in mode_samples(folders).items():
            for row in summarise([[*run, *views(run, close)] for run in runs.values()], draws=draws, seed=seed):
                rows.append({**row, "mode": mode, "arm": arm, **cost})
    frame = pd.DataFrame(rows, columns=MAIN)
    names = list(dict.fromkeys(frame["benchmark"]))
    names = [n for n in names if "(" not in n] + [n for n in names if "(" in n]
    return frame.sort_values("benchmark", key=lambda column: column.map(names.index), kind="stable", ignore_index=True)


def views(run: Sequence[Sample], close: set[str]) -> list[Sample]:
    """The same samples counted in other ways, as benchmarks of their own: MBPP on its two hidden asserts alone (the prompt shows
    the third), and each benchmark that has problems in `close` without them."""
    known = [s for s in run if s.benchmark == "mbpp" and s.hidden is not None]
    touched = {s.benchmark for s in run if s.task_id in close}
    far = [s for s in run if s.benchmark in touched and s.task_id not in close]
    hidden = [replace(s, benchmark="mbpp" + HIDDEN, status="pass" if s.hidden else "fail") for s in known]
    return hidden + [replace(s, benchmark=s.benchmark + FAR) for s in far]


def too_close(train: Path) -> set[str]:
    """Held-out tasks whose nearest training task has a cosine above 0.9, as notebook 01 measured; none when it has not run."""
    path = Path(train).parent / "01_tasks" / "leakage.csv"
    if not path.is_file():
        return set()
    found = pd.read_csv(path)
    return set(found.loc[found["cosine"] > 0.9, "task"])


def plain(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows of a main table without those of `views`."""
    return frame[~frame["benchmark"].str.endswith((HIDDEN, FAR))]


def costs(folders: Sequence[Path]) -> dict[str, Any]:
    """Budget columns of an arm's runs: means over the seeds, None where no run knows."""
    runs = [read_json(folder / "run.json") for folder in folders]
    budgets = [read_json(f / "budget.json") if (f / "budget.json").is_file() else {} for f in folders]
    return {
        "completions": _mean([b.get("completions") for b in budgets]),
        "trained_tokens": _mean([b.get("trained_tokens") for b in budgets]),
        "wall_s": _mean([run["wall_s"] for run in runs]),
        "configs_tried": tried(folders) or max((run["configs_tried"] for run in runs if run.get("configs_tried")), default=None),
        "executed": _mean([b.get("programs") for b in budgets]),
        "device": ", ".join(dict.fromkeys(run["device"] for run in runs)),
    }


def tried(folders: Sequence[Path]) -> int:
    """How many configurations the search (evaluation.search) tried for this arm, in this run or in the committed one."""
    root, arm = folders[0].parent.parent, folders[0].name.rpartition("-s")[0]
    logs = [base / "search" / "search.jsonl" for base in (root, reference_roots(root.name)[0])]
    rows = next((found for log in logs if (found := JsonLines(log).rows())), [])
    return len({row["lr"] for row in rows if row["arm"] == arm})


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return round(sum(known) / len(known), 1) if known else None


def metrics_table(train: Path) -> pd.DataFrame:
    """All metrics.jsonl below `train` as one table: arm, seed, step, and the metrics that are numbers."""

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
    """A DataFrame as a Markdown table; floats with `digits` digits, a column of whole numbers without, unknown cells empty."""

    def cell(value: Any) -> str:
        if pd.isna(value):  # None, NaN and pd.NA, which has no truth value
            return ""
        return f"{value:.{digits}f}" if isinstance(value, float) else str(value).replace("|", "\\|").replace("\n", " ")

    lines = [list(frame.columns), ["---"] * len(frame.columns), *frame.convert_dtypes().astype(object).itertuples(index=False)]
    return "\n".join("| " + " | ".join(cell(value) for value in line) + " |" for line in lines) + "\n"


def count(number: int, noun: str) -> str:
    """ "1 seed", "3 seeds"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def headline(frame: pd.DataFrame) -> str:
    """The metric that figures and sentences speak of: pass@1 where samples were drawn, else greedy."""
    return "pass@1" if "pass@1" in set(frame["metric"]) else "greedy"


def span(ends: Sequence[Any], sign: str = "") -> str:
    """(share, low, high) in percent, "6.2 [1.1, 28.3]"; sign "+": a difference in percentage points. "" is unknown."""
    value, low, high = ("" if pd.isna(end) else f"{100 * end:{sign}z.1f}" for end in ends)
    return value and f"{value} [{low}, {high}]"


def readable(frame: pd.DataFrame) -> pd.DataFrame:
    """A table of shares or differences for readers: percent and percentage points with their 95 % intervals, p after Holm, the
    detectable difference, n, seeds. The CSV keeps all columns."""
    found = frame[[n for n in ("comparison", "arm", "mode", "benchmark", "metric") if n in frame]].copy()
    lower, upper = ("difference_low", "difference_high") if "difference_low" in frame else ("ci_low", "ci_high")
    places = {"solved, %": ("value", "ci_low", "ci_high", ""), "difference, points": ("difference", lower, upper, "+")}
    for title, (value, low, high, sign) in places.items():
        if value in frame:
            found[title] = [span(row, sign) for row in frame[[value, low, high]].itertuples(index=False)]
    if "p_holm" in frame:
        found["p (Holm)"] = ["" if pd.isna(p) else f"{p:.3f}" for p in frame["p_holm"]]
    if "detectable" in frame:
        found["detectable, points"] = ["" if pd.isna(size) else f"{100 * size:.1f}" for size in frame["detectable"]]
    return found.assign(n=frame["n"].astype("Int64"), **({"seeds": frame["seeds"]} if "seeds" in frame else {}))


def across(frame: pd.DataFrame, rows: list[str], cell: str) -> pd.DataFrame:
    """The column `cell` of `readable` with one row per value of the columns `rows`, one column per benchmark and metric. Where
    modes met fewer problems than the rest, a column `problems` says how many, benchmark by benchmark."""
    names = frame["benchmark"] + " " + frame["metric"]
    if (frame.groupby(names)["n"].nunique() == 1).all():
        names += " (n = " + frame["n"].astype(str) + ")"
    else:
        sizes = frame.groupby([*rows, "benchmark"], sort=False)["n"].max().reset_index("benchmark")
        told = sizes["benchmark"] + " " + sizes["n"].astype(str)
        frame = frame.join(told.groupby(level=rows, sort=False).agg(", ".join).rename("problems"), on=rows)
        rows = [*rows, "problems"]
    wide = readable(frame).assign(name=names, **frame[rows]).pivot(index=rows, columns="name", values=cell)
    return frame[rows].drop_duplicates().join(wide[list(dict.fromkeys(names))], on=rows).fillna("")


def differences_table(frame: pd.DataFrame) -> pd.DataFrame:
    """Paired differences in the headline metric, in percentage points: a column per benchmark, rows that say the same as one."""
    wide = across(frame[frame["metric"] == headline(frame)], ["comparison"], "difference, points")
    return wide.groupby([*wide.columns[1:]], sort=False)["comparison"].agg(", ".join).reset_index()[[*wide.columns]]


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """The main table for readers: one row per arm and mode, one column per benchmark and metric, percent with interval."""
    return across(plain(frame), ["arm", "mode", "seeds"], "solved, %")


def read_main(path: Path) -> list[dict[str, str]]:
    """The rows of a main table: `path` is a run folder or the CSV itself. Raises FalconError when it is no main table."""
    path = Path(path) / "tables" / "main.csv" if Path(path).is_dir() else Path(path)
    if not path.is_file():
        raise FalconError(f"{path} is missing", "give a run folder such as results/runs/quick, made by: falconlib run")
    try:
        with open(path, encoding="utf-8", newline="") as source:
            rows = list(csv.DictReader(source))
    except (UnicodeDecodeError, csv.Error):
        rows = []
    if not rows or set(NEEDED) - set(rows[0]):
        raise FalconError(f"{path} is no main table with the columns {', '.join(NEEDED)}", "falconlib run --only 07")
    return rows


def as_text(path: Path) -> str:
    """A main table's CSV for the terminal, as `readable` has it."""
    read_main(path)  # checks its columns
    return readable(pd.read_csv(path)).to_string(index=False)
