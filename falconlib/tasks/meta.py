"""Meta-tasks: what one inner step learns from (support) and is judged on (query). Pure functions of tasks and a generator.

By problem, the paper's reading: one problem is one meta-task, and its rollouts are split (`inner.support` of `train.group`).
By family, the other reading of "a distribution of tasks": support and query are different problems of one family.
Training uses the first; the second is here to be sampled and looked at.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from falconlib.errors import FalconError
from falconlib.records import Task
from falconlib.tasks import HasRandom, sample_tasks


@dataclass(frozen=True)
class MetaTask:
    """name: of the problem or the family. support, query: the problems whose rollouts take these parts."""

    name: str
    support: tuple[Task, ...]
    query: tuple[Task, ...]


def by_problem(tasks: Sequence[Task], n: int, rng: HasRandom) -> list[MetaTask]:
    """`n` different problems, each its own support and query (rollouts are split, not problems)."""
    return [MetaTask(task.task_id, (task,), (task,)) for task in sample_tasks(tasks, [1.0] * len(tasks), n, rng)]


def by_family(tasks: Sequence[Task], n: int, support: int, query: int, rng: HasRandom) -> list[MetaTask]:
    """`n` different families, each with `support` and `query` problems; no problem is in both.

    A family is drawn in proportion to its number of problems; families too small for both parts are left out. Raises
    FalconError when fewer than `n` are left, and for parts of less than one problem.
    """
    families: dict[str, list[Task]] = defaultdict(list)
    for task in tasks:
        families[task.family].append(task)
    large = [own for name, own in sorted(families.items()) if name and len(own) >= support + query]
    if min(support, query) < 1 or len(large) < n:
        wanted = f"{n} families with {support} + {query} problems"
        raise FalconError(f"{wanted}: {len(large)} have that many", "ask for fewer families or problems, at least one of each")
    drawn = sample_tasks([own[0] for own in large], [float(len(own)) for own in large], n, rng)
    found = []
    for first in drawn:
        own = families[first.family]
        both = sample_tasks(own, [1.0] * len(own), support + query, rng)
        found.append(MetaTask(first.family, tuple(both[:support]), tuple(both[support:])))
    return found
