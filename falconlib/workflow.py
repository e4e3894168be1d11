"""Running the graph: skips what is up to date, one process per notebook, resumes after a crash.

A stage has succeeded when its process ended with 0 AND the manifest was written by this very attempt AND every declared
output exists with its recorded hash. Whatever kills the run (SIGKILL, Ctrl-C, a full disk) leaves folders from which the
next run goes on: an interrupted stage keeps its checkpoints when its key is still the same, and starts afresh otherwise.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from falconlib.errors import FalconError
from falconlib.files import disk_errors, read_json, write_json
from falconlib.graph import Status, Step, Workflow, differences
from falconlib.notebook import DEAD, Child, execute
from falconlib.reporting.run import STAGE_ENV

OFFLINE_PROFILES = ("smoke", "quick")  # need no hub: everything they read lies in wheels and in data/
FREE_MB = 200  # below this nothing is started
REDRAW = "\r\x1b[K"  # terminal: to the start of the line, clear it


def run(workflow: Workflow, steps: list[Step], force: bool = False, *, echo: Callable[[str], None], live: bool = False) -> int:
    """Runs what is not up to date, in order. Returns 0, or 1 when a stage failed (the later ones are not tried).

    Args:
        workflow: the graph with its profile. steps: of `graph.select`. force: run them even when they are up to date,
            from their beginning. echo: takes each line. live: echo also takes lines that redraw the last one (REDRAW).

    Raises FalconError (bad input that a notebook found, a full disk, another run in the same folder) and
    KeyboardInterrupt, both after the child is stopped.
    """
    with disk_errors(workflow.root):
        workflow.root.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(workflow.root).free < FREE_MB * 2**20:
            raise FalconError(
                f"less than {FREE_MB} MB are free for {workflow.root}", "free some, or set FALCON_RESULTS to another disk"
            )
    with lock(workflow.root), tempfile.TemporaryDirectory(prefix="falcon-") as scratch, Children(Path(scratch)) as children:
        progress = Progress(workflow, steps, force, echo, live)
        for step in steps:
            status = workflow.status(step)
            if status.state == "up to date" and not force:
                progress.skip(step)
                continue
            progress.begin(step, status)
            problem = attempt(workflow, step, children, progress, force)
            progress.end(step, problem)
            if problem:
                return 1
    return 0


def attempt(workflow: Workflow, step: Step, children: Children, progress: Progress, force: bool) -> str:
    """Runs one step. Returns "" when it succeeded, else what is wrong; the notebook's own FalconError is raised."""
    folder, key, token = workflow.root / step.key, workflow.key(step), secrets.token_hex(8)
    began = time.monotonic()
    prepare_folder(folder, key, force)
    record = {"key": key, "token": token, "state": "running"}
    write_json(folder / "attempt.json", record)
    source = children.scratch / f"{step.node.name}.ipynb"
    shutil.copyfile(workflow.source(step.node), source)  # what runs is what was hashed, whatever is saved meanwhile
    handed = {"stage": step.key, "token": token, "key": key, "command": workflow.command}
    env = {STAGE_ENV: json.dumps(handed)}
    if workflow.profile.name in OFFLINE_PROFILES:
        env["HF_HUB_OFFLINE"] = os.environ.get("HF_HUB_OFFLINE", "1")
    paths = {"source": str(source), "target": str(workflow.executed(step)), "log": str(folder / "log.txt")}
    with children.take() as child:
        child.begin({**paths, "parameters": workflow.parameters(step), "env": env})
        children.prepare()
        while not child.wait(0.5):
            progress.tick(step, time.monotonic() - began)
        failure = child.result()
    problem = explain(failure, folder) if failure else unproven(workflow, step, token)
    wall = round(time.monotonic() - began, 3)
    write_json(folder / "attempt.json", {**record, "state": "failed" if problem else "done", "problem": problem, "wall_s": wall})
    if failure.get("name") == "FalconError":
        message, _, remedy = failure["message"].partition("\n  remedy: ")
        raise FalconError(f"{step.label}: {message}", remedy)
    return problem


def prepare_folder(folder: Path, key: dict[str, Any], force: bool) -> None:
    """Empties a stage's folder, unless its last attempt was interrupted or failed with the same key: then it resumes."""
    previous: dict[str, Any] = {"state": "unknown"}
    with contextlib.suppress(FalconError):
        previous = read_json(folder / "attempt.json")
    resumes = previous["state"] in ("running", "failed") and not differences(previous["key"], key)
    with disk_errors(folder):
        if force or not resumes:
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "manifest.json").unlink(missing_ok=True)


def unproven(workflow: Workflow, step: Step, token: str) -> str:
    """Why an attempt that ended with 0 is no success, "" when it is one."""
    path = workflow.root / step.key / "manifest.json"
    if not path.is_file() or read_json(path).get("token") != token:
        return "it ended without writing its manifest: its last cell did not run"
    return "; ".join(workflow.broken_outputs(step, read_json(path)))


def explain(failure: dict[str, str], folder: Path) -> str:
    """The failure of a child in words."""
    if failure["name"] == DEAD:
        return (
            f"its kernel died, probably out of memory: try a smaller train.micro_tokens or eval limit; log: {folder / 'log.txt'}"
        )
    return f"{failure['name']}: {failure['message']}; log: {folder / 'log.txt'}"


def prepare(workflow: Workflow, steps: list[Step], echo: Callable[[str], None]) -> None:
    """Writes each step's notebook with its parameters filled in, not run, to open in JupyterLab: <root>/prepared/."""
    for step in steps:
        target = workflow.root / "prepared" / f"{step.key.replace('/', '-')}.ipynb"
        with disk_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
        source = str(workflow.source(step.node))
        execute({"source": source, "target": str(target), "parameters": workflow.parameters(step)}, prepare_only=True)
        echo(f"{target}")


def plan(workflow: Workflow, steps: list[Step], force: bool, why: bool) -> list[str]:
    """One line per step: its status, and what a run would do. why: every reason on a line of its own."""
    lines, runs = [], set()
    for step in steps:
        status = workflow.status(step)
        if force or status.state != "up to date":
            runs.add(step.key)
        verdict = "runs" if step.key in runs else "skipped"
        if step.key not in runs and runs & set(step.needs):
            verdict = "runs if the outputs of the stages before it change"
        lines.append(f"{step.label:40} {status.state:11} {verdict}")
        lines += [f"    {reason}" for reason in status.reasons] if why else []
    return lines


@contextlib.contextmanager
def lock(root: Path) -> Iterator[None]:
    """Keeps a second run out of `root`, which it makes. The kernel frees the lock when its holder dies, however it dies."""
    path = root / "run.lock"
    with disk_errors(path):  # not around the yield: the run's own errors are not about the lock
        root.mkdir(parents=True, exist_ok=True)
        handle = open(path, "a+", encoding="utf-8")  # noqa: SIM115
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            handle.seek(0)
            holder = handle.read().strip() or "unknown"
            raise FalconError(f"another run is working in {root}: {holder}", "wait for it, or stop that process") from error
        handle.truncate(0)
        handle.write(f"process {os.getpid()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}")
        handle.flush()
        yield


class Children:
    """Child processes for the notebooks; the next one warms up while the current one works. A context manager."""

    def __init__(self, scratch: Path):
        self.scratch = scratch
        self.spare: Child | None = None

    def __enter__(self) -> Children:
        return self

    def __exit__(self, *_: object) -> None:
        if self.spare:
            self.spare.stop()

    @contextlib.contextmanager
    def take(self) -> Iterator[Child]:
        """A child for one notebook; it and its kernel are gone afterwards, whatever happened."""
        child, self.spare = self.spare or Child(self.scratch), None
        try:
            yield child
        finally:
            child.stop()

    def prepare(self) -> None:
        """Starts the next child, which imports papermill and waits."""
        self.spare = Child(self.scratch)


class Progress:
    """Lines about the run: position, status, elapsed time, and the time left as far as earlier runs tell it."""

    def __init__(self, workflow: Workflow, steps: list[Step], force: bool, echo: Callable[[str], None], live: bool):
        self.steps, self.echo, self.live = steps, echo, live
        self.began = self.stage_began = time.monotonic()
        runs: set[str] = set()
        for step in steps:
            if force or workflow.status(step).state != "up to date" or runs & set(step.needs):
                runs.add(step.key)
        self.expected = {step.key: workflow.seconds(step) for step in steps if step.key in runs}

    def _place(self, step: Step) -> str:
        return f"[{self.steps.index(step) + 1:2}/{len(self.steps)}] {step.label}"

    def left(self, step: Step, spent: float) -> str:
        """ ", about 3:20 left", or "" while a duration is unknown."""
        position = self.steps.index(step)
        waiting = [self.expected[s.key] for s in self.steps[position:] if s.key in self.expected]
        known = [seconds for seconds in waiting if seconds is not None]
        if len(known) < len(waiting) or not sum(known):
            return ""
        return f", about {clock(max(sum(known) - spent, 0))} left"

    def skip(self, step: Step) -> None:
        self.echo(f"{self._place(step)}: up to date")

    def begin(self, step: Step, status: Status) -> None:
        self.stage_began = time.monotonic()
        reasons = list(status.reasons[:3]) + ([f"and {len(status.reasons) - 3} more"] if len(status.reasons) > 3 else [])
        self.echo(f"{self._place(step)}: {status.state}{' (' + '; '.join(reasons) + ')' if reasons else ', forced'}")

    def tick(self, step: Step, spent: float) -> None:
        if self.live:
            total = time.monotonic() - self.began
            self.echo(f"{REDRAW}{self._place(step)}: {clock(spent)}, elapsed {clock(total)}{self.left(step, spent)}")

    def end(self, step: Step, problem: str) -> None:
        spent = time.monotonic() - self.stage_began
        self.expected[step.key] = 0.0
        verdict = f"FAILED: {problem}" if problem else "done"
        total = clock(time.monotonic() - self.began)
        line = f"{self._place(step)}: {verdict} in {clock(spent)}, elapsed {total}{'' if problem else self.left(step, 0)}"
        self.echo(f"{REDRAW}{line}\n" if self.live else line)


def clock(seconds: float) -> str:
    """75.2 -> "1:15"."""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes}:{rest:02}"
