"""The supervisor: one zygote per core, one program at a time in each, results as Reports in the order of the programs.

It holds programs and tests as data and hands them over as memory files; no code of a candidate or a test runs here.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import selectors
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import replace

from falconlib.config import Profile, SandboxConfig, override
from falconlib.errors import FalconError, did_you_mean
from falconlib.records import INFRA_ERROR, Program, Report
from falconlib.sandbox import layers, verdict
from falconlib.sandbox.cache import VerdictCache
from falconlib.sandbox.worker import Worker

RETRIES = 2  # of a program that the harness lost
TEXT = 16  # times output_kb that a gold may print: what it prints is no reason to know nothing
SLACK, MOST = 3, 5  # a program may take SLACK times what its gold takes, where that is above cpu_s; at most MOST times cpu_s


def longest_last(programs: Sequence[Program]) -> list[Program]:
    """Distinct programs; those that look like sleepers at the end, so that they keep few others waiting."""
    return sorted(dict.fromkeys(programs), key=lambda p: "sleep" in p.code or "while True" in p.code)


def gold_of(program: Program) -> Program:
    """The reference program under the same tests."""
    return replace(program, code=program.gold or "", visible=0, gold=None)


class Task:
    """A program under way: its limits, how often its asserts run (() when not known), its runs so far."""

    def __init__(self, program: Program, limits: SandboxConfig, runs: Sequence[int] = ()):
        self.program, self.limits, self.runs, self.attempts, self.alone = program, limits, runs, 0, False
        self.mode = "stdio" if program.mode == "stdio" else "value"
        self.parts: list = []  # stdio: results of the tests so far
        self.needed = 0.0  # seconds of the slowest run

    def inputs(self) -> tuple[bytes, bytes]:
        code = self.program.code.encode("utf-8", "surrogatepass")
        if self.mode == "stdio":
            return code, self.case().input.encode("utf-8", "surrogatepass")
        p = self.program
        return code, json.dumps({"tests": p.tests, "setup": p.setup, "entry": p.entry_point, "runs": self.runs}).encode()

    def case(self) -> verdict.Case:
        return verdict.case(self.program, len(self.parts))

    def job(self) -> dict:
        output = self.limits.output_kb << 10
        if self.mode == "stdio":  # what is wanted may be longer; a power of two tells a program little about it
            output = max(output, 1 << (len(self.case().output.encode("utf-8", "surrogatepass")) + 4096).bit_length())
        return job(self.mode, self.limits, output)


def job(mode: str, config: SandboxConfig, output: int) -> dict:
    """What a zygote is told beside the files."""
    return {"mode": mode, "cpu": config.cpu_s, "memory": config.memory_mb << 20, "output": output}


class Sandbox:
    """Runs programs against their tests behind the walls that this machine offers. A context manager.

    Args:
        config: limits, number of workers, weakest acceptable tier and integrity.
        tier: "A" or "B" to insist on one, None for the best there is.
        without: layers to leave out, for tests that show what each is good for.

    Attributes: `layers`, a dict layer -> {requested, active, verified, reason}; `tier`, "A", "B" or "unsafe"; `layers_id`, the
    short text of both that every Report carries.

    Raises FalconError when the machine cannot give what `config.require` or `tier` asks for.
    """

    def __init__(self, config: SandboxConfig = SandboxConfig(), tier: str | None = None, without: Sequence[str] = ()):  # noqa: B008 - frozen
        override(Profile(), {f"sandbox.{name}": value for name, value in vars(config).items()})  # raises for a wrong one
        if tier not in (None, "A", "B"):
            raise did_you_mean("sandbox tier", tier, ("A", "B"))
        self.config = config
        self._settings = {"tier": tier or "A", "off": sorted(without)}
        self._lock, self._pid = threading.RLock(), os.getpid()
        self._workers: list[Worker] = []
        self._golds: dict[Program, tuple | None] = {}  # (seconds needed, runs) of golds; None for those that do not pass
        self._closer = weakref.finalize(self, _close, self._workers, self._pid)
        count = config.workers or len(os.sched_getaffinity(0))
        try:
            self._workers += [Worker({**self._settings, "worker": k}) for k in range(count)]
            for worker in self._workers:
                worker.wait_ready(60)
            self._verify(tier)
        except BaseException:
            self.close()
            raise

    def _verify(self, tier: str | None) -> None:
        """Tries the walls and grades them; a layer is active when it is in every zygote."""
        config, worker = self.config, self._workers[0]

        def run(code: bytes, stdin: bytes) -> tuple[bytes, dict]:
            worker.start(None, job("stdio", config, config.output_kb << 10) | {"inspect": True}, code, stdin)
            raw = worker.finish() or {"stdout": b"", "ended": verdict.Ended([], None, False, 0, 0)}
            return raw["stdout"], raw["ended"].record

        told, record = layers.probe(run, config.memory_mb << 20, config.output_kb << 10)
        facts = dict(worker.facts)
        for other in self._workers[1:]:
            facts |= {name: fact for name, fact in other.facts.items() if not fact[0]}
        self.layers = layers.assess(facts, told, record, [*self._settings["off"], *(layers.NAMESPACES if tier == "B" else ())])
        self.tier = layers.admit(self.layers, tier, config.require, config.allow_unsafe)
        self.layers_id = layers.identity(self.tier, self.layers)
        self._cache = VerdictCache(config.cache, config, self.layers_id) if config.cache else None

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    def close(self) -> None:
        """Ends every process of the sandbox, once other threads have their verdicts. Safe to call twice."""
        with self._lock if os.getpid() == self._pid else contextlib.nullcontext():
            self._closer()

    def refresh(self) -> None:
        """Replaces every zygote by a new one."""
        with self._mine():
            for number in range(len(self._workers)):
                self._replace(number)

    def idle(self) -> bool:
        """Whether no process exists below the zygotes but one waiting judge each."""
        from psutil import Process

        own = 2 if self.layers["pid"]["active"] else 1  # the first process of a pid namespace has one above it
        return all(len(Process(w.process.pid).children(recursive=True)) <= own for w in self._workers)

    def run(self, program: Program) -> Report:
        """The Report of one program."""
        return self.run_many([program])[0]

    def run_many(self, programs: Sequence[Program], progress: bool = False) -> list[Report]:
        """One Report per program, in their order; identical programs run once, and those that `config.cache` knows not at all.
        Where loops decide how many asserts run, or a program times out, its gold runs as well, once per Sandbox, and the
        program again if that changes its limits. Never raises for what a program does."""
        from tqdm.auto import tqdm

        verdict.require_programs(programs)
        unique = longest_last(programs)
        results = {p: verdict.infra(why, self.layers_id, "BrokenTests") for p in unique if (why := verdict.unusable(p))}
        with self._mine():
            known = self._cache.find(unique) if self._cache else {}
            todo = [p for p in unique if p not in results and p not in known]
            try:
                with tqdm(total=0, desc="sandbox", disable=not progress, leave=False) as bar:
                    self._settle(map(self._task, todo), results, bar)
                    unsure = {p: results.pop(p) for p in todo if self._needs_gold(p, results[p])}
                    self._measure(dict.fromkeys(map(gold_of, unsure)), bar)
                    again = [t for t in map(self._task, unsure) if t.runs or t.limits != self.config]
                    results |= unsure | self._settle(again, {}, bar)
            finally:  # what is known before an interrupt is kept as well
                if self._cache:
                    self._cache.keep({p: r for p, r in results.items() if p.gold is None or r.tests_expected is not None})
        results |= known
        return [results[p] for p in programs]

    def _task(self, program: Program) -> Task:
        gold = self._golds.get(gold_of(program)) if self._golds else None
        if gold is None:
            return Task(program, self.config)
        needed, runs = gold
        limit = max(self.config.cpu_s, min(SLACK * needed, MOST * self.config.cpu_s))
        return Task(program, self.config if limit == self.config.cpu_s else replace(self.config, cpu_s=limit), runs)

    def _needs_gold(self, program: Program, report: Report) -> bool:
        """Whether only the gold can tell how often asserts run, or how long the task takes, and was not asked yet."""
        doubtful = report.status == "timeout" or (report.tests_expected is None and report.status != INFRA_ERROR)
        return doubtful and program.gold is not None and gold_of(program) not in self._golds

    def _measure(self, golds: Iterable[Program], bar) -> None:
        limits = replace(self.config, cpu_s=MOST * self.config.cpu_s, output_kb=TEXT * self.config.output_kb)
        tasks = [Task(p, limits) for p in golds]
        reports = self._settle(tasks, {}, bar)
        for task in tasks:
            report = reports[task.program]
            if report.status != "pass":
                told = "a reference program does not pass its tests (%s, %s): %.60r"
                logging.getLogger(__name__).warning(told, report.status, report.error, task.program.code)
            if report.status != INFRA_ERROR:  # that one is asked again, next time
                self._golds[task.program] = (task.needed, report.runs) if report.status == "pass" else None

    def _settle(self, tasks: Iterable[Task], results: dict[Program, Report], bar) -> dict[Program, Report]:
        """Runs tasks to their Reports, which it adds to `results`."""
        waiting = deque(tasks)
        bar.total += len(waiting)
        late = self._drain(waiting, results, bar, len(self._workers))
        self._drain(late, results, bar, 1)
        return results

    @contextlib.contextmanager
    def _mine(self):
        """One thread at a time; raises FalconError for a sandbox that is closed or lacks the means."""
        ours = os.getpid() == self._pid
        with self._lock if ours else contextlib.nullcontext():
            if not (ours and self._workers):
                remedy = "use `with Sandbox(...) as sandbox:` where it is needed"
                raise FalconError("the sandbox is closed, or belongs to another process", remedy)
            try:
                yield
            except OSError as error:
                remedy = "more open files (ulimit -n 4096), larger files (ulimit -f), or more memory"
                raise FalconError(f"the sandbox cannot go on: {error}", remedy) from error

    def _drain(self, waiting: deque[Task], results: dict[Program, Report], bar, width: int) -> deque[Task]:
        """Runs tasks on `width` workers. Returns those that only the hard wall stopped: they are run again, alone."""
        late: deque[Task] = deque()
        idle = list(range(min(width, len(self._workers))))
        busy: dict[int, int] = {}  # descriptor: number of the worker
        try:
            with selectors.DefaultSelector() as selector:
                while waiting or busy:
                    while waiting and idle:
                        number = idle.pop()
                        worker = self._start(number, waiting.popleft())
                        busy[worker.control.fileno()] = number
                        selector.register(worker.control, selectors.EVENT_READ)
                    ready = {key.fd for key, _ in selector.select(1.0)}
                    now = time.monotonic()
                    for fd in [fd for fd, n in busy.items() if fd in ready or now > self._workers[n].deadline]:
                        worker = self._workers[busy[fd]]
                        selector.unregister(worker.control)
                        task, raw = worker.task, worker.finish() if fd in ready else None
                        idle.append(busy.pop(fd))
                        if raw is None:
                            self._replace(idle[-1])
                        again = self._digest(task, raw, results)
                        if again is None:
                            bar.update()
                        elif again.alone and width > 1:
                            late.append(again)
                        else:
                            waiting.appendleft(again)
        finally:  # after an interrupt nobody waits for what is still running
            for number in busy.values():
                self._replace(number)
        return late

    def _start(self, number: int, task: Task) -> Worker:
        for last in (False, True):
            try:
                self._workers[number].start(task, task.job(), *task.inputs())
                break
            except OSError:  # its zygote was killed while idle
                if last:
                    raise
                self._replace(number)
        return self._workers[number]

    def _replace(self, number: int) -> None:
        for last in (False, True):
            self._workers[number].stop()
            self._workers[number] = Worker({**self._settings, "worker": number})
            try:
                self._workers[number].wait_ready(60)
                break
            except FalconError:  # killed while it started
                if last:
                    raise
        facts = self._workers[number].facts
        if lost := [n for n, v in self.layers.items() if v["active"] and not facts.get(n, [n == "no_new_privs"])[0]]:
            self._workers[number].stop()
            raise FalconError(f"a new sandbox process lacks {', '.join(lost)}, which the first one had", "falconlib doctor")

    def _digest(self, task: Task, raw: dict | None, results: dict[Program, Report]) -> Task | None:
        """Files a result, or returns the task that has to run (again)."""
        if raw is None or verdict.judge_gone(raw):
            task.attempts += 1
            if task.attempts <= RETRIES:
                return task
            results[task.program] = verdict.infra("the sandbox process died three times on this program", self.layers_id)
            return None
        task.needed = max(task.needed, verdict.needed(raw["ended"]))
        raw.update(layers=self.layers_id, integrity="in_process" if task.mode == "in_process" else "value")
        if raw["ended"].killed == "hard" and not task.alone:
            task.alone = True
            return task
        if task.mode == "stdio":
            return self._digest_stdio(task, raw, results)
        report = verdict.report(task.program, raw, task.limits)
        refused = report.status == INFRA_ERROR and report.error and report.error.type == "IntegrityError"
        if refused and task.mode == "value" and self.config.min_integrity != "value":
            task.mode = "in_process"
            return task
        results[task.program] = report
        return None

    def _digest_stdio(self, task: Task, raw: dict, results: dict[Program, Report]) -> Task | None:
        program = task.program
        result, error, loaded = verdict.stdio_result(program, len(task.parts), raw, task.limits)
        task.parts.append((result, error, loaded, verdict.costs(raw, task.limits)))
        if len(task.parts) < len(program.tests) and result.status not in ("timeout", "syntax_error"):
            return task
        tests = [part[0] for part in task.parts]  # what follows a timeout would time out as well: it is not run
        tests += [
            replace(result, index=i, snippet=i, visible=i < program.visible, expected=None, got=None)
            for i in range(len(tests), len(program.tests))
        ]
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
