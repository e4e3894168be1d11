"""Runs a corpus of hostile, broken and control programs and compares verdicts and promises: the sandbox's self-test.

A corpus is JSONL with `name, program, test, expected_verdict, must_hold` and optionally `also_ok, expect, after, repeat,
hidden_test`. Canaries and listeners stand around the sandbox while it runs; programs run nowhere else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import json
import os
import secrets
import shutil
import signal
import socket
import sys
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated

import msgspec
import psutil
from tqdm.auto import tqdm

from falconlib.config import SandboxConfig
from falconlib.errors import FalconError, did_you_mean
from falconlib.records import INFRA_ERROR, Program, Report, to_json
from falconlib.sandbox.pool import Sandbox

CANARY = Path("/tmp/falcon_canary")
PORT = 53535
_TRACES = ("/tmp/falcon_pwned*", "/dev/shm/falcon*", "~/.falcon_pwned*", sysconfig.get_paths()["purelib"] + "/falcon_pwned*")
_SEGMENT = 0x46414C43  # the System V key that a hostile program would use
_CONTROL = Program("def add(a, b):\n    return a + b\n", ("assert add(1, 2) == 3\nassert add(2, 2) == 4",))


class Expect(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What `expect` of a row may hold."""

    error_type: str = ""
    line: int = 0
    per_test: list[str] = []


class Row(msgspec.Struct):
    """What a line of a corpus must be."""

    name: str
    program: str
    test: str
    expected_verdict: str
    must_hold: list[str]
    also_ok: list[str] = []
    expect: Expect = Expect()
    after: str = ""
    repeat: Annotated[int, msgspec.Meta(ge=1)] = 1
    hidden_test: str = ""


_FIELDS = ", ".join(Row.__struct_fields__)


def check_corpus(path: str | Path, tier: str | None = None, json_out: str | Path | None = None) -> int:
    """Runs the corpus fresh, warm (a control after each), and with cores oversubscribed four times; with no `tier` given,
    also warm on tier B. Writes each mismatch to standard output, and {"programs", "mismatches", "layers": by tier} to
    `json_out`.

    Returns 0 when at least one program ran and nothing differed, else 1. Raises FalconError for an unreadable corpus, or
    a machine that does not offer the tier.
    """
    rows = read_corpus(Path(path))
    out = Path(json_out).absolute() if json_out is not None else None
    if out is not None and (out.is_dir() or not os.access(out if out.exists() else out.parent, os.W_OK)):
        raise FalconError(f"cannot write {str(json_out)!r}", "give --json a file in a folder that exists")
    mismatches: list[dict] = []
    with Surroundings() as around:
        ways = [("fresh", tier), ("warm", tier), ("oversubscribed", tier), *([] if tier else [("warm", "B")])]
        found: dict = {}
        for way, on in ways:
            workers = 4 * len(os.sched_getaffinity(0)) if way == "oversubscribed" else 1
            with Sandbox(SandboxConfig(workers=workers), tier=on) as sandbox:
                found.setdefault(sandbox.tier, sandbox.layers)
                run = run_crowded if way == "oversubscribed" else run_single
                for row, what in run(rows, sandbox, around, way):
                    mismatches.append({"name": row["name"], "way": f"{way}, tier {sandbox.tier}", "what": what})
                    sys.stdout.write("{name} ({way}): {what}\n".format(**mismatches[-1]))
    if json_out is not None:
        told = {"programs": len(rows), "mismatches": mismatches, "layers": found}
        Path(json_out).write_text(json.dumps(told), encoding="utf-8")
    tiers = ", ".join(found)
    sys.stdout.write(f"{len(rows)} programs, {len(ways)} ways (tiers: {tiers}), {len(mismatches)} mismatches\n")
    return 0 if rows and not mismatches else 1


def read_corpus(path: Path) -> list[dict]:
    """The rows of a corpus file. Raises FalconError naming the line that is wrong."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FalconError(f"cannot read the corpus {str(path)!r}: {error}", "give a JSONL file: --corpus FILE.jsonl") from error
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            msgspec.convert(row, Row)
        except (ValueError, RecursionError) as error:
            raise FalconError(f"line {number} of {path.name} is no program of a corpus: {error}", f"fields: {_FIELDS}") from error
        rows.append(row)
    names = {row["name"] for row in rows}
    for row in rows:
        if row.get("after") and row["after"] not in names:
            raise did_you_mean(f"program to run before {row['name']}", row["after"], sorted(names))
    return rows


def program(row: dict) -> Program:
    return Program(row["program"], (row["test"], row["hidden_test"]) if "hidden_test" in row else (row["test"],), visible=1)


def run_single(rows: list[dict], sandbox: Sandbox, around: Surroundings, way: str) -> Iterator[tuple[dict, str]]:
    """One program after the other in one worker; fresh: its zygote is replaced before each."""
    by_name = {row["name"]: row for row in rows}
    for row in tqdm(rows, desc=f"{way}, tier {sandbox.tier}", leave=False):
        if way == "fresh":
            sandbox.refresh()
        if row.get("after") in by_name:
            sandbox.run(program(by_name[row["after"]]))
        before = around.state()
        reports = [sandbox.run(program(row)) for _ in range(row.get("repeat", 1))]
        clean = sandbox.run(_CONTROL).status == "pass"
        facts = {**before, "clean": clean, "alone": sandbox.idle(), "sandbox": sandbox}
        yield from ((row, what) for what in mismatches_of(row, reports, around, facts))


def run_crowded(rows: list[dict], sandbox: Sandbox, around: Surroundings, way: str) -> Iterator[tuple[dict, str]]:
    """All at once on too many workers, a control between every two: verdicts and what can be seen from outside."""
    controls = [dataclasses.replace(_CONTROL, code=_CONTROL.code + f"# {i}\n") for i in range(len(rows))]
    mixed = [p for pair in zip(map(program, rows), controls, strict=True) for p in pair]
    before = around.state()
    reports = sandbox.run_many(mixed, progress=True)
    for row, report, control in zip(rows, reports[::2], reports[1::2], strict=True):
        facts = {**before, "clean": control.status == "pass", "alone": True, "sandbox": sandbox, "crowded": True}
        yield from ((row, what) for what in mismatches_of(row, [report], around, facts))
    if not sandbox.idle():
        yield rows[-1], "NO_ORPHAN: processes are left"


def mismatches_of(row: dict, reports: Sequence[Report], around: Surroundings, facts: dict) -> Iterator[str]:
    """What differs from the row's expectations."""
    report = reports[0]
    hidden = [t for t in report.tests if t.snippet == 1]
    status = "pass" if hidden and all(t.status == "pass" for t in report.tests if t.snippet == 0) else report.status
    if status not in (row["expected_verdict"], *row.get("also_ok", ())):
        yield f"verdict {status}, expected {row['expected_verdict']} ({report.error})"
    if row.get("hidden_test") and not hidden and report.status != INFRA_ERROR:
        yield "no assert of the hidden test ran"
    if hidden and any(t.status == "pass" for t in hidden):
        yield "the hidden test passed"
    if status == row["expected_verdict"]:
        yield from details(row.get("expect", {}), report)
    for promise in row["must_hold"]:
        broken = PROMISES[promise](reports, around, facts) if promise in PROMISES else "unknown promise"
        if broken:
            yield f"{promise}: {broken}"


def details(expect: dict, report: Report) -> Iterator[str]:
    error, slack = report.error, report.status == "timeout"
    if "error_type" in expect and (error is None or error.type != expect["error_type"]):
        yield f"error type {error and error.type}, expected {expect['error_type']}"
    if "line" in expect and (error is None or error.line is None or abs(error.line - expect["line"]) > slack):
        yield f"error line {error and error.line}, expected {expect['line']}"
    if "per_test" in expect and [t.status for t in report.tests] != expect["per_test"]:
        yield f"per test {[t.status for t in report.tests]}, expected {expect['per_test']}"


class Surroundings:
    """Canaries, listeners and traces around the sandbox. A context manager; the folder of the canaries is removed after."""

    def __enter__(self) -> Surroundings:
        try:
            return self.build()
        except OSError as error:  # the names are fixed: the programs of a corpus know them
            self.stack.close()
            raise FalconError(
                f"the canaries cannot be put up: {error}", "one check at a time on a machine, by one user"
            ) from error

    def build(self) -> Surroundings:
        self.secret = f"canary-{secrets.token_hex(8)}"
        self.signals, self.stack = 0, contextlib.ExitStack()
        os.environ["FALCON_CANARY_SECRET"] = self.secret
        self.listeners = [self.listen(socket.AF_UNIX, "\0falcon_canary")]  # first: it is taken while another check runs
        shutil.rmtree(CANARY, ignore_errors=True)
        CANARY.mkdir(mode=0o755)
        files = {"secret.txt": self.secret, "deleteme": "", "falcon_canary_module.py": f"SECRET = {self.secret!r}\n"}
        for name, text in files.items():
            (CANARY / name).write_text(text)
        self.listeners.append(self.listen(socket.AF_UNIX, str(CANARY / "sock")))
        for family, host in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
            for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
                with contextlib.suppress(OSError):  # no IPv6 here, or the port is taken: then nothing can arrive either
                    self.listeners.append(self.listen(family, (host, PORT), kind))
        previous = signal.signal(signal.SIGURG, self.count)
        self.stack.callback(signal.signal, signal.SIGURG, previous)
        self.old = self.traces()
        return self

    def __exit__(self, *exc) -> None:
        self.stack.close()
        os.environ.pop("FALCON_CANARY_SECRET", None)
        shutil.rmtree(CANARY, ignore_errors=True)

    def listen(self, family: int, address, kind: int = socket.SOCK_STREAM) -> socket.socket:
        listener = self.stack.enter_context(socket.socket(family, kind))
        listener.bind(address)
        if kind == socket.SOCK_STREAM:
            listener.listen()
        listener.setblocking(False)
        return listener

    def count(self, *args) -> None:
        self.signals += 1

    def state(self) -> dict:
        return {"rss": psutil.Process().memory_info().rss, "fds": psutil.Process().num_fds()}

    def traces(self) -> set[str]:
        """Files and segments that hostile programs leave when they can."""
        found = {f for pattern in _TRACES for f in glob.glob(os.path.expanduser(pattern))}
        with contextlib.suppress(OSError), open("/proc/sysvipc/shm") as table:
            found |= {"System V segment" for line in table if line.split()[0] == str(_SEGMENT)}
        return found if (CANARY / "deleteme").exists() else found | {"the canary was moved"}

    def files(self) -> str:
        return ", ".join(sorted(self.traces() - self.old))

    def visitors(self) -> str:
        """Whether a listener was reached, or a port was opened for others."""
        for listener in self.listeners:
            with contextlib.suppress(BlockingIOError):
                listener.recv(1) if listener.type == socket.SOCK_DGRAM else listener.accept()[0].close()
                return "a listener was reached"
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", PORT + 1), timeout=0.2):
            return "a port of the program is reachable"
        return ""


def _alive(reports: Sequence[Report], around: Surroundings, facts: dict) -> str:
    grown = psutil.Process().num_fds() - facts["fds"]
    lost = any(r.status == "infra_error" for r in reports)
    return "the harness broke" if lost else f"{grown} descriptors leaked" if grown > 4 else ""


def _wall(reports: Sequence[Report], around: Surroundings, facts: dict) -> str:
    """Late is what took longer than its limit and had not used its CPU up; when crowded all starve, on purpose."""
    limit = facts["sandbox"].config.cpu_s
    late = [r.wall_s for r in reports if r.wall_s > limit + 1 and r.cpu_s < 0.9 * limit]
    return f"{late[0]} s" if late and not facts.get("crowded") else ""


def _memory(reports: Sequence[Report], around: Surroundings, facts: dict) -> str:
    peak, most = max(r.peak_mb or 0 for r in reports), facts["sandbox"].config.memory_mb + 64
    grown = (psutil.Process().memory_info().rss - facts["rss"]) >> 20
    return f"{peak} MB" if peak > most else f"supervisor grew by {grown} MB" if grown > 32 else ""


def _output(reports: Sequence[Report], around: Surroundings, facts: dict) -> str:
    cap = facts["sandbox"].config.output_kb << 10
    long = any(max(len(r.stdout), len(r.stderr), len(r.error.message) if r.error else 0) > cap for r in reports)
    unmarked = any(max(len(r.stdout.encode()), len(r.stderr.encode())) >= 3 * cap and not r.truncated for r in reports)
    return "more text than the cap" if long else "cut text is not marked" if unmarked else ""


Check = Callable[[Sequence[Report], Surroundings, dict], str]  # -> what is wrong, or ""
PROMISES: dict[str, Check] = {
    "NOT_PASS": lambda r, a, f: "it passed" if any(one.status == "pass" for one in r) else "",
    "HOST_ALIVE": _alive,
    "CLEAN_NEXT": lambda r, a, f: "" if f["clean"] else "the next control did not pass",
    "NO_ORPHAN": lambda r, a, f: "" if f["alone"] else "processes are left",
    "NO_FILE": lambda r, a, f: a.files(),
    "NO_READ": lambda r, a, f: "the canary is in the report" if any(a.secret in to_json(one) for one in r) else "",
    "NO_NET": lambda r, a, f: a.visitors(),
    "NO_SIGNAL": lambda r, a, f: f"{a.signals} signals arrived" if a.signals else "",
    "WALL": _wall,
    "MEM": _memory,
    "OUT": _output,
    "DETERMINISTIC": lambda r, a, f: "" if len({(o.status, o.tests, o.stdout) for o in r}) == 1 else "the repeats differ",
}
PROMISES["NO_EXPECTED"], PROMISES["NO_ENV"] = PROMISES["NOT_PASS"], PROMISES["NO_READ"]
PROMISES["NO_HOST_EXEC"] = PROMISES["DISK"] = PROMISES["NO_FILE"]
