"""Run folders: where a notebook writes, what it was made from, and when it is complete.

Every notebook begins with `start` and ends with `Stage.finish`:

    stage = start("04_long_term_memory", {"profile": profile, "results": results, "overrides": overrides})
    ...
    stage.save_table(frame, "tables/retrieval")
    stage.finish()

`start` checks the parameters before anything runs and writes run.json; `finish` writes manifest.json last, and it alone
says that the stage is complete. This module decides nothing about freshness (workflow does) and draws nothing.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import functools
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from falconlib.config import ARMS, Profile, load_profile
from falconlib.errors import WORDS, FalconError, did_you_mean
from falconlib.files import disk_errors, read_json, sha256, write_json

REPO = Path(__file__).resolve().parents[2]
STAGE_ENV = "FALCON_STAGE"  # JSON that the runner hands to the kernel: stage, token, key, command
PARAMETERS = {"profile": str, "results": str, "overrides": dict, "arm": str, "seed": int}
GRID_NOTEBOOK = "06_train"


def results_root(results: str = "") -> Path:
    """The results folder: the parameter, else $FALCON_RESULTS, else `results` of the repository (relative: to it)."""
    return REPO / (results or os.environ.get("FALCON_RESULTS") or "results")


def stage_key(notebook: str, arm: str | None = None, seed: int | None = None) -> str:
    """Folder of a stage below results/runs/<profile>: the notebook's name, or train/<arm>-s<seed> for the grid."""
    return f"train/{arm}-s{seed}" if arm is not None else notebook


def start(notebook: str, parameters: dict[str, Any]) -> Stage:
    """First call of each notebook: checks the parameters, makes the run folder, writes run.json.

    Args:
        notebook: the notebook's name without ending, e.g. "06_train".
        parameters: the parameters cell as a dict: "profile" (name), "results" (root, "" for the default), "overrides"
            (dotted name -> value); for 06_train also "arm" and "seed".

    Raises FalconError for an unknown name (papermill's -p too), a wrong type, an unknown profile or arm, before it writes.
    """
    check_parameters(notebook, parameters)
    arm, seed = parameters.get("arm"), parameters.get("seed")
    overrides = dict(parameters["overrides"])
    if arm is not None:
        overrides |= {"train.arm": arm, "train.seed": seed}
    profile = load_profile(parameters["profile"], overrides)
    root = results_root(parameters["results"]) / "runs" / profile.name
    handed = json.loads(os.environ.get(STAGE_ENV, "{}"))
    if handed:
        die_with_parent()
    return Stage(stage_key(notebook, arm, seed), profile, root, dict(parameters), handed)


def check_parameters(notebook: str, parameters: dict[str, Any]) -> None:
    """Raises FalconError unless exactly the parameters of this notebook are there, each of its type."""
    expected = [name for name in PARAMETERS if notebook == GRID_NOTEBOOK or name not in ("arm", "seed")]
    for name in [*injected(), *parameters]:
        if name not in expected:
            raise did_you_mean(f"parameter of {notebook}", name, expected)
    for name, value in parameters.items():
        kind = PARAMETERS[name]
        if not isinstance(value, kind) or isinstance(value, bool):
            hints = {dict: "papermill: -y 'overrides: {train.steps: 5}'", int: f"{name} = 0", str: f'{name} = "..."'}
            raise FalconError(f"parameter {name} = {value!r} of {notebook}: {WORDS[kind.__name__]} is expected", hints[kind])
    missing = [name for name in expected if name not in parameters]
    if missing:
        raise FalconError(f"parameter {missing[0]} of {notebook} is missing", f"the parameters cell holds {', '.join(expected)}")
    if "arm" in parameters and parameters["arm"] not in ARMS:
        raise did_you_mean("arm", parameters["arm"], ARMS)


def injected() -> list[str]:
    """The names that papermill's own cell assigns, of this kernel's history: of an unknown one papermill only warns."""
    cells = [cell for cell in vars(sys.modules["__main__"]).get("In", ()) if cell.startswith("# Parameters\n")]
    targets = [target for cell in cells for node in ast.walk(ast.parse(cell)) for target in getattr(node, "targets", ())]
    return [target.id for target in targets if isinstance(target, ast.Name)]


class Stage:
    """One run of one notebook.

    profile: the typed configuration (train.arm and train.seed set for 06_train). root: results/runs/<profile>, where
    tables/ and figures/ lie. folder: of this stage, for its metrics, samples, checkpoints. key: folder relative to root.
    from_reference: the files that `find` took from the committed reference results.
    """

    def __init__(self, key: str, profile: Profile, root: Path, parameters: dict[str, Any], handed: dict[str, Any]):
        self.key, self.profile, self.root, self.folder = key, profile, root, root / key
        self.parameters, self.handed = parameters, handed
        self.from_reference: list[str] = []
        self.inputs: dict[str, str] = {}
        self.outputs: list[str] = []
        self.began = time.perf_counter()
        with disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            proof = self.folder / "manifest.json"
            self.kept = not handed and proof.is_file() and b'"token": "' in proof.read_bytes()  # cells by hand: a run's proof
            if not self.kept:  # stays until `finish`
                proof.unlink(missing_ok=True)
        self.facts = provenance(profile, parameters, handed.get("command") or "by hand")
        self._write_run()

    def note(self, **facts: Any) -> None:
        """Adds facts to run.json: model, data (fingerprints), sandbox (layers), configs_tried, trained_tokens, ...

        Known keys start as None (unknown); other keys are added.
        """
        self.facts |= facts
        self._write_run()

    def path(self, relative: str) -> Path:
        """`relative` below root ("tables/tasks.csv"), its folder made. Name it in `finish(outputs=...)`."""
        target = self.root / relative
        with disk_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
        return target

    def find(self, relative: str) -> Path:
        """An earlier stage's file or folder: of this run when it is complete, else of the committed reference results.

        Reference files are noted in run.json and in `from_reference`: the notebook must say so.
        Raises FalconError with the command that makes it when it is nowhere.
        """
        for base in (self.root, *reference_roots(self.profile.name)):
            target = base / relative
            if target.exists() and not unfinished(target, base):
                prefix = "" if base == self.root else f"results/reference/{base.name}/"
                if prefix:
                    self.from_reference.append(relative)
                    self.note(from_reference=self.from_reference)
                for file in [target] if target.is_file() else sorted(p for p in target.rglob("*") if p.is_file()):
                    self.inputs[prefix + file.relative_to(base).as_posix()] = sha256(file)
                return target
        raise FalconError(f"{relative} is not there: no complete stage wrote it", f"falconlib run --profile {self.profile.name}")

    def save_table(self, frame: Any, stem: str) -> Path:
        """Writes a DataFrame as `<stem>.csv` below root, without its index, and counts it among the outputs."""
        from falconlib.reporting.tables import write_csv

        target = write_csv(frame, self.root / f"{stem}.csv")
        self.outputs.append(f"{stem}.csv")
        return target

    def save_figure(self, figure: Any, stem: str, frame: Any) -> None:
        """Writes `<stem>.svg`, `.png` and its data `<stem>.csv` below root, and counts them among the outputs."""
        from falconlib.reporting.figures import save

        save(figure, self.root / stem, frame)
        self.outputs += [f"{stem}.{ending}" for ending in ("svg", "png", "csv")]

    def finish(self, outputs: tuple[str | Path, ...] | list[str | Path] = ()) -> None:
        """Last call of each notebook: completes run.json, then writes manifest.json atomically, with every hash.

        Args:
            outputs: what the notebook wrote besides save_table and save_figure: paths below root (a folder: all in it).

        Raises FalconError when an output is missing, empty, or outside root; then there is no manifest.
        """
        hashes: dict[str, str] = {}
        for output in [*self.outputs, *outputs]:
            target = self.root / output
            files = sorted(p for p in target.rglob("*") if p.is_file()) if target.is_dir() else [target]
            for file in files or [target]:
                if not file.is_file() or not file.resolve().is_relative_to(self.root.resolve()):
                    raise FalconError(f"output {output} of {self.key} is no file below {self.root}", "write it before finish()")
                hashes[file.relative_to(self.root).as_posix()] = sha256(file)
        self.facts |= {"wall_s": round(time.perf_counter() - self.began, 3), "peak_mb": peak_mb()}
        self.facts |= {"device": device(), "complete": True}
        self.kept = False
        self._write_run()
        key = self.handed.get("key") or {"parameters": self.parameters}
        manifest = {"stage": self.key, "token": self.handed.get("token"), **key, "read": self.inputs, "outputs": hashes}
        write_json(self.folder / "manifest.json", manifest)
        if not self.handed:  # else the notebook is still being written: the runner copies
            keep_copy(self.root, self.key)

    def _write_run(self) -> None:
        if not self.kept:
            write_json(self.folder / "run.json", {"stage": self.key, **self.facts})


def keep_copy(root: Path, key: str) -> None:
    """Copies a complete stage to $FALCON_COPY/runs/<profile>, if that is set and lacks it: what it wrote, its records and its
    executed notebook, and its manifest last: a copy that was cut off is no complete stage."""
    proof = f"{key}/manifest.json"
    if copy := os.environ.get("FALCON_COPY"):  # Google Drive: too slow and too loosely locked to work in
        target = Path(copy) / "runs" / root.name
        with disk_errors(target):
            if (target / proof).is_file() and (target / proof).read_bytes() == (root / proof).read_bytes():
                return
            (target / proof).unlink(missing_ok=True)
            records = [f"{key}/{p.name}" for p in (root / key).iterdir() if p.suffix in (".json", ".jsonl", ".ipynb")]
            for name in [*read_json(root / proof)["outputs"], *(name for name in records if name != proof), proof]:
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(root / name, target / name)


def reference_roots(profile: str) -> list[Path]:
    """Where committed results lie: those of this profile, then those of `quick`."""
    return [REPO / "results" / "reference" / name for name in dict.fromkeys((profile, "quick"))]


def unfinished(target: Path, base: Path) -> bool:
    """Whether `target` lies in a stage folder that has begun (run.json) but is not complete (no manifest.json)."""
    folders = [target, *target.parents]
    return any((f / "run.json").is_file() and not (f / "manifest.json").is_file() for f in folders[: folders.index(base)])


def provenance(profile: Profile, parameters: dict[str, Any], command: str) -> dict[str, Any]:
    """What run.json says at the start. None: not known (yet)."""
    return {
        "config": dataclasses.asdict(profile),
        "parameters": parameters,
        "seed": profile.train.seed,
        "command": command,
        "git": git_state(),
        "python": platform.python_version(),
        "packages": versions(),
        "platform": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "device": device(),
        "dtype": profile.model.dtype,
        **dict.fromkeys(("model", "data", "sandbox", "wall_s", "peak_mb")),
        "complete": False,
    }


def git_state() -> dict[str, Any]:
    """{"commit": hex, "dirty": bool}: dirty when a tracked or new file differs, results aside; None without git."""
    commit = _git("rev-parse", "HEAD")
    changes = _git("status", "--porcelain", "--", ".", ":(exclude)results")
    return {"commit": commit, "dirty": None if changes is None else bool(changes)}


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(REPO), *arguments], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


@functools.cache
def versions() -> dict[str, str]:
    """Installed versions of the packages that falconlib depends on; {} when falconlib itself is not installed."""
    try:
        names = sorted({re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in importlib.metadata.requires("falconlib") or ()})
    except importlib.metadata.PackageNotFoundError:
        return {}
    found = {}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # an extra that is not installed
            found[name] = importlib.metadata.version(name)
    return found


def device() -> str:
    """The device in words. torch is asked only when it is loaded: a stage without torch ran on the CPU."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return f"cuda: {torch.cuda.get_device_name()}"
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        name = next(line.split(":", 1)[1].strip() for line in cpuinfo.splitlines() if line.startswith("model name"))
    return f"cpu: {name}"


def peak_mb() -> int:
    """The most memory (MB) that this process has held at once, its children aside."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (2**20 if sys.platform == "darwin" else 2**10)


def die_with_parent() -> None:
    """Asks Linux to kill this process when its parent dies, so that a killed run leaves no kernel behind."""
    if sys.platform == "linux":
        import ctypes
        import signal

        ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
