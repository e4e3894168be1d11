"""One zygote process and the memory files that go to and come from it."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec

from falconlib.errors import FalconError
from falconlib.sandbox import verdict

_ZYGOTE = Path(__file__).with_name("zygote.py")
_ENVIRONMENT = {
    "PYTHONHASHSEED": "0",
    "TZ": "UTC",
    "LC_ALL": "C.UTF-8",
    "HOME": "/nonexistent",
    "PATH": "/nonexistent",
    "MALLOC_ARENA_MAX": "1",  # an arena per thread would eat the address space limit
}


def memfd(name: str, data: bytes = b"") -> int:
    """An anonymous file in memory holding `data`, at offset 0 for whoever gets it."""
    fd, done = os.memfd_create(name), 0
    while done < len(data):
        done += os.pwrite(fd, data[done:], done)
    return fd


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
        # isolated like -I, which would also ignore PYTHONHASHSEED
        command = [sys.executable, "-sSPB", "-X", "utf8", str(_ZYGOTE), json.dumps({**config, "fd": theirs.fileno()})]
        with theirs:
            self.process = subprocess.Popen(
                command, env=_ENVIRONMENT, cwd="/", pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=self.log,
                stderr=self.log, start_new_session=True,
            )  # fmt: skip
        self.task: Any = None  # the caller's own
        self.deadline = 0.0
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

    def start(self, task: object, job: dict, first: bytes, second: bytes) -> None:
        """Hands over a program and its tests (or its standard input)."""
        self.task = task
        for name, data in ("code", first), ("tests", second), *((n, b"") for n in ("result", "out", "err", "fault")):
            self.fds.append(memfd(name, data))
        self.deadline, self.cap = time.monotonic() + job["cpu"] * 12 + 15, job["output"]
        socket.send_fds(self.control, [json.dumps(job).encode()], self.fds)

    def finish(self) -> dict | None:
        """What came of it, or None when the zygote died."""
        try:
            data = self.control.recv(1 << 16)
        except OSError:
            data = b""
        raw = None
        if data:
            result, out, err, fault = self.fds[2:]
            raw = {"ended": msgspec.json.decode(data, type=verdict.Ended), "result": content(result, 8 << 20)}
            raw |= {"stdout": content(out, self.cap), "stderr": content(err, self.cap)}
            raw["fault"] = content(fault, 1 << 14).decode("utf-8", "replace")
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
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(1)  # it reaps the first process of its pid namespace, which ends with the socket
        self.process.kill()
        self.process.wait()
        if self.log >= 0:
            os.close(self.log)
            self.log = -1
