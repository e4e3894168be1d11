"""What judge, zygote and descriptors tell -> one Report. Classes of failure are decided here, from outside the program."""

from __future__ import annotations

import io
import json
import os
import re
import reprlib
import signal
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

import msgspec

from falconlib.config import SandboxConfig
from falconlib.errors import FalconError
from falconlib.records import INFRA_ERROR, ErrorInfo, Program, Report, TestResult

T = TypeVar("T")
OWN_WORD = "a pass that rests on the program's own comparison"
SLOW_TESTS = "the tests themselves took the time"
PRECEDENCE = ("syntax_error", "timeout", "memory", "runtime_error", "fail", "pass")
_FRAME = re.compile(r'File "solution\.py", line (\d{1,9}) in (\S{1,100})')  # bounded: a program can write there as well


class Described(msgspec.Struct):
    """An exception as the sandbox tells it."""

    type: str = "Error"
    message: str = ""
    line: int | None = None
    end_line: int | None = None
    function: str | None = None
    frames: list[tuple[int, str]] = []
    raised: bool = False
    syntax: bool = False
    truncated: bool = False


class Record(msgspec.Struct):
    """One executed assert as the judge tells it."""

    snippet: int
    status: str
    error: Described | None = None
    expected: str | None = None
    got: str | None = None
    own: bool = False  # a pass that rests on the program's own comparison


class Judged(msgspec.Struct):
    """The judge's record."""

    records: list[Record] = []
    expected: int | None = None
    runs: list[tuple[int, int, int]] = []
    loaded: bool = False
    error: Described | None = None
    broken: str | None = None
    refused: str | None = None
    lost: bool = False
    waited: float = 0.0
    candidate_eq: bool = False
    inout: bool = False


class End(msgspec.Struct):
    """How a process ended."""

    status: int
    cpu: float
    rss: int


class Ended(msgspec.Struct):
    """The zygote's record."""

    ends: list[End]
    killed: str | None
    judge_killed: bool
    wall: float
    delay: float
    record: dict[str, str] = {}


class Case(msgspec.Struct):
    """One test of mode "stdio"."""

    input: str
    output: str


def judge_gone(raw: dict) -> bool:
    """Whether the judge ended before it knew anything of the program and its tests did not end it: somebody else did."""
    ended: Ended = raw["ended"]
    status = ended.ends[-1].status
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    return len(ended.ends) == 2 and not raw["result"] and not ended.judge_killed and killed


def needed(ended: Ended) -> float:
    """Seconds that a program took of its limits: of CPU, or of time when it could have had the processor."""
    cpu, *judges = (end.cpu for end in ended.ends)
    return max(cpu, ended.wall - ended.delay - sum(judges))


def case(program: Program, index: int) -> Case:
    return msgspec.convert(json.loads(program.tests[index]), Case)


def require_programs(programs: Sequence[Program]) -> None:
    """Raises FalconError for what is no Program."""
    for p in programs:
        texts = isinstance(p, Program) and isinstance(p.tests, tuple) and (p.code, p.setup, *p.tests)
        texts = texts and (*texts, p.code if p.gold is None else p.gold)
        if not texts or not all(isinstance(text, str) for text in texts) or p.mode not in ("assert", "stdio"):
            expected = 'code, setup and gold are text, tests a tuple of texts, mode "assert" or "stdio"'
            raise FalconError(f"no Program: {reprlib.repr(p)}", expected)


def unusable(program: Program) -> str:
    """Why nothing can be judged by a program's tests, or ""; what only running them shows comes later."""
    try:
        for index in range(len(program.tests) if program.mode == "stdio" else 0):
            case(program, index)
    except (ValueError, RecursionError, msgspec.ValidationError) as error:
        return f"a test is no {{input, output}}: {error}"
    return "" if program.tests else "no tests: nothing can be judged"


def decoded(data: bytes, kind: type[T]) -> T | None:
    """JSON as a `kind`, or None: a program may have written it."""
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, RecursionError):
        return None


def infra(message: str, layers: str = "", kind: str = "InfraError") -> Report:
    """No verdict: the harness, the tests or the integrity rule stood in the way."""
    return Report(INFRA_ERROR, error=ErrorInfo(kind, message), layers=layers)


def refuse(base: Report, kind: str, why: str) -> Report:
    """No verdict, with the costs and texts of `base`."""
    return replace(base, status=INFRA_ERROR, error=ErrorInfo(kind, why))


def clean(data: bytes, cap: int) -> tuple[str, bool]:
    """Captured bytes as text, and whether the cap was reached."""
    return data[:cap].decode("utf-8", "replace"), len(data) >= cap


def explain(info: Described, source: str) -> ErrorInfo:
    """An ErrorInfo with the text of its line."""
    lines = io.StringIO(source, newline=None).read().split("\n")  # str.splitlines knows more line ends than Python
    line = info.line if info.line is not None and 1 <= info.line <= len(lines) else None
    text = lines[line - 1] if line is not None else None
    frames = tuple((name, n) for n, name in info.frames)
    end = info.end_line if line else None
    return ErrorInfo(info.type[:100], info.message[:1000], line, end, text, info.function, frames, info.truncated)


def death(ended: Ended, fault: str, limits: SandboxConfig) -> tuple[str, Described]:
    """Status and error of a candidate whose process ended before its judge had done."""
    status, end = "runtime_error", ended.ends[0]
    number = os.WTERMSIG(end.status) if os.WIFSIGNALED(end.status) else None
    if ended.killed == "closed":
        kind, message = "ProtocolError", "the process closed its channel"
    elif ended.killed:
        status, kind, message = "timeout", "Timeout", f"the {ended.killed} limit was reached"
    elif number in (signal.SIGXCPU, signal.SIGKILL) and end.cpu >= limits.cpu_s:
        status, kind, message = "timeout", "Timeout", "the cpu limit was reached"
    elif number == signal.SIGKILL and end.rss >> 10 >= limits.memory_mb * 0.9:
        status, kind, message = "memory", "MemoryError", "killed for its memory"
    elif number:
        kind = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
        message = "the process crashed"
    else:
        kind, message = "SystemExit", f"the process ended itself with exit status {os.WEXITSTATUS(end.status)}"
    place = _FRAME.search(fault)
    line, function = (int(place[1]), place[2]) if place else (None, None)
    frames = [(int(n), name) for n, name in reversed(_FRAME.findall(fault))][-20:]
    return status, Described(kind, message, line, line, function, frames)


def report(program: Program, raw: dict, limits: SandboxConfig) -> Report:
    """The Report of a value-mode or in-process run. raw: {ended, result, stdout, stderr, fault, layers, integrity}."""
    ended: Ended = raw["ended"]
    base = costs(raw, limits)
    judged = decoded(raw["result"], Judged)
    alone = raw["integrity"] == "in_process"
    if judged is None and alone:
        status, info = death(ended, raw["fault"], limits)
        return replace(base, status=status, error=explain(info, program.code), integrity="in_process")
    if judged is None:
        return judge_lost(base, ended, raw, program, limits)
    if judged.refused:
        return refuse(base, "IntegrityError", f"these tests need one process: {judged.refused}")
    if judged.broken:
        absent = re.search(r"No module named '(\w+)", judged.broken)
        if absent and absent[1] in program.code:  # it brings, or wants, a package that is not here
            return replace(base, status="runtime_error", error=ErrorInfo("ModuleNotFoundError", judged.broken))
        return refuse(base, "BrokenTests", judged.broken)
    if judged.lost and ended.killed in ("wall", "hard") and judged.waited < limits.cpu_s:
        return refuse(base, "BrokenTests", SLOW_TESTS)
    dead = death(ended, raw["fault"], limits)
    tests = tuple(test_result(i, r, dead, program) for i, r in enumerate(judged.records))
    status = min((t.status for t in tests), key=PRECEDENCE.index, default="fail")
    error = judged.error
    if judged.lost and status == "pass":  # a test caught the end of the program
        status, error = dead
    elif error is not None and error.syntax:
        status, tests = "syntax_error", tuple(replace(t, status="syntax_error") for t in tests)
    elif error is None:
        first = next((r for r, t in zip(judged.records, tests, strict=True) if t.status == status), None)
        error = None if first is None or status in ("pass", "fail") else dead[1] if first.status == "died" else first.error
    if not tests:
        return refuse(base, "BrokenTests", "no assertion was executed")
    forgeable = any(r.own for r in judged.records)
    integrity = "in_process" if alone or forgeable else "value"
    if forgeable and limits.min_integrity == "value":
        if status == "pass":
            return refuse(base, "IntegrityError", OWN_WORD)
        failed = [replace(t, status="fail", message=OWN_WORD) if r.own else t for t, r in zip(tests, judged.records, strict=True)]
        tests, integrity = tuple(failed), "value"
    return replace(base, status=status, tests=tests, tests_expected=judged.expected, runs=tuple(judged.runs), integrity=integrity,
                   error=explain(error, program.code) if error else None, loaded=judged.loaded, inout=judged.inout,
                   candidate_eq=judged.candidate_eq)  # fmt: skip


def judge_lost(base: Report, ended: Ended, raw: dict, program: Program, limits: SandboxConfig) -> Report:
    """The judge left no record. Once a value of the candidate had arrived, that value is to blame."""
    if not raw["result"] or (ended.killed is None and not ended.judge_killed and ended.ends[-1].status == 0):
        return refuse(base, "BrokenTests", "the tests ended or stalled their own process")
    if raw["result"] == b"*" and ended.killed in ("wall", "hard"):  # nothing was asked of the program at the time
        return refuse(base, "BrokenTests", SLOW_TESTS)
    if ended.killed not in (None, "closed"):
        status, info = death(ended, raw["fault"], limits)
        return replace(base, status=status, error=explain(info, program.code))
    status = "timeout" if ended.judge_killed else "memory" if os.WIFSIGNALED(ended.ends[-1].status) else "runtime_error"
    kind = "Timeout" if status == "timeout" else "JudgeError"
    return replace(base, status=status, error=ErrorInfo(kind, "a returned value exhausted the judge"))


def test_result(index: int, record: Record, dead: tuple[str, Described], program: Program) -> TestResult:
    """One record as a TestResult; `died` becomes what the process died of."""
    status, error = dead if record.status == "died" else (record.status, record.error)
    if status not in PRECEDENCE:
        status = "runtime_error"
    kind = None if error is None or status in ("pass", "fail") else error.type
    return TestResult(index, record.snippet, status, record.snippet < program.visible, kind, error.message if error else None,
                      error.line if error else None, record.expected, record.got)  # fmt: skip


def costs(raw: dict, limits: SandboxConfig) -> Report:
    """A Report that holds the costs and the captured text only."""
    ended, cap = raw["ended"], limits.output_kb << 10
    (out, cut), (err, cut2) = clean(raw["stdout"], cap), clean(raw["stderr"], cap)
    number = os.WTERMSIG(ended.ends[0].status) if os.WIFSIGNALED(ended.ends[0].status) else None
    own = None if number == signal.SIGKILL else number
    return Report("fail", signal=own, stdout=out, stderr=err, truncated=cut or cut2, cpu_s=ended.ends[0].cpu, wall_s=ended.wall,
                  peak_mb=ended.ends[0].rss / 1024, layers=raw["layers"])  # fmt: skip


def stdio_result(program: Program, index: int, raw: dict, limits: SandboxConfig) -> tuple[TestResult, ErrorInfo | None, bool]:
    """(result, error, loaded) of one run of a script: its standard output against the expected text, line by line."""
    wanted, frame = case(program, index).output, decoded(raw["result"][4:], Judged)
    visible, got = index < program.visible, raw["stdout"].decode("utf-8", "replace")
    texts = (cut(wanted), cut(got))
    ended: Ended = raw["ended"]
    if ended.ends[0].status or ended.killed:  # what it wrote into its frame before counts no longer
        status, info = death(ended, raw["fault"], limits)
    elif frame is not None and frame.error is not None:
        info = frame.error
        exhausted = info.type == "MemoryError" and not info.raised
        status = "syntax_error" if info.syntax else "memory" if exhausted else "runtime_error"
    else:
        same = lines(got) == lines(wanted)
        return TestResult(index, index, "pass" if same else "fail", visible, None, None, None, *texts), None, True
    error = explain(info, program.code)
    return TestResult(index, index, status, visible, info.type, info.message, error.line, *texts), error, False


def lines(text: str) -> list[str]:
    """Lines without trailing blanks, and without blank lines at the end."""
    return [line.rstrip(" \t\r") for line in text.rstrip(" \t\r\n").split("\n")]


def cut(text: str) -> str:
    """At most 500 characters, and none that UTF-8 cannot hold."""
    text = text[:501].encode("utf-8", "replace").decode()
    return text if len(text) <= 500 else text[:500] + "..."
