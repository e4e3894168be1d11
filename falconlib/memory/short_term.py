"""Short-term memory: the most recent episodes of each task, across visits (METHOD: M_S(x), "the most recent samples").

Plain ring buffers in RAM; they feed the inner loop. They go into checkpoints through `state` and `load`. Nothing is learnt here.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence

from falconlib.errors import FalconError
from falconlib.records import Episode, from_dict, to_dict


class ShortTermMemory:
    """Ring buffers per task. size: episodes kept per task; total: over all tasks, the least recently visited task goes first.

    Raises FalconError unless 1 <= size <= total.
    """

    def __init__(self, size: int = 16, total: int = 8192):
        if not 1 <= size <= total:
            raise FalconError(f"short-term memory: 1 <= size <= total is expected, not {size} and {total}", "set short_term.size")
        self.size, self.total = size, total
        self._rings: OrderedDict[str, deque[Episode]] = OrderedDict()  # least recently visited task first

    def __len__(self) -> int:
        return sum(len(ring) for ring in self._rings.values())

    def add(self, episodes: Sequence[Episode]) -> None:
        """Appends episodes in order; the oldest of a full ring drop out."""
        for episode in episodes:
            ring = self._rings.setdefault(episode.task_id, deque(maxlen=self.size))
            ring.append(episode)
            self._rings.move_to_end(episode.task_id)
        kept = len(self)
        while kept > self.total:
            kept -= len(self._rings.popitem(last=False)[1])

    def get(self, task_id: str) -> list[Episode]:
        """The kept episodes of one task, oldest first; empty for a task never visited. Reading is no visit."""
        return list(self._rings.get(task_id, ()))

    def tasks(self) -> list[str]:
        """Task ids, least recently visited first."""
        return list(self._rings)

    def state(self) -> dict:
        """Everything as plain JSON-able data; `load` of it gives the same buffers, exactly."""
        tasks = [[task, [to_dict(e) for e in ring]] for task, ring in self._rings.items()]
        return {"size": self.size, "total": self.total, "tasks": tasks}

    def load(self, state: dict) -> None:
        """Replaces the contents by what `state` gave. Raises FalconError, changing nothing, when the sizes differ or a record is
        broken."""
        if not isinstance(state, dict):
            raise FalconError(f"no state of a short-term memory: {str(state)[:80]}", "resume from an earlier checkpoint")
        for name in ("size", "total"):
            if state.get(name) != getattr(self, name):
                raise FalconError(
                    f"the checkpoint holds short_term.{name} = {state.get(name)!r}, this run has {getattr(self, name)}",
                    "resume with the profile that the run was started with",
                )
        try:
            rings = OrderedDict(
                (task, deque((from_dict(Episode, e) for e in episodes), maxlen=self.size)) for task, episodes in state["tasks"]
            )
            if any(e.task_id != task for task, ring in rings.items() for e in ring):
                raise ValueError("an episode under another task's name")
        except (KeyError, TypeError, ValueError) as error:
            raise FalconError(f"malformed short-term memory: {error!r}", "resume from an earlier checkpoint") from error
        self._rings = rings
        self.add(())  # drops what is beyond `total`
