"""Which walls stand on this machine: harmless violations tried from behind them, a grade, and a reason for what is missing.

A layer counts as verified when an attempt that it forbids was refused in the way that this layer refuses, or when the
kernel's own record of the probe process says so.
"""

from __future__ import annotations

import json
import os
import secrets
from pathlib import Path

from falconlib.errors import FalconError
from falconlib.sandbox.kernel import namespace_id

NAMESPACES = ("user", "pid", "net", "mount", "ipc", "uts")
LAYERS = (*NAMESPACES, "landlock", "seccomp", "capabilities", "uid", "no_new_privs", "rlimits", "clocks")
_READABLE = ("/etc/passwd", "/etc/group", "/etc/hosts")  # by any user of the machine
BASE = ("seccomp", "capabilities", "no_new_privs", "rlimits")  # without these there is no sandbox at all

PROBE = """
import ctypes, json, os, resource, socket, time
ask = json.loads(input())
libc = ctypes.CDLL(None, use_errno=True)
def syscall(*args):
    if libc.syscall(*(ctypes.c_long(a) for a in args)) < 0:
        raise OSError(ctypes.get_errno(), "")
def tried(action):
    try:
        action()
    except OSError as error:
        return error.errno
    except (MemoryError, ValueError):
        return -1
    return 0
def spawn():
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
told = {
    "read": tried(lambda: open(ask["canary"]).read()),
    "list": tried(lambda: os.listdir("/")),
    "write": tried(lambda: open(ask["written"], "w").close()),
    "source": tried(lambda: open(ask["source"]).read(1)),
    "socket": tried(socket.socket),
    "fork": tried(spawn),
    "exec": tried(lambda: os.execv("/nonexistent", ["x"])),
    "signal": tried(lambda: os.kill(os.getppid(), 0)),
    "trace": tried(lambda: syscall(ask["ptrace"], 0x4206, os.getppid(), 0, 0)),
    "unshare": tried(lambda: syscall(ask["unshare"], 0x10000000)),
    "become_root": tried(lambda: os.setresuid(0, 0, 0)),
    "raise_limit": tried(lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (hard + 1, hard + 1))),
    "memory": tried(lambda: bytearray(ask["memory"])),
    "output": tried(lambda: [os.write(2, bytes(4096)) for _ in range(ask["output"] // 4096 + 2)]),
    "parent": os.getppid(), "host": os.uname().nodename,
}
print(json.dumps(told))
time.sleep(0.05)
"""


def question(written: Path, memory: int, output: int) -> bytes:
    """The probe's standard input: what it should try to reach. Nothing is put there for it: a kill would leave it behind."""
    numbers = {"x86_64": (101, 272), "aarch64": (117, 97)}.get(os.uname().machine, (101, 272))
    ask: dict[str, object] = {
        "canary": next(filter(os.path.exists, _READABLE), __file__),
        "source": __file__,
        "written": str(written),
    }
    ask |= {"ptrace": numbers[0], "unshare": numbers[1], "memory": 2 * memory, "output": output}
    return json.dumps(ask).encode() + b"\n"


def probe(run, memory: int, output: int) -> tuple[dict, dict]:
    """(answers of the probe, the kernel's record of its process). run(code, stdin) -> (stdout, record)."""
    written = Path(f"/tmp/falcon-probe-{secrets.token_hex(4)}")
    out, record = run(PROBE.encode(), question(written, memory, output))
    written.unlink(missing_ok=True)
    try:
        return json.loads(out), record
    except ValueError:
        raise FalconError("the sandbox's probe gave no answer", "falconlib doctor") from None


def assess(facts: dict, told: dict, record: dict, without: list[str]) -> dict[str, dict]:
    """layer -> {requested, active, verified, reason}. facts: what each zygote says that it set up."""
    refused = {name for name, code in told.items() if name not in ("parent", "host") and code != 0}
    kept = "bounding" in facts.get("capabilities", [True, ""])[1]  # without exec and new privileges nothing can be gained from it
    sets = ("CapPrm", "CapEff", "CapInh", *(() if kept else ("CapBnd",)))
    own = {n for n in ("user", "net", "ipc") if record.get(f"{n} namespace", "0") not in ("0", str(namespace_id(n)))}
    clock = float(record.get("clock", "0"))
    seen = {
        "user": "user" in own,
        "net": "net" in own and record.get("devices") == "lo" and "socket" in refused,
        "ipc": "ipc" in own,
        "clocks": clock > 0,
        "pid": told["parent"] == 1,
        "uts": told["host"] == "sandbox",
        "mount": "read" in refused and "write" in refused and "source" in refused,
        "landlock": told["list"] == 13 and {"read", "write", "source"} <= refused,
        "seccomp": record.get("Seccomp") == "2" and all(told[n] == 1 for n in ("fork", "socket", "exec", "trace", "unshare")),
        "capabilities": all(int(record.get(n, "1"), 16) == 0 for n in sets),
        "uid": record.get("Uid", "").split()[:1] not in ([], ["0"]) and "become_root" in refused,
        "no_new_privs": record.get("NoNewPrivs") == "1",
        "rlimits": {"raise_limit", "memory", "output"} <= refused,
    }
    facts = {**facts, "no_new_privs": [True, ""]}
    result = {}
    for layer in LAYERS:
        active, reason = facts.get(layer, [False, "unknown to this kernel"])
        verified = bool(active and seen.get(layer, False))
        if active and not verified:
            reason = f"set up, but the probe was not stopped: {told}"
        result[layer] = {"requested": layer not in without, "active": active, "verified": verified, "reason": reason}
    return result


def grade(layers: dict[str, dict]) -> str:
    """ "A": namespaces, Landlock and the base; "B": a read wall and the base; "none": less."""
    good = {name for name, layer in layers.items() if layer["verified"]}
    if {*NAMESPACES, *BASE, "landlock"} <= good:
        return "A"
    return "B" if {*BASE} <= good and good & {"landlock", "mount"} else "none"


def admit(layers: dict[str, dict], tier: str | None, require: str, allow_unsafe: bool) -> str:
    """The tier to run on. Raises FalconError when it is less than asked for: it fails closed."""
    found = grade(layers)
    missing = "; ".join(f"{n}: {v['reason'] or 'not there'}" for n, v in layers.items() if not v["verified"])
    wanted = "A" if require == "strong" else tier or "B"
    if found == "none" and not allow_unsafe:
        raise FalconError(
            f"no sandbox worth the name on this machine ({missing})", "see `falconlib doctor`, or set sandbox.allow_unsafe=true"
        )
    if wanted == "A" and found != "A":
        raise FalconError(
            f"sandbox tier A was asked for, this is tier {found} ({missing})",
            "set sandbox.require=good, or see `falconlib doctor`",
        )
    return "unsafe" if found == "none" else found


def identity(tier: str, layers: dict[str, dict]) -> str:
    """A short text for reports: the tier and the verified layers."""
    return f"{tier}:" + ",".join(n for n, v in layers.items() if v["verified"])
