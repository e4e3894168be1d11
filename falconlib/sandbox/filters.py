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
timerfd_settime timerfd_gettime memfd_create ftruncate fallocate fsync fdatasync socketpair sendto recvfrom sendmsg recvmsg
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
    thread = 0x00010000  # CLONE_THREAD
    filt.add_rule(sc.ALLOW, "clone", sc.Arg(0, sc.MASKED_EQ, thread, thread))
    with tempfile.TemporaryFile() as file:
        filt.export_bpf(file)
        file.seek(0)
        return file.read()


FILTERS = {  # base64 of zlib of build(machine)
    "x86_64": (
        "eNpt1GdPFUEUxvH/wuXSpFzwqggqzRpFY9co2DsKir2AoIgNNPbee++9V+wKiC1GX2r8Aupb+xfwJc48uxpJ2GTzu/fsnJmdmZ2TCvjMHYS32fAmFffqAY"
        "5hgIm/rjNXkFeKB3mpB0FeECKfEyqfef3UEiaf4pc1hMtqImQVkfIJUfIx0fIRjeRDYuQDYuV94uQ9AvIuCfIOibKSxvK2nYO5b9FE3qSpvEEzeZ0keY1k"
        "eZUUeYVUeZk0eYl0eZEMeYFMeZ7W8hxt5FnayjN0lKfpJE+RJU/SWZ6gizxON3mM7vKoXWPjEXrKw/SSh+gnD9JfHiBH7meU3MdouZdcuYdxcjd5chf5ci"
        "dT5Q4K5XaK5DZmy60Uyy2UyM3MkZsolRspkxtYKNezSK6jXK6lQq5hmVzNSrnK/LKuNE+sK0ymdbnp2brMjGTtY0a2LjVvYl1i3sxaYWZkLTcztC42M7cu"
        "MithXWhWyLrArJx1vllJa5lZWes8s3PWUrOj1rnmS7XO4Z0s4b0s5oOczUdZxCdZyGc5iy9yJl/lDL7J6XyX0/ghp/JTTuG3nIzjWCfhlxOJlgXEyAnEyv"
        "HEyXwCMo8EOY4kOZZkmUsLOYaWcjSt5CjS5Ugy5Agy5XBay2G0lUNpJ4eQLQeTIyMZJAcyRA5gjMxhrAyjUvq4I0O5K0Ookn2pljg1RnvW25icoPmKa924"
        "v7eJ2bNlz2eBV1dMvCtePP5f3DHxLp1dHbLddmG/Gs7v8H9+kPbtAu8Da+14WU6D7TPrt8/AbZ+e5j0Pv9DwOC3q56UwMHfShKCpHu7/5kluXSIq3muXUj"
        "8/+DffrT+NyS+wJpInE0iTAZJlPIkyLtaRxIxouN+o+v1GEuWzRhApw4mQfvw+dx/duuzz6nSoV7dDvDruqF+/diFMQt0mvzfeH6HukWw="
    ),
    "aarch64": (
        "eNpt1NdPFFEUBvBvcHdgSRTWZUFcSEDUaDCCJsYWhZUiqPRlsVGkWqOABbCgYsfee1cELCgaXn0zMXaN+mB88En/Cj3nm9W4yU4y+WXu3H7OvUkAbPK6gY"
        "Eh4HkSrMeNB3DS+3DRfsTQPq0rby9i6T3E0R6MoneRSu9gEr2NyfQW0uhNpNMbmEKvYyq9hhn0KmbSK5hNL2MOvYS59CIy6AVk0vPw0nOYR88ii55BNj2N"
        "HHoKufQk8ugJ5NPjKKTHUESPopgeQSk9jDLajXJ6CH56EBX0ACrpflTRfaime1FD96CWdqGO7kY93YUGuhONtBNNdAea6Xa00G1opVvRRjvQTtulRG2TGu"
        "oWaaFulh7UTdKzulFmoLbKjNQWmaHaLDNWN8gK1PWyInWarFBdJytW18oOqGtkR9TVsqPqKtlpdaVEQm2SCKmNEjG1QSKp1kuE1TrJALVWMkJdIRmi1kjG"
        "qNWSUWqVZJxaKRmoLsdDugyP6FIM0CV4TBfjCa3AIPXjBS3HK+rDa1qGN7QUb2kJ3tFivKdF+EAL8ZEW4BNdhM90Ib7QBfhK8/Gd5uEHnY+fNBe/aA5shp"
        "qNWJqFOOpAPPXCQzORQjMwjtrRS23oo8PQT8MwSGfhKYXxTDRlrPHSxo3pGGK5IZnF//YuUc+znlvfv3PNY8fyaH6npzlfOjuk3PwWun7q//WtckPKJ06w"
        "hGk3QrYbGzxOCqxxxiQH/of3hB4vMbhdArwF/jI3PIHv0fFRVr3IxEC9hOD27r/trfsoBiU+1YViOhLJ1AkPjYaLRo0wKIbHh+43MrhfByJtagQcNBwR1I"
        "Rps+Jo3as2iaAVxzBYcTRgxUkfk7tpp8DvTjMw3h/HsIyw"
    ),
}
