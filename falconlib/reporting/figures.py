"""Figures from tables: learning curves, pass rates with intervals, paired differences.

Each function takes a DataFrame and returns a matplotlib Figure; `save` writes it as SVG and PNG with its data as CSV, the
same bytes each time. Colours are Okabe and Ito's, and every series has its marker too, so that greyscale can be read.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from falconlib.files import write_bytes
from falconlib.reporting.tables import write_csv

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C8C00")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
STYLE: dict[Any, Any] = {
    **dict.fromkeys(("font.size", "axes.titlesize", "axes.labelsize"), 10),
    **dict.fromkeys(("xtick.labelsize", "ytick.labelsize", "legend.fontsize"), 9),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right"), False),
    "axes.grid": True,
    "grid.alpha": 0.3,
    "figure.constrained_layout.use": True,
    "svg.hashsalt": "falconlib",
    "savefig.dpi": 150,
}


def save(figure: Figure, stem: Path, frame: pd.DataFrame) -> None:
    """Writes `<stem>.svg`, `<stem>.png` (150 dpi) and the plotted data `<stem>.csv`, each atomically; closes the figure.

    No dates and no random ids are written: the same figure gives the same bytes.
    """
    stem = Path(stem)
    for ending, metadata in (("svg", {"Date": None, "Creator": None}), ("png", {"Software": None})):
        data = io.BytesIO()
        with matplotlib.rc_context(STYLE):
            figure.savefig(data, format=ending, metadata=metadata)
        write_bytes(stem.with_name(f"{stem.name}.{ending}"), data.getvalue())
    write_csv(frame, stem.with_name(f"{stem.name}.csv"))
    plt.close(figure)


def _panels(count: int, width: float = 4.6, height: float = 3.2, **options) -> tuple[Figure, list]:
    across = min(count, 3)  # more side by side would be too small to read on a page
    down = -(-count // across)
    with matplotlib.rc_context(STYLE):
        figure, axes = plt.subplots(down, across, figsize=(width * across, height * down), squeeze=False, **options)
    for axis in list(axes.flat)[count:]:
        axis.remove()
    return figure, list(axes.flat)[:count]


def look(names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """name -> (colour, marker), in the order given."""
    return {name: (COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]) for i, name in enumerate(names)}


def learning_curves(
    frame: pd.DataFrame, values: Sequence[str] = ("reward",), x: str = "step", titles: Sequence[str] = ()
) -> Figure:
    """One panel per metric: a thin line per seed, a bold mean per arm, a band from the lowest to the highest seed.

    frame: columns arm, seed, `x`, and `values`. Unknown values (NaN) leave gaps.
    """
    figure, axes = _panels(len(values))
    styles = look(list(dict.fromkeys(frame["arm"])))
    for axis, value, title in zip(axes, values, [*titles, *values[len(titles) :]], strict=True):
        for arm, (colour, marker) in styles.items():
            wide = frame[frame["arm"] == arm].pivot(index=x, columns="seed", values=value).astype(float)
            if wide.shape[1] > 1:
                axis.plot(wide.index, wide, color=colour, linewidth=0.7, alpha=0.6)
                axis.fill_between(wide.index, wide.min(axis=1), wide.max(axis=1), color=colour, alpha=0.12, linewidth=0)
            axis.plot(wide.index, wide.mean(axis=1), color=colour, marker=marker, markersize=5, linewidth=2, label=arm)
        axis.set(xlabel=x, title=title)
        axis.xaxis.get_major_locator().set_params(integer=True)
    axes[-1].legend(frameon=False)
    return figure


def pass_rates(frame: pd.DataFrame) -> Figure:
    """One panel per benchmark and metric: each arm's value with its 95 % interval; modes differ by marker.

    frame: a main table (tables.MAIN).
    """
    groups = list(frame.groupby(["benchmark", "metric"], sort=False))
    figure, axes = _panels(len(groups), height=max(3.2, 1.2 + 0.28 * frame["arm"].nunique()), sharey=True)
    arms, styles = list(dict.fromkeys(frame["arm"])), look(list(dict.fromkeys(frame["mode"])))
    for axis, ((benchmark, metric), part) in zip(axes, groups, strict=True):
        for shift, (mode, (colour, marker)) in enumerate(styles.items()):
            own = part[part["mode"] == mode]
            place = [arms.index(arm) + 0.18 * (shift - (len(styles) - 1) / 2) for arm in own["arm"]]
            error = np.maximum([own["value"] - own["ci_low"], own["ci_high"] - own["value"]], 0)
            axis.errorbar(own["value"], place, xerr=error, fmt=marker, color=colour, capsize=3, markersize=6, label=mode)
        axis.set(yticks=range(len(arms)), yticklabels=arms, xlim=(-0.02, 1.02), xlabel="share of problems solved")
        axis.set_title(f"{benchmark}, {metric}, n = {int(part['n'].max())}")
    axes[0].invert_yaxis()
    axes[-1].legend(frameon=False, loc="lower right")
    return figure


def paired_differences(frame: pd.DataFrame, label: str = "difference in the share of solved problems") -> Figure:
    """One line per comparison: the paired difference with its 95 % interval, and zero.

    frame: columns comparison, difference, ci_low, ci_high.
    """
    figure, (axis,) = _panels(1, width=6, height=0.9 + 0.4 * len(frame))
    place = np.arange(len(frame))
    error = np.maximum([frame["difference"] - frame["ci_low"], frame["ci_high"] - frame["difference"]], 0)
    axis.errorbar(frame["difference"], place, xerr=error, fmt=MARKERS[0], color=COLOURS[0], capsize=3, markersize=6)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set(yticks=place, yticklabels=frame["comparison"], xlabel=label, ylim=(len(frame) - 0.5, -0.5))
    return figure
