"""The README's tree of files, one line each. `python tests/readme_tree.py` writes it anew; a test compares it.

Modules are described by the first sentence of their docstring; folders and other files by the words below.
"""

import ast
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
START, END = "<!-- tree:start -->", "<!-- tree:end -->"
WIDTH = 96  # characters of a description
WORDS = {
    "README.md": "this page",
    "Makefile": "short names for the commands: setup, reproduce, test, lint, lab, notebooks",
    "pyproject.toml": "dependencies, the exclusive extras cpu and gpu (faiss), settings of ruff, pytest and jupytext",
    "constraints.txt": "the exact versions that the reference results were made with",
    "environment.yml": "the same for conda users",
    "CHANGELOG.md": "what changed for users",
    "CONTRIBUTING.md": "how to work on it, and how to add an arm, a data set, a judge, a notebook",
    "LOG.md": "the lab book: dated, failures included",
    "LICENSE": "Apache-2.0",
    "CITATION.cff": "how to cite",
    ".ci/run": "calls the test command",
    "data/": "committed tasks with their source and licence",
    "notebooks/": "00 to 10, reviewed .py paired with .ipynb; profiles/*.yaml",
    "results/": "reference/: committed runs; runs/: what you just made",
    "tests/": "mirrors falconlib",
    "benchmarks/": "speed against peers",
}


def sentence(path: Path) -> str:
    """The first sentence of a module's docstring, cut where a clause ends when it is longer than a line of the tree."""
    text = " ".join((ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split())
    first = text.split(". ")[0].rstrip(".")
    if len(first) > WIDTH:
        ends = [first.rfind(mark, 0, WIDTH) for mark in (": ", "; ", ", ", " (")]
        first = first[: max(ends)] if max(ends) > 20 else first[:WIDTH].rsplit(" ", 1)[0]
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


def inside(text: str) -> str:
    """What stands between the markers of the README."""
    return text.split(START)[1].split(END)[0].strip().removeprefix("```text\n").removesuffix("\n```")


if __name__ == "__main__":
    readme = REPO / "README.md"
    before, after = readme.read_text(encoding="utf-8").split(START)[0], readme.read_text(encoding="utf-8").split(END)[1]
    readme.write_text(f"{before}{START}\n```text\n{tree()}\n```\n{END}{after}", encoding="utf-8")
