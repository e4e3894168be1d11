"""Two ranks that train together: after every step both remember the same."""

import subprocess
import sys

import pytest
from test_memory import TASKS, episode

from falconlib.memory import LongTermMemory, ShortTermMemory
from falconlib.memory.embed import HashedTfidf
from falconlib.training.distributed import gather

STEPS = 4


def train(rank, folder, together=True):
    """What a rank does: its own tasks in every step, the same writes everywhere. Returns what it knew after each step."""
    said = []
    with LongTermMemory(folder / f"{rank}.sqlite", HashedTfidf(), run_id="r") as long:
        short = ShortTermMemory(size=3, total=8)
        long.add_tasks(TASKS)
        long.add_golds(TASKS)
        for step in range(STEPS):
            mine = [TASKS[(5 * step + 2 * i + rank) % 12] for i in range(3 - rank * (step % 2) * 3)]  # rank 1 may have none
            names = [n.task_id for r in long.recall(TASKS, 2) for n in r.neighbours]
            told = [episode(t, f"x = {step} + {rank}", ("pass", "fail")[rank], "E" * rank, reward=1 / 3, step=step) for t in mine]
            support = gather(told) if together else told
            short.add(support)
            long.add_episodes(support)
            effects = {e.task_id: e.reward.total * (1 if e.feedback.status == "pass" else -1) for e in support}
            long.update_utility(effects, 0.2)
            said.append(f"{step} {names} {long.content_hash()} {short.state()}")
        long.snapshot(folder / f"{rank}.copy")
    return said


CHILD = """
import sys
from datetime import timedelta
from pathlib import Path
from torch import distributed
import test_memory_ranks
folder, rank = Path(sys.argv[1]), int(sys.argv[2])
store = f"file://{folder}/meeting"
distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
(folder / f"{rank}.txt").write_text("\\n".join(test_memory_ranks.train(rank, folder)))
distributed.destroy_process_group()
"""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    env = {"PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    children = [subprocess.Popen([sys.executable, "-c", CHILD, folder, str(rank)], env=env) for rank in range(2)]
    assert [child.wait(120) for child in children] == [0, 0]
    return folder


def test_two_ranks_remember_the_same_after_every_step(ranks):
    first, second = ((ranks / f"{rank}.txt").read_text() for rank in range(2))
    assert first == second and len(first.splitlines()) == STEPS
    assert (ranks / "0.copy").read_bytes() == (ranks / "1.copy").read_bytes()
    with LongTermMemory(ranks / "1.sqlite", read_only=True) as memory:  # rank 0's programs are in rank 1's file
        stored = [code for _, code, source in memory.positives([t.task_id for t in TASKS]) if source == "own"]
        assert stored and all(code.endswith("+ 0") for code in stored)


def test_without_gathering_they_would_not(tmp_path):
    first, second = (train(rank, tmp_path, together=False) for rank in range(2))
    assert all(a != b for a, b in zip(first, second, strict=True))


def test_a_single_process_keeps_its_own():
    assert gather([3, 1]) == [3, 1] and gather([]) == []
