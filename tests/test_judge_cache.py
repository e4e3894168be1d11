"""The judge cache: asks once, replays exactly, and never mixes up questions."""

import sqlite3

import pytest

from falconlib.errors import FalconError
from falconlib.judge import CachedJudge, JudgeCache, StaticJudge
from falconlib.records import Scores, Task

TASKS = [Task(f"t/{i}", "t", "train", f"Task {i}.", "f", ("assert f() == 1",)) for i in range(3)]
PAIRS = [(task, f"def f():\n    return {i}\n") for i, task in enumerate(TASKS)]
GOOD = Scores(2, 1, 0)


class Asked:
    """A judge that remembers what it was asked and gives the answers it was made with."""

    name, version = "asked", "asked-1"

    def __init__(self, answer=GOOD, revision="r1"):
        self.answer, self.seen, self.identity = answer, [], {"model": "m", "revision": revision}

    def score_many(self, pairs):
        self.seen += pairs
        return [self.answer] * len(pairs)


def test_asks_once_and_answers_alike(tmp_path):
    judge = Asked()
    with JudgeCache(tmp_path / "a" / "cache.sqlite") as cache:
        cached = CachedJudge(judge, cache)
        first = cached.score_many([*PAIRS, PAIRS[0]])
        assert first == [judge.answer] * 4 and len(judge.seen) == 3
        assert cached.score_many(PAIRS) == first[:3] and len(judge.seen) == 3
        assert (cached.hits, cached.misses) == (3, 3)
    other = Asked(revision="r2")
    with JudgeCache(tmp_path / "a" / "cache.sqlite") as cache:  # another revision is another question
        CachedJudge(other, cache).score_many(PAIRS[:1])
    assert len(other.seen) == 1


def test_replay_only_answers_from_the_file_or_not_at_all(tmp_path):
    path = tmp_path / "cache.sqlite"
    with pytest.raises(FalconError, match="replay-only needs one"):
        JudgeCache(path, "replay-only")
    with JudgeCache(path) as cache:
        CachedJudge(StaticJudge(), cache).score_many(PAIRS[:2])
    expected = StaticJudge().score_many(PAIRS[:2])
    before = path.read_bytes()

    class Silent(StaticJudge):
        def score_many(self, pairs):
            raise AssertionError("a replay must not ask")

    with JudgeCache(path, "replay-only") as cache:
        replay = CachedJudge(Silent(), cache)
        assert replay.score_many(PAIRS[:2]) == expected
        with pytest.raises(FalconError, match="t/2"):
            replay.score_many(PAIRS)
        cache.put({"k": 1})
    assert path.read_bytes() == before


def test_off_touches_nothing(tmp_path):
    judge = Asked()
    with JudgeCache(tmp_path / "cache.sqlite", "off") as cache:
        cached = CachedJudge(judge, cache)
        cached.score_many(PAIRS)
        cached.score_many(PAIRS)
    assert len(judge.seen) == 6 and list(tmp_path.iterdir()) == []


def test_a_missing_score_is_replayed_but_asked_again(tmp_path):
    judge = Asked(Scores(2, None, 0))
    with JudgeCache(tmp_path / "c") as cache:
        CachedJudge(judge, cache).score_many(PAIRS[:1])
        CachedJudge(judge, cache).score_many(PAIRS[:1])
        assert len(judge.seen) == 2
    with JudgeCache(tmp_path / "c", "replay-only") as cache:
        assert CachedJudge(judge, cache).score_many(PAIRS[:1]) == [judge.answer]
    assert len(judge.seen) == 2


def test_key_depends_on_everything_that_can_change_an_answer(tmp_path):
    task, code = PAIRS[0]
    identity = {"model": "m", "revision": "r", "rubric": "x", "sampling": {"temperature": 0}}
    judges = [Asked() for _ in range(6)]
    for judge, more in zip(judges, [{}, *({field: "other"} for field in identity)], strict=False):
        judge.identity = identity | more
    judges[5].name, judges[5].identity = "openai", identity
    with JudgeCache(tmp_path / "c") as cache:
        for judge in judges:  # another backend, or another anything, is another question
            for pair in (PAIRS[0], (TASKS[1], code), (task, code + "\n"), (task, "\ud800")):
                CachedJudge(judge, cache).score_many([pair])
            assert len(judge.seen) == 4
        again = Asked()
        again.identity = dict(reversed(identity.items()))
        assert CachedJudge(again, cache).score_many(PAIRS[:1]) == [GOOD] and again.seen == []


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
