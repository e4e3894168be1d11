"""The fork server, executed as `python -s -S zygote.py CONFIG`: small, single-threaded, standard library only.

It forks candidate and judge for one program at a time, watches the clocks, kills, reaps, and reports how the processes
ended. Programs, tests and outputs pass it as file descriptors: it never reads them, so nothing of them is in the memory
of what it forks next.
"""

import builtins
import contextlib
import ctypes
import faulthandler
import fcntl
import functools
import gc
import importlib
import json
import mmap
import os
import random
import resource
import select
import signal
import site
import socket
import sys
import time
import types

HERE = os.path.dirname(os.path.abspath(__file__))
PREIMPORT = """
array base64 binascii bisect calendar cmath collections collections.abc contextlib copy csv ctypes dataclasses datetime decimal
enum fractions functools hashlib heapq inspect io itertools json locale math numbers operator pprint queue random re reprlib
secrets statistics string struct textwrap threading time timeit traceback types typing unicodedata uuid weakref zlib
"""
WALL_GRACE = 0.5  # seconds of effective wall beyond the CPU limit
HARD_FACTOR = 10  # hard wall, in CPU limits
JUDGE_GRACE = 1.0  # CPU seconds of a judge beyond the program's limit
ADDR_NO_RANDOMIZE = 0x0040000
THREADS = 256  # of a candidate; their kernel stacks are in no other limit
CLOSING = 0.05  # seconds that a candidate which hung up has to end
FILES = 128  # open files that the fork server needs to be allowed
JUDGE_PROGRAMS, JUDGE_KB = 500, 100_000  # after so many programs, or at such a size, a judge is replaced


def load(*names):
    """Our modules, outside sys.modules and with their own copy of the builtins, so that a program cannot patch them."""
    own = types.SimpleNamespace()
    for package in ("falconlib", "falconlib.sandbox"):
        sys.modules[package] = types.ModuleType(package)
    for name in names:
        full = f"falconlib.sandbox.{name}"
        module = sys.modules[full] = types.ModuleType(full)
        module.__dict__["__builtins__"] = dict(vars(builtins))
        with open(os.path.join(HERE, name + ".py"), encoding="utf-8") as file:
            exec(compile(file.read(), "<sandbox>", "exec", dont_inherit=True), module.__dict__)
        setattr(own, name, module)
    for full in [m for m in sys.modules if m.startswith("falconlib")]:
        del sys.modules[full]
    return own


def cpu_seconds(pid):
    try:
        return time.clock_gettime(((~pid) << 3) | 2)
    except OSError:
        return 0.0


def run_delay(pid):
    """Seconds that a process was runnable but not run; 0 where /proc does not say."""
    try:
        with open(f"/proc/{pid}/schedstat", "rb") as file:
            return int(file.read().split()[1]) / 1e9
    except (OSError, ValueError, IndexError):
        return 0.0


def kernel_record(pid):
    """The lines of /proc/PID/status, once the process is behind its walls."""
    try:
        with open(f"/proc/{pid}/status") as file:
            record = dict(line.rstrip("\n").split(":\t", 1) for line in file if ":\t" in line)
        with open(f"/proc/{pid}/net/dev") as file:
            record["devices"] = " ".join(line.split(":")[0].strip() for line in file if ":" in line)
    except OSError:
        return {}
    record |= {f"{name} namespace": str(OWN.kernel.namespace_id(name)) for name in OWN.kernel.NAMESPACES}
    record["clock"] = str(cpu_seconds(pid))
    return record if record.get("State", "Z")[0] in "SR" else {}


class Zygote:
    """Serves programs from the control socket until it closes."""

    def __init__(self, config):
        self.control = socket.socket(fileno=os.dup(config["fd"]))  # a low number: the caller's may be any, and children close
        os.close(config["fd"])  # by range
        self.owner = os.pidfd_open(os.getppid())  # the socket may live on in a forked copy of it
        self.null = os.open(os.devnull, os.O_RDWR)
        self.judge, self.settled = None, mmap.mmap(-1, 1)  # shared with the children, until they are behind their walls
        self.walls = OWN.kernel.Walls(config)

    def serve(self):
        for name in PREIMPORT.split():
            importlib.import_module(name)
        site.setquit()  # exit() and quit(), which `python -S` lacks
        with open("/proc/self/statm", "rb") as file:
            self.base = int(file.read().split()[0]) * resource.getpagesize()
        self.walls.enter()
        gc.collect()
        gc.freeze()
        self.control.send(json.dumps({"ready": os.getpid(), "layers": self.walls.facts}).encode())
        while True:
            owner_gone = self.owner in select.select([self.control, self.owner], [], [])[0]
            message, fds, _, _ = (b"", [], 0, None) if owner_gone else socket.recv_fds(self.control, 4096, 8)
            if not message:
                return
            self.control.send(json.dumps(self.run(json.loads(message), fds)).encode())

    def run(self, job, fds):
        code, tests, result, out, err, fault = fds
        value = job["mode"] == "value"
        stdin, theirs, judge = tests if job["mode"] == "stdio" else self.null, result, None
        if value:
            ours, theirs = (s.detach() for s in socket.socketpair())
            judge = self.judge or self.fork_judge(job)
        start = time.monotonic()
        self.settled[0] = 0
        pid = self.fork(self.candidate, job, code, tests, (stdin, out, err, theirs, fault))
        if value:
            socket.send_fds(judge.channel, [b"."], [ours, tests, result])
            os.close(theirs)
            os.close(ours)
        report = self.watch(job, pid, judge, fault, start)
        if not self.settled[0]:  # nothing of the program ran
            sys.exit("a process could not be put behind its walls")
        for fd in fds:
            os.close(fd)
        return report

    def retired(self):
        """Whether the judge has closed its side for good, whatever it said afterwards."""
        try:
            return self.judge.channel.send(b"") != 0
        except OSError:
            return True

    def bury_judge(self):
        judge, self.judge = self.judge, None
        judge.channel.close()
        return self.reap(judge.pid, judge.handle)["status"]

    def fork_judge(self, job):
        ours, theirs = socket.socketpair()
        pid = self.fork(self.judge_loop, job, (self.null, self.null, self.null, theirs.fileno()))
        theirs.close()
        self.judge = types.SimpleNamespace(pid=pid, handle=os.pidfd_open(pid), channel=ours)
        return self.judge

    def fork(self, body, *args):
        pid = os.fork()
        if pid:
            return pid
        try:
            body(*args)
            os._exit(0)
        finally:
            os._exit(int(body == self.judge_loop))  # 1: something exhausted it; tests end it with 0

    # in the children

    def settle(self, fds, job, output, judge):
        """Descriptors 0, 1, 2, ... become `fds`, the others are closed; then limits and walls."""
        fresh = [os.open(os.devnull, os.O_RDWR) if fd == self.null else fd for fd in fds]  # flags belong to the open file
        high = [fcntl.fcntl(fd, fcntl.F_DUPFD, FILES // 2) for fd in fresh]
        for target, fd in enumerate(high):
            os.dup2(fd, target)
        os.closerange(len(fds), OWN.kernel.RULESET)
        if not judge:
            faulthandler.enable(4)
            faulthandler.register(signal.SIGXCPU, 4, all_threads=False, chain=False)
        cpu = int(job["cpu"]) + 1
        memory = self.base + job["memory"]
        limits = {"AS": memory, "DATA": memory, "FSIZE": output, "NOFILE": 64, "CORE": 0, "STACK": 8 << 20,
                  "MEMLOCK": 0, "MSGQUEUE": 0} | ({} if judge else {"CPU": (cpu, cpu + 1)})  # fmt: skip
        if self.walls.ids:  # a uid of its own: threads of others do not count
            limits["NPROC"] = THREADS
        if "rlimits" not in self.walls.off:
            for name, limit in limits.items():
                which = getattr(resource, "RLIMIT_" + name)
                most = resource.getrlimit(which)[1]  # the caller's own limits may be lower
                pair = limit if isinstance(limit, tuple) else (limit, limit)
                resource.setrlimit(which, pair if most < 0 else tuple(min(n, most) for n in pair))
        self.walls.enclose(judge)
        if not judge:
            self.settled[0] = 1
        self.settled.close()
        random.seed(0)

    def candidate(self, job, code, tests, fds):
        source = read_all(code)
        job["tests"] = read_all(tests) if job["mode"] == "in_process" else None
        self.settle(fds, job, job["output"], judge=False)
        source = source.decode("utf-8", "surrogatepass")
        if job["mode"] == "in_process":
            OWN.judge.run_in_process(json.loads(job["tests"]), source, write_result)
        else:
            {"value": OWN.candidate.serve, "stdio": OWN.candidate.script}[job["mode"]](3, source)

    def judge_loop(self, job, fds):
        """Serves programs as long as their tests leave no trace in this process; it holds no candidate's code."""
        self.settle(fds, job, 8 << 20, judge=True)
        channel = socket.socket(fileno=3)
        retire = functools.partial(channel.shutdown, socket.SHUT_RD)  # not to be undone by what it runs then
        gc.disable()  # trees without cycles come and go; what does leak goes with the process
        for _ in range(JUDGE_PROGRAMS):
            _, (peer, tests, result), _, _ = socket.recv_fds(channel, 1, 3)
            random.seed(0)
            clean, hung_up = OWN.judge.run(
                json.loads(read_all(tests)), peer, lambda data, fd=result: os.pwrite(fd, data, 0), retire
            )
            if not clean or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > JUDGE_KB:
                return
            for fd in (peer, tests, result):
                os.close(fd)
            channel.send(b"x" if hung_up else b".")

    # in the zygote

    def watch(self, job, pid, judge, fault, start):
        """Waits for the judge's word (or the candidate's end, where there is no judge), enforcing the clocks."""
        handle, polls = os.pidfd_open(pid), select.poll()
        last = judge.channel.fileno() if judge else handle
        for fd in {handle, last, self.control.fileno(), self.owner}:
            polls.register(fd, select.POLLIN)
        killed, judge_killed, delay, record = None, False, 0.0, {}
        wait = 0.01 if job.get("inspect") else job["cpu"]
        spent = cpu_seconds(judge.pid) if judge else 0.0
        waited = run_delay(judge.pid) if judge else 0.0
        while True:
            events = dict(polls.poll(max(5, min(250, int(wait * 1000)))))
            if self.control.fileno() in events or self.owner in events:  # the supervisor is gone, or has given up
                signal.pidfd_send_signal(handle, signal.SIGKILL)
                os._exit(0)
            if last in events:
                break
            if job.get("inspect"):
                wait, record = 0.01, kernel_record(pid) or record
                continue
            if handle in events:
                polls.unregister(handle)
            judge_cpu = cpu_seconds(judge.pid) - spent if judge else 0.0
            wall, limit = time.monotonic() - start, job["cpu"]
            delay = run_delay(pid) + (run_delay(judge.pid) - waited if judge else 0.0)
            effective = wall - delay - judge_cpu
            left = {"cpu": limit - cpu_seconds(pid), "wall": limit + WALL_GRACE - effective, "hard": limit * HARD_FACTOR - wall}
            wait = min(left.values())
            if wait <= 0 and killed is None and handle not in events:
                killed = next(k for k in left if left[k] <= 0)
                self.kill(pid, handle, fault)
            if judge and (judge_cpu > limit + JUDGE_GRACE or wall > limit * HARD_FACTOR + 2):
                judge_killed = True
                signal.pidfd_send_signal(judge.handle, signal.SIGKILL)
        wall = time.monotonic() - start
        word = judge.channel.recv(1) if judge else b""
        while not (killed or self.settled[0] or time.monotonic() - start > job["cpu"] * HARD_FACTOR):
            if select.select([handle], [], [], 0.001)[0]:  # a judge that refuses its tests is ahead of a candidate which is
                break  # still on its way behind its walls: killing it there would say that it could not get there
        if word != b"." and not select.select([handle], [], [], CLOSING)[0]:
            killed = killed or "closed"  # it hung up and lives on
        ends = [self.reap(pid, handle)]
        if judge:
            ends.append({"status": 0, "cpu": max(0.0, cpu_seconds(judge.pid) - spent), "rss": 0})
            if judge_killed or not word or self.retired():
                ends[1]["status"] = self.bury_judge()
        return {"ends": ends, "killed": killed, "judge_killed": judge_killed, "wall": wall, "delay": delay, "record": record}

    def kill(self, pid, handle, fault):
        """SIGXCPU first: faulthandler writes the line even from inside a C loop; then SIGKILL. A process that did not get the
        processor since has some more time for it."""
        size, start, spent = 0, time.monotonic(), cpu_seconds(pid)
        signal.pidfd_send_signal(handle, signal.SIGXCPU)
        while (waited := time.monotonic() - start) < 0.05 or (waited < 0.25 and cpu_seconds(pid) == spent):
            time.sleep(0.005)
            before, size = size, os.fstat(fault).st_size
            if size and size == before:
                break
        signal.pidfd_send_signal(handle, signal.SIGKILL)

    def reap(self, pid, handle):
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(handle, signal.SIGKILL)
        _, status, usage = os.wait4(pid, 0)
        os.close(handle)
        return {"status": status, "cpu": usage.ru_utime + usage.ru_stime, "rss": usage.ru_maxrss}


def read_all(fd):
    """The content of a memfd, from its start."""
    return os.pread(fd, os.fstat(fd).st_size, 0)


def write_result(data):
    os.pwrite(3, data, 0)


def fix_addresses():
    """Starts this program again without address randomisation, where that is allowed: hash(None) and id() repeat then."""
    libc = ctypes.CDLL(None)
    current = libc.personality(0xFFFFFFFF)
    if current >= 0 and not current & ADDR_NO_RANDOMIZE and libc.personality(current | ADDR_NO_RANDOMIZE) >= 0:
        os.execv(sys.executable, sys.orig_argv)


def allow_files():
    """Some descriptors have high numbers here; a caller with a low limit of open files lends what it may. Verdicts are files."""
    largest, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    if 0 <= largest < 8 << 20:
        sys.exit(f"files of 8 MiB are needed, the limit (ulimit -f) is {largest} bytes")
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most != resource.RLIM_INFINITY and most < FILES:
        sys.exit(f"{FILES} open files are needed, the hard limit (ulimit -Hn) is {most}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, 4096) if most >= 0 else 4096, most))


if __name__ == "__main__":
    fix_addresses()
    allow_files()
    OWN = load("codec", "candidate", "rewrite", "proxies", "judge", "filters", "kernel")
    Zygote(json.loads(sys.argv[1])).serve()
