"""CONTRIBUTING's worked examples, each applied to a copy of the repository and run there."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
TEXT = (REPO / "CONTRIBUTING.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"(?ms)^## (A new .*?)\n(.*?)(?=^## |\Z)", TEXT))
BLOCK = re.compile(r"(?ms)^```(\w+) ?(\S*)\n(.*?)^```$")


def edit(path: Path, diff: str) -> None:
    """Applies a diff block: each hunk's old lines must stand in the file exactly once."""
    for hunk in diff.split("@@\n"):
        lines = hunk.splitlines()
        old = "".join(line[1:] + "\n" for line in lines if line[:1] != "+")
        new = "".join(line[1:] + "\n" for line in lines if line[:1] != "-")
        text = path.read_text(encoding="utf-8")
        assert text.count(old) == 1, f"{path.name} does not hold this once:\n{old}"
        path.write_text(text.replace(old, new), encoding="utf-8")


@pytest.mark.parametrize("title", ["A new arm", "A new judge", "A new data set", "A new notebook"])
def test_the_worked_example_runs(title, tmp_path):
    blocks = BLOCK.findall(SECTIONS[title])
    assert 0 < sum(content.count("\n") for kind, _, content in blocks if kind != "bash") < 40, "an example fits a screen"
    for name in ("falconlib", "notebooks", "data"):
        shutil.copytree(REPO / name, tmp_path / name, ignore=shutil.ignore_patterns("downloads", "0*_*", "10_*"))
    shutil.copy(REPO / "pyproject.toml", tmp_path)
    (tmp_path / "tests").mkdir()
    commands = []
    for kind, name, content in blocks:
        if kind == "diff":
            edit(tmp_path / name, content)
        elif kind == "python":
            assert not (tmp_path / name).exists()
            (tmp_path / name).write_text(content, encoding="utf-8")
            if name.startswith("tests/"):
                commands.append(f"python -m pytest -p no:cacheprovider {name}\n")
        else:
            commands.append(content)
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    environment |= {"FALCON_RESULTS": str(tmp_path / "results"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(["bash", "-e", "-o", "pipefail", "-c", "".join(commands)], cwd=tmp_path, env=environment,
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert commands and done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    assert "1 passed" in done.stdout or "11_lengths: done" in done.stdout


def test_the_examples_run_in_the_copy(tmp_path):
    (tmp_path / "falconlib").mkdir()
    (tmp_path / "falconlib" / "__init__.py").write_text("here = True\n")
    script = "import falconlib; assert falconlib.here"
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, check=False)
    assert done.returncode == 0
