"""The supervisor: one zygote per core, one program at a time in each, results as Reports in the order of the programs.

It holds programs and tests as data and hands them over as memory files; no code of a candidate or a test runs here.
"""

from __future__ import annotations

import json
import os
import selectors
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import msgspec

from falconlib.config import SandboxConfig
from falconlib.errors import FalconError
from falconlib.records import INFRA_ERROR, Program, Report
from falconlib.sandbox import verdict

RETRIES = 2  # of a program that the harness lost
_ZYGOTE = Path(__file__).with_name("zygote.py")


def memfd(name: str, data: bytes = b"") -> int:
    """An anonymous file in memory holding `data`, at offset 0 for whoever gets it."""
    fd = os.memfd_create(name)
    if data:
        os.write(fd, data) if len(data) < 1 << 16 else _write_all(fd, data)
        os.lseek(fd, 0, os.SEEK_SET)
    return fd


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def content(fd: int, cap: int) -> bytes:
    """At most `cap` bytes of a memory file; its holder may have closed, shrunk or grown it."""
    chunks, offset = [], 0
    while offset < cap and (chunk := os.pread(fd, min(cap - offset, 1 << 20), offset)):
        chunks.append(chunk)
        offset += len(chunk)
    return b"".join(chunks)


class Worker:
    """One zygote process and the program it is busy with."""

    def __init__(self, config: dict):
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.log = memfd("zygote-log")
        environment = {"PYTHONHASHSEED": "0", "TZ": "UTC", "LC_ALL": "C.UTF-8", "HOME": "/nonexistent", "PATH": "/nonexistent",
                       "MALLOC_ARENA_MAX": "1", "OPENBLAS_NUM_THREADS": "1"}  # fmt: skip
        command = [sys.executable, "-s", "-S", "-P", "-B", "-X", "utf8", str(_ZYGOTE), json.dumps({**config, "fd": theirs.fileno()})]
        with theirs:
            self.process = subprocess.Popen(command, env=environment, cwd="/", pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL,
                                            stdout=self.log, stderr=self.log, start_new_session=True)  # fmt: skip
        self.task: Task | None = None
        self.fds: list[int] = []
        self.facts: dict = {}

    def wait_ready(self, timeout: float) -> None:
        """Raises FalconError with the zygote's own words when it does not come up."""
        self.control.settimeout(timeout)
        try:
            data = self.control.recv(1 << 16)
        except OSError:
            data = b""
        self.control.settimeout(None)
        if not data:
            words = content(self.log, 4000).decode("utf-8", "replace").strip().splitlines()
            raise FalconError(f"the sandbox did not start: {words[-1] if words else 'no reason given'}", "falconlib doctor")
        self.facts = json.loads(data)["layers"]

    def start(self, task: Task, job: dict, first: bytes, second: bytes) -> None:
        """Hands over a program and its tests (or its standard input)."""
        self.task = task
        self.fds = [memfd("code", first), memfd("tests", second), *(memfd(n) for n in ("result", "out", "err", "fault"))]
        self.deadline = time.monotonic() + job["cpu"] * 12 + 15
        socket.send_fds(self.control, [json.dumps(job).encode()], self.fds)

    def finish(self, cap: int) -> dict | None:
        """What came of it, or None when the zygote died."""
        try:
            data = self.control.recv(1 << 16)
        except OSError:
            data = b""
        raw = None
        if data:
            result, out, err, fault = self.fds[2:]
            raw = {"ended": msgspec.json.decode(data, type=verdict.Ended), "result": content(result, 8 << 20), "cap": cap,
                   "stdout": content(out, cap), "stderr": content(err, cap), "fault": content(fault, 1 << 14).decode("utf-8", "replace")}  # fmt: skip
        self.release()
        return raw

    def release(self) -> None:
        for fd in self.fds:
            os.close(fd)
        self.fds, self.task = [], None

    def stop(self) -> None:
        """Ends the zygote and with it everything below it."""
        self.release()
        self.control.close()
        self.process.kill()
        self.process.wait()
        if self.log >= 0:
            os.close(self.log)
            self.log = -1


class Task:
    """A program under way: its runs so far."""

    def __init__(self, index: int, program: Program):
        self.index, self.program, self.attempts, self.alone = index, program, 0, False
        self.mode = "stdio" if program.mode == "stdio" else "value"
        self.parts: list = []  # stdio: results of the tests so far

    def inputs(self) -> tuple[bytes, bytes]:
        code = self.program.code.encode("utf-8", "surrogatepass")
        if self.mode == "stdio":
            return code, json.loads(self.program.tests[len(self.parts)])["input"].encode("utf-8", "surrogatepass")
        tests = {"tests": self.program.tests, "setup": self.program.setup, "entry": self.program.entry_point}
        return code, json.dumps(tests).encode()


class Sandbox:
    """Runs programs against their tests behind the walls that this machine offers. A context manager.

    Args:
        config: limits, number of workers, weakest acceptable tier and integrity.
        tier: "A" or "B" to insist on one, None for the best there is.
        without: layers to leave out, for tests that show what each is good for.

    Raises FalconError when the machine cannot give what `config.require` or `tier` asks for.
    """

    def __init__(self, config: SandboxConfig = SandboxConfig(), tier: str | None = None, without: Sequence[str] = ()):  # noqa: B008 - frozen
        self.config = config
        self._settings = {"tier": tier or "A", "off": sorted(without)}
        self._lock, self._pid = threading.Lock(), os.getpid()
        self._workers: list[Worker] = []
        self._closer = weakref.finalize(self, _close, self._workers, self._pid)
        count = config.workers or len(os.sched_getaffinity(0))
        try:
            self._workers += [Worker({**self._settings, 'worker': k}) for k in range(count)]
            for worker in self._workers:
                worker.wait_ready(60)
        except BaseException:
            self.close()
            raise
        self.tier, self.layers, self.layers_id = "unverified", {}, "unverified"

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    def close(self) -> None:
        """Ends every process of the sandbox. Safe to call twice."""
        self._closer()

    def run(self, program: Program) -> Report:
        """The Report of one program."""
        return self.run_many([program])[0]

    def run_many(self, programs: Sequence[Program], progress: bool = False) -> list[Report]:
        """One Report per program, in their order; identical programs run once. Never raises for what a program does."""
        if not self._workers or os.getpid() != self._pid:
            raise FalconError("the sandbox is closed, or belongs to another process", "use `with Sandbox(...) as sandbox:` where it is needed")
        unique = list(dict.fromkeys(programs))
        tasks = [Task(i, p) for i, p in enumerate(unique)]
        tasks.sort(key=lambda t: "sleep" in t.program.code or "while True" in t.program.code)  # long ones last
        results: dict[Program, Report] = {}
        from tqdm.auto import tqdm

        with self._lock, tqdm(total=len(unique), desc="sandbox", disable=not progress, leave=False) as bar:
            late = self._drain(deque(t for t in tasks if t.program.tests), results, bar, len(self._workers))
            self._drain(late, results, bar, 1)
        empty = verdict.infra("no tests: nothing can be judged", kind="BrokenTests")
        return [results.get(p, empty) for p in programs]

    def _drain(self, waiting: deque[Task], results: dict[Program, Report], bar, width: int) -> deque[Task]:
        """Runs tasks on `width` workers. Returns those that only the hard wall stopped: they are run again, alone."""
        late: deque[Task] = deque()
        idle, busy = list(range(min(width, len(self._workers)))), {}
        with selectors.DefaultSelector() as selector:
            while waiting or busy:
                while waiting and idle:
                    number = idle.pop()
                    worker = self._start(number, waiting.popleft())
                    busy[worker.control.fileno()] = number
                    selector.register(worker.control, selectors.EVENT_READ)
                ready = {key.fd for key, _ in selector.select(1.0)}
                now = time.monotonic()
                for fd, number in list(busy.items()):
                    worker = self._workers[number]
                    if fd not in ready and now < worker.deadline:
                        continue
                    selector.unregister(worker.control)
                    del busy[fd]
                    idle.append(number)
                    task = worker.task
                    raw = worker.finish(self.config.output_kb << 10) if fd in ready else None
                    if raw is None:
                        self._replace(number)
                    again = self._digest(task, raw, results)
                    if again is task and task.alone and width > 1:
                        late.append(task)
                    elif again is not None:
                        waiting.appendleft(task)
                    else:
                        bar.update()
        return late

    def _start(self, number: int, task: Task) -> Worker:
        config = self.config
        job = {"mode": task.mode, "cpu": config.cpu_s, "memory": config.memory_mb << 20, "output": config.output_kb << 10}
        for _ in range(2):
            try:
                self._workers[number].start(task, job, *task.inputs())
                break
            except OSError:  # its zygote was killed while idle
                self._replace(number)
        return self._workers[number]

    def _replace(self, number: int) -> None:
        self._workers[number].stop()
        self._workers[number] = Worker({**self._settings, "worker": number})
        self._workers[number].wait_ready(60)

    def _digest(self, task: Task, raw: dict | None, results: dict[Program, Report]) -> Task | None:
        """Files a result, or returns the task that has to run (again)."""
        if raw is None:
            task.attempts += 1
            if task.attempts <= RETRIES:
                return task
            results[task.program] = verdict.infra("the sandbox process died three times on this program", self.layers_id)
            return None
        raw.update(layers=self.layers_id, integrity="in_process" if task.mode == "in_process" else "value")
        if raw["ended"].killed == "hard" and not task.alone:
            task.alone = True
            return task
        if task.mode == "stdio":
            return self._digest_stdio(task, raw, results)
        report = verdict.report(task.program, raw, self.config.min_integrity, self.config.memory_mb << 20)
        refused = report.status == INFRA_ERROR and report.error.type == "IntegrityError"
        if refused and task.mode == "value" and self.config.min_integrity != "value":
            task.mode = "in_process"
            return task
        results[task.program] = report
        return None

    def _digest_stdio(self, task: Task, raw: dict, results: dict[Program, Report]) -> Task | None:
        program = task.program
        result, error, loaded = verdict.stdio_result(program, len(task.parts), raw, self.config.memory_mb << 20)
        task.parts.append((result, error, loaded, verdict.costs(raw)))
        if len(task.parts) < len(program.tests) and result.status not in ("timeout", "syntax_error"):
            return task
        tests = [part[0] for part in task.parts]  # what follows a timeout would time out as well: it is not run
        tests += [replace(result, index=i, snippet=i, visible=i < program.visible, expected=None, got=None) for i in range(len(tests), len(program.tests))]
        status = min((t.status for t in tests), key=verdict.PRECEDENCE.index)
        first = next(p for p in task.parts if p[0].status == status)
        total = {n: sum(getattr(p[3], n) for p in task.parts) for n in ("cpu_s", "wall_s")}
        peak = max(p[3].peak_mb for p in task.parts)
        results[program] = replace(first[3], status=status, tests=tuple(tests), tests_expected=len(program.tests), error=first[1],
                                   loaded=first[2], peak_mb=peak, **total)  # fmt: skip
        return None


def _close(workers: list[Worker], pid: int) -> None:
    """Runs at close, at garbage collection and at exit; a forked copy of the owner leaves the processes alone."""
    if os.getpid() == pid:
        while workers:
            workers.pop().stop()
