"""The sandbox over Ray: a local cluster gives the same verdicts in the same order, and a lost node is no verdict."""

import os
import sys

import pytest

from falconlib.config import SandboxConfig
from falconlib.errors import FalconError
from falconlib.records import Program
from falconlib.sandbox import Sandbox
from falconlib.sandbox.ray_pool import RaySandbox

TESTS = ("assert add(1, 2) == 3", "assert add(2, 2) == 4")
PROGRAMS = [
    Program(f"def add(a, b):\n    {body}\n", TESTS)
    for body in (
        "return a + b",
        "return 3",
        "return a / 0",
        "import time; time.sleep(9)",
        "return a + b",
        "import os; os._exit(0)",
    )
]
LIMITS = SandboxConfig(workers=1, cpu_s=1.0)


def test_without_ray_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(FalconError, match=r"falconlib\[ray\]"):
        RaySandbox(LIMITS)


@pytest.fixture(scope="module")
def cluster():
    ray = pytest.importorskip("ray", reason="ray is not installed: pip install 'falconlib[ray]'")
    path = os.pathsep.join(p for p in sys.path if p)
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": path}})
    yield ray
    ray.shutdown()


@pytest.mark.slow
def test_same_verdicts_as_the_sandbox_in_order(cluster):
    with Sandbox(LIMITS) as sandbox:
        local = sandbox.run_many(PROGRAMS)
    with RaySandbox(LIMITS, actors=2) as remote:
        assert remote.tier == local[0].layers[0] and remote.layers["seccomp"]["verified"]
        found = remote.run_many(PROGRAMS, progress=True)
        assert [(r.status, r.tests) for r in found] == [(r.status, r.tests) for r in local]
        assert [r.status for r in found] == ["pass", "fail", "runtime_error", "timeout", "pass", "runtime_error"]
        assert remote.run_many([]) == [] and remote.run(PROGRAMS[0]).status == "pass"
    with pytest.raises(FalconError, match="closed"):
        remote.run(PROGRAMS[0])


@pytest.mark.slow
def test_a_killed_actor_comes_back_and_one_that_stays_away_is_no_verdict(cluster):
    with RaySandbox(LIMITS) as remote:
        cluster.kill(remote._actors[0], no_restart=False)
        assert remote.run(PROGRAMS[0]).status == "pass"
        cluster.kill(remote._actors[0])
        report = remote.run(PROGRAMS[0])
        assert (report.status, report.error.type) == ("infra_error", "InfraError")


@pytest.mark.slow
def test_a_refused_node_is_named(cluster):
    with pytest.raises(FalconError, match="a node has no sandbox"):
        RaySandbox(SandboxConfig(workers=1, cache="/dev/null/none"))


@pytest.mark.slow
def test_no_cluster_is_started_behind_the_users_back(cluster):
    cluster.shutdown()
    with pytest.raises(FalconError, match=r"ray\.init"):
        RaySandbox(LIMITS)
