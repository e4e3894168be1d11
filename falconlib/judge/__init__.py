"""AI feedback: a judge grades style, complexity and instruction following of programs on the paper's scale -1, 0, 1, 2.

`open_judge` makes the configured one: `StaticJudge`, the offline, deterministic default, or a `ModelJudge` that asks a local
model or a server, through an SQLite cache, and is bounded by the static one. A judge sees a task and a program,
never a test verdict; it runs nothing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Protocol

from falconlib.errors import FalconError
from falconlib.judge.cache import JudgeCache, cache_key
from falconlib.judge.model import CachedChat, Chat, ModelJudge, asked_of
from falconlib.judge.static import StaticJudge
from falconlib.records import Scores, Task

if TYPE_CHECKING:
    from falconlib.config import JudgeConfig

__all__ = ["CachedChat", "Chat", "Judge", "JudgeCache", "ModelJudge", "StaticJudge", "open_chat", "open_judge"]


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
def open_chat(config: JudgeConfig, load: Callable[[str], Any]) -> Iterator[CachedChat | None]:
    """The configured model behind its cache; None for the static backend, which has no model.

    load: name of a model -> the model (see LocalChat), called for backend "local" only: this room imports none.
    """
    if config.backend == "static":
        yield None
        return
    mode = "replay-only" if config.replay else "read-write" if config.cache else "off"
    with JudgeCache(config.cache, mode) as cache:
        if config.replay:
            chat = absent(cache, config)
        elif config.backend == "local":
            from falconlib.judge.local import LocalChat

            chat = LocalChat(load(config.model))
        else:
            from falconlib.judge.server import ServerChat

            chat = ServerChat(config.model, config.timeout_s, config.revision)
        yield CachedChat(chat, cache, config.model)


def absent(cache: JudgeCache, config: JudgeConfig) -> Any:
    """The chat whose answers the cache holds, as far as a replay needs it: it is never asked, its model and server need not
    be there. Raises FalconError unless exactly one judge of the cache fits backend, model and revision of `config`, and
    $FALCON_JUDGE_SAMPLING where it is set; of one that changed how it asks again, the present one."""
    from falconlib.judge.server import REPAIR, sampling

    wish = os.environ.get("FALCON_JUDGE_SAMPLING", "") if config.backend == "openai" else ""
    known = [judge for judge in cache.judges() if judge["backend"] == config.backend]
    fit = [j["identity"] for j in known if config.model in ("", j["model"], j["identity"]["model"])]
    fit = [identity for identity in fit if config.revision in ("", revision(identity))]
    fit = [identity for identity in fit if not wish or identity["sampling"] == sampling(wish)]
    fit = [identity for identity in fit if identity.get("repair", REPAIR) == REPAIR] or fit
    different = {cache_key(asked_of(identity)): identity for identity in fit}
    if len(different) != 1:
        names = ", ".join(sorted({f"{j['identity']['model']} ({revision(j['identity'])})" for j in known})) or "none"
        ways = sorted({json.dumps(identity["sampling"]) for identity in different.values()})
        raise FalconError(
            f"{cache.path} holds answers of {config.backend} judges with these models (revisions): {names}"
            + f"; sampling: {' or '.join(ways)}" * (len(ways) > 1),
            "--set judge.model=<one of them>, judge.revision=... where one model has several, FALCON_JUDGE_SAMPLING likewise",
        )
    counts = {"asked": 0, "repaired": 0, "unanswered": 0}
    return SimpleNamespace(name=config.backend, identity=next(iter(different.values())), counts=counts)


def revision(identity: dict[str, Any]) -> str:
    """What tells models of one name apart: the revision, else the address of the server."""
    return identity.get("revision") or identity.get("address") or ""


@contextmanager
def open_judge(config: JudgeConfig, load: Callable[[str], Any]) -> Iterator[Judge]:
    """The configured judge. Arguments and errors as `open_chat`. The static judge is quicker than any cache and has none."""
    with open_chat(config, load) as chat:
        yield StaticJudge() if chat is None else ModelJudge(chat)
