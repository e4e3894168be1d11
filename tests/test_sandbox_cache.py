"""The cache of verdicts: what is kept, what is asked anew, and what a broken file says."""

import _thread
import dataclasses
import sqlite3
import threading

import pytest

from falconlib.config import SandboxConfig
from falconlib.errors import FalconError
from falconlib.records import ErrorInfo, Program, Report, TestResult
from falconlib.sandbox import Sandbox
from falconlib.sandbox.cache import VerdictCache
from falconlib.sandbox.worker import Worker

TESTS = ("assert add(1, 2) == 3", "assert add(2, 2) == 4")
LIMITS = SandboxConfig(workers=1, cpu_s=0.5)
GOOD, WRONG, BROKEN, LATE = (
    Program(f"def add(a, b):\n    {body}\n", TESTS) for body in ("return a + b", "return 3", "return a / 0", "while True: pass")
)


@pytest.fixture
def started(monkeypatch):
    """Codes of the programs that ran, the probe of a sandbox's start left out."""
    codes, original = [], Worker.start

    def start(self, task, job, *fds):
        if task is not None:
            codes.append(task.program.code)
        return original(self, task, job, *fds)

    monkeypatch.setattr(Worker, "start", start)
    return codes


def test_verdicts_are_kept_over_sandboxes_but_not_timeouts(tmp_path, started):
    config = dataclasses.replace(LIMITS, cache=str(tmp_path / "new" / "verdicts.db"))
    no_test = dataclasses.replace(GOOD, tests=())
    programs = [GOOD, WRONG, LATE, BROKEN, GOOD, no_test]
    with Sandbox(config) as sandbox:
        first = sandbox.run_many(programs)
    assert [r.status for r in first] == ["pass", "fail", "timeout", "runtime_error", "pass", "infra_error"]
    assert sorted(started) == sorted(p.code for p in (GOOD, WRONG, LATE, BROKEN))
    started.clear()
    with Sandbox(config) as sandbox:
        second = sandbox.run_many(programs)
    assert started == [LATE.code]
    assert [r for r in second if r.status != "timeout"] == [r for r in first if r.status != "timeout"]


def test_an_interrupt_loses_no_verdict(tmp_path, started):
    config = dataclasses.replace(LIMITS, cache=str(tmp_path / "v.db"))
    sleeper = dataclasses.replace(GOOD, code="import time\ntime.sleep(9)\n")
    with Sandbox(config) as sandbox:
        threading.Timer(0.3, _thread.interrupt_main).start()
        with pytest.raises(KeyboardInterrupt):
            sandbox.run_many([sleeper, GOOD])
        assert started == [GOOD.code, sleeper.code]
        assert sandbox.run(GOOD).status == "pass" and len(started) == 2


def test_off_by_default(tmp_path, started, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Sandbox(LIMITS) as sandbox:
        assert sandbox.run(GOOD) is not None and sandbox.run(GOOD).status == "pass"
    assert len(started) == 2 and list(tmp_path.iterdir()) == []


def test_the_key_holds_program_tests_limits_and_image(tmp_path, monkeypatch):
    path = tmp_path / "v.db"
    cache, report = VerdictCache(path, LIMITS, "A:x"), Report("pass", (TestResult(0, 0, "pass"),), 1)
    cache.keep({GOOD: report})
    assert VerdictCache(path, dataclasses.replace(LIMITS, workers=9), "A:x").find([GOOD, WRONG]) == {GOOD: report}
    changed = [{"code": GOOD.code + "\n"}, {"tests": TESTS[:1]}, {"setup": "import math"}, {"visible": 1}, {"entry_point": "add"}]
    assert cache.find([dataclasses.replace(GOOD, **change) for change in changed]) == {}
    for limits in ({"cpu_s": 1.0}, {"memory_mb": 1}, {"output_kb": 1}, {"min_integrity": "in_process"}):
        assert VerdictCache(path, dataclasses.replace(LIMITS, **limits), "A:x").find([GOOD]) == {}
    assert VerdictCache(path, LIMITS, "B:x").find([GOOD]) == {}
    monkeypatch.setattr("sys.version", "4.0")
    assert VerdictCache(path, LIMITS, "A:x").find([GOOD]) == {}


def test_sources_of_the_sandbox_are_part_of_the_key(tmp_path, monkeypatch):
    from falconlib.sandbox import cache as module

    before = VerdictCache(tmp_path / "v.db", LIMITS, "A:x").key(GOOD)
    (tmp_path / "other.py").write_text("changed")
    monkeypatch.setattr(module, "__file__", str(tmp_path / "cache.py"))
    assert VerdictCache(tmp_path / "v.db", LIMITS, "A:x").key(GOOD) != before


def test_no_verdict_and_timeout_are_not_kept(tmp_path):
    cache = VerdictCache(tmp_path / "v.db", LIMITS, "A:x")
    strange = Report("runtime_error", (), 1, ErrorInfo("E", "\ud800", 1, 1, "\ud800"), stdout="\x00é")
    cache.keep({GOOD: Report("infra_error"), WRONG: Report("timeout"), BROKEN: strange})
    assert cache.find([GOOD, WRONG, BROKEN]) == {BROKEN: strange}


def test_an_unusable_file_is_named(tmp_path):
    (tmp_path / "text.db").write_text("this is no database, and long enough to be read as one" * 20)
    for path in (tmp_path / "text.db", tmp_path, tmp_path / "text.db" / "below"):
        with pytest.raises(FalconError, match="no cache of verdicts"):
            Sandbox(dataclasses.replace(LIMITS, cache=str(path)))
    cache = VerdictCache(tmp_path / "v.db", LIMITS, "A:x")
    with sqlite3.connect(tmp_path / "v.db") as db:
        db.execute("INSERT INTO verdicts VALUES (?, ?)", (cache.key(GOOD), '{"status": 7}'))
    with pytest.raises(FalconError, match="Report"):
        cache.find([GOOD])


def test_a_kill_by_somebody_unknown_is_not_kept(tmp_path):
    cache = VerdictCache(tmp_path / "v.db", LIMITS, "A:x")
    killed = Report("runtime_error", (), 1, ErrorInfo("SIGKILL", "the process crashed"))
    cache.keep({GOOD: killed, WRONG: Report("fail")})
    assert list(cache.find([GOOD, WRONG])) == [WRONG]
