"""The seccomp filter: which system calls judge and candidate may make. Standard library only at run time.

`build` makes the BPF program with pyseccomp (which needs the system library libseccomp2); FILTERS holds its output for the
machines we know, so that nothing but a kernel is needed to use it. A test compares the two.
After a change of the tables, put base64(zlib(build(machine))) there.
"""

PID_MARK = 0x7A11CA11  # stands for the process's own pid; patched in each child

ALLOWED = """
read write readv writev pread64 pwrite64 preadv pwritev open openat close close_range stat fstat lstat newfstatat statx lseek
mmap mprotect munmap mremap madvise mincore brk rt_sigaction rt_sigprocmask rt_sigreturn rt_sigpending rt_sigtimedwait
rt_sigsuspend sigaltstack pause access faccessat faccessat2 readlink readlinkat getcwd chdir fchdir getdents64 statfs fstatfs
pipe pipe2 dup dup2 dup3 select pselect6 poll ppoll epoll_create1 epoll_ctl epoll_wait epoll_pwait eventfd2 timerfd_create
timerfd_settime timerfd_gettime memfd_create ftruncate fallocate fsync fdatasync socketpair recvfrom recvmsg
shutdown getsockname getpeername getsockopt setsockopt futex set_robust_list get_robust_list rseq membarrier sched_yield
sched_getaffinity sched_getparam sched_getscheduler sched_get_priority_max sched_get_priority_min getpriority setpriority
nanosleep clock_nanosleep clock_gettime clock_getres gettimeofday time times getitimer setitimer alarm getpid gettid getppid
getpgrp getpgid getsid getuid geteuid getgid getegid getresuid getresgid getgroups getrlimit setrlimit getrusage uname sysinfo
umask getrandom set_tid_address arch_prctl exit exit_group wait4 waitid restart_syscall
"""
MISSING = ("clone3", "openat2", "io_uring_setup", "io_uring_enter", "io_uring_register", "rt_sigqueueinfo", "execveat")  # ENOSYS
ARGUMENTS = {  # system call -> (argument number, allowed values)
    "ioctl": (1, (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)),
    "fcntl": (1, (0, 1, 2, 3, 4, 1030, 1032, 1033, 1034)),
    "prctl": (0, (15, 16, 0x53564D41)),
    "kill": (0, (PID_MARK,)),
    "tgkill": (0, (PID_MARK,)),
    "prlimit64": (0, (0, PID_MARK)),
}


def build(machine: str) -> bytes:
    """The BPF program for `machine` ("x86_64" or "aarch64")."""
    import errno
    import tempfile

    import pyseccomp as sc

    filt = sc.SyscallFilter(sc.ERRNO(errno.EPERM))
    wanted = {"x86_64": sc.Arch.X86_64, "aarch64": sc.Arch.AARCH64}[machine]
    if sc.system_arch() != wanted:
        filt.add_arch(wanted)
        filt.remove_arch(sc.system_arch())
    for name in ALLOWED.split():
        if sc.resolve_syscall(wanted, name) >= 0:
            filt.add_rule(sc.ALLOW, name)
    for name in MISSING:
        filt.add_rule(sc.ERRNO(errno.ENOSYS), name)
    for name, (number, values) in ARGUMENTS.items():
        for value in values:
            filt.add_rule(sc.ALLOW, name, sc.Arg(number, sc.MASKED_EQ, 0xFFFFFFFF, value))
    filt.add_rule(sc.ALLOW, "sendto", sc.Arg(4, sc.EQ, 0))  # no address: a datagram socketpair would reach any path
    thread = 0x00010000  # CLONE_THREAD
    filt.add_rule(sc.ALLOW, "clone", sc.Arg(0, sc.MASKED_EQ, thread, thread))
    with tempfile.TemporaryFile() as file:
        filt.export_bpf(file)
        file.seek(0)
        return file.read()


FILTERS = {  # base64 of zlib of build(machine)
    "x86_64": (
        "eNpt1GdPFUEUxvH/wuUCVykXvCoCShPU2GI3UVCjxoaCYC8Uu9hb7Nh777037B17SXwj8Quob+1fwJc48+xqJGGTzS97ds7MzszOSQN85g7Bu1x4k4Z7dQ"
        "XH0MfE39aaK8RrxUO80osQLwmTLwiXz71+nhEhn+KXT4iU1UTJx0TLRwTkQxrIBzSU94mR94iVd4mTdwjK2yTIWyTKmzSSN+wczH2dxrKKJvIaTeVVkuQV"
        "kuVlUuQl0uRF0uUFMuR5MuU5suRZWsozZMvT5MhTtJMn6SBP0FEep7M8Rhd51K6p8Qjd5GG6y0P0kgfpLQ+QJ/czRO5jqNxLvtzDCLmbArmLQrmTcXIHJX"
        "I7pXIbZXIr5XILU+RmpspNTJcbmSk3UCHXM0euY56sZL5cy2K5hmVyNcvlKlbIlSZiXWEyrMtND9aepkfrMjOCdakZ0brEfKl1sfly6yIzI+tCM0PrAjNz"
        "63yzItZ5ZoWsc82KWeeYHbFWmJ2yzjZ/oHUW7+VMauQMPsjpfJTT+CSn8llO4Yss56ss45ss5bss4YeczE85id9yIo5jnYBfjqeBHEeMHEusHEOcHE1Qji"
        "JBFpMki0iWI0mVhTSXBbSQI8iQw8mU+WTJYbSUQ8mRQ2glB5MrB5Eno+knB9JfDmCY7M9wGUGV9HFdhnNDhvFA5vFQ4jwy2rOdbXJC5u+tduO+tiZmz5L7"
        "v9MD79k9D927ufUDfw8vbs9tsVdvTLzT3/bx/+KOiXfs4OqQ67aL+FV/fpv/80O0bhWsCa6047V36m2fVbd9Jm77jHTvfeTp+sdJrZuXQt/80UUhU1Xc52"
        "ZJbr0iEO+1S6mbH/qb79alRhQWWxMpkAmkyyDJMp5EGRfrSGIG1d9voG6/0QR81iiiZSRR0o/f5+63W699Xv0O9+p5mFffHfXr1y5ESKit9Hvj/QHlopOb"
    ),
    "aarch64": (
        "eNpt1NdPFFEUBvBvcHaATRRWWHAFEhA1GoyAotFYEAUCKr3ZKFLtBSwUFRV77703BOxoePXNxNhj1Afjg0/6V+g53wzGTXaSyW/mzu3n3IkHYMrtBfoHgJ"
        "fxsC8vnsBDHyOCPkIkfah15X6AKNqHaNqLEbQHSfQ+JtBuTKT3kEzvIoXeQSq9jUn0FqbRm5hOb2AGvY5Z9Bpm06tIp1cwh15GBr2EufQi5tELyKTnkUXP"
        "IZueRQ49g1x6Gvn0FAroSRTSEyimx1FCj6GMHkU5PYIKehiV9BCq6EFU0wOooftRS/ehju5FPd2DBtqFRrobTXQXNtKdaKadaKE70Eq3o41uQwftkCe1Xb"
        "6obVJTbZUe1K0ykrpFRlY3y0zUTTIztUVmqjbLzNXJshJ1g6xMXS8rVdfJytW1snPqGtlRdbXsuLpKIqGulMioKyRiapNEUm2USKsNEnm1XjJBrZPMUGsl"
        "c9TlkllqjWSaWi2Zp1ZJJqqVkpnqMjylS/GMLkE/XYxXdBHe0Aq8peV4T8vwgZbiIy3BJ1qMz7QIX2ghvtICfKP5+EHz8JMuxC+6AL/pfJiGmosomoNoGg"
        "ofzUYMzUIizcQY6kIPNdFLh6CPBqGfpuM5hfFCtGSssdLGi5kYYLkhGcPvri5Rz6+e09J/5xhT4ZSH831Kmue1p13KzXdOeZpdL3Wwnn0+U5Kd9tb3wP0m"
        "/d+vXW5I+fhxtrBcRsB2o/3nkwh7PqMSnO/B3YHHi/NvF4uMvPISL2Kc95G+MLueO86pF+vf3jvY3v5PRaKoVI1AIR2OBOpBDA1HBA0bZlAM9QXu1+3fby"
        "jcphqCUBqMEGrBMu142/9bUyJtxzsIdrwN2PHUy+Juuijwp9NyxvsLhr+OBA=="
    ),
}
