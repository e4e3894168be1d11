"""What recall reads: one summary per task, right after every write, mended when it is not; the older schema."""

import os
import random
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
import test_memory_files
from test_memory import TASKS, Planar, at, episode, make_task
from test_memory_bounds import change
from test_memory_files import contents, grown
from test_memory_mending import QUERY, killed

from falconlib.cli import main
from falconlib.errors import FalconError
from falconlib.memory import LongTermMemory, export, import_export, verify
from falconlib.memory.embed import HashedTfidf

path = test_memory_files.path  # the fixture: a memory file of twelve tasks


def test_a_recall_reads_no_programs_but_those_it_shows(path):
    with LongTermMemory(path, HashedTfidf()) as memory:
        memory.add_episodes([episode(TASKS[1], f"x = {i}", ("pass", "fail")[i % 2], "E") for i in range(8)])
        memory._search.sync()
        read = set()

        def watch(action, table, column, *_):
            if action == sqlite3.SQLITE_READ:
                read.add((table, column))
            return sqlite3.SQLITE_OK

        memory._store.db.set_authorizer(watch)
        assert len(memory.recall(TASKS, 2)) == 12
    wide = {(t, c) for t, c in read if t == "episode" or (t == "task" and c not in ("id", "task_id", "utility", "text_hash"))}
    assert not wide and {t for t, _ in read} >= {"task", "summary"}


def told(memory, task_id):
    """What a recall from the same place says of a task."""
    (found,) = [n for n in memory.recall([QUERY], 12)[0].neighbours if n.task_id == task_id]
    return found.code, found.errors


def test_a_summary_follows_every_write(tmp_path):
    with LongTermMemory(tmp_path / "m", Planar()) as memory:
        memory.add_tasks([make_task(i, at(20 + i)) for i in range(3)])
        assert told(memory, "toy/1") == (None, ())
        one = make_task(1, at(21), gold="def f():\n    return 1\n")
        memory.add_episodes([episode(one, f"x = {i}", "runtime_error", "KeyError", message='it\'s "a"\0\n é') for i in range(3)])
        memory.add_episodes([episode(one, f"y = {i}", "runtime_error", e) for i, e in enumerate(("AError", "AError"))])
        memory.add_episodes([episode(one, "long = 'one'"), episode(one, "b = 2")])
        # four failures are kept: two of each class, so the alphabet decides; both have been seen twice
        assert told(memory, "toy/1") == ("b = 2", (("AError", 2, ""), ("KeyError", 2, 'it\'s "a"\0\n é')))
        memory.add_episodes([episode(one, "x = 2", "runtime_error", "KeyError", message="later")])
        assert told(memory, "toy/1") == ("b = 2", (("KeyError", 3, "later"), ("AError", 2, "")))
        for number in range(6):  # of programs of one class the latest tells
            memory.add_episodes([episode(make_task(2, at(22)), f"z = {number}", "runtime_error", "E", message=f"{number}")])
            assert number == 0 or told(memory, "toy/2")[1][0][2] == f"{number}"
        memory.add_golds([one])
        assert told(memory, "toy/1")[0] == one.gold
        with LongTermMemory(tmp_path / "m", Planar()) as other:
            other.add_episodes([episode(one, "x = 3", "syntax_error", "SyntaxError", message="of another process")] * 2)
        classes = [("AError", 2, ""), ("KeyError", 2, "later"), ("SyntaxError", 2, "of another process")]
        assert told(memory, "toy/1") == (one.gold, tuple(classes))  # the oldest failure has gone


def test_summaries_are_right_after_anything_that_many_writers_do(tmp_path):
    draw, tasks = random.Random(3), [make_task(i, f"Task {i} of a few") for i in range(30)]
    with (
        LongTermMemory(tmp_path / "m", HashedTfidf(), max_tasks=20) as one,
        LongTermMemory(tmp_path / "m", HashedTfidf(), max_tasks=20) as two,
    ):
        for _ in range(60):
            memory, some = draw.choice((one, two)), draw.sample(tasks, 3)
            memory.add_tasks(some)
            fates = [draw.choice([("pass", ""), ("runtime_error", "E"), ("fail", "fail")]) for _ in some]
            memory.add_episodes([episode(t, f"x = {draw.randrange(9)}", *f) for t, f in zip(some, fates, strict=True)])
            memory.update_utility({some[0].task_id: draw.random()}, 0.5)
        export(one, tmp_path / "m.parquet")
        assert one.stats()["tasks"] == 20 and one._store.rows("SELECT count(*) FROM summary") == [(20,)]
    import_export(tmp_path / "m.parquet", tmp_path / "copy")
    assert verify(tmp_path / "m") == [] == verify(tmp_path / "copy")
    with LongTermMemory(tmp_path / "m", HashedTfidf()) as memory, LongTermMemory(tmp_path / "copy") as copy:
        assert memory.recall(tasks, 5) == copy.recall(tasks, 5)


def test_tables_that_disagree_end_in_no_raw_error(path):
    """As when a page of the file took another one's place: its tasks are listed in an index and not in their table."""
    roots = "(SELECT rootpage FROM sqlite_master WHERE name = 'empty')"
    change(
        path,
        "CREATE TABLE empty(x)",
        "PRAGMA writable_schema = ON",
        f"UPDATE sqlite_master SET rootpage = {roots} WHERE name = 'task'",
    )
    assert verify(path)
    with LongTermMemory(path, HashedTfidf()) as memory:
        assert len(memory.recall(TASKS, 2)) == 12  # through the saved index
    for end in (".faiss", ".faiss.json"):
        Path(f"{path}{end}").unlink(missing_ok=True)
    with LongTermMemory(path, HashedTfidf()) as memory:
        assert memory.recall(TASKS, 2)[0].neighbours == ()


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("UPDATE summary SET errors = '[' WHERE task = 3", "the summary of a task is damaged"),
        ("UPDATE summary SET errors = x'00' WHERE task = 3", "the summary of a task is damaged"),
        ("UPDATE summary SET errors = '[1]' WHERE task = 3", "the summary of a task is damaged"),
        ("UPDATE summary SET errors = '[[1]]' WHERE task = 3", "the summary of a task is damaged"),
        ("DELETE FROM summary WHERE task = 3", "the summary of a task is damaged"),
        ("UPDATE summary SET code = 'import os' WHERE task = 3", None),
        ("INSERT INTO summary SELECT 99, task_id, description, code, errors FROM summary WHERE task = 3", None),
    ],
)
def test_a_damaged_summary_is_found_and_mended(path, statement, message):
    before = contents(path)
    change(path, statement)
    if message:
        with pytest.raises(FalconError, match=message) as caught:
            contents(path)
        assert "--repair" in caught.value.remedy
    assert len(verify(path)) == 1 and verify(path, repair=True) and verify(path) == []
    assert contents(path) == before


def test_columns_that_disagree_with_the_feedback_are_damage(path):
    with LongTermMemory(path, HashedTfidf()) as memory:
        memory.add_episodes([episode(TASKS[1], "x = 1", "runtime_error", "E\ud800", message="half")] * 2)
    assert verify(path) == []
    before = contents(path)
    change(path, "UPDATE episode SET message = x'00ff', error_class = 'other' WHERE error_class = 'E?'")
    assert "program 14 is damaged" in verify(path)[0] and verify(path, repair=True) and verify(path) == []
    assert contents(path) == before


@pytest.mark.parametrize("wrong", ["verified = 1", "count = 'many'", "count = -5", "step = 'y'"])
def test_a_repair_takes_from_the_feedback_what_a_column_says_wrongly(path, wrong):
    with LongTermMemory(path, HashedTfidf()) as memory:
        memory.add_episodes([episode(TASKS[1], "bad = 0", "runtime_error", "E")])
    before = contents(path)
    change(path, f"UPDATE episode SET {wrong} WHERE code = 'bad = 0'")
    assert "is damaged" in verify(path)[0] and verify(path, repair=True) and verify(path) == []
    assert (contents(path) == before) != wrong.startswith("step"), "only the number that is lost stays unknown"


def test_a_damaged_value_is_not_exported(path):
    change(path, "UPDATE task SET utility = 'much' WHERE id = 3")
    with LongTermMemory(path, read_only=True) as memory, pytest.raises(FalconError, match="cannot be exported") as caught:
        export(memory, path.parent / "m.parquet")
    assert "--repair" in caught.value.remedy and not (path.parent / "m.parquet").exists()


def test_a_file_of_the_older_schema_is_taken_over_by_a_repair(path):
    before = contents(path)
    change(path, "DROP TABLE summary", "CREATE INDEX episode_error ON episode(task, error_class)", "PRAGMA user_version = 1")
    with LongTermMemory(path.parent / "new", HashedTfidf()) as memory:
        for attempt in (lambda: LongTermMemory(path), lambda: LongTermMemory(path, read_only=True), lambda: memory.restore(path)):
            with pytest.raises(FalconError, match="has schema 1, 2 is expected") as caught:
                attempt()
            assert f"verify {path} --repair" in caught.value.remedy
    old = path.read_bytes()
    assert "has schema 1" in verify(path)[0] and "0 rows could not be read" in verify(path, repair=True)[-1]
    assert verify(path) == [] and contents(path) == before and Path(f"{path}.damaged").read_bytes() == old


# -- looking without touching ------------------------------------------------------------------------------------------


def state(folder):
    return {name: (folder / name).read_bytes() for name in os.listdir(folder)}


def test_a_look_leaves_nothing_beside_a_memory(path, tmp_path, capsys):
    grown(path)
    before, out = state(path.parent), tmp_path.parent / f"{tmp_path.name}.parquet"
    for what, *more in (["stats"], ["search", "sum"], ["verify"], ["export", "--out", str(out)]):
        assert main(["memory", what, str(path), *more]) == 0 and state(path.parent) == before, what
    with LongTermMemory(path, read_only=True) as memory, closing(sqlite3.connect(path)) as other:
        other.execute("UPDATE task SET utility = 1.0 WHERE id = 1")
        other.commit()
        assert memory.search(TASKS[0].prompt, 1)[0].utility == 1.0
        with pytest.raises(sqlite3.OperationalError, match="readonly"):
            memory._store.db.execute("DELETE FROM task")
    assert sorted(os.listdir(path.parent)) == sorted(before)


def test_a_look_leaves_what_a_killed_process_wrote_as_it_is(path):
    target = path.parent / "live"
    killed(target)
    before = {end: Path(f"{target}{end}").read_bytes() for end in ("", "-wal")}
    with LongTermMemory(target, read_only=True) as memory:
        assert memory.stats()["tasks"] == 50
    assert verify(target) == [] and {end: Path(f"{target}{end}").read_bytes() for end in before} == before


@pytest.mark.parametrize("loss", ["DELETE FROM sqlite_sequence", "UPDATE sqlite_sequence SET seq = 3 WHERE name = 'task'"])
def test_a_lost_count_of_ids_is_found_and_mended(path, loss):
    before = contents(path)
    change(path, loss)
    assert "count of ids is lost" in verify(path)[0] and verify(path, repair=True) and verify(path) == []
    assert contents(path) == before


def test_a_snapshot_that_took_the_place_of_a_memory_is_read_beside_its_writer(path, tmp_path):
    with LongTermMemory(path, HashedTfidf()) as memory:
        memory.snapshot(tmp_path / "copy.sqlite")
    with LongTermMemory(tmp_path / "copy.sqlite", HashedTfidf()), closing(sqlite3.connect(tmp_path / "copy.sqlite")) as db:
        assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
