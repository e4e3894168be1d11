"""Meta-tasks by problem and by family."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from falconlib.errors import FalconError
from falconlib.tasks import load_tasks
from falconlib.tasks.meta import by_family, by_problem

TRAIN = load_tasks("basics", "train")


def test_by_problem_a_problem_is_its_own_support_and_query():
    found = by_problem(TRAIN, 5, random.Random(1))
    assert len({m.name for m in found}) == 5 and found == by_problem(TRAIN, 5, random.Random(1))
    assert all(m.support == m.query and m.support[0].task_id == m.name for m in found)


def test_by_family_support_and_query_share_no_task():
    rng = random.Random(0)
    for _ in range(200):
        found = by_family(TRAIN, 4, 3, 4, rng)  # 7 problems: the whole family
        assert len({m.name for m in found}) == 4
        for meta in found:
            support, query = ({t.task_id for t in part} for part in (meta.support, meta.query))
            assert len(support) == 3 and len(query) == 4 and not support & query
            assert {t.family for t in (*meta.support, *meta.query)} == {meta.name}


def test_by_family_is_seeded_and_takes_every_problem_to_both_parts():
    assert by_family(TRAIN, 3, 2, 2, random.Random(5)) == by_family(TRAIN, 3, 2, 2, random.Random(5))
    own = [t for t in TRAIN if t.family == "lists"]
    rng, seen = random.Random(0), Counter()
    for _ in range(300):
        (meta,) = by_family(own, 1, 2, 2, rng)
        seen.update([("s", t.task_id) for t in meta.support] + [("q", t.task_id) for t in meta.query])
    assert len(seen) == 2 * len(own) and min(seen.values()) > 40  # 300 * 2 / 7 = 86 each


def test_by_family_refuses_what_it_cannot_give():
    with pytest.raises(FalconError, match=r"4 \+ 4 problems: 0 have that many"):
        by_family(TRAIN, 1, 4, 4, random.Random(0))
    for support, query in ((0, 1), (1, 0)):
        with pytest.raises(FalconError, match="families with"):
            by_family(TRAIN, 1, support, query, random.Random(0))
    with pytest.raises(FalconError, match="29 families"):
        by_family(TRAIN, 29, 1, 1, random.Random(0))
