"""The sandbox in hostile surroundings: few or many descriptors, no environment, forks, threads, kills."""

import contextlib
import os
import resource
import subprocess
import sys
import textwrap
import threading
import time

import psutil
import pytest

from falconlib.config import SandboxConfig
from falconlib.errors import FalconError
from falconlib.records import Program
from falconlib.sandbox import Sandbox

CONTROL = Program("def f(x):\n    return x\n", ("assert f(1) == 1",))
HEAD = """import os, sys
from falconlib.config import SandboxConfig
from falconlib.records import Program
from falconlib.sandbox import Sandbox
"""


def script(body: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", HEAD + textwrap.dedent(body)], capture_output=True, text=True, timeout=60)


def test_no_descriptor_of_the_owner_comes_along():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 2000:
        pytest.skip("too few open files allowed here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (2000, hard))
    held = [os.open(os.devnull, os.O_RDONLY) for _ in range(1500)]  # the sockets to the zygote get numbers above that
    try:
        code = "import os\ndef f(x):\n    found = []\n    for fd in range(5000):\n        try: os.fstat(fd)\n"
        code += "        except OSError: continue\n        found.append(fd)\n    return found\n"
        with Sandbox(SandboxConfig(workers=1)) as sandbox:
            report = sandbox.run(Program(code, ("assert f(1) == [0, 1, 2, 3, 4]",)))
        assert report.status == "pass", report.tests
    finally:
        for fd in held:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


FEW = """
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))
try:
    with Sandbox(SandboxConfig(workers=1)) as s:
        print(s.run(Program('def f(): return 1', ('assert f() == 1',))).status)
except Exception as error:
    print(type(error).__name__, error)
"""


def test_few_open_files_are_enough_or_named():
    assert script(FEW.format(soft=40, hard=256)).stdout == "pass\n"
    assert "FalconError the sandbox did not start: 128 open files are needed" in script(FEW.format(soft=40, hard=100)).stdout


LOW = """
import resource
resource.setrlimit(resource.RLIMIT_{name}, ({limit}, {limit}))
try:
    with Sandbox(SandboxConfig(workers=1)) as s:
        print(s.run(Program('def f(): return 1', ('assert f() == 1',))).status)
except Exception as error:
    print(type(error).__name__, error)
"""


def test_low_limits_of_the_caller_are_kept_or_named():
    assert script(LOW.format(name="NPROC", limit=200)).stdout == "pass\n"
    assert script(LOW.format(name="STACK", limit=1 << 20)).stdout == "pass\n"
    assert "files of 8 MiB are needed, the limit (ulimit -f) is 1024" in script(LOW.format(name="FSIZE", limit=1024)).stdout


def test_descriptors_that_run_out_are_an_error_and_not_the_end():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    held = []
    with Sandbox(SandboxConfig(workers=1)) as sandbox:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
            try:
                while True:
                    held.append(os.dup(0))
            except OSError:
                pass
            with pytest.raises(FalconError, match="Too many open files"):
                sandbox.run(CONTROL)
        finally:
            for fd in held:
                os.close(fd)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert sandbox.run(CONTROL).status == "pass" and sandbox.idle()


def test_a_bare_environment_is_enough(tmp_path):
    done = script(
        f"""
        os.mkdir({str(tmp_path / "gone")!r}); os.chdir({str(tmp_path / "gone")!r}); os.rmdir(os.getcwd())
        os.environ.clear()
        os.environ["TMPDIR"] = "/nonexistent"
        with Sandbox(SandboxConfig(workers=1)) as s:
            print(s.run(Program('def f(): return 1', ('assert f() == 1',))).status)
        """
    )
    assert done.stdout == "pass\n", done.stderr


def test_a_forked_copy_of_a_killed_owner_keeps_nothing_alive():
    body = """
        s = Sandbox(SandboxConfig(workers=1))
        if os.fork() == 0:
            import time
            time.sleep(20)
            os._exit(0)
        print("ready", flush=True)
        s.run(Program("import time\\ntime.sleep(9)", ("assert f() == 1",)))
    """
    with subprocess.Popen([sys.executable, "-c", HEAD + textwrap.dedent(body)], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"ready\n"
        below = psutil.Process(process.pid).children(recursive=True)
        copies = [p for p in psutil.Process(process.pid).children() if "zygote.py" not in " ".join(p.cmdline())]
        zygotes = [p for p in below if p not in copies]
        assert zygotes and len(copies) == 1
        process.kill()
        _, alive = psutil.wait_procs(zygotes, timeout=10)
        copies[0].kill()
    assert not alive


def test_threads_share_a_sandbox_and_close_waits_for_them():
    sandbox, reports = Sandbox(SandboxConfig(workers=1)), []

    def work(k):
        programs = [
            Program(f"import time\ndef f(x):\n    time.sleep(0.05)\n    return {k} * {i}\n", (f"assert f(1) == {k * i}",))
            for i in range(4)
        ]
        with contextlib.suppress(FalconError):  # closed before its turn came
            reports.extend(r.status for r in sandbox.run_many(programs))

    threads = [threading.Thread(target=work, args=(k,)) for k in range(3)]
    for thread in threads:
        thread.start()
    while len(reports) < 4:
        time.sleep(0.01)
    sandbox.close()
    for thread in threads:
        thread.join()
    assert set(reports) == {"pass"} and len(reports) % 4 == 0
    with pytest.raises(FalconError, match="closed"):
        sandbox.refresh()


def test_a_forgotten_sandbox_ends_its_processes():
    sandbox = Sandbox(SandboxConfig(workers=1))
    below = psutil.Process(sandbox._workers[0].process.pid)
    del sandbox
    assert not psutil.wait_procs([below], timeout=5)[1]
