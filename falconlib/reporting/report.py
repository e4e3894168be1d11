"""The report: report.md, a self-contained report.html, the table in the README, and the committed reference results.

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
from falconlib.reporting.tables import markdown, read_main, summary

START, END = "<!-- results:start -->", "<!-- results:end -->"
NOT_PUBLISHED: tuple[str, ...] = ("checkpoints", "prepared", "attempt.json", "log.txt", "run.lock", ".ipynb_checkpoints")
NOT_PUBLISHED += ("*.sqlite-wal", "*.sqlite-shm", "*.faiss*")
STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem;color:#1a1a1a;background:#fff}
table{border-collapse:collapse;display:block;overflow-x:auto;margin:1rem 0;font-size:.9em}
th,td{border-bottom:1px solid #bbb;padding:.3rem .6rem;text-align:left;font-variant-numeric:tabular-nums}td{white-space:nowrap}
th:first-child,td:first-child{position:sticky;left:0;background:#fff}
th button{font:inherit;font-weight:600;background:none;border:0;padding:0;cursor:pointer;text-align:left}
pre{overflow-x:auto;background:#f0f0f0;padding:.6rem;font-size:.85em}pre code{padding:0}
img{max-width:min(100%,56rem);height:auto}figure{margin:1.5rem 0}figcaption{color:#444}code{background:#f0f0f0;padding:0 .2em}
"""
SCRIPT = """
document.querySelectorAll("table").forEach(function (table) {
  table.querySelectorAll("th").forEach(function (head, column) {
    var button = document.createElement("button"); button.textContent = head.textContent;
    head.textContent = ""; head.appendChild(button); var up = false;
    button.addEventListener("click", function () {
      up = !up; var body = table.tBodies[0], rows = Array.from(body.rows);
      rows.sort(function (a, b) {
        var x = a.cells[column].textContent, y = b.cells[column].textContent, d = parseFloat(x) - parseFloat(y);
        if (!x || !y) { return (x ? 0 : 1) - (y ? 0 : 1); }  // unknown stays last
        return (isNaN(d) ? x.localeCompare(y) : d) * (up ? 1 : -1); });
      rows.forEach(function (row) { body.appendChild(row); }); }); }); });
"""


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
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{entities.escape(title)}</title>'
    page = f"{head}<style>{STYLE}</style></head><body><main>{body}</main><script>{SCRIPT}</script></body></html>\n"
    return f'<!doctype html>\n<html lang="en"><head>{page}'


def provenance(root: Path) -> Section:
    """How the results were made: command, commit, machine, versions, and the wall time of each stage, from run.json."""
    runs = {path.parent.relative_to(root).as_posix(): read_json(path) for path in sorted(root.rglob("run.json"))}
    if not runs:
        raise FalconError(f"{root} holds no run.json", "falconlib run")
    facts = list(runs.values())[-1]
    commit = facts["git"]["commit"]
    dirty = " with uncommitted changes" if facts["git"]["dirty"] else ""
    lines = [
        f"* Command: `{facts['command']}`",
        f"* Commit: {commit[:12] + dirty if commit else 'unknown'}",
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


def update_readme(path: Path, table: str) -> None:
    """Puts `table` between the README's result markers. Raises FalconError when the markers are not there once each."""
    text = Path(path).read_text(encoding="utf-8")
    if text.count(START) != 1 or text.count(END) != 1 or text.index(START) > text.index(END):
        raise FalconError(f"{path} does not hold {START} and then {END}, once each", "put both markers where the table belongs")
    before, after = text.split(START)[0], text.split(END)[1]
    write_text(Path(path), f"{before}{START}\n{table.strip()}\n{END}{after}")


def publish(profile: str, readme: Path = REPO / "README.md", reference: Path = REPO / "results" / "reference") -> Path:
    """Makes the complete run of `profile` the committed reference, and its table the README's. `make reference` calls it.

    Copies all but checkpoints, logs and locks; the old reference goes only when the new one lies beside it. The committed
    logs of the ablation runs (ablations/) come from runs of their own and stay.
    Raises FalconError when a stage has no manifest.
    """
    root, target = results_root() / "runs" / profile, reference / profile
    for run in root.rglob("run.json"):
        if not (run.parent / "manifest.json").is_file():
            raise FalconError(f"stage {run.parent.name} of {root} is not complete", f"falconlib run --profile {profile}")
    table = readme_table(root / "tables" / "main.csv")
    fresh = target.with_name(f".{profile}.new")
    with disk_errors(target):
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.copytree(root, fresh, ignore=shutil.ignore_patterns(*NOT_PUBLISHED))
        if (target / "ablations").is_dir():
            shutil.copytree(target / "ablations", fresh / "ablations")
        shutil.rmtree(target, ignore_errors=True)
        os.replace(fresh, target)
    update_readme(readme, table)
    return target


if __name__ == "__main__":
    try:
        sys.stdout.write(f"{publish(sys.argv[1] if len(sys.argv) > 1 else 'quick')}\n")
    except FalconError as problem:
        sys.exit(f"falconlib: {problem}")
