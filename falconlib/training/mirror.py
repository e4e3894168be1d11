"""A copy of each step's metrics for a viewer, tensorboard or trackio; metrics.jsonl stays the record. Neither is a dependency."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from falconlib.errors import FalconError

Watch = Callable[[dict[str, Any]], object]  # called with each row of metrics


@contextmanager
def mirror(kind: str, folder: Path) -> Iterator[Watch]:
    """What to call with each row; files go below `folder`. kind: "tensorboard", "trackio", or "" for nobody.

    Raises FalconError when the package is not installed.
    """
    try:
        if kind == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            with SummaryWriter(folder / "tensorboard") as writer:
                yield lambda row: [writer.add_scalar(k, v, row["step"]) for k, v in numbers(row).items()]
        elif kind == "trackio":
            os.environ.setdefault("TRACKIO_DIR", str(folder / "trackio"))  # its default is the home folder
            import trackio

            trackio.init(project="falcon", name=folder.name)
            yield lambda row: trackio.log(numbers(row), step=row["step"])
            trackio.finish()
        else:
            yield lambda row: None
    except ModuleNotFoundError as error:
        raise FalconError(f"train.mirror = {kind!r}, but {error.name} is not installed", f"pip install {kind}") from error


def numbers(row: dict[str, Any]) -> dict[str, float]:
    """The row's known numbers by name, error classes as errors/<class>; the step itself is the axis."""
    flat = {**row, **{f"errors/{name}": count for name, count in row.get("errors", {}).items()}}
    return {k: float(v) for k, v in flat.items() if k != "step" and isinstance(v, int | float)}
