"""Running the graph: skips what is up to date, one process per notebook, resumes after a crash.

A stage has succeeded when its process ended with 0 AND the manifest was written by this very attempt AND every declared
output exists with its recorded hash. Whatever kills the run (SIGKILL, Ctrl-C, a full disk) leaves folders from which the
next run goes on: an interrupted stage keeps its checkpoints when its key is still the same, and starts afresh otherwise.
"""

from __future__ import annotations

import contextlib
import errno
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
from falconlib.files import REMEDIES, disk_errors, read_json, write_json
from falconlib.graph import Status, Step, Workflow, differences, record
from falconlib.notebook import DEAD, Child, execute
from falconlib.reporting.run import STAGE_ENV, keep_copy

OFFLINE_PROFILES = ("smoke", "quick")  # need no hub: everything they read lies in wheels and in data/
FREE_MB = 200  # below this nothing is started
LOOK_S, HUNG_S, IDLE_SHARE = 10.0, 1800.0, 0.005  # an idle kernel uses 0.1 % of a core; one that waits for a server, more
HUNG = {"name": "Hung", "message": f"its kernel did nothing for {HUNG_S / 60:.0f} minutes and was stopped", "again": "yes"}
REDRAW = "\r\x1b[K"  # terminal: to the start of the line, clear it


def run(
    workflow: Workflow, steps: list[Step], force: bool = False, *, echo: Callable[[str], None], live: bool = False, jobs: int = 1
) -> int:
    """Runs what is not up to date, each step after those that it reads. Returns 0, or 1 when a stage failed (what has not
    begun then is not tried).

    Args:
        workflow: the graph with its profile. steps: of `graph.select`. force: run them even when they are up to date,
            from their beginning. echo: takes each line. live: echo also takes lines that redraw the last one (REDRAW).
        jobs: at most so many notebooks at once, each with its share of the cores. One begins when the kernels of the others
            are up: kernels that look for free ports at the same moment can find the same one.

    Raises FalconError (bad input that a notebook found, a full disk, another run in the same folder) and
    KeyboardInterrupt, both after every child is stopped.
    """
    with disk_errors(workflow.root):
        workflow.root.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(workflow.root).free < FREE_MB * 2**20:
            raise FalconError(f"less than {FREE_MB} MB are free for {workflow.root}", REMEDIES[errno.ENOSPC])
    with lock(workflow.root), tempfile.TemporaryDirectory(prefix="falcon-") as scratch, Children(Path(scratch), jobs) as children:
        progress, waiting, failed = Progress(workflow, steps, force, echo, live, jobs), list(steps), False
        working: list[Attempt] = []
        while working or (waiting and not failed):
            unfinished = {step.key for step in waiting} | {attempt.step.key for attempt in working}
            ready = [step for step in waiting if not unfinished & set(step.needs)]
            if ready and not failed and len(working) < jobs and all(attempt.up() for attempt in working):
                waiting.remove(step := ready[0])
                status = workflow.status(step)
                if status.state == "up to date" and not force:
                    keep_copy(workflow.root, step.key)
                    progress.skip(step)
                    continue
                progress.begin(step, status)
                working.append(Attempt(workflow, step, children, force))
                if waiting:
                    children.warm()
            for attempt in [attempt for attempt in working if attempt.ended(0.5 / len(working))]:
                working.remove(attempt)
                problem = attempt.problem()
                if attempt.again and not attempt.repeated:
                    echo(f"{attempt.step.label}: {problem}; once more")
                    working.append(Attempt(workflow, attempt.step, children, False, repeated=True))
                    continue
                progress.end(attempt, problem, working)
                failed = failed or bool(problem)
            progress.tick(working)
    return int(failed)


class Attempt:
    """One attempt at one step: begins when it is made, is asked with `ended`, and says with `problem` how it ended.

    again: its notebook's process failed, or hung, through no fault of a cell: worth a second attempt, which resumes.
    """

    def __init__(self, workflow: Workflow, step: Step, children: Children, force: bool, repeated: bool = False):
        self.workflow, self.step, self.repeated, self.again = workflow, step, repeated, False
        self.folder, self.began, self.token = workflow.root / step.key, time.monotonic(), secrets.token_hex(8)
        key = workflow.key(step)
        prepare_folder(self.folder, key, force)
        self.record = {**key, "token": self.token, "state": "running"}
        write_json(self.folder / "attempt.json", self.record)
        source = children.scratch / f"{step.key.replace('/', '-')}.ipynb"
        shutil.copyfile(workflow.source(step.node), source)  # what runs is what was hashed, whatever is saved meanwhile
        env = {STAGE_ENV: json.dumps({"stage": step.key, "token": self.token, "key": key, "command": workflow.command})}
        if workflow.profile.name in OFFLINE_PROFILES:
            env["HF_HUB_OFFLINE"] = os.environ.get("HF_HUB_OFFLINE", "1")
        paths = {"source": str(source), "target": str(workflow.executed(step)), "log": str(self.folder / "log.txt")}
        self.child = children.take()
        self.watch = Watch(self.child)
        self.child.begin({**paths, "parameters": workflow.parameters(step), "env": env})

    def spent(self) -> float:
        return time.monotonic() - self.began

    def up(self) -> bool:
        """Whether its kernel has run the notebook's first call, `start`."""
        run = self.folder / "run.json"
        return run.is_file() and run.stat().st_mtime >= (self.folder / "attempt.json").stat().st_mtime

    def ended(self, timeout: float) -> bool:
        """Whether it is over, after at most `timeout` seconds: its process has ended, or hangs and was stopped."""
        return self.child.wait(timeout) or self.watch.hangs()

    def problem(self) -> str:
        """What is wrong, nothing when it succeeded; the notebook's own FalconError is raised. Its processes are gone then."""
        failure = HUNG if self.watch.hung else self.child.result()
        self.child.stop()
        self.again = failure.get("again") == "yes"
        problem = explain(failure, self.folder) if failure else unproven(self.workflow, self.step, self.token)
        end = {"state": "failed" if problem else "done", "problem": problem, "wall_s": round(self.spent(), 3)}
        write_json(self.folder / "attempt.json", {**self.record, **end})
        if not problem:
            keep_copy(self.workflow.root, self.step.key)
        if failure.get("name") == "FalconError":
            message, _, remedy = failure["message"].partition("\n  remedy: ")
            raise FalconError(f"{self.step.label}: {message}", remedy)
        return problem


class Watch:
    """Watches a notebook's kernel: it hangs when for HUNG_S seconds it and its processes hardly used a processor."""

    def __init__(self, child: Child):
        self.child, self.hung = child, False
        self.looked = self.active = time.monotonic()
        self.used = 0.0

    def hangs(self) -> bool:
        now = time.monotonic()
        if now - self.looked >= LOOK_S:
            used = self.child.cpu_seconds()
            busy = abs(used - self.used) > IDLE_SHARE * (now - self.looked)  # less, too: a process of its sandbox has ended
            if busy or now - self.looked > 3 * LOOK_S:  # it, or this process, was stopped and goes on
                self.active = now
            self.looked, self.used, self.hung = now, used, now - self.active > HUNG_S
        return self.hung


def prepare_folder(folder: Path, key: dict[str, Any], force: bool) -> None:
    """Empties a stage's folder, unless its last attempt was interrupted or failed with the same key: then it resumes."""
    previous = record(folder / "attempt.json")
    resumes = previous.get("state") in ("running", "failed") and not differences(previous, key)
    with disk_errors(folder):
        if force or not resumes:
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "manifest.json").unlink(missing_ok=True)


def unproven(workflow: Workflow, step: Step, token: str) -> str:
    """Why an attempt that ended with 0 is no success, "" when it is one."""
    manifest = record(workflow.root / step.key / "manifest.json")
    if manifest.get("token") != token:
        return "it ended without writing its manifest: its last cell did not run"
    return "; ".join(workflow.broken_outputs(step, manifest))


def explain(failure: dict[str, str], folder: Path) -> str:
    """The failure of a child in words."""
    died = "its kernel died, probably out of memory"
    died += ": try a smaller train.micro_tokens or tasks.eval_limit" if folder.parent.name == "train" else ""
    return f"{died if failure['name'] == DEAD else failure['name'] + ': ' + failure['message']}; log: {folder / 'log.txt'}"


def prepare(workflow: Workflow, steps: list[Step], echo: Callable[[str], None], force: bool = False) -> None:
    """Writes each step's notebook with its parameters filled in, not run, to open in JupyterLab: <root>/prepared/.

    Raises FalconError where that would write over what somebody changed there; `force` does it.
    """
    for step in steps:
        target = workflow.root / "prepared" / f"{step.key.replace('/', '-')}.ipynb"
        with disk_errors(target), tempfile.TemporaryDirectory() as folder:
            target.parent.mkdir(parents=True, exist_ok=True)
            fresh, source = Path(folder) / target.name, str(workflow.source(step.node))
            execute({"source": source, "target": str(fresh), "parameters": workflow.parameters(step)}, prepare_only=True)
            if not force and target.is_file() and cells(target) != cells(fresh):
                raise FalconError(f"{target} was changed, or made with other settings", "--force writes over it")
            shutil.copyfile(fresh, target)
        echo(f"{target}")


def cells(path: Path) -> list[str]:
    """The text of a notebook's cells; of a file that is none, nothing that a notebook could have."""
    try:
        return ["".join(cell["source"]) for cell in read_json(path)["cells"]]
    except (FalconError, KeyError, TypeError):
        return [str(path)]


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


class Children(contextlib.ExitStack):
    """Child processes for the notebooks; the next one warms up while the others work. None is left when the context ends."""

    def __init__(self, scratch: Path, jobs: int):
        super().__init__()
        self.scratch = scratch
        self.spare: Child | None = None
        self.env = {"OMP_NUM_THREADS": str(max((os.cpu_count() or 1) // jobs, 1))} if jobs > 1 else {}

    def warm(self) -> Child:
        """Starts the next child, which imports papermill and waits."""
        self.spare = Child(self.scratch, self.env)
        self.callback(self.spare.stop)
        return self.spare

    def take(self) -> Child:
        """A child for one notebook."""
        child, self.spare = self.spare or self.warm(), None
        return child


class Progress:
    """Lines about the run: position, status, elapsed time, and the time left as far as earlier runs tell it."""

    def __init__(self, workflow: Workflow, steps: list[Step], force: bool, echo: Callable[[str], None], live: bool, jobs: int):
        self.steps, self.echo, self.live, self.jobs = steps, echo, live, jobs
        self.began = time.monotonic()
        self.expected: dict[str, float | None] = {}
        for step in steps:
            if force or workflow.status(step).state != "up to date" or set(self.expected) & set(step.needs):
                self.expected[step.key] = workflow.seconds(step)

    def _place(self, step: Step) -> str:
        return f"[{self.steps.index(step) + 1:2}/{len(self.steps)}] {step.label}"

    def _elapsed(self, working: list[Attempt]) -> str:
        """ "elapsed 1:40, about 3:20 left"; nothing about the time left while a duration is unknown."""
        spent = {attempt.step.key: attempt.spent() for attempt in working}
        left = [None if seconds is None else max(seconds - spent.get(key, 0), 0) for key, seconds in self.expected.items()]
        known = [seconds for seconds in left if seconds is not None]
        rest = f", about {clock(sum(known) / self.jobs)} left" if known and len(known) == len(left) else ""
        return f"elapsed {clock(time.monotonic() - self.began)}{rest}"

    def skip(self, step: Step) -> None:
        self.expected.pop(step.key, None)
        self.echo(f"{self._place(step)}: up to date")

    def begin(self, step: Step, status: Status) -> None:
        reasons = list(status.reasons[:3]) + ([f"and {len(status.reasons) - 3} more"] if len(status.reasons) > 3 else [])
        self.echo(f"{self._place(step)}: {status.state}{' (' + '; '.join(reasons) + ')' if reasons else ', forced'}")

    def tick(self, working: list[Attempt]) -> None:
        if self.live and working:
            places = "; ".join(f"{self._place(attempt.step)}: {clock(attempt.spent())}" for attempt in working)
            width = shutil.get_terminal_size().columns - 1  # a line that wraps could not be redrawn
            self.echo(REDRAW + f"{places}, {self._elapsed(working)}"[:width])

    def end(self, attempt: Attempt, problem: str, working: list[Attempt]) -> None:
        self.expected.pop(attempt.step.key, None)
        verdict = f"FAILED: {problem}" if problem else "done"
        line = f"{self._place(attempt.step)}: {verdict} in {clock(attempt.spent())}, {self._elapsed(working)}"
        self.echo(f"{REDRAW}{line}\n" if self.live else line)


def clock(seconds: float) -> str:
    """75.2 -> "1:15"."""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes}:{rest:02}"
