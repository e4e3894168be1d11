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

    def choose(self, prompts, fields, options):
        self.seen += prompts
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
        again = Asked(address="http://elsewhere")  # where the model stood does not
        again.identity = dict(reversed(again.identity.items()))
        assert ask(again, cache) == [GOOD] * 3 and again.seen == []
        monkeypatch.setattr("falconlib.judge.model.RUBRIC", "model-0")
        ask(again, cache)
        assert len(again.seen) == 3


def test_the_judges_of_a_file_are_known(tmp_path):
    judge = {"backend": "asked", "model": "", "identity": Asked().identity}
    with JudgeCache(tmp_path / "c") as cache:
        ask(Asked(), cache)
        cache.put_judge(judge)
        cache.put_judge(judge)
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
    (tmp_path / "text").write_text("no database, " * 100)
    with pytest.raises(FalconError, match="no judge cache"):
        JudgeCache(tmp_path / "text")
    sqlite3.connect(tmp_path / "other").execute("CREATE TABLE answers (x)").connection.close()
    with pytest.raises(FalconError, match="no judge cache"):
        JudgeCache(tmp_path / "other", "replay-only")
    with pytest.raises(FalconError, match="replay-only"):
        JudgeCache(tmp_path / "new", "replay_only")
    assert not (tmp_path / "new").exists()
    with JudgeCache(tmp_path / "good") as cache:
        cache._db.execute("DROP TABLE answers")
        for use in (lambda: cache.get("k"), lambda: cache.put({"k": 1}), cache.judges):
            with pytest.raises(FalconError, match="damaged"):
                use()
