"""The memory at its bounds: names that are taken, other processes in between, the largest size, malformed values."""

import hashlib
import json
import multiprocessing
import os
import resource
import signal
import sqlite3
import tempfile
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import test_memory_files
from test_memory import TASKS, TEXTS, Planar, at, episode, make_task, names
from test_memory_files import contents, forked, grown

from falconlib.errors import FalconError
from falconlib.memory import LongTermMemory, ShortTermMemory, export, import_export, recall, store, verify
from falconlib.memory.digest import text_hash
from falconlib.memory.embed import HashedTfidf

path = test_memory_files.path  # the fixture: a memory file of twelve tasks
QUERY = make_task("q", at(0), "test")


def change(path, *statements):
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        for statement in statements:
            db.execute(statement)


# -- export and import -------------------------------------------------------------------------------------------------


def test_an_export_takes_no_name_that_is_in_use(path):
    before = contents(path)
    (path.parent / "link").symlink_to("nowhere")
    with LongTermMemory(path, read_only=True) as memory:
        for name in (path, f"{path}.faiss", f"{path}-journal", path.parent / "link"):
            with pytest.raises(FalconError, match="exists"):
                export(memory, name)
    assert contents(path) == before and verify(path) == [] and not Path(f"{path}-journal").exists()


def import_at_once(source, target, barrier, said):
    barrier.wait(30)
    try:
        said.put(import_export(source, target))
    except FalconError as error:
        said.put(error.message)


def test_of_two_imports_to_one_name_one_wins(path, monkeypatch):
    source, before, context = path.parent / "m.parquet", contents(path)[0], multiprocessing.get_context("fork")
    with LongTermMemory(path, read_only=True) as memory:
        export(memory, source)
    for attempt in range(3):
        target, barrier, said = path.parent / f"copy{attempt}", context.Barrier(2), context.Queue()
        pair = [context.Process(target=import_at_once, args=(source, target, barrier, said)) for _ in range(2)]
        [child.start() for child in pair]
        assert sorted(str(said.get(timeout=60)) for _ in pair) == [f"{target} exists: only a new file is written", "None"]
        [child.join() for child in pair]
        assert verify(target) == [] and contents(target)[0] == before

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("falconlib.memory.upkeep.verify", interrupted)
    left = sorted(os.listdir(path.parent))
    with pytest.raises(KeyboardInterrupt):
        import_export(source, path.parent / "late")
    assert sorted(os.listdir(path.parent)) == left


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("meta", b"[]"),
        ("meta", b'{"embedder": "x", "name": "hashed", "dim": "0"}'),
        ("task_embedding", b"abc"),
        ("task_embedding", np.full(1024, np.nan, np.float32).tobytes()),
        ("task_utility", float("inf")),
        ("task_text_hash", 1),
        ("task_id", 2**63),
        ("task_description", [1]),
        ("episode_code", None),
        ("episode_feedback", "{}"),
    ],
)
def test_a_malformed_export_is_refused(path, column, value):
    import pyarrow
    from pyarrow import parquet

    with LongTermMemory(path, read_only=True) as memory:
        export(memory, path.parent / "m.parquet")
    table = parquet.read_table(path.parent / "m.parquet")
    if column == "meta":
        table = table.replace_schema_metadata({"falconlib": value})
    else:
        kind = {"type": pyarrow.uint64()} if column == "task_id" else {}
        table = table.set_column(table.column_names.index(column), column, pyarrow.array([value] * len(table), **kind))
    parquet.write_table(table, path.parent / "odd.parquet")
    with pytest.raises(FalconError):
        import_export(path.parent / "odd.parquet", path.parent / "new")
    assert not [name for name in os.listdir(path.parent) if "new" in name]


# -- other processes in between ----------------------------------------------------------------------------------------


def test_a_recall_sees_one_state_of_the_file(tmp_path, monkeypatch):
    tasks = [make_task(f"x{i}", at(i)) for i in range(30)]
    with (
        LongTermMemory(tmp_path / "m", Planar(), max_tasks=30) as memory,
        LongTermMemory(tmp_path / "m", Planar(), max_tasks=30) as w,
    ):
        memory.add_tasks(tasks)
        turn = iter(range(10**6))

        def evict_after(method):
            def wrapped(*values):
                found = method(*values)
                w.add_tasks([make_task(f"y{next(turn)}/{i}", at(i)) for i in range(30)])
                return found

            return wrapped

        for owner, name in ((memory, "_lookup"), (memory._search, "_ranks")):
            with monkeypatch.context() as patch:
                patch.setattr(owner, name, evict_after(getattr(owner, name)))
                assert all(len(r.neighbours) == 2 for r in memory.recall([*tasks[:2], QUERY], 2))
        method, state = w._store.count, memory._store.transaction
        with state(write=False):
            before = memory._store.count(), memory.content_hash()
            w.add_tasks([make_task("z", at(3))])
            assert (memory._store.count(), memory.content_hash()) == before and method() == 30
        assert memory.content_hash() == w.content_hash() != before[1]


def test_evicted_rows_in_an_index_hide_nothing(tmp_path):
    with LongTermMemory(tmp_path / "m", Planar()) as reader, LongTermMemory(tmp_path / "m", Planar(), max_tasks=3000) as writer:
        writer.add_tasks([make_task(f"a{i}", at(i * 1e-3)) for i in range(3000)])
        assert len(reader.recall([QUERY], 8)[0].neighbours) == 8
        writer.add_tasks([make_task(f"b{i}", at(20 + i * 1e-3)) for i in range(2900)])
        found = names(reader.recall([QUERY], 8)[0])
        assert found == names(writer.recall([QUERY], 8)[0]) and len(found) == 8 and len(reader._search.index) == 3000
        index = reader._search.index
        writer.add_tasks([make_task(f"c{i}", at(20 + i * 1e-3)) for i in range(250)])  # fewer than a tenth
        assert len(reader.recall([QUERY], 8)[0].neighbours) == 8 and reader._search.index is index and len(index) == 3250


def test_an_index_with_evicted_rows_is_saved_and_loaded(tmp_path, monkeypatch):
    pytest.importorskip("faiss")
    with LongTermMemory(tmp_path / "m", Planar(), max_tasks=100) as memory:
        memory.add_tasks([make_task(f"a{i}", at(i / 2)) for i in range(100)])
        memory.recall([QUERY], 1)
        memory.add_tasks([make_task(f"b{i}", at(60 + i)) for i in range(5)])
        expected = names(memory.recall([QUERY], 8)[0])
    assert expected[0] == "toy/a5" and verify(tmp_path / "m") == []
    with LongTermMemory(tmp_path / "m", Planar(), max_tasks=100) as memory, monkeypatch.context() as patch:
        patch.setattr(memory._store, "vectors", lambda *_: pytest.fail("the index was built again"))
        assert names(memory.recall([QUERY], 8)[0]) == expected and len(memory._search.index) == 105
    sidecar = tmp_path / "m.faiss.json"
    whole = json.loads(sidecar.read_text())
    sidecar.write_text(json.dumps(whole | {"keys": "00" * 16 + whole["keys"][32:]}))  # another id for a row that has gone
    assert "is damaged" in verify(tmp_path / "m")[0]
    sidecar.write_text(json.dumps(whole))
    with LongTermMemory(tmp_path / "m", Planar(), max_tasks=100) as memory:
        memory.add_tasks([make_task(f"c{i}", at(60 + i)) for i in range(20)])
        assert names(memory.recall([QUERY], 8)[0])[0] == "toy/a25"  # a fifth of the saved index is gone: it is built again
        assert len(memory._search.index) == 100


@pytest.mark.parametrize("looked", [False, True])
def test_an_index_of_rows_to_come_is_not_used(tmp_path, looked):
    with LongTermMemory(tmp_path / "m", Planar()) as memory:
        memory.add_tasks([make_task(f"a{i}", at(20 + i)) for i in range(61)])
        memory.snapshot(tmp_path / "snap")
        memory.add_tasks([make_task("far", at(85))])
        memory.recall([QUERY], 1)
    with LongTermMemory(tmp_path / "m", Planar()) as memory:
        memory.restore(tmp_path / "snap")
        if looked:
            memory.recall([QUERY], 1)
        memory.add_tasks([make_task("near", at(1))])  # takes the row that "far" had in the saved index
        assert names(memory.recall([QUERY], 1)[0]) == ["toy/near"]


def test_many_near_duplicates_of_evaluation_tasks_hide_nothing(tmp_path):
    with LongTermMemory(tmp_path / "m", Planar()) as memory:
        memory.add_tasks(
            [make_task(f"a{i}", at(i * 1e-3)) for i in range(2100)] + [make_task(f"b{i}", at(40 + i)) for i in range(8)]
        )
        memory.blocklist([QUERY])
        other = make_task("q2", at(47), "test")
        first, second = memory.recall([QUERY, other], 8)
        assert names(first) == [f"toy/b{i}" for i in range(8)] and names(second)[:2] == ["toy/b6", "toy/b5"]
        assert len(memory.search(at(0), 2108)) == 8  # more than are ever fetched


def test_an_index_from_before_a_restore_is_not_saved(tmp_path):
    at_ten = [make_task(f"old{i}", at(10 * i)) for i in range(6)]
    with LongTermMemory(tmp_path / "other", Planar()) as other:
        other.add_tasks([make_task(f"new{i}", at(80 - 10 * i)) for i in range(6)])
        other.snapshot(tmp_path / "snap")
    query = make_task("q", at(79), "test")
    with LongTermMemory(tmp_path / "m", Planar()) as memory:
        memory.add_tasks(at_ten)
        assert names(memory.recall([query], 1)[0]) == ["toy/old5"]
        with LongTermMemory(tmp_path / "m", Planar()) as other:
            other.restore(tmp_path / "snap")
    assert verify(tmp_path / "m") == []  # the first one has closed last
    with LongTermMemory(tmp_path / "m", Planar()) as memory, LongTermMemory(tmp_path / "m", Planar()) as other:
        memory.blocklist([make_task("e", at(86), "test")])
        assert names(memory.recall([query], 1)[0]) == ["toy/new1"]
        other.restore(tmp_path / "snap")
        other.add_tasks([make_task("late", at(77))])
        assert names(memory.recall([query], 1)[0]) == ["toy/new1"]


def test_an_index_of_other_vectors_is_found_out(path):
    faiss = pytest.importorskip("faiss")
    before, sidecar = contents(path), Path(f"{path}.faiss.json")
    turned = faiss.IndexFlatIP(1024)
    turned.add(HashedTfidf().encode(TEXTS)[::-1].copy())
    for data in (b"IxXX" + bytes(500), faiss.serialize_index(turned).tobytes()):  # of an unknown kind, or whole in itself
        Path(f"{path}.faiss").write_bytes(data)
        told = json.loads(sidecar.read_text())
        whole = hashlib.sha256(data + bytes.fromhex(told["keys"])).hexdigest()
        sidecar.write_text(json.dumps(told | {"sha256": whole}))
        assert contents(path) == before
    for keys in ("x", "00", 10**25, None):
        sidecar.write_text(json.dumps(json.loads(sidecar.read_text()) | {"keys": keys}))
        assert contents(path) == before
    Path(f"{path}.faiss").unlink()
    Path(f"{path}.faiss").mkdir()
    assert contents(path) == before
    with pytest.raises(FalconError, match="cannot be removed"):
        verify(path, repair=True)


def test_a_restore_waits_a_minute_and_no_longer(path, monkeypatch):
    monkeypatch.setattr(store, "WAIT", 0.3)
    with LongTermMemory(path, HashedTfidf()) as memory, closing(sqlite3.connect(path, isolation_level=None)) as other:
        memory.snapshot(path.parent / "snap")
        other.execute("BEGIN")
        other.execute("SELECT * FROM task").fetchall()
        memory.restore(path.parent / "snap")  # readers are in nobody's way
        other.execute("ROLLBACK")
        other.execute("BEGIN IMMEDIATE")
        start, before = time.monotonic(), memory.content_hash()
        with pytest.raises(FalconError, match="locked"):
            memory.restore(path.parent / "snap")
        assert time.monotonic() - start < 10 and memory.content_hash() == before
        other.execute("ROLLBACK")
        memory.restore(path.parent / "snap")


# -- the largest size --------------------------------------------------------------------------------------------------


def test_newcomers_stay_and_evicted_tasks_are_passed_over(tmp_path):
    with LongTermMemory(tmp_path / "m", HashedTfidf(), max_tasks=8) as memory:
        memory.add_tasks(TASKS[:8])
        memory.add_golds(TASKS[:8])
        with pytest.raises(FalconError, match="knows no task 'toy/9'"):
            memory.add_golds(TASKS[9:10])
        memory.recall(TASKS, 1)
        index = memory._search.index
        memory.update_utility({f"toy/{i}": 0.5 for i in range(8)}, 1.0)
        memory.add_tasks([TASKS[8], TASKS[0]])  # neither of them goes, though all have more utility, and nothing is older
        kept = {name for (name,) in memory._store.rows("SELECT task_id FROM task")}
        assert kept == {f"toy/{i}" for i in range(9) if i != 1}
        assert memory._store.rows("SELECT count(*) FROM episode") == [(7,)]  # those of the evicted task went with it
        memory.add_golds(TASKS[:9])
        memory.add_episodes([episode(TASKS[1], "x = 1"), episode(TASKS[8], "x = 2")])
        memory.update_utility({"toy/1": 9.0, "toy/8": 0.25}, 1.0)
        assert [code for _, code, _ in memory.positives(["toy/1", "toy/8"])] == [TASKS[8].gold, "x = 2"]
        assert memory._search.index is index  # not thrown away at every eviction
        before = memory.content_hash()
        with pytest.raises(FalconError, match="12 tasks at once are more than the 8"):
            memory.add_tasks(TASKS)
        assert memory.content_hash() == before


# -- damage ------------------------------------------------------------------------------------------------------------


def test_verify_finds_what_sqlite_does_not(path):
    for statement, message in (
        ("UPDATE episode SET code = x'00ff' WHERE id = 2", "program 2 is damaged"),
        ("UPDATE episode SET feedback = '{' WHERE id = 3", "program 3 is damaged"),
        ("DROP INDEX task_rank", "INDEX task_rank ON task is missing"),
        ("DROP TABLE episode", "no such table: episode"),
        ("UPDATE task SET utility = 'much' WHERE id = 4", "'toy/3' is damaged"),
    ):
        change(path, statement)
        assert message in " ".join(verify(path)) and message in " ".join(verify(path, repair=True)), statement
        assert verify(path) == []
    assert sorted(p.name for p in path.parent.glob("*.damaged*")) == [f"m.sqlite.damaged{n}" for n in ("", "-2", "-3", "-4")]
    with LongTermMemory(path) as memory:
        assert memory.stats()["tasks"] == 12 and len(memory.recall(TASKS, 2)) == 12
        change(path, "UPDATE task SET utility = 'much'")
        with pytest.raises(FalconError, match="a utility is no number") as caught:
            memory.recall(TASKS, 2)
        assert "--repair" in caught.value.remedy
    change(path, "UPDATE meta SET value = 'many' WHERE key = 'dim'")
    with pytest.raises(FalconError, match="does not say with which embedder"):
        LongTermMemory(path)
    change(path, "UPDATE meta SET value = '1024' WHERE key = 'dim'", "PRAGMA user_version = 9")
    with pytest.raises(FalconError, match="has schema 9, 2 is expected"):
        LongTermMemory(path, HashedTfidf())


def spoil(path):
    data = path.read_bytes()
    cut = len(data) * 3 // 4 // 4096 * 4096
    path.write_bytes(data[:cut] + b"\xff" * 8192 + data[cut + 8192 :])
    return path.read_bytes()


def test_a_repair_spares_other_processes_links_and_earlier_copies(path):
    grown(path)
    change(path, "UPDATE sqlite_sequence SET seq = 1000000000000000 WHERE name = 'task'")  # no reason to try them all
    first, names_before = spoil(path), sorted(os.listdir(path.parent))
    with LongTermMemory(path, HashedTfidf()) as writer:
        with pytest.raises(FalconError, match="locked") as caught:
            verify(path, repair=True)
        assert "another process" in caught.value.remedy and writer._store.rows("SELECT 1")

    def without_room():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        with pytest.raises(FalconError, match="disk"):
            verify(path, repair=True)
        return True

    assert forked(without_room) == 0
    assert path.read_bytes() == first and set(os.listdir(path.parent)) <= {*names_before, "m.sqlite-shm"}
    link = path.parent / "link"
    link.symlink_to(path)
    ours = [path.parent / name for name in (".m.sqlite.faiss.a_b12345", ".m.sqlite.faiss.json.abcdefgh", ".m.sqlite.private-abc")]
    users = [path.parent / name for name in (".m.sqlite.bak", ".m.sqlite.swp", ".m.sqlite.original", ".m.sqlite.faiss.old")]
    ours[-1].mkdir()
    (ours[-1] / "m.sqlite").touch()
    for file in (*ours[:-1], *users):
        file.touch()
    for file in (*ours, *users):
        os.utime(file, (0, 0))
    (path.parent / ".m.sqlite.faiss.zzzzzzzz").touch()  # of a process that may still be writing it
    verify(link, repair=True)
    assert link.is_symlink() and verify(path) == [] and Path(f"{path}.damaged").read_bytes() == first
    assert not any(file.exists() for file in ours) and all(file.exists() for file in users)
    assert (path.parent / ".m.sqlite.faiss.zzzzzzzz").exists()
    second = spoil(path)
    verify(path, repair=True)
    assert Path(f"{path}.damaged").read_bytes() == first and Path(f"{path}.damaged-2").read_bytes() == second


def test_a_wal_in_a_closed_folder_has_a_remedy(path):
    with tempfile.TemporaryDirectory() as folder:
        frozen = Path(folder) / "m.sqlite"
        with LongTermMemory(path, HashedTfidf()) as memory:
            memory.update_utility({"toy/1": 9.0}, 1.0)
            for end in ("", "-wal"):
                Path(f"{frozen}{end}").write_bytes(Path(f"{path}{end}").read_bytes())
        Path(folder).chmod(0o555)

        def read():
            if os.getuid() == 0:
                os.setuid(65534)
            try:
                LongTermMemory(frozen, HashedTfidf(), read_only=True)
            except FalconError as error:
                return "copy it, with its -wal file" in error.remedy

        assert forked(read) == 0
        Path(folder).chmod(0o755)


# -- malformed values, settings, languages -----------------------------------------------------------------------------


def test_half_characters_and_numbers_out_of_range(tmp_path):
    odd = replace(TASKS[0], prompt="a \ud800 b", family="\udc00")
    with LongTermMemory(os.fsdecode(bytes(tmp_path) + b"/\xff.sqlite"), HashedTfidf()) as memory:
        memory.add_tasks([odd, *TASKS[1:]])
        memory.add_episodes([episode(odd, "x = 1", "runtime_error", "E\ud800")])
        assert memory.failures(["toy/0"])[0][2].error_class == "E?" and len(memory.recall([odd, TASKS[1]], 2)) == 2
        assert memory._store.rows("SELECT description FROM task WHERE id = 1") == [("a ? b",)]
        before = memory.content_hash()
        for attempt in (
            lambda: memory.add_tasks([replace(TASKS[1], task_id="\ud800")]),
            lambda: memory.add_episodes([replace(episode(TASKS[1], "x"), step=2**70)]),
            lambda: memory.update_utility({"toy/1": float("inf")}, 0.2),
            lambda: memory.update_utility({"toy/1": float("nan")}, 0.2),
            lambda: memory.update_utility({"toy/1": "0.5"}, 0.2),
            lambda: memory.update_utility({"toy/1": 0.5}, "much"),
            lambda: memory.update_utility({"toy/1": 1e308}, -1e5),
            lambda: memory.update_utility({"toy/1": 0.5}, float("nan")),
            lambda: memory.recall(TASKS, -1),
            lambda: memory.recall(TASKS, 2.5),
            lambda: memory.add_tasks([replace(TASKS[1], task_id="toy/\0")]),
            lambda: memory.add_tasks([make_task("new", None)]),
            lambda: memory.add_tasks([replace(make_task("new", "new"), tests=[1])]),
            lambda: memory.add_tasks(["toy/1"]),
            lambda: memory.add_golds([replace(TASKS[1], gold=1)]),
            lambda: memory.add_episodes([episode(TASKS[2], "x"), replace(episode(TASKS[1], "x"), code=None)]),
            lambda: memory.add_episodes([episode(TASKS[1], "x", "fail", 5)]),
            lambda: memory.add_episodes([episode(TASKS[1], "x", reward=float("nan")), episode(TASKS[1], "x", reward=1.0)]),
            lambda: memory.add_episodes([replace(episode(TASKS[1], "x"), rollout="first")]),
            lambda: memory.search("x", 0),
        ):
            with pytest.raises(FalconError):
                attempt()
        assert memory.content_hash() == before and len(memory.search("\udfff", 1)) == 1
        with LongTermMemory(memory.path, read_only=True) as view:
            assert view.content_hash() == before
    for attempt in (lambda: memory.recall(TASKS, 2), lambda: memory.add_tasks([make_task("new", "new")])):
        with pytest.raises(FalconError, match="closed database"):
            attempt()


def test_settings_on_which_promises_rest(tmp_path, monkeypatch):
    with LongTermMemory(tmp_path / "m", Planar()) as memory:
        assert [memory._store.number(p) for p in ("foreign_keys", "journal_mode", "synchronous")] == [1, "wal", 2]
        assert memory._store.number("mmap_size") == 0  # else a file that is cut while it is open kills the process (SIGBUS)
        memory.add_tasks([make_task(0, at(0))])
        memory.add_tasks([make_task(0, at(0)), make_task(1, at(13.5)), make_task(2, at(14.5))])
        assert memory.blocklist([QUERY]) == ["toy/0", "toy/1"] and memory._store.count() == 3  # cos 0.972 and 0.968
        assert recall.SAVE_EVERY == 10_000
        monkeypatch.setattr(recall, "SAVE_EVERY", 2)
        memory.search(at(0), 1)
        assert memory._search.path.exists()


def test_letters_of_any_script_count():
    vectors = HashedTfidf().encode(
        ["Подсчитайте гласные", "Подсчитайте согласные", "対応する括弧", "café", "cafe\u0301", "ｆｕｌｌ", "full"]
    )
    similar = vectors @ vectors.T
    assert 0.3 < similar[0, 1] < 0.99 and abs(similar[0, 2]) < 0.2 and similar[3, 4] > 0.999 and similar[5, 6] > 0.999
    assert text_hash("Café") == text_hash("cafe\u0301") != text_hash("cafe")


def test_a_malformed_short_term_state_changes_nothing():
    memory = ShortTermMemory(2, 4)
    memory.add([episode(TASKS[0], "a")])
    state, whole = memory.state(), {"size": 2, "total": 4}
    for odd in (
        None,
        [],
        whole,
        whole | {"tasks": [["a"]]},
        whole | {"tasks": [["a", [{"x": 1}]]]},
        whole | {"tasks": [["a", [1]]]},
    ):
        with pytest.raises(FalconError):
            memory.load(odd)
        assert memory.state() == state
    ((episode_of_0,),) = [row[1] for row in state["tasks"]]
    with pytest.raises(FalconError, match="another task's name"):
        memory.load(state | {"tasks": [["toy/1", [episode_of_0]]]})
    assert memory.state() == state
    memory.load(state | {"tasks": [[f"t{i}", [episode_of_0 | {"task_id": f"t{i}"}] * 3] for i in range(9)]})
    assert len(memory) == 4 and memory.tasks() == ["t7", "t8"]


def test_a_new_memory_waits_for_another_process_that_makes_it_too(tmp_path, monkeypatch):
    refused = []

    class Busy(sqlite3.Connection):
        def execute(self, sql, *values):
            if "journal_mode" in sql and len(refused) < 3:
                refused.append(sql)
                raise sqlite3.OperationalError("database is locked")  # as SQLite says at once, whatever its time limit
            return super().execute(sql, *values)

    plain = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *given, **named: plain(*given, **named, factory=Busy))
    with LongTermMemory(tmp_path / "memory.sqlite", HashedTfidf()) as memory:
        assert memory.stats()["tasks"] == 0 and len(refused) == 3
