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
sched_getaffinity sched_getparam sched_getscheduler sched_get_priority_max sched_get_priority_min getpriority
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
        "eNpt1FdPFUEYxvH/wuFQlHLAoyKgNBWNhdgvFNSoQZSm2AuKDUWxN+y9916wV7D3HhOvNH4B9db+BbzEmWcXIwmbbH7Zd+ed2ZnZeVMBn7mD8C4H3qbiXr3B"
        "MQw08bf15gryRvEgr/UiyCtC5EtC5Quvn+eEyWf45VPC5RMi5GMi5SOi5EOayQc0l/eJlveIkXeJlXcIyNvEy1skyDpayFo7B3PfpKW8QSt5ndbyGonyKkny"
        "CsnyMqnyEmnyIunyAhnyPJnyHO1lDR3kWTrKM3SVp+kuT5EtT9JTnqCXPG7X1HiMPvIofeUR+svDDJCHyJUHyZcHGCH3UyD3UST3Uiz3UCJ3M0HuokzuZJrc"
        "wXS5nXK5jRlyKzPlFmbLzVTITVTKjcyXG6iS61ko17FUrmWFXMMqWc1qudq8sa4ymdaVpidrP9OzdbkZybrMjGxdar7YusTMwLrYzMy6yMzcutCsiLXKrJB1"
        "gVkx63yzI9ZKs1PWeeYPtM7lvazgg5zDRzmbT3IWn+VMvsgZfJXlfJPT+S6n8UOW8VNO5Zecwh85GcexTsIvJ9JMTiBajidGjiNWjiUgxxAvS0mUo0mSo0iR"
        "JbSVxbSTRaTLQjJkAZlyJO3lCDrKfLLkcHJkHrkyksFyGEPkUEbKIRTKMG5KH7UylDoZwkOZyyOJ89hoz3QHkxM0f+1TN+7rYmL2DLn/udlo79k9B337uHUD"
        "fz8vbs9rqVdnTLxHQ/u4f3HHxLO7uzrkuO3Cfjed3/n//CCdsgIfAtV2vG5Ok+0zG7fPwG2fnua9D69pepyUxnnJDCoYOzpoqon73CbRrVNExXntkhvnBxvy"
        "3XrUgpJSawLFMp40GSBJxpEgY2McSXRe0/1GNe43kiifNYJIGU6E9OP3ufvt1mmfV7dDvToe4tV1R/36tQthEuo3+L3x/gINAZI4"
    ),
    "aarch64": (
        "eNpt1NdPFFEUBvBvcHYoicIKCyKQgKjRYKQEjcaCKBBQqbuAjSLVbgALYEHF3nvvDQEraHj1zcTYY9QH44NP+lfoOd8Mxk12JpNf5s7t59xJBGDK4wEGhoCX"
        "ibAvD57ATR8jkj5CFH2odeXpRzTtQwztxRj6ACm0B1PofUyl95BK7yKN3kE6vY0Megsz6E3MpDcwi17HHHoNc+lVZNErmEcvI5tewnx6EQvoBeTQ88il55BH"
        "zyKfnkEBPY0iegrF9CRK6AmU0ePw0mMop0dRQY+gkh5GFT2EanoQNfQAaul+1NF9qKd70UC70Uj3oInuRjPdhRbahVa6E210B9rpdnTQbXKrnVKidkgNtV1a"
        "qFulJ3WLjKhulhmom2RGapvMUG2VGastsgI1Q1akbpQVqhtk5ep62Tl1neyoulZ2XF0jkVBXS2TUVRIxtVkiqTZJpNVGibzaIJmg1ktmqHWSOepKySy1VjJN"
        "rZHMU6slE9UqPKUr8IwuxwBdhkG6FK/oEryhlXhLK/CeluMD9eEj9eITLcNnWoovtARfaTG+0SL8oIX4SRfjF12E33QhTEMtQDTNRwwNRSzNQxzNRTLNwQTq"
        "Qi810UdHoJ8GYZBm4TmF8UK0ZKyJ0saD2RhiuSEZw++ublHPrZ5P37/zi+lwyiP4Pi3T/drdKeXmO6c8066XPlzPPpdpqU5763vgflP+79cuN6R88iRbWC4j"
        "YLvx/vNJhj2fcUnO9+CewOMl+LeLR3ZhhdeDOOd9bGy4XS8swakX79/eM9ze/j9FodSnRqKEjkYSdSOORiCSho8yKEbGBu43zL/fUISZaghCaTBCqAXLtONt"
        "/2dNibQd7yDY8TZgx1Mvi7vposCfLssZ7y+JSYyy"
    ),
}
