"""The solutions of the exercises are right: their code runs, and its asserts hold."""

from __future__ import annotations

import re

import pytest

from falconlib.notebook import read_cells
from falconlib.reporting.run import REPO

FOLDER = REPO / "notebooks"
NAMES = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
LATER = "# after the cells above"  # begins the code of a solution that goes on where the notebook ends


def solutions(name: str) -> list[list[str]]:
    """The code blocks of each solution of a notebook."""
    text = next(cell["source"] for cell in read_cells(FOLDER / f"{name}.ipynb") if "## Exercises" in cell["source"])
    hidden = re.findall(r"<details><summary>Solution</summary>\n\n(.*?)\n\n</details>", text, re.DOTALL)
    return [re.findall(r"```python\n(.*?)```", part, re.DOTALL) for part in hidden]


ALONE = [(name, code) for name in NAMES for part in solutions(name) for code in part if not code.startswith(LATER)]
CONTINUED = [name for name in NAMES if any(code.startswith(LATER) for part in solutions(name) for code in part)]


@pytest.mark.parametrize("name", NAMES)
def test_every_solution_holds_code(name):
    assert [len(part) for part in solutions(name)] == [1, 1]


@pytest.mark.parametrize(("name", "code"), ALONE, ids=[name for name, _ in ALONE])
def test_a_solution_runs_after_the_import_cell(name, code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    space: dict = {}
    exec(compile(read_cells(FOLDER / f"{name}.ipynb")[2]["source"], f"imports of {name}", "exec"), space)
    exec(compile(code, f"solution of {name}", "exec"), space)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONTINUED)
def test_a_solution_runs_where_its_notebook_ends(name, tmp_path, monkeypatch):
    import nbformat
    import papermill

    monkeypatch.setenv("FALCON_BATCH", "1")
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    last = notebook.cells.pop()  # closes what it opened
    codes = [code for part in solutions(name) for code in part if code.startswith(LATER)]
    notebook.cells += [*map(nbformat.v4.new_code_cell, codes), last]
    nbformat.write(notebook, tmp_path / "longer.ipynb")
    parameters = {"profile": "smoke", "results": str(tmp_path / "results")}
    papermill.execute_notebook(
        str(tmp_path / "longer.ipynb"), None, parameters=parameters, cwd=str(REPO), kernel_name="python3", progress_bar=False
    )
    assert (tmp_path / "results/runs/smoke" / name / "manifest.json").is_file()
