"""What the kernel is asked for: namespaces, Landlock, seccomp, capabilities, another uid. Standard library only.

Why not the packages: walls are made in the fork server and entered by each child, and what the fork server imports is in the
memory of every candidate, so both import the standard library only. `landlock` 1.0.0.dev5 (4 ms to import) has file rights alone:
TCP (ABI 4) and signals (ABI 6) would need a second ruleset by the same three calls that are made here, so it would replace ten
lines; on a kernel named like 6.1.85+ its error path ends with a ValueError. `pyseccomp` 0.1.2 looks for libseccomp2 when it is
imported, with subprocess, tempfile and nine more modules (13 ms; unpacking the filter takes 0.06), and where that library is
absent there would be no filter, and so no tier. It makes the filters beforehand instead, and a test compares them (`filters`).
psutil and msgspec serve in the supervisor.
"""

import base64
import ctypes
import errno
import os
import platform
import signal
import socket
import stat
import struct
import sys
import zlib

from falconlib.sandbox.filters import FILTERS, PID_MARK

NAMESPACES = {"mount": 0x20000, "uts": 0x4000000, "ipc": 0x8000000, "user": 0x10000000, "pid": 0x20000000, "net": 0x40000000}
_PROC_NAMES = {"mount": "mnt"}
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_FIRST_UID = 61_000  # host uids of zygote, judge and candidate when root lends them
_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
_BIND, _REC, _RDONLY, _REMOUNT, _PRIVATE, _NOSUID, _NODEV, _NOEXEC = 0x1000, 0x4000, 1, 0x20, 1 << 18, 2, 4, 8
_READ_FILE, _WRITE_FILE, _READ_DIR = 1 << 2, 1 << 1, 1 << 3
_FS_RIGHTS = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 5: (1 << 16) - 1}  # by Landlock ABI
RULESET = 100  # its descriptor: above all that a child closes
_libc = ctypes.CDLL(None, use_errno=True)


def call(name, *args):
    """A libc function or `syscall`; raises OSError."""
    result = getattr(_libc, name)(*(ctypes.c_long(a) if isinstance(a, int) else a for a in args))
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{name}: {os.strerror(error)}")
    return result


def prctl(option, a=0, b=0):
    return call("prctl", option, a, b, 0, 0)


def library():
    """(paths to read, folders to hide below them): the standard library entry by entry, and the shared objects it needs."""
    stdlib = os.path.dirname(os.__file__)
    hidden = [os.path.join(stdlib, name) for name in ("site-packages", "dist-packages")]
    paths = [p for name in sorted(os.listdir(stdlib)) if (p := os.path.join(stdlib, name)) not in hidden]
    paths += [p for p in sys.path if p.endswith("lib-dynload") and not p.startswith(stdlib + os.sep)]
    with open("/proc/self/maps") as file:
        mapped = {line.split(None, 5)[5].strip() for line in file if ".so" in line}
    folders = {os.path.dirname(p) for p in mapped if p.startswith("/") and not p.startswith(stdlib)}
    for folder in sorted(folders):
        names = sorted(os.listdir(folder))
        mixed = stdlib.startswith(folder + os.sep) or any("python" in n and os.path.isdir(os.path.join(folder, n)) for n in names)
        paths += [os.path.join(folder, n) for n in names if ".so" in n] if mixed else [folder]
    paths += [p for p in ("/usr/share/zoneinfo", "/etc/localtime") if os.path.exists(p)]
    return stdlib, paths, [p for p in hidden if os.path.isdir(p)]


def namespace_id(name):
    """Inode of this process's namespace `name`; 0 when the kernel has none."""
    try:
        return os.stat(f"/proc/self/ns/{_PROC_NAMES.get(name, name)}").st_ino
    except OSError:
        return 0


class Walls:
    """The restrictions of one zygote and its children. config: {tier, off, worker}. facts: layer -> [active, reason]."""

    def __init__(self, config):
        self.off, self.facts = set(config["off"]), {}
        self.off |= set(NAMESPACES) if config["tier"] == "B" else set()
        self.first_uid = _FIRST_UID + 3 * config["worker"]
        self.root = os.geteuid() == 0
        self.ids = None
        self.stdlib, self.paths, self.hidden = library()
        self.no_uid = self.why_no_uid()

    def note(self, layer, active, reason=""):
        self.facts[layer] = [bool(active), reason]

    # once, in the zygote

    def enter(self):
        wanted = {n: bit for n, bit in NAMESPACES.items() if n not in self.off}
        trouble = self.rehearse(wanted) if wanted else "not requested"
        before = {n: namespace_id(n) for n in NAMESPACES}
        if not trouble:
            self.unshare(wanted)
        for name in NAMESPACES:
            changed = namespace_id(name) != before[name] if before[name] else not trouble
            self.note(name, changed, "" if changed else trouble or "not requested")
        if self.facts["net"][0]:
            self.note("net", [n for _, n in socket.if_nameindex()] == ["lo"], "only a loopback device that is down")
        self.note("clocks", os.path.exists(f"/proc/{os.getpid()}/schedstat"), "run-queue delay from /proc")
        prctl(38, 1)  # no new privileges
        prctl(4, 0)  # not dumpable: no ptrace, no /proc/self/mem of it
        self.choose_ids()
        self.drop_bounding_set()
        self.ruleset = self.landlock()
        self.filter = self.prepare_filter()
        self.note("rlimits", "rlimits" not in self.off)

    def rehearse(self, wanted):
        """Tries the namespaces in a child first: a half-done unshare cannot be taken back. Returns what went wrong, or ""."""
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                self.unshare(wanted)
                os.write(writer, b"ok")
            except BaseException as error:  # noqa: BLE001 - whatever it is, it is the reason
                os.write(writer, str(error).encode()[:300])
            os._exit(0)
        os.close(writer)
        said = b""
        while chunk := os.read(reader, 400):
            said += chunk
        os.close(reader)
        os.waitpid(pid, 0)
        return "" if said == b"ok" else said.decode() or "no answer"

    def unshare(self, wanted):
        uid, gid = os.geteuid(), os.getegid()
        helper = self.map_ids(uid, gid) if "user" in wanted else None
        call("unshare", sum(wanted.values()))
        if helper:
            helper()
        if "pid" in wanted:
            self.become_first()
        if "uts" in wanted:
            socket.sethostname("sandbox")
        sources = self.open_sources() if "mount" in wanted else []
        if helper and not self.no_uid:  # from here on another user: what it makes must be owned by an id that is mapped
            os.setgroups([])
            os.setresgid(0, 0, 0)
            os.setresuid(0, 0, 0)
            if "pid" in wanted:
                prctl(1, signal.SIGKILL)  # a change of ids takes it back
        if sources:
            self.new_root(sources, "pid" in wanted)

    def map_ids(self, uid, gid):
        """Writes the id maps after unshare: root lends three ids, which a helper outside has to write; others map their own."""
        lines = [f"{uid} {uid} 1"] if self.no_uid else [f"{k} {self.first_uid + k} 1" for k in range(3)]
        if not self.root:

            def write():
                for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
                    with open(f"/proc/self/{name}", "w") as file:
                        file.write(text)

            return write
        (reader, writer), parent = os.pipe(), os.getpid()
        pid = os.fork()
        if pid == 0:
            os.close(writer)
            done = 1
            if os.read(reader, 1):
                for name in ("uid_map", "gid_map"):
                    with open(f"/proc/{parent}/{name}", "w") as file:
                        file.write("\n".join(lines))
                done = 0
            os._exit(done)

        def wait():
            os.write(writer, b"x")
            if os.waitpid(pid, 0)[1]:
                raise OSError("the id map was refused")

        return wait

    def become_first(self):
        """Forks the first process of the new pid namespace; this one waits for it and dies with it."""
        pid = os.fork()
        if pid:
            os.closerange(3, 1024)
            os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) & 0xFF)
        prctl(1, signal.SIGKILL)

    def open_sources(self):
        """The standard library, its shared objects and five devices, opened while their folders can still be entered."""
        paths = [self.stdlib, *(p for p in self.paths if not p.startswith(self.stdlib + os.sep)), *_DEVICES]
        return [(p, os.open(p, os.O_PATH | os.O_CLOEXEC)) for p in paths if os.path.exists(p)]

    def new_root(self, sources, own_pids):
        """A root folder that holds the sources and /proc, and nothing else."""
        free = (d for d in ("/mnt", "/media", "/srv", "/opt", "/tmp", "/var") if os.path.isdir(d))
        base = next(d for d in free if not any(path.startswith(d + "/") for path, _ in sources))
        self.mount(None, "/", None, _REC | _PRIVATE)
        self.mount("tmpfs", base, "tmpfs", _NOSUID | _NODEV, "size=1m,mode=755")
        for path, fd in sources:
            target = base + path
            folder = stat.S_ISDIR(os.fstat(fd).st_mode)
            os.makedirs(target if folder else os.path.dirname(target), exist_ok=True)
            if not folder:
                open(target, "w").close()
            self.mount(f"/proc/self/fd/{fd}", target, None, _BIND | _REC)
            os.close(fd)
        for folder in self.hidden:
            self.mount("tmpfs", base + folder, "tmpfs", _NOSUID | _NODEV | _RDONLY, "size=4k,mode=755")
        os.mkdir(base + "/proc")
        for number, name in enumerate(("stdin", "stdout", "stderr")):
            os.symlink(f"/proc/self/fd/{number}", f"{base}/dev/{name}")
        if own_pids:
            self.mount("proc", base + "/proc", "proc", _NOSUID | _NODEV | _NOEXEC)
        else:
            self.mount("/proc", base + "/proc", None, _BIND | _REC)
        self.mount(None, base, None, _REMOUNT | _BIND | _RDONLY | _NOSUID | _NODEV)
        os.chdir(base)
        call("syscall", _PIVOT_ROOT[platform.machine()], b".", b".")
        call("umount2", b".", 2)
        os.chdir("/")

    def mount(self, source, target, kind, flags, data=None):
        source, target, kind, data = (a.encode() if isinstance(a, str) else a for a in (source, target, kind, data))
        call("mount", source, target, kind, flags, data)

    def why_no_uid(self):
        """Why judge and candidate keep the uid of their owner, or "". In a root folder of their own they can read the library."""
        if "uid" in self.off:
            return "not requested"
        if not self.root:
            return "only root can lend other uids"
        with open("/proc/self/uid_map") as file:
            spans = [(int(first), int(first) + int(count)) for first, _, count in map(str.split, file)]
        if not any(low <= self.first_uid and self.first_uid + 3 <= high for low, high in spans):
            return "no other uids are mapped here"
        parts = self.stdlib.split(os.sep)
        closed = [p for i in range(2, len(parts) + 1) if not os.stat(p := os.sep.join(parts[:i])).st_mode & 1]
        return f"other users cannot read {closed[0]}, where the standard library is" if closed and "mount" in self.off else ""

    def choose_ids(self):
        """Which uids judge and candidate get."""
        if self.no_uid:
            return self.note("uid", False, self.no_uid)
        first = 0 if self.facts["user"][0] else self.first_uid
        if first:
            os.setgroups([])
        self.ids = (first + 1, first + 2)
        return self.note("uid", True, "candidate, judge and zygote differ")

    def drop_bounding_set(self):
        if "capabilities" in self.off:
            return self.note("capabilities", False, "not requested")
        try:
            for number in range(64):
                prctl(24, number)
        except OSError as error:  # EINVAL marks the end of the list
            if error.errno == errno.EPERM:
                return self.note("capabilities", True, "none held; the bounding set is not ours to change")
        return self.note("capabilities", True, "none in any set")

    def landlock(self):
        """A ruleset's descriptor, or None: read the library, write /dev/null, nothing else; no TCP, no signals."""
        if "landlock" in self.off:
            return self.note("landlock", False, "not requested")
        try:
            abi = call("syscall", 444, None, 0, 1)
        except OSError as error:
            return self.note("landlock", False, str(error))
        rights = _FS_RIGHTS[max(k for k in _FS_RIGHTS if k <= abi)]
        attributes = struct.pack("QQQ", rights, 3 if abi >= 4 else 0, 3 if abi >= 6 else 0)
        size = 24 if abi >= 6 else 16 if abi >= 4 else 8
        ruleset = call("syscall", 444, ctypes.c_char_p(attributes), size, 0)
        allowed = [(p, _READ_FILE | (_READ_DIR if os.path.isdir(p) else 0)) for p in self.paths if os.path.exists(p)]
        allowed += [(p, _READ_FILE | (_WRITE_FILE if p == "/dev/null" else 0)) for p in _DEVICES if os.path.exists(p)]
        for path, right in allowed:
            fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
            call("syscall", 445, ruleset, 1, ctypes.c_char_p(struct.pack("=Qi", right, fd)), 0)
            os.close(fd)
        os.dup2(ruleset, RULESET)
        os.close(ruleset)
        self.note("landlock", True, f"ABI {abi}: files" + (", TCP" if abi >= 4 else "") + (", signals" if abi >= 6 else ""))
        return RULESET

    def prepare_filter(self):
        packed = FILTERS.get(platform.machine())
        if "seccomp" in self.off or packed is None:
            return self.note("seccomp", False, "not requested" if packed else f"no filter for {platform.machine()}")
        code = zlib.decompress(base64.b64decode(packed))
        self.note("seccomp", True, f"{len(code) // 8} instructions, allow-list")
        return code

    # in each child, before it sees a program

    def enclose(self, judge):
        if self.ids:
            uid = self.ids[0 if judge else 1]
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
        if "capabilities" not in self.off:
            header = struct.pack("II", 0x20080522, 0)
            call("capset", ctypes.c_char_p(header), ctypes.c_char_p(bytes(24)))
        prctl(1, signal.SIGKILL)  # dies with the zygote
        prctl(4, 0)
        if self.ruleset:
            call("syscall", 446, self.ruleset, 0)
            os.close(self.ruleset)
        if self.filter:
            code = self.filter.replace(struct.pack("I", PID_MARK), struct.pack("I", os.getpid()))
            buffer = ctypes.create_string_buffer(code, len(code))
            prctl(22, 2, ctypes.c_char_p(struct.pack("HxxxxxxP", len(code) // 8, ctypes.addressof(buffer))))
