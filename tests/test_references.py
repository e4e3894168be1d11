"""The committed references: what notebooks 07 and 08 make of the committed logs is what is committed, byte for byte."""

import contextlib
import io
import re
import shlex
from pathlib import Path

import pytest

from falconlib.notebook import read_cells

REPO = Path(__file__).resolve().parents[1]
REFERENCE = REPO / "results" / "reference"


@pytest.fixture(scope="module", params=["quick", "small-cpu"])
def again(request, tmp_path_factory):
    """(run folder, reference folder, what was printed): the code cells of 07 and 08, run here on the committed logs alone."""
    results, said, before = tmp_path_factory.mktemp("results"), io.StringIO(), Path.cwd()
    for name in ("07_benchmarks", "08_ablations"):
        cells = [cell for cell in read_cells(REPO / "notebooks" / f"{name}.ipynb") if cell["type"] == "code"]
        scope = {"__name__": name}
        with contextlib.redirect_stdout(said), contextlib.chdir(REPO / "notebooks"):
            for cell in cells:
                exec(cell["source"], scope)
                if "parameters" in cell["tags"]:
                    scope |= {"profile": request.param, "results": str(results)}
    assert Path.cwd() == before
    return results / "runs" / request.param, REFERENCE / request.param, said.getvalue()


def test_the_sweep_that_08_prints_names_an_adapter_that_is_there(again):
    from falconlib.cli import parser

    root, reference, said = again
    options = parser().parse_args(shlex.split(re.search(r"Per temperature: falconlib (.+)", said)[1]))
    assert REPO / options.adapter == reference / "train/falcon-s0/adapter" and options.adapter.parts[0] == "results"
    assert (options.profile, options.set) == (reference.name, ["eval.temperature=0.2"])
    assert (REPO / options.out).resolve() == (root / "ablations/temperature/0.2").resolve()
