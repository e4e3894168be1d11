"""Several processes, one run: this process's rank and what all of them hold, in rank order. Nothing else.

Every process keeps the same theta and the same memories: it samples its share of the tasks, gathers the others' episodes and
gradients, and then does what the others do. Alone (no `accelerate launch`), all of this is the identity.
"""

from __future__ import annotations

import os
from typing import Any

import torch.distributed as dist


def start(cpu: bool) -> None:
    """Joins the processes that `accelerate launch` started (gloo on CPU, nccl on GPUs); nothing to join alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from accelerate import PartialState

        PartialState(cpu=cpu)


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def gather(items: list[Any]) -> list[Any]:
    """The items of all processes, in rank order; also a barrier."""
    if world() == 1:
        return items
    found: list[list[Any]] = [[]] * world()
    dist.all_gather_object(found, items)
    return [item for part in found for item in part]
