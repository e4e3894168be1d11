"""The README's results, table of notebooks and tree of files. `python tests/readme_tree.py` writes them anew; a test compares.

The results come from the tables of the committed runs, largest study first; nothing in them is typed. A notebook's row holds
the question of its title cell, and run time and memory of the committed run of `quick`. Modules are described by the first
sentence of their docstring; folders and other files by the words below.
"""

import ast
import json
import re
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
REFERENCE = REPO / "results" / "reference" / "quick"
RESULTS = "<!-- results:start -->", "<!-- results:end -->"
START, END = "<!-- tree:start -->", "<!-- tree:end -->"
NOTEBOOKS = "<!-- notebooks:start -->", "<!-- notebooks:end -->"
WIDTH = 96  # characters of a description
WORDS = {
    "README.md": "this page",
    "Makefile": "short names for the commands: setup, reproduce, test, lint, lab, notebooks",
    "pyproject.toml": "dependencies, the exclusive extras cpu and gpu (faiss), settings of ruff, mypy, pytest and jupytext",
    "constraints.txt": "the exact versions that the reference results were made with",
    "constraints-gpu.txt": "the same with the GPU build of faiss",
    "constraints-colab.txt": "what Colab's image lacks",
    "environment.yml": "the same for conda users",
    "CHANGELOG.md": "what changed for users",
    "CONTRIBUTING.md": "how to work on it, and how to add an arm, a data set, a judge, a notebook",
    "LOG.md": "the lab book: dated, failures included",
    "LICENSE": "Apache-2.0",
    "CITATION.cff": "how to cite",
    ".pre-commit-config.yaml": "ruff, the pairs of notebooks and the search for secrets, at each commit",
    ".ci/run": "calls the test command",
    "docs/": "pictures of this page",
    "data/": "committed tasks with their source and licence",
    "notebooks/": "00 to 10, reviewed .py paired with .ipynb; profiles/*.yaml",
    "results/": "reference/: committed runs, and why these (README.md there); runs/: what you just made",
    "tests/": "mirrors falconlib",
    "benchmarks/": "speed against peers",
}


def sentence(path: Path) -> str:
    """The first sentence of a module's docstring, cut where a clause ends when it is longer than a line of the tree."""
    text = " ".join((ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split())
    first = re.split(r"(?<!\bal)(?<!\be\.g)(?<!\bi\.e)\.(?= [A-Z0-9`]|$)", text)[0]
    if len(first) > WIDTH:
        ends = [first.rfind(mark, 0, WIDTH) for mark in (": ", "; ", ", ", " (")]
        first = first[: max(ends)] if max(ends) > 20 else first[:WIDTH].rsplit(" ", 1)[0]
    while first.count("(") > first.count(")"):
        first = first[: first.rindex("(")].rstrip(" ,;:")
    return first


def tree() -> str:
    """The tree as text: the files above, then falconlib with every module."""
    lines = [f"{name:32}  {words}" for name, words in WORDS.items() if (REPO / name).exists()]
    lines.append(f"{'falconlib/':32}  the method")
    package = REPO / "falconlib"
    for path in sorted(package.rglob("*.py"), key=lambda p: (p.parent != package, p.parent, p.name != "__init__.py", p.name)):
        if path == package / "__init__.py":
            continue
        room = path.name == "__init__.py"
        name = f"{path.parent.name}/" if room else path.name
        depth = len(path.relative_to(package).parts) - room
        lines.append(f"{'  ' * depth + name:32}  {sentence(path)}".rstrip())
    return "\n".join(lines)


def stages() -> list[Path]:
    """run.json of every stage of the reference run; the committed logs of ablations are runs of their own."""
    return sorted([*REFERENCE.glob("*/run.json"), *REFERENCE.glob("train/*/run.json")])


def cost(name: str) -> tuple[str, str]:
    """Run time and memory of a notebook in the reference run: all its stages together, its largest stage; "" is unknown."""
    folders = (REFERENCE / "train").glob("*") if name == "06_train" else [REFERENCE / name]
    runs = [
        json.loads((folder / "run.json").read_text(encoding="utf-8")) for folder in folders if (folder / "run.json").is_file()
    ]
    seconds, peaks = [run.get("wall_s") for run in runs], [run.get("peak_mb") for run in runs]
    time = f"{sum(seconds):.0f} s" if seconds and None not in seconds else ""
    return time, f"{max(peaks) / 1024:.1f} GB" if peaks and None not in peaks else ""


def results(reference: Path = REPO / "results" / "reference") -> str:
    """Each committed run, the one with most problems and seeds first: percent solved, the picture, differences, in short."""
    import pandas as pd

    from falconlib.reporting.report import in_short, readme_table
    from falconlib.reporting.tables import count, differences_table, markdown, plain

    runs = {path.parents[1]: plain(pd.read_csv(path)) for path in reference.glob("*/tables/main.csv")}
    parts = []
    for folder, main in sorted(runs.items(), key=lambda run: -(run[1]["n"] * run[1]["seeds"]).max()):
        name, place = folder.name, folder.relative_to(reference.parents[1])
        paired, contrasts = (pd.read_csv(folder / "tables" / f"{table}.csv") for table in ("paired", "contrasts"))
        size = ", ".join([count(main["arm"].nunique(), "arm"), count(main["seeds"].max(), "seed")])
        met = main.groupby("benchmark", sort=False)["n"].max()
        one = f"{count(met.iloc[0], 'problem')} of each benchmark" if met.nunique() == 1 else ""
        size += ", " + (one or " and ".join(f"{n} problems of {benchmark}" for benchmark, n in met.items()))
        links = f"[report]({place}/report.md), [settings](notebooks/profiles/{name}.yaml)"
        picture = f"![Problems solved per arm with 95 % intervals, profile {name}]({place}/figures/solved.png)"
        picture = [] if parts else [picture]  # of the first alone
        parts += [f"### Profile `{name}`: {size}", f"Percent of problems solved ({links}):"]
        parts += [readme_table(folder / "tables/main.csv"), *picture]
        parts += ["Differences in percentage points:", markdown(differences_table(paired))]
        parts += ["\n".join(f"* {line}" for line in in_short(name, paired, contrasts))]
    return "\n\n".join(part.strip() for part in parts)


def notebooks() -> str:
    """The table: notebook with its link, question, time, memory, badge; last the time of all."""
    rows = ["| notebook | question it answers | time | memory | |", "|---|---|---:|---:|---|"]
    for path in sorted((REPO / "notebooks").glob("[0-9]*.py")):
        title = "\n".join(line.removeprefix("#").removeprefix(" ") for line in path.read_text(encoding="utf-8").splitlines())
        question = " ".join(re.search(r"(?s)\*\*Question\.\*\*(.*?\?)", title)[1].split())
        badge = re.search(r"\[!\[Open In Colab\].*", title)[0]
        rows.append(f"| [{path.stem}](notebooks/{path.stem}.ipynb) | {' | '.join((question, *cost(path.stem), badge))} |")
    seconds = [json.loads(file.read_text(encoding="utf-8"))["wall_s"] for file in stages()]
    rows.append(f"| all | | {sum(seconds) / 60:.1f} min | | |")
    return "\n".join(rows)


def inside(text: str, start: str = START, end: str = END) -> str:
    """What stands between two markers of the README."""
    return text.split(start)[1].split(end)[0].strip().removeprefix("```text\n").removesuffix("\n```")


def replaced(text: str, start: str, end: str, new: str) -> str:
    return f"{text.split(start)[0]}{start}\n{new}\n{end}{text.split(end)[1]}"


if __name__ == "__main__":
    readme = REPO / "README.md"
    text = replaced(readme.read_text(encoding="utf-8"), START, END, f"```text\n{tree()}\n```")
    text = replaced(text, *RESULTS, results())
    readme.write_text(replaced(text, *NOTEBOOKS, notebooks()), encoding="utf-8")
