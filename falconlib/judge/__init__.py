"""AI feedback: a judge grades style, complexity and instruction following of programs on the paper's scale -1, 0, 1, 2.

`StaticJudge` is the offline, deterministic default. `CachedJudge` puts an SQLite cache in front of any judge. A judge
sees a task and a program, never a test verdict; it runs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from falconlib.judge.cache import CachedJudge, JudgeCache
from falconlib.judge.static import StaticJudge
from falconlib.records import Scores, Task

__all__ = ["CachedJudge", "Judge", "JudgeCache", "StaticJudge"]


class Judge(Protocol):
    """name: of the backend. version: one line for tables. identity: everything besides task and program that can change
    an answer (model, revision, rubric, sampling), as JSON data: part of the cache key."""

    name: str
    version: str
    identity: dict[str, Any]

    def score_many(self, pairs: Sequence[tuple[Task, str]]) -> list[Scores]:
        """One Scores per (task, program), in order; a score without a usable answer is None."""
        ...
