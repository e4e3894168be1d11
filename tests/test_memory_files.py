"""The memory's files: damage, foreign files, full disks, killed writers, several processes. Nothing acknowledged is ever lost."""

import json
import os
import random
import resource
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from test_memory import TASKS, episode, make_task

from falconlib.errors import FalconError
from falconlib.memory import LongTermMemory, export, import_export, verify
from falconlib.memory._faiss import load_faiss
from falconlib.memory.embed import HashedTfidf


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "m.sqlite"
    with LongTermMemory(path, HashedTfidf()) as memory:
        memory.add_tasks(TASKS)
        memory.add_golds(TASKS)
        memory.recall(TASKS, 2)
    return path


def contents(path):
    with LongTermMemory(path, read_only=True) as memory:
        return memory.content_hash(), memory.recall(TASKS, 3)


# -- clear errors ------------------------------------------------------------------------------------------------------


def test_another_embedder_is_refused_and_nothing_changes(path):
    before = contents(path)
    with pytest.raises(FalconError, match="hashed-tfidf/2/1024") as caught:
        LongTermMemory(path, HashedTfidf(256))
    assert "same embedder" in caught.value.remedy and contents(path) == before


@pytest.mark.parametrize("vectors", [np.ones((1, 9)), np.ones((2, 1024)), np.ones((1, 1024)), np.full((1, 1024), np.nan)])
def test_vectors_of_a_wrong_shape_or_length_are_refused(path, vectors):
    embedder, before = HashedTfidf(), contents(path)
    with LongTermMemory(path, embedder) as memory:
        embedder.encode = lambda texts: vectors
        with pytest.raises(FalconError, match=r"1024|length is not 1"):
            memory.add_tasks([make_task("new", "A new one")])
    assert contents(path) == before


def test_foreign_files_are_left_alone(tmp_path):
    foreign, text = tmp_path / "foreign.db", tmp_path / "text"
    with sqlite3.connect(foreign) as db:
        db.execute("CREATE TABLE task(id)")
    db.close()
    text.write_text("no database at all, but long enough to be looked at\n" * 100)
    for file, message in ((foreign, "another program"), (text, "not a database")):
        before = file.read_bytes()
        with pytest.raises(FalconError, match=message):
            LongTermMemory(file, HashedTfidf())
        with pytest.raises(FalconError, match=f"{message}|mended"):
            verify(file, repair=True)
        assert file.read_bytes() == before and not Path(f"{file}-wal").exists()


def test_missing_files_and_folders_that_cannot_be_written(tmp_path):
    for attempt in (lambda p: LongTermMemory(p), lambda p: LongTermMemory(p, HashedTfidf(), read_only=True), verify):
        with pytest.raises(FalconError, match=r"there is no memory|unable to open|no such file"):
            attempt(tmp_path / "none" / "m")
    assert not (tmp_path / "none").exists()
    with pytest.raises(FalconError, match=r"/proc/memory|unable to open"):
        LongTermMemory("/proc/memory", HashedTfidf())
    with pytest.raises(FalconError, match="folder cannot be made"):
        LongTermMemory("/proc/new/memory", HashedTfidf())


def forked(action):
    """Runs `action` in a child process and returns its exit code: 0 when it gave True, 3 when it raised."""
    child = os.fork()
    if child == 0:
        code = 3
        try:
            if "faiss" in sys.modules:  # OpenMP's threads do not survive a fork: waiting for them would never end
                sys.modules["faiss"].omp_set_num_threads(1)
            code = 0 if action() else 1
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_read_only_folder_can_be_read(path):
    before, _ = contents(path)
    with tempfile.TemporaryDirectory() as folder:  # tmp_path itself is closed to other users
        frozen = Path(folder) / "m.sqlite"
        frozen.write_bytes(path.read_bytes())
        frozen.chmod(0o444)
        Path(folder).chmod(0o555)

        def read_then_write():
            if os.getuid() == 0:
                os.setuid(65534)  # root may write anywhere
            with LongTermMemory(frozen, HashedTfidf(), read_only=True) as memory:
                same = memory.content_hash() == before and len(memory.positives(["toy/1"])) == 1
            try:
                LongTermMemory(frozen, HashedTfidf()).update_utility({"toy/1": 1.0}, 0.5)
            except FalconError as error:
                return (
                    same and ("readonly" in error.message or "unable to open" in error.message) and "permissions" in error.remedy
                )

        assert forked(read_then_write) == 0
        Path(folder).chmod(0o755)


# -- damage ------------------------------------------------------------------------------------------------------------


def damage_index(path, how):
    index, sidecar = Path(f"{path}.faiss"), Path(f"{path}.faiss.json")
    if how == "truncated":
        index.write_bytes(index.read_bytes()[:-100])
    elif how == "flipped":
        data = bytearray(index.read_bytes())
        data[len(data) // 2] ^= 255
        index.write_bytes(data)
    elif how == "missing":
        index.unlink()
    elif how == "sidecar cut":
        sidecar.write_text(sidecar.read_text()[:20])
    elif how == "sidecar odd":
        sidecar.write_text("[1]")
    else:  # an index of another embedder or of other tasks, whole in itself
        sidecar.write_text(json.dumps(json.loads(sidecar.read_text()) | {how: "x" if how != "count" else 5}))


@pytest.mark.parametrize("how", ["truncated", "flipped", "missing", "sidecar cut", "sidecar odd", "embedder", "keys", "count"])
def test_a_damaged_index_is_rebuilt(path, how):
    before = contents(path)
    damage_index(path, how)
    assert contents(path) == before
    assert (how == "missing") == (verify(path) == [])
    verify(path, repair=True)
    assert verify(path) == [] and contents(path) == before


def test_an_index_of_another_memory_is_not_used(path, tmp_path):
    other = tmp_path / "other"
    with LongTermMemory(other, HashedTfidf()) as memory:
        memory.add_tasks([make_task(i, f"Quite another task, number {i}.") for i in range(len(TASKS))])
        memory.recall(TASKS, 1)
    before = contents(path)
    for suffix in (".faiss", ".faiss.json"):
        Path(f"{path}{suffix}").write_bytes(Path(f"{other}{suffix}").read_bytes())
    assert contents(path) == before and verify(path) == []  # only out of date: it is rebuilt


def test_a_stale_index_is_completed(path):
    with LongTermMemory(path, HashedTfidf()) as memory:
        memory.add_tasks([make_task("late", "Return the sum of all square numbers in a list.")])
    with LongTermMemory(path, read_only=True) as memory:
        assert "toy/late" in [n.task_id for n in memory.recall(TASKS[:1], 3)[0].neighbours]


def grown(path):
    """A file of many pages."""
    with LongTermMemory(path, HashedTfidf()) as memory:
        tasks = [make_task(f"g{i}", f"Task number {i} of many") for i in range(150)]
        memory.add_tasks(tasks)
        memory.add_episodes([episode(t, f"x = {i}") for i, t in enumerate(tasks)])


@pytest.mark.parametrize("how", ["truncated", "overwritten"])
def test_a_damaged_database_is_reported_and_mended(path, how):
    grown(path)
    data = path.read_bytes()
    cut = len(data) * 3 // 4 // 4096 * 4096
    path.write_bytes(data[:cut] if how == "truncated" else data[:cut] + b"\xff" * 8192 + data[cut + 8192 :])
    problems = verify(path)
    assert problems
    if how == "truncated":
        with pytest.raises(FalconError, match=r"malformed") as caught:
            LongTermMemory(path, HashedTfidf())
        assert str(path) in str(caught.value) and "verify" in caught.value.remedy
    damaged = path.read_bytes()
    assert "could not be read" in " ".join(verify(path, repair=True))
    assert verify(path) == [] and Path(f"{path}.damaged").read_bytes() == damaged
    with LongTermMemory(path, HashedTfidf()) as memory:
        assert 60 < memory.stats()["tasks"] <= 162
        memory.add_tasks([make_task("after", "Life goes on")])


def test_a_file_without_a_header_cannot_be_mended(path):
    data = path.read_bytes()
    path.write_bytes(b"\0" * 8192 + data[8192:])
    with pytest.raises(FalconError, match="not a database") as caught:
        verify(path, repair=True)
    assert "--repair" not in caught.value.remedy and "from a checkpoint" in caught.value.remedy
    assert path.read_bytes()[8192:] == data[8192:]


def test_a_damaged_embedding_is_made_again(path):
    before = contents(path)
    with sqlite3.connect(path) as db:
        db.execute("UPDATE task SET embedding = x'0011' WHERE task_id = 'toy/3'")
        db.execute("UPDATE task SET text_hash = 5 WHERE task_id = 'toy/4'")
    db.close()
    Path(f"{path}.faiss").unlink()
    with LongTermMemory(path, HashedTfidf()) as memory, pytest.raises(FalconError, match="embedding is not of 1024"):
        memory.recall(TASKS, 1)
    assert len(verify(path)) == 2 and len(verify(path, repair=True)) == 2
    assert verify(path) == [] and contents(path) == before


# -- full disk ---------------------------------------------------------------------------------------------------------


def test_a_full_disk_is_reported_and_loses_nothing(path):
    before = contents(path)
    with LongTermMemory(path, HashedTfidf()) as memory:
        pages = memory._store.db.execute("PRAGMA page_count").fetchone()[0]
        memory._store.db.execute(f"PRAGMA max_page_count = {pages + 2}")  # SQLite's own "database or disk is full"
        with pytest.raises(FalconError, match="full") as caught:
            memory.add_tasks([make_task(f"n{i}", f"New task {i}") for i in range(50)])
        assert "disk space" in caught.value.remedy
        memory.update_utility({"toy/1": 0.0}, 0.5)  # what fits still works
    assert contents(path) == before and verify(path) == []


def test_a_write_that_the_system_refuses_loses_nothing(path):
    before = contents(path)

    def write_too_much():  # in a child: the limit would hold for all of pytest
        with LongTermMemory(path, HashedTfidf()) as memory:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
            try:
                memory.add_tasks([make_task(f"n{i}", f"New task {i}") for i in range(200)])
            except FalconError as error:
                return "disk space" in error.remedy

    assert forked(write_too_much) == 0
    assert contents(path) == before and verify(path) == []


def full_disk(action):
    """Whether `action` ends in a FalconError that names the disk, in a child that may write files of 20,000 bytes at most."""

    def limited():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        try:
            action()
        except FalconError as error:
            return "disk" in error.remedy and "m.sqlite" in error.message

    return forked(limited) == 0


def test_copies_for_which_there_is_no_room_leave_the_old_ones(path, tmp_path):
    with LongTermMemory(path, read_only=True) as memory:
        export(memory, tmp_path / "m.sqlite.parquet")
        memory.snapshot(tmp_path / "snap")
        whole = {name: (tmp_path / name).read_bytes() for name in ("snap", "m.sqlite.parquet")}
        names = sorted(os.listdir(tmp_path))
        assert full_disk(lambda: memory.snapshot(tmp_path / "snap"))
        assert full_disk(lambda: export(memory, tmp_path / "again.m.sqlite.parquet"))
        assert full_disk(lambda: import_export(tmp_path / "m.sqlite.parquet", tmp_path / "copy.m.sqlite"))
        assert {name: (tmp_path / name).read_bytes() for name in whole} == whole and sorted(os.listdir(tmp_path)) == names
    import_export(tmp_path / "m.sqlite.parquet", tmp_path / "copy.m.sqlite")  # the failed attempt is not in the way
    assert contents(tmp_path / "copy.m.sqlite") == contents(path)


def test_a_restore_for_which_there_is_no_room_changes_nothing(path, tmp_path):
    with LongTermMemory(tmp_path / "full", HashedTfidf()) as other:
        other.add_tasks([make_task(f"n{i}", f"New task {i}") for i in range(50)])
        other.snapshot(tmp_path / "snap")
    before = contents(path)

    def restore():
        with LongTermMemory(path, HashedTfidf()) as memory:
            memory.restore(tmp_path / "snap")

    assert full_disk(restore)
    assert contents(path) == before and verify(path) == []


def test_an_index_that_cannot_be_saved_is_reported(path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with (
        pytest.raises(FalconError, match=r"cannot write .*m.sqlite.faiss: No space left"),
        LongTermMemory(path, HashedTfidf()) as memory,
    ):
        memory.add_tasks([make_task("new", "A new one")])
        memory.recall(TASKS, 1)
    assert not [name for name in os.listdir(path.parent) if name.startswith(".")]
    monkeypatch.undo()
    with LongTermMemory(path, read_only=True) as memory:
        assert memory.search("a new one", 1)[0].task_id == "toy/new"


# -- several processes and sudden death ----------------------------------------------------------------------------------


def write_for_ever(path, writer, pipe):
    """Adds tasks and episodes one by one, and says so after each."""
    with LongTermMemory(path, HashedTfidf(64)) as memory:
        for i in range(10**6):
            task = make_task(f"{writer}/{i}", f"Task {i} of writer {writer}")
            memory.add_tasks([task])
            memory.add_episodes([episode(task, f"x = {i}"), episode(task, f"y = {i}", "fail", "fail")])
            memory.update_utility({task.task_id: float(i)}, 1.0)
            os.write(pipe, f"{task.task_id} {i}\n".encode())


def start_writer(path, writer):
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        try:
            write_for_ever(path, writer, write)
        finally:
            os._exit(1)
    os.close(write)
    return child, read


def kill_and_check(path, children, after=0, delay=0.0):
    """Kills each writer some time after so many acknowledged writes; returns how many there were. All of them must be there."""
    acknowledged = []
    for child, pipe in children:
        with os.fdopen(pipe) as file:
            lines = [file.readline() for _ in range(after)]
            time.sleep(delay)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            acknowledged += [line.split() for line in [*lines, *file.read().splitlines()]]
    with LongTermMemory(path, HashedTfidf(64)) as memory:
        passed = {task_id: code for task_id, code, _ in memory.positives([t for t, _ in acknowledged])}
        failed = {task_id: code for task_id, code, _ in memory.failures([t for t, _ in acknowledged])}
        utility = dict(memory._store.rows("SELECT task_id, utility FROM task"))
        for task_id, i in acknowledged:
            assert passed[task_id] == f"x = {i}" and failed[task_id] == f"y = {i}" and utility[task_id] == float(i)
    return len(acknowledged)


@pytest.mark.parametrize("rounds", [8, pytest.param(300, marks=pytest.mark.slow)])
def test_a_killed_writer_loses_nothing_acknowledged(tmp_path, rounds):
    path, rng, total = tmp_path / "m", random.Random(rounds), 0
    for number in range(rounds):
        child = start_writer(path, f"{rounds}.{number}")
        total += kill_and_check(path, [child], after=rng.randrange(5), delay=rng.uniform(0, 0.02))
        if number % 20 == 7:
            assert verify(path) == []
            with LongTermMemory(path, HashedTfidf(64)) as memory:
                memory.recall([make_task("q", "Task 3", "test")], 2)
    assert total > rounds


def test_two_processes_write_and_a_third_reads(tmp_path):
    path = tmp_path / "m"
    children = [start_writer(path, name) for name in "ab"]
    seen, end = set(), time.monotonic() + 30
    with LongTermMemory(path, HashedTfidf(64)) as reader:
        while len(seen) < 2 and time.monotonic() < end:
            found = reader.search("Task of writer a", 8) + reader.search("Task of writer b", 8)
            seen = {n.task_id.split("/")[1] for n in found}
        assert seen == {"a", "b"}
    assert kill_and_check(path, children, after=1) >= 2 and verify(path) == []


# -- imports -----------------------------------------------------------------------------------------------------------


def test_importing_memory_is_light_and_torch_comes_before_faiss(path):
    code = """
import sys
from falconlib.memory import LongTermMemory
heavy = {"torch", "faiss", "transformers", "pandas", "pyarrow"} & set(sys.modules)
with LongTermMemory(sys.argv[1], read_only=True) as memory:
    memory.stats(), memory.content_hash()
    heavy |= {"torch", "faiss"} & set(sys.modules)
    memory.search("sum")
order = list(sys.modules)
print(sorted(heavy), "faiss" not in order or "torch" not in order or order.index("torch") < order.index("faiss"))
"""
    child = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    assert child.stdout.strip() == "[] True"


def test_two_builds_of_faiss_are_refused(monkeypatch):
    monkeypatch.setattr(
        "importlib.metadata.distributions", lambda name: iter([name] if name in ("faiss-cpu", "faiss-gpu") else [])
    )
    with pytest.raises(FalconError, match="2 builds of faiss") as caught:
        load_faiss()
    assert "pip uninstall -y faiss-cpu faiss-gpu" in caught.value.remedy
