"""Figures from tables: learning curves, pass rates with intervals, paired differences.

Each function takes a DataFrame and returns a matplotlib Figure; `save` writes it as SVG and PNG with its data as CSV, the
same bytes each time. Colours are Okabe and Ito's, and every series has its marker too (a curve its dashes), so that
greyscale can be read.
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
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)), (0, (2, 1)), (0, (9, 3)), (0, (3, 4)), "-")
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


def _percent(share: float, _: int) -> str:
    return f"{100 * share:.3g}%"  # 2.5% is neither 2% nor 3%


def look(names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """name -> (colour, marker), in the order given."""
    return {name: (COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]) for i, name in enumerate(names)}


def learning_curves(
    frame: pd.DataFrame, values: Sequence[str] = ("reward",), x: str = "step", titles: Sequence[str] = ()
) -> Figure:
    """One panel per metric: a bold mean per arm, and a band from the lowest to the highest seed.

    Each arm has its dashes over the wider ones of the arms before it, and stands a little beside them: equal ones stay visible.
    frame: columns arm, seed, `x`, and `values`. Unknown values (NaN) leave gaps.
    """
    figure, axes = _panels(len(values))
    styles, places = look(list(dict.fromkeys(frame["arm"]))), np.unique(frame[x])
    apart = min(0.008 * np.ptp(places), 0.06 * np.diff(places).min(initial=1))
    every = max(1, len(places) // 6)  # a marker on each step would hide the lines of a longer run
    for axis, value, title in zip(axes, values, [*titles, *values[len(titles) :]], strict=True):
        for i, (arm, (colour, marker)) in enumerate(styles.items()):
            wide = frame[frame["arm"] == arm].pivot(index=x, columns="seed", values=value).astype(float)
            place = wide.index + apart * (i - (len(styles) - 1) / 2)
            if wide.shape[1] > 1:
                axis.fill_between(place, wide.min(axis=1), wide.max(axis=1), color=colour, alpha=0.07, linewidth=0)
            look_of = {"marker": marker, "markerfacecolor": "white" if i % 2 else colour, "markevery": (i % every, every)}
            width = max(1.2, 2.8 - 0.35 * i)
            axis.plot(place, wide.mean(axis=1), color=colour, linestyle=DASHES[i % 8], linewidth=width, label=arm, **look_of)
        axis.set(xlabel=x, title=title)
        axis.xaxis.get_major_locator().set_params(integer=x == "step")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=min(8, len(styles)), frameon=False)
    return figure


def pass_rates(frame: pd.DataFrame) -> Figure:
    """One panel per benchmark and metric, one line per arm and mode: its value with its 95 % interval; modes differ by marker.

    frame: a main table (tables.MAIN). A line of fewer seeds or problems than the others says how many.
    """
    names = frame["arm"] + (" " + frame["mode"]).where(frame["mode"] != "zero-shot", "")
    most = frame["seeds"].max()
    names += (", " + frame["seeds"].astype(str) + f" of {most} seeds").where(frame["seeds"] < most, "")
    fewer = frame["n"] < 0.9 * frame.groupby("benchmark")["n"].transform("max")  # more than a few without a verdict
    names += (", n = " + frame["n"].astype(str)).where(fewer, "")
    groups, lines = list(frame.assign(name=names).groupby(["benchmark", "metric"], sort=False)), list(dict.fromkeys(names))
    figure, axes = _panels(len(groups), height=1.6 + 0.24 * len(lines), sharey=True)
    styles = look(list(dict.fromkeys(frame["mode"])))
    for axis, ((benchmark, metric), part) in zip(axes, groups, strict=True):
        for mode, (colour, marker) in styles.items():
            own = part[part["mode"] == mode]
            error = np.maximum([own["value"] - own["ci_low"], own["ci_high"] - own["value"]], 0)
            place = [lines.index(name) for name in own["name"]]
            axis.errorbar(own["value"], place, xerr=error, fmt=marker, color=colour, capsize=3, markersize=6, label=mode)
        top = min(1.02, 1.1 * frame["ci_high"].max())
        axis.set(yticks=range(len(lines)), yticklabels=lines, xlim=(-0.03 * top, top), xlabel="problems solved")
        axis.xaxis.set_major_formatter(_percent)
        axis.locator_params(axis="x", nbins=6)
        axis.set_title(f"{benchmark}, {metric}, n = {int(part['n'].max())}")
    axes[0].invert_yaxis()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(styles), frameon=False)
    return figure


def rates_against(frame: pd.DataFrame, x: str, label: str, apart: float = 0.0) -> Figure:
    """One panel per benchmark: each arm's share of solved problems over the column `x`, with its 95 % interval.

    Several rows of an arm are joined by its dashes. frame: columns benchmark, arm, `x`, value, ci_low, ci_high, n; a row whose
    `x` is unknown (NaN) has no place and is left out. apart: how far equal places of two arms stand beside each other.
    """
    groups, styles = list(frame.groupby("benchmark", sort=False)), look(list(dict.fromkeys(frame["arm"])))
    figure, axes = _panels(len(groups), width=6, height=4.2, sharey=True)
    for axis, (benchmark, part) in zip(axes, groups, strict=True):
        for i, (arm, (colour, marker)) in enumerate(styles.items()):
            own = part[(part["arm"] == arm) & part[x].notna()]
            error = np.maximum([own["value"] - own["ci_low"], own["ci_high"] - own["value"]], 0)
            place = own[x] + apart * (i - (len(styles) - 1) / 2)
            lines = {"linestyle": DASHES[i % 8] if len(own) > 1 else "none", "elinewidth": 1, "capsize": 3, "markersize": 6}
            axis.errorbar(place, own["value"], yerr=error, fmt=marker, color=colour, label=arm, **lines)
        axis.set(xlabel=label, title=f"{benchmark}, n = {int(part['n'].max())}")
        axis.xaxis.set_major_formatter("{x:,.0f}")
        axis.yaxis.set_major_formatter(_percent)
    axes[0].set_ylabel("problems solved")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(styles), frameon=False)
    return figure


def paired_differences(frame: pd.DataFrame, label: str = "difference in percentage points", unit: float = 100) -> Figure:
    """One line per comparison: the paired difference, times `unit`, with its 95 % interval, and zero.

    frame: columns comparison, difference, ci_low, ci_high.
    """
    frame = frame.assign(**unit * frame[["difference", "ci_low", "ci_high"]])
    figure, (axis,) = _panels(1, width=6, height=0.9 + 0.3 * len(frame))
    place = np.arange(len(frame))
    error = np.maximum([frame["difference"] - frame["ci_low"], frame["ci_high"] - frame["difference"]], 0)
    axis.errorbar(frame["difference"], place, xerr=error, fmt=MARKERS[0], color=COLOURS[0], capsize=3, markersize=6)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set(yticks=place, yticklabels=frame["comparison"], xlabel=label, ylim=(len(frame) - 0.5, -0.5))
    return figure
