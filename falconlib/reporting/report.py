"""The report: report.md, a self-contained report.html, what the tables say in short, and the committed reference results.

Puts together what the stages wrote; computes nothing that is not in a table already.
"""

from __future__ import annotations

import base64
import os
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from falconlib.errors import FalconError
from falconlib.files import disk_errors, read_json, write_text
from falconlib.reporting.run import REPO, results_root
from falconlib.reporting.tables import count, headline, markdown, plain, read_main, readable, summary

NOT_PUBLISHED: tuple[str, ...] = ("checkpoints", "prepared", "attempt.json", "log.txt", "run.lock", ".ipynb_checkpoints")
NOT_PUBLISHED += ("*.sqlite-wal", "*.sqlite-shm", "*.faiss*")
WHOLE = ("sft-s0", "falcon-s0")  # runs published with adapter and memory, and the best baseline; results/README.md says why


@dataclass(frozen=True)
class Figure:
    """A figure of a section. stem: below the run folder, e.g. "figures/rewards". alt: what it shows, in words. caption."""

    stem: str
    alt: str
    caption: str


@dataclass(frozen=True)
class Section:
    """A part of the report. text: Markdown (tables by `tables.markdown`). figures: shown after the text."""

    heading: str
    text: str
    figures: tuple[Figure, ...] = ()


def write_report(root: Path, title: str, sections: Sequence[Section]) -> tuple[Path, Path]:
    """Writes report.md and report.html into the run folder `root`; a section on how it was made comes last.

    report.html holds its figures and style itself and fetches nothing. Raises FalconError for a missing figure.
    """
    root = Path(root)
    parts = [f"# {title}\n"]
    for section in [*sections, provenance(root)]:
        parts.append(f"## {section.heading}\n\n{section.text.strip()}\n")
        for figure in section.figures:
            if not (root / f"{figure.stem}.png").is_file():
                raise FalconError(f"figure {figure.stem}.png is not in {root}", "run the notebook that draws it")
            parts.append(f"![{figure.alt}]({figure.stem}.png)\n\n*{figure.caption}*\n")
    text = "\n".join(parts)
    return write_text(root / "report.md", text), write_text(root / "report.html", html(text, title, root))


def html(text: str, title: str, root: Path) -> str:
    """The Markdown `text` as one HTML page; images below `root` become data URLs, tables can be sorted."""
    import html as entities

    import markdown as converter

    def embed(match: re.Match[str]) -> str:
        data = base64.b64encode((root / match[1]).read_bytes()).decode("ascii")
        return f'src="data:image/png;base64,{data}"'

    body = re.sub(r'src="([^":]+\.png)"', embed, converter.markdown(text, extensions=["tables", "fenced_code"]))
    page = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    return page.replace("TITLE", entities.escape(title), 1).replace("BODY", body, 1)


def provenance(root: Path) -> Section:
    """How the results were made: commands and commits of training and tables, machine, versions, seconds of each stage."""
    runs = {path.parent.relative_to(root).as_posix(): read_json(path) for path in sorted(root.rglob("run.json"))}
    if not runs:
        raise FalconError(f"{root} holds no run.json", "falconlib run")
    facts = list(runs.values())[-1]
    made: dict[str, set[str]] = {}  # a study's tables may be younger than its training
    for key, run in runs.items():
        state = "with uncommitted changes" if run["git"]["dirty"] else ""
        text = f"`{run['command']}` at commit {(run['git']['commit'] or 'unknown')[:12]} {state}".strip()
        made.setdefault(text, set()).add("training" if "train/" in key else "tables and figures")
    later = len([*root.glob("modes/*/samples*.jsonl.gz")])
    told = f"* {count(later, 'file')} of samples in `modes/`: `falconlib eval --out` after training, see the cards there"
    lines = [
        *(f"* {' and '.join(sorted(kinds)).capitalize()}: {text}" for text, kinds in made.items()),
        *([told] if later else []),
        f"* Machine: {facts['platform']}; {', '.join(dict.fromkeys(run['device'] for run in runs.values()))}",
        f"* Python {facts['python']}, "
        + ", ".join(f"{name} {facts['packages'].get(name, '-')}" for name in ("torch", "transformers")),
        "",
        "| stage | seconds |",
        "| --- | --- |",
        *(f"| {name} | {'' if run['wall_s'] is None else format(run['wall_s'], '.1f')} |" for name, run in runs.items()),
    ]
    return Section("How this was made", "\n".join(lines))


def readme_table(main_csv: Path) -> str:
    """The README's table, as Markdown, from a main.csv."""
    read_main(main_csv)  # checks its columns
    return markdown(summary(pd.read_csv(main_csv)))


def in_short(profile: str, paired: pd.DataFrame, contrasts: pd.DataFrame) -> list[str]:
    """Sentences on tables/paired.csv and tables/contrasts.csv, each of which follows from their intervals; the last concludes."""

    def named(rows: pd.DataFrame) -> str:
        spans = readable(rows)["difference, points"]
        found = [f"{r.comparison}, {r.benchmark} {r.metric}, {text}" for r, text in zip(rows.itertuples(), spans, strict=True)]
        return ": " + "; ".join(found) + " percentage points" if found else ""

    sure, kept = (frame[frame["p_holm"] < 0.05] for frame in (paired, contrasts))
    ran, metric = contrasts[contrasts["difference"].notna()], headline(paired)
    lines = [f"{len(sure)} of {count(len(paired), 'paired comparison')} are significant after Holm's adjustment{named(sure)}."]
    if len(contrasts):
        text = f"Of the {len(contrasts)} contrasts of FALCON planned beforehand {len(ran)} were run"
        lines.append(f"{text}, and {len(kept)} are significant after Holm's adjustment within each metric{named(kept)}.")
    sizes = [f"{100 * size:.1f}" for size in sorted(ran.loc[ran["metric"] == metric, "detectable"].dropna())]
    if sizes:
        text = " to ".join(dict.fromkeys((sizes[0], sizes[-1])))
        text = f"a true difference of {text} percentage points ({metric}); a smaller one is neither shown nor ruled out."
        lines.append(f"80 % of such studies would find {text}")
    if len(kept):
        told = f": FALCON differs beyond chance in {count(len(kept), 'planned contrast')}, named above"
    elif len(sure):
        told = ": differences in problems solved beyond chance, but none of FALCON's planned contrasts is one"
    else:
        told = " shows no difference in problems solved that chance would not explain: it does not rank the arms"
    lines.append(f"**Profile `{profile}`{told}.**")
    return lines


def publish(profile: str, reference: Path = REPO / "results" / "reference") -> Path:
    """Makes the complete run of `profile` the committed reference; `make reference` calls it, and then writes the README anew.

    Copies all but checkpoints, logs and locks; adapters and memories of WHOLE and of the baseline with the highest mean alone.
    The old reference goes only when the new one lies beside it. The committed logs of runs of their own (ablations/, search/)
    stay; modes/ are the run's own, since its tables rest on them.
    Raises FalconError when a stage has no manifest.
    """

    def left_out(folder: str, names: list[str]) -> set[str]:
        heavy = () if Path(folder).name in (*WHOLE, best) else ("adapter", "memory.sqlite")
        return shutil.ignore_patterns(*NOT_PUBLISHED, *heavy)(folder, names)

    root, target = results_root() / "runs" / profile, reference / profile
    for run in root.rglob("run.json"):
        if not (run.parent / "manifest.json").is_file():
            raise FalconError(f"stage {run.parent.name} of {root} is not complete", f"falconlib run --profile {profile}")
    read_main(root)  # checks its columns
    frame = plain(pd.read_csv(root / "tables" / "main.csv")).query("mode == 'zero-shot'")
    rivals = frame[(frame["metric"] == headline(frame)) & ~frame["arm"].str.match("base|sft|falcon")]
    best = f"{rivals.groupby('arm')['value'].mean().idxmax()}-s0" if len(rivals) else ""
    fresh = target.with_name(f".{profile}.new")
    with disk_errors(target):
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.copytree(root, fresh, ignore=left_out)
        for kept in [path for name in ("ablations", "search") for path in target.glob(f"{name}/*")]:
            if not (place := fresh / kept.relative_to(target)).exists():
                place.parent.mkdir(exist_ok=True)
                (shutil.copytree if kept.is_dir() else shutil.copyfile)(kept, place)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(fresh, target)
    return target


if __name__ == "__main__":
    try:
        sys.stdout.write(f"{publish(sys.argv[1] if len(sys.argv) > 1 else 'quick')}\n")
    except FalconError as problem:
        sys.exit(f"falconlib: {problem}")
