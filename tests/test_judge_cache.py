"""The judge cache: asks once, replays exactly, and never mixes up questions."""

import json
import sqlite3

import pytest

from falconlib.errors import FalconError
from falconlib.judge import CachedChat, JudgeCache

FIELDS, OPTIONS = ("style", "complexity"), ("0", "1", "2")
GOOD = {"style": "2", "complexity": "1"}
QUESTIONS = ["Grades: ...\n\nTask: Add.\n\nProgram:\n  1| x = 1", "\nTask: Take the mean.\n", "third \ud800"]


class Asked:
    """A Chat that remembers what it was asked and gives the answer it was made with."""

    name = "asked"

    def __init__(self, answer=GOOD, **identity):
        self.answer, self.seen = answer, []
        self.identity = {"model": "m", "revision": "r", "sampling": {"temperature": 0}} | identity
        self.counts = {"asked": 0, "repaired": 0, "unanswered": 0}

    def choose(self, prompts, fields, options, keep=lambda *_: None):
        self.seen += prompts
        for prompt in prompts:
            keep(prompt, self.answer)
        return [self.answer] * len(prompts)


def ask(chat, cache, prompts=QUESTIONS, fields=FIELDS, options=OPTIONS):
    return CachedChat(chat, cache).choose(prompts, fields, options)


def test_asks_once_and_answers_alike(tmp_path):
    chat = Asked()
    with JudgeCache(tmp_path / "a" / "cache.sqlite") as cache:
        assert ask(chat, cache, [*QUESTIONS, QUESTIONS[0]]) == [GOOD] * 4 and len(chat.seen) == 3
        assert ask(chat, cache) == [GOOD] * 3 and len(chat.seen) == 3


def test_replay_only_answers_from_the_file_or_not_at_all(tmp_path):
    path = tmp_path / "cache.sqlite"
    with pytest.raises(FalconError, match="replay-only needs one"):
        JudgeCache(path, "replay-only")
    with JudgeCache(path) as cache:
        ask(Asked(), cache, QUESTIONS[:1])
    before, silent = path.read_bytes(), Asked()
    with JudgeCache(path, "replay-only") as cache:
        assert ask(silent, cache, QUESTIONS[:1]) == [GOOD]
        with pytest.raises(FalconError, match="about the task 'Take the mean"):
            ask(silent, cache)
        cache.put({"k": 1})
    assert path.read_bytes() == before and silent.seen == []


def test_off_touches_nothing(tmp_path):
    chat = Asked()
    with JudgeCache(tmp_path / "cache.sqlite", "off") as cache:
        ask(chat, cache)
        ask(chat, cache)
        assert cache.judges() == []
    assert len(chat.seen) == 6 and list(tmp_path.iterdir()) == []


def test_a_missing_answer_is_replayed_but_asked_again(tmp_path):
    chat = Asked(None)
    with JudgeCache(tmp_path / "c") as cache:
        ask(chat, cache, QUESTIONS[:1])
        ask(chat, cache, QUESTIONS[:1])
        assert len(chat.seen) == 2
    with JudgeCache(tmp_path / "c", "replay-only") as cache:
        assert ask(chat, cache, QUESTIONS[:1]) == [None]
    assert len(chat.seen) == 2


def test_key_depends_on_everything_that_can_change_an_answer(tmp_path, monkeypatch):
    chats = [Asked(), *(Asked(**{field: "other"}) for field in ("model", "revision", "sampling", "repair")), Asked()]
    chats[-1].name = "another"
    with JudgeCache(tmp_path / "c") as cache:
        for chat in chats:  # another backend, or another anything, is another question
            ask(chat, cache)
            ask(chat, cache, QUESTIONS[:1], FIELDS, (*OPTIONS, "3"))
            ask(chat, cache, QUESTIONS[:1], FIELDS[::-1])
            assert len(chat.seen) == 5
        again = Asked(address="http://elsewhere")  # where the model of a named revision stood does not
        again.identity = dict(reversed(again.identity.items()))
        assert ask(again, cache) == [GOOD] * 3 and again.seen == []
        monkeypatch.setattr("falconlib.judge.model.RUBRIC", "model-0")
        ask(again, cache)
        assert len(again.seen) == 3


def test_the_judges_of_a_file_are_known(tmp_path):
    judge = {"backend": "asked", "model": "mine", "identity": Asked().identity}
    with JudgeCache(tmp_path / "c") as cache:
        chat = CachedChat(Asked(), cache, "mine")
        assert cache.judges() == []  # one that has not answered anything, such as a start that failed, is none
        for prompts in (QUESTIONS[:1], QUESTIONS):
            chat.choose(prompts, FIELDS, OPTIONS)
        assert cache.judges() == [judge]


POISON = [{"style": "9", "complexity": "1"}, {"style": "2"}, {}, [], "2", {"style": 2, "complexity": "1"}, {**GOOD, "more": "1"}]


@pytest.mark.parametrize("value", [json.dumps({"answer": a}) for a in POISON] + ["[]", "{}", "3", "{bad", "null and void"])
def test_a_damaged_answer_is_named(tmp_path, value):
    path = tmp_path / "c"
    with JudgeCache(path) as cache:
        ask(Asked(), cache)
    db = sqlite3.connect(path)
    db.execute("UPDATE answers SET value = ?", (value,))
    db.commit()
    db.close()
    for mode in ("read-write", "replay-only"):
        with JudgeCache(path, mode) as cache, pytest.raises(FalconError, match=str(path)):
            ask(Asked(), cache)


def test_bad_files_and_modes_are_named(tmp_path):
    """Only a file that is damaged is to be deleted: another program's, or one that is locked, is not."""
    (tmp_path / "text").write_text("no database, " * 100)
    sqlite3.connect(tmp_path / "other").execute("CREATE TABLE answers (x)").connection.close()
    cases = [("text", "read-write", "delete"), ("other", "replay-only", "choose"), ("", "read-write", "choose")]
    for name, mode, remedy in [*cases, ("text/c.sqlite", "read-write", "choose")]:
        with pytest.raises(FalconError, match="cannot be used as a judge cache") as caught:
            JudgeCache(tmp_path / name, mode)
        assert remedy in caught.value.remedy, (name, caught.value)
    with pytest.raises(FalconError, match="replay-only"):
        JudgeCache(tmp_path / "new", "replay_only")
    assert not (tmp_path / "new").exists()
    with JudgeCache(tmp_path / "good") as cache:
        cache._db.execute("DROP TABLE answers")
        for use in (lambda: cache.get("k"), lambda: cache.put({"k": 1}), cache.judges):
            with pytest.raises(FalconError, match="cannot be used"):
                use()


def test_a_locked_cache_is_not_to_be_deleted(tmp_path):
    with JudgeCache(tmp_path / "c") as cache:
        other = sqlite3.connect(tmp_path / "c")
        other.execute("BEGIN EXCLUSIVE")
        cache._db.execute("PRAGMA busy_timeout=10")
        with pytest.raises(FalconError, match="locked") as caught:
            cache.put({"k": 1})
        assert "wait" in caught.value.remedy and "delete" not in caught.value.remedy
        other.close()


def test_making_one_cache_at_once_waits_for_the_others(tmp_path, monkeypatch):
    """SQLite reports a lock at the switch to WAL at once, whatever its time-out: two processes that make one file meet there."""
    waits = []
    other = sqlite3.connect(tmp_path / "c")
    other.execute("BEGIN EXCLUSIVE")
    monkeypatch.setattr(
        "falconlib.files.time.sleep", lambda seconds: waits.append(seconds) or (len(waits) == 3 and other.rollback())
    )
    real = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *args, **more: real(*args, **(more | {"timeout": 0})))
    with JudgeCache(tmp_path / "c") as cache:
        cache.put({"k": 1})
        assert cache.get("k") == 1 and len(waits) == 3
    other.close()


def test_a_replay_leaves_no_trace_and_needs_no_right_to_write(tmp_path):
    folder = tmp_path / "published"
    with JudgeCache(folder / "c") as cache:
        cache.put({"k": 1})
    (folder / "c").chmod(0o444)
    folder.chmod(0o555)
    try:
        with JudgeCache(folder / "c", "replay-only") as cache:
            assert cache.get("k") == 1 and [path.name for path in folder.iterdir()] == ["c"]
    finally:
        folder.chmod(0o755)
    assert [path.name for path in folder.iterdir()] == ["c"]


def test_a_replay_sees_what_a_writer_has_not_folded_in_yet(tmp_path):
    with JudgeCache(tmp_path / "c") as writer:
        writer.put({"k": 1})
        with JudgeCache(tmp_path / "c", "replay-only") as cache:
            assert cache.get("k") == 1


def test_a_later_answer_replaces_none(tmp_path):
    with JudgeCache(tmp_path / "c") as cache:
        ask(Asked(None), cache)
        ask(Asked(), cache)
        assert ask(Asked(None), cache) == [GOOD] * 3


def test_no_answer_replaces_none_that_another_process_paid_for(tmp_path):
    class Slow(Asked):
        def choose(self, prompts, *form):
            with JudgeCache(tmp_path / "c") as other:
                ask(Asked(), other)  # meanwhile
            return super().choose(prompts, *form)

    with JudgeCache(tmp_path / "c") as cache:
        assert ask(Slow(None), cache) == [None] * 3
    with JudgeCache(tmp_path / "c", "replay-only") as cache:
        assert ask(Asked(None), cache) == [GOOD] * 3


def test_answers_are_stored_as_they_arrive(tmp_path):
    class Interrupted(Asked):
        def choose(self, prompts, fields, options, keep):
            super().choose(prompts[:2], fields, options, keep)
            raise KeyboardInterrupt

    with JudgeCache(tmp_path / "c") as cache:
        with pytest.raises(KeyboardInterrupt):
            ask(Interrupted(), cache)
        late = Asked()
        assert ask(late, cache) == [GOOD] * 3 and late.seen == QUESTIONS[2:]


def test_an_address_counts_where_no_revision_tells_models_apart(tmp_path):
    chats = [Asked({**GOOD, "style": s}, revision="", address=f"http://{s}") for s in "12"]
    with JudgeCache(tmp_path / "c") as cache:
        assert [ask(chat, cache)[0]["style"] for chat in chats] == ["1", "2"]
