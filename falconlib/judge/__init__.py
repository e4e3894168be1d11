"""AI feedback: a judge grades style, complexity and instruction following of programs on the paper's scale -1, 0, 1, 2.

`open_judge` makes the configured one: `StaticJudge`, the offline, deterministic default, or a `ModelJudge` that asks a local
model or a server and is bounded by the static one; an SQLite cache in front of any. A judge sees a task and a program,
never a test verdict; it runs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from falconlib.judge.cache import CachedJudge, JudgeCache
from falconlib.judge.model import CachedChat, Chat, ModelJudge
from falconlib.judge.static import StaticJudge
from falconlib.records import Scores, Task

if TYPE_CHECKING:
    from falconlib.config import JudgeConfig

__all__ = ["CachedChat", "CachedJudge", "Chat", "Judge", "JudgeCache", "ModelJudge", "StaticJudge", "open_chat", "open_judge"]


class Judge(Protocol):
    """name: of the backend. version: one line for tables. identity: everything besides task and program that can change
    an answer (model, revision, rubric, sampling), as JSON data: part of the cache key."""

    name: str
    version: str
    identity: dict[str, Any]

    def score_many(self, pairs: Sequence[tuple[Task, str]]) -> list[Scores]:
        """One Scores per (task, program), in order; a score without a usable answer is None."""
        ...


@contextmanager
def open_chat(config: JudgeConfig, load: Callable[[str], Any]) -> Iterator[Chat | None]:
    """The configured model behind its cache; None for the static backend, which has no model.

    load: name of a model -> the model (see LocalChat), called for backend "local" only: this room imports none.
    """
    if config.backend == "static":
        yield None
        return
    if config.backend == "local":
        from falconlib.judge.local import LocalChat

        chat: Chat = LocalChat(load(config.model))
    else:
        from falconlib.judge.server import ServerChat

        chat = ServerChat(config.model, config.timeout_s)
    mode = "replay-only" if config.replay else "read-write" if config.cache else "off"
    with JudgeCache(config.cache, mode) as cache:
        yield CachedChat(chat, cache)


@contextmanager
def open_judge(config: JudgeConfig, load: Callable[[str], Any]) -> Iterator[Judge]:
    """The configured judge. Arguments and errors as `open_chat`. The static judge is quicker than any cache and has none."""
    with open_chat(config, load) as chat:
        yield StaticJudge() if chat is None else ModelJudge(chat)
