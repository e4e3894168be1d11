"""One notebook, run by papermill in a child process of its own: `python -m falconlib.notebook`, driven by JSON on stdin.
`python -m falconlib.notebook pair` writes every notebooks/NN_name.ipynb anew from its reviewed NN_name.py, without outputs.

Also what the graph must know of a notebook before it runs: its code, its parameters cell, and whether the reviewed .py and
the .ipynb that is run say the same. An executed notebook proves nothing (a killed kernel marks every cell completed);
only the manifest that its last cell writes does, and the graph checks that.
"""

from __future__ import annotations

import ast
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from falconlib.errors import FalconError
from falconlib.files import sha256_of, write_text
from falconlib.reporting.run import REPO, die_with_parent

DEAD = "DeadKernelError"
# JupyterLab brings it, jsonschema imports it for a check that notebooks do not need, and it takes a second of each stage
sys.modules.setdefault("rfc3987_syntax", None)  # type: ignore[arg-type]


def read_cells(path: Path) -> list[dict[str, Any]]:
    """The cells of an .ipynb as {"type", "source", "tags"}, without empty ones. Raises FalconError when it is broken."""
    try:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        found = [(c["cell_type"], "".join(c["source"]).strip(), c.get("metadata", {}).get("tags", [])) for c in cells]
    except FileNotFoundError as error:
        raise FalconError(f"notebook {path.name} is missing", "make notebooks") from error
    except (ValueError, KeyError, TypeError) as error:
        raise FalconError(f"{path.name} is no notebook: {error}", "delete it, then make notebooks") from error
    return [{"type": kind, "source": source, "tags": sorted(tags)} for kind, source, tags in found if source]


def code_hash(path: Path) -> str:
    """SHA-256 over the code cells of an .ipynb: prose and outputs do not count."""
    return sha256_of([cell for cell in read_cells(path) if cell["type"] == "code"])


def check_pair(path: Path) -> None:
    """Raises FalconError when NN_name.ipynb and its reviewed NN_name.py differ in their cells."""
    twin = path.with_suffix(".py")
    if twin.is_file():
        with tempfile.TemporaryDirectory() as scratch:
            same = read_cells(write_pair(twin, Path(scratch))) == read_cells(path)
        if not same:
            back = f"after editing the .ipynb: jupytext --to py:percent notebooks/{path.name}"
            raise FalconError(f"{twin.name} and {path.name} differ", f"after editing the .py: make notebooks; {back}")


def write_pair(source: Path, folder: Path) -> Path:
    """The .ipynb of a percent .py, into `folder`: no outputs, and cell ids that depend on the cells alone (small diffs)."""
    import jupytext
    import nbformat

    notebook = jupytext.read(source)
    seen: Counter[str] = Counter()
    for cell in notebook.cells:
        name = sha256_of([cell.cell_type, cell.source])[:8]
        seen[name] += 1
        cell["id"] = name if seen[name] == 1 else f"{name}-{seen[name]}"
    notebook.nbformat_minor = 5
    notebook.metadata["language_info"] = {"name": "python"}
    return write_text(folder / f"{source.stem}.ipynb", nbformat.writes(notebook) + "\n")


def check_parameters_cell(path: Path, names: list[str]) -> None:
    """Raises FalconError unless exactly one cell is tagged `parameters` and it assigns each of `names`.

    papermill itself only warns about a name that the notebook does not know, and runs on with the default.
    """
    cells = [cell for cell in read_cells(path) if "parameters" in cell["tags"]]
    if len(cells) != 1:
        raise FalconError(f"{path.name} has {len(cells)} cells tagged `parameters`, one is expected", "tag its parameters cell")
    known = set()
    for statement in ast.parse(cells[0]["source"]).body:
        targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
        known |= {target.id for target in targets if isinstance(target, ast.Name)}
    for name in names:
        if name not in known:
            raise FalconError(f"{path.name} has no parameter {name}, only {', '.join(sorted(known))}", "add it to that cell")


class Child:
    """A child process that has papermill loaded and waits for one notebook, so that the next stage starts without delay."""

    def __init__(self, scratch: Path, env: dict[str, str]):
        environment = env | {name: value for name, value in os.environ.items() if name != "MPLBACKEND"}
        environment |= {
            "TQDM_MININTERVAL": "30",
            "FALCON_BATCH": "1",
            "PYTHONHASHSEED": "0",
            "PYDEVD_DISABLE_FILE_VALIDATION": "1",
            "JUPYTER_PREFER_ENV_PATH": "1",  # this environment's python3 kernel, not one of the user's
            "IPYTHONDIR": str(scratch / "ipython"),  # no start-up files, no shared history database
            "JUPYTER_RUNTIME_DIR": str(scratch / "runtime"),
        }
        command = [sys.executable, "-m", "falconlib.notebook"]
        self.process = subprocess.Popen(
            command, env=environment, cwd=REPO, text=True, process_group=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def begin(self, spec: dict[str, Any]) -> None:
        """Starts the notebook: spec has source, target, log (paths), parameters, stage (for the kernel), env."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # a child that died already is seen by wait()
            self.process.stdin.write(json.dumps(spec) + "\n")
            self.process.stdin.close()

    def wait(self, timeout: float) -> bool:
        """Whether the child has ended within `timeout` seconds."""
        try:
            self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            return False
        return True

    def family(self) -> list[Any]:
        """The child, its kernel and all their processes, as psutil knows them."""
        import psutil

        with contextlib.suppress(psutil.NoSuchProcess):
            if self.process.returncode is None:  # else its number may be another's by now
                parent = psutil.Process(self.process.pid)
                return [*parent.children(recursive=True), parent]
        return []

    def cpu_seconds(self) -> float:
        """CPU seconds that the family has used, as far as it is still there."""
        import psutil

        spent = 0.0
        for process in self.family():
            with contextlib.suppress(psutil.NoSuchProcess):
                spent += sum(process.cpu_times()[:2])
        return spent

    def result(self) -> dict[str, str]:
        """{} after success, else {"name", "message"} of the error, and "again" when no cell is to blame. `wait` was true."""
        assert self.process.stdout is not None
        text = self.process.stdout.read().strip()
        if text:
            return json.loads(text)
        return {} if self.process.returncode == 0 else {"name": "ChildProcessError", "message": f"exit {self.process.returncode}"}

    def stop(self) -> None:
        """Kills the child, its kernel and all their processes, and waits until they are gone; files are made to survive that."""
        import psutil

        family = self.family()
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(family, timeout=5)
        self.process.wait()


def execute(spec: dict[str, Any], prepare_only: bool = False) -> None:
    """Runs (or only parameterises) the notebook of `spec`; papermill's errors pass through."""
    import papermill

    escaped = {name: str(spec[name]).replace("{", "{{").replace("}", "}}") for name in ("source", "target")}
    settings = {"kernel_name": "python3", "language": "python", "progress_bar": False, "cwd": str(REPO), "start_timeout": 180}
    settings |= {"iopub_timeout": 60, "coalesce_streams": True, "autosave_cell_every": 30, "prepare_only": prepare_only}
    try:
        with contextlib.ExitStack() as stack:
            if not prepare_only:
                log = stack.enter_context(open(spec["log"], "a", encoding="utf-8"))
                settings |= {"stdout_file": log, "stderr_file": log}
            papermill.execute_notebook(escaped["source"], escaped["target"], parameters=spec["parameters"], **settings)
    finally:
        forget_paths(Path(spec["target"]))


def forget_paths(path: Path) -> None:
    """Takes this machine's folders out of an executed notebook's metadata."""
    if path.is_file():
        content = json.loads(path.read_text(encoding="utf-8"))
        for name in ("input_path", "output_path"):
            content["metadata"].get("papermill", {}).pop(name, None)
        write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def main() -> int:
    """In the child: one spec from stdin, one line of JSON to stdout when the notebook failed; all else goes to the log."""
    die_with_parent()
    import papermill.exceptions
    from nbclient.exceptions import DeadKernelError

    line = sys.stdin.readline()
    if not line:
        return 0  # the run ended before it needed this child
    spec = json.loads(line)
    answer = os.fdopen(os.dup(1), "w")
    log = os.open(spec["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(spec["env"])
    failure: dict[str, str] = {}
    try:
        execute(spec)
    except papermill.exceptions.PapermillExecutionError as error:
        failure = {"name": error.ename, "message": error.evalue}
    except DeadKernelError as error:
        failure = {"name": DEAD, "message": str(error)}
    except Exception as error:  # noqa: BLE001 - whatever broke is handed to the runner, which reports it
        failure = {"name": type(error).__name__, "message": str(error), "again": "yes"}
    if failure:
        answer.write(json.dumps(failure))
        answer.close()
    return 1 if failure else 0


if __name__ == "__main__":
    if sys.argv[1:] == ["pair"]:
        for reviewed in sorted((REPO / "notebooks").glob("[0-9][0-9]_*.py")):
            write_pair(reviewed, reviewed.parent)
        sys.exit(0)
    sys.exit(main())
