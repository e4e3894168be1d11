"""What a memory survives: leftovers of killed processes, other versions of Python, races, repairs while in use, full disks."""

import json
import os
import resource
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import test_memory_files
from test_memory import TASKS, Planar, at, episode, make_task, names
from test_memory_bounds import change
from test_memory_files import contents, forked

from falconlib.cli import main
from falconlib.config import load_profile
from falconlib.errors import FalconError
from falconlib.memory import LongTermMemory, _faiss, export, import_export, recall, verify
from falconlib.memory.digest import program_hash
from falconlib.memory.embed import HashedTfidf, PolicyStates, unit
from falconlib.memory.store import SIDE
from falconlib.tasks import load_tasks
from falconlib.training import train_rl

path = test_memory_files.path  # the fixture: a memory file of twelve tasks
QUERY = make_task("q", at(0), "test")


def killed(path):
    """Leaves a memory whose last writes are in its WAL alone."""

    def write():
        memory = LongTermMemory(path, HashedTfidf())
        memory.add_tasks([make_task(f"k{i}", f"Task {i}") for i in range(50)])
        os.kill(os.getpid(), signal.SIGKILL)

    assert forked(write) == -signal.SIGKILL and Path(f"{path}-wal").stat().st_size


def test_what_a_killed_process_left_is_not_replayed_into_another_memory(path):
    target = path.parent / "live"
    killed(target)
    with LongTermMemory(path, HashedTfidf()) as memory:
        export(memory, path.parent / "m.parquet")
        left = {end: Path(f"{target}{end}").read_bytes() for end in ("", "-wal")}
        for taken in (target, path):
            with pytest.raises(FalconError, match="in use, or was one"):
                memory.snapshot(taken)
        memory.update_utility({"toy/1": 0.5}, 1.0)
    assert {end: Path(f"{target}{end}").read_bytes() for end in left} == left
    target.unlink()
    with pytest.raises(FalconError, match=r"live-wal is what a killed process left"):
        import_export(path.parent / "m.parquet", target)
    for end in SIDE:
        Path(f"{target}{end}").unlink(missing_ok=True)
    import_export(path.parent / "m.parquet", target)
    with LongTermMemory(target, read_only=True) as memory:
        assert memory.stats()["tasks"] == 12


# -- programs and their hashes -----------------------------------------------------------------------------------------


def deeper(frames, action):
    return deeper(frames - 1, action) if frames else action()


def test_a_hash_depends_on_the_program_alone():
    odd = ["x = " + " + ".join(["1"] * terms) for terms in range(20, 700, 40)] + ["x = " + "{1: " * 55 + "1" + "}" * 55]
    for code in odd:
        assert len({deeper(frames, lambda code=code: program_hash(code)) for frames in (0, 60, 300)}) == 1
    assert program_hash('x = "\ud800"') == program_hash('x  =  "?"') != program_hash('x = "!"')


def test_half_characters_are_no_damage(path):
    with LongTermMemory(path, HashedTfidf()) as memory:
        memory.add_episodes([episode(TASKS[0], 'x = "\ud800"'), episode(TASKS[1], "# \ud800\ny = 1")])
        export(memory, path.parent / "m.parquet")
        before = memory.content_hash()
    import_export(path.parent / "m.parquet", path.parent / "copy")
    assert verify(path) == [] and contents(path.parent / "copy")[0] == before


def test_programs_of_another_python_and_odd_rewards_are_kept(path):
    before = contents(path)[0]
    change(path, "UPDATE episode SET ast_hash = 'of ' || id, reward = 9e999 WHERE id < 4")
    with LongTermMemory(path, read_only=True) as memory:
        export(memory, path.parent / "m.parquet")
    assert [line.split(",")[0] for line in verify(path)] == [f"program {i} is damaged" for i in (1, 2, 3)]
    assert "0 rows could not be read" in verify(path, repair=True)[-1]
    import_export(path.parent / "m.parquet", path.parent / "copy")
    for file in (path, path.parent / "copy"):
        assert verify(file) == [] and contents(file)[0] == before


# -- other processes in between ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("description", ["Return the sum.", "Reverse a word."])
def test_a_task_that_another_process_stores_meanwhile(tmp_path, description):
    class Slow(HashedTfidf):
        def encode(self, texts):
            with LongTermMemory(tmp_path / "m", HashedTfidf()) as other:
                other.add_tasks([make_task(1, "Return the sum.")])
            return super().encode(texts)

    with LongTermMemory(tmp_path / "m", Slow()) as memory:
        tasks = [make_task(1, description), make_task(2, "Another one.")]
        if description == "Return the sum.":
            memory.add_tasks(tasks)
        else:
            with pytest.raises(FalconError, match="'toy/1' with another description"):
                memory.add_tasks(tasks)
        assert memory.stats()["tasks"] == 1 + (description == "Return the sum.")
        with pytest.raises(FalconError, match="knows no task 'toy/9'"):
            memory.add_episodes([episode(make_task(9, "x"), "x = 1")])


def test_a_repaired_embedding_is_not_undone_by_who_has_the_old_one(path):
    pytest.importorskip("faiss")
    wrong = unit(np.random.default_rng(0).standard_normal((1, 1024)))[0].tobytes()[:-4] + b"\0\0\xc0\x7f"  # its last number: NaN
    for suffix in (".faiss", ".faiss.json"):
        Path(f"{path}{suffix}").unlink()
    change(path, f"UPDATE task SET embedding = x'{wrong.hex()}' WHERE id = 9")
    with LongTermMemory(path, HashedTfidf()) as old:
        old.recall(TASKS[:1], 1)
        assert "'toy/8' is damaged" in verify(path, repair=True)[0]
        assert names(old.recall([replace(TASKS[8], task_id="q")], 8)[0])
        assert old.search(TASKS[8].prompt, 1)[0].task_id == "toy/8"
    assert verify(path) == []


def test_one_wrong_vector_in_an_index_is_found_and_mended(tmp_path):
    faiss = pytest.importorskip("faiss")
    with LongTermMemory(tmp_path / "m", Planar()) as memory:
        memory.add_tasks([make_task(i, at(i)) for i in range(80)])
        index = memory._search.sync()
        vectors = index.rows(np.arange(80)).copy()
        vectors[[7, 8]] = vectors[[8, 7]]
        index._index = faiss.IndexFlatIP(2)
        index._index.add(vectors)
    for repair, problems in ((False, 1), (True, 1), (False, 0)):
        found = verify(tmp_path / "m", repair=repair, embedder=Planar())
        assert len(found) == problems and all("m.faiss is damaged" in line for line in found)


def test_an_index_that_is_only_out_of_date_is_no_damage(tmp_path):
    pytest.importorskip("faiss")
    tasks = [make_task(i, at(i)) for i in range(60)]
    with LongTermMemory(tmp_path / "m", Planar(), flat_limit=10, max_tasks=50) as memory:
        memory.add_tasks(tasks[:50])
        memory.recall([QUERY], 1)
        memory.snapshot(tmp_path / "snap")
    assert verify(tmp_path / "m") == []  # of another kind than by default
    with LongTermMemory(tmp_path / "m", Planar(), max_tasks=50) as memory:
        memory.add_tasks(tasks[50:])
    assert verify(tmp_path / "m") == []  # a fifth of it has gone
    with LongTermMemory(tmp_path / "m", Planar()) as memory:
        memory.recall([QUERY], 1)
        memory.add_tasks([make_task("late", at(70))])
        memory.recall([QUERY], 1)
    with LongTermMemory(tmp_path / "m", Planar()) as memory:
        memory.restore(tmp_path / "snap")
    assert verify(tmp_path / "m") == [] and verify(tmp_path / "m", repair=True, embedder=Planar()) == []
    assert json.loads((tmp_path / "m.faiss.json").read_text())["count"] == 50  # made anew all the same


# -- full disks --------------------------------------------------------------------------------------------------------


def test_on_a_full_disk_a_memory_can_be_read(path):
    before = contents(path)[0]
    for end in ("-wal", "-shm"):
        Path(f"{path}{end}").unlink(missing_ok=True)

    def read():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        with LongTermMemory(path, read_only=True) as memory:
            return memory.content_hash() == before and len(memory.recall(TASKS, 2)) == 12

    assert forked(read) == 0


def test_a_recall_needs_no_room_for_the_index(tmp_path, monkeypatch):
    pytest.importorskip("faiss")
    monkeypatch.setattr(recall, "SAVE_EVERY", 2)

    def full(path, data):
        raise FalconError(f"cannot write {path}: No space left on device")

    monkeypatch.setattr(_faiss, "write_bytes", full)
    found = []
    with pytest.raises(FalconError, match="No space left"), LongTermMemory(tmp_path / "m", Planar()) as memory:
        memory.add_tasks([make_task(i, at(i + 1)) for i in range(5)])
        found += names(memory.recall([QUERY], 1)[0])
    assert found == ["toy/0"]


# -- clear errors ------------------------------------------------------------------------------------------------------


def test_the_fact_that_differs_is_named(path, tmp_path):
    other = HashedTfidf(256)
    other.fingerprint = HashedTfidf().fingerprint
    with pytest.raises(FalconError, match="dim '1024', not '256'") as caught:
        LongTermMemory(path, other)
    assert "fingerprint" not in caught.value.message
    text = tmp_path / "text"
    text.write_text("not a memory\n" * 500)
    for attempt in (lambda: LongTermMemory(text, read_only=True), lambda: verify(text, repair=True)):
        with pytest.raises(FalconError, match="not a database") as caught:
            attempt()
        assert caught.value.remedy.startswith("it is no memory")


def test_a_memory_of_the_policy_is_searched_and_mended_with_its_model(tmp_path, monkeypatch, capsys):
    states = PolicyStates(lambda texts: np.array([[len(t), 1.0] for t in texts]), 2, "toy")
    monkeypatch.setattr("falconlib.policy.states.policy_states", lambda config: states if config.name == "mine" else None)
    with LongTermMemory(tmp_path / "m", states) as memory:
        memory.add_tasks(TASKS)
    for given in (["search", str(tmp_path / "m"), "sum"], ["verify", str(tmp_path / "m"), "--repair"]):
        change(tmp_path / "m", "UPDATE task SET embedding = x'00' WHERE id = 3" if "verify" in given else "SELECT 1")
        assert main(["memory", *given]) == 2 and "--model" in capsys.readouterr().err
        assert main(["memory", *given, "--model", "mine"]) == 0 and "toy/" in capsys.readouterr().out
    assert main(["memory", "verify", str(tmp_path / "m")]) == 0


# -- while training ----------------------------------------------------------------------------------------------------


def test_training_holds_back_every_evaluated_task_and_dates_what_it_stores(tmp_path, monkeypatch):
    profile = load_profile("smoke", {"long_term.embedder": "hashed"})
    tasks, told = load_tasks("basics", "train")[:5], []
    kept = [tmp_path / f"memory.sqlite{end}" for end in (".bak", ".damaged", ".parquet")]
    for file in (*kept, tmp_path / "memory.sqlite-journal"):
        file.write_text("x")

    class Enough(Exception):
        pass

    def blocklist(memory, evaluated):
        told.append({t.task_id for t in evaluated})
        ((oldest, newest),) = memory._store.rows("SELECT min(created), max(created) FROM episode")
        assert time.time() - 60 < oldest <= newest <= time.time()
        memory.close()
        raise Enough

    monkeypatch.setattr(LongTermMemory, "blocklist", blocklist)
    with pytest.raises(Enough):
        train_rl(None, tasks, profile, 0, tmp_path, False, None)
    held = {t.task_id for name in ("humaneval", "basics") for t in load_tasks(name) if t.split in ("test", "validation")}
    assert told == [held] and {t.split for t in load_tasks("basics") if t.task_id in held} == {"test", "validation"}
    assert all(file.read_text() == "x" for file in kept)
