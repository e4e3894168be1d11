"""The method as one drawing: its parts, what flows between them, and which notebook treats which part.

`overview("05...")` is the picture at the top of notebook 05, with its parts filled. Two loops, two memories; each kind of
arrow has its own line style besides its colour, so that the drawing can be read in greyscale.
"""

from __future__ import annotations

import io
from typing import Any

import matplotlib.pyplot as plt
from IPython.display import Image
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from falconlib.reporting.figures import COLOURS, STYLE

# part: left, bottom, width, height (on a field of 100 x 58), title, text, the notebooks that treat it
PARTS: dict[str, tuple[float, float, float, float, str, str, str]] = {
    "tasks": (1, 27, 15, 13, "Tasks", "description,\nshown and\nhidden tests", "01"),
    "long-term memory": (23, 47.5, 56, 10, "Long-term memory", "solved programs and frequent errors of the training tasks", "04"),
    "policy": (23, 27, 16, 13, "Policy", "model + LoRA\n$\\theta + \\delta_x$", "06"),
    "sandbox": (49, 35, 15, 9.5, "Sandbox", "runs the tests", "02"),
    "judge": (49, 22.5, 15, 9.5, "Judge", "reads the code", "03 09"),
    "feedback": (71, 22.5, 13, 22, "Feedback", "tests passed\nerror line\nstyle\ncomplexity\ninstruction\nknown error", "03"),
    "reward": (89, 27, 10, 13, "Reward", "$R_i$,\n$A_{it}$", "03"),
    "short-term memory": (64, 11, 20, 9, "Short-term memory", "last tries at this task", "05"),
    "inner step": (34, 11, 20, 9, "Inner step", r"$\delta_x = -\alpha\,g_x/\Vert g_x\Vert$", "05"),
    "outer step": (34, 0.5, 50, 7.5, "Outer step", r"$\nabla_\theta L_{outer}$, all tasks, both halves", "05 06"),
    "evaluation": (1, 5, 17, 13, "Evaluation", "held-out tasks,\npass@k, style,\nablations", "07 to 10"),
}
HERE = {  # what a notebook fills, by its number
    **dict.fromkeys(("00", "06"), tuple(PARTS)[:-1]),
    **{"01": ("tasks",), "02": ("sandbox",), "03": ("judge", "feedback", "reward"), "04": ("long-term memory",)},
    **{"05": ("short-term memory", "inner step", "outer step"), "07": ("evaluation",), "09": ("judge", "evaluation")},
    **{"08": ("long-term memory", "short-term memory", "inner step", "judge", "evaluation"), "10": ("evaluation",)},
}
DATA, INNER, OUTER, MEMORY = ("0.25", "-", 1.3), (COLOURS[1], (0, (4, 2)), 2.0), (COLOURS[0], "-", 2.6), (COLOURS[2], ":", 2.0)
# points of each arrow, its kind, its label and where that stands
ARROWS: list[tuple[list[tuple[float, float]], tuple[Any, Any, float], str, tuple[float, float]]] = [
    ([(16, 33.5), (23, 33.5)], DATA, "prompt", (19.4, 35)),
    ([(39, 36), (49, 38.5)], DATA, "", (0, 0)),
    ([(39, 31), (49, 28.5)], DATA, "programs", (42.4, 33.4)),
    ([(64, 39.5), (71, 39.5)], DATA, "report", (67.5, 41)),
    ([(64, 27), (71, 27)], DATA, "grades", (67.5, 28.5)),
    ([(84, 33.5), (89, 33.5)], DATA, "", (0, 0)),
    ([(26, 27), (26, 14), (18, 14)], DATA, "", (0, 0)),
    ([(31, 47.5), (31, 40)], MEMORY, "recall", (28, 43.6)),
    ([(94, 40), (94, 52.5), (79, 52.5)], MEMORY, "remember", (88, 54)),
    ([(75, 47.5), (75, 44.5)], MEMORY, "known errors", (82, 45.8)),
    ([(92.5, 27), (92.5, 15.5), (84, 15.5)], INNER, "", (0, 0)),
    ([(64, 15.5), (54, 15.5)], INNER, "inner loop", (59, 17)),
    ([(37, 20), (37, 27)], INNER, "$\\delta_x$", (35.2, 23.5)),
    ([(46.4, 47.5), (46.4, 20)], MEMORY, "neighbours'\nprograms", (42, 23.6)),
    ([(96, 27), (96, 4.2), (84, 4.2)], OUTER, "outer loop", (90, 5.7)),
    ([(34, 4.2), (30, 4.2), (30, 27)], OUTER, "$\\theta$", (31.6, 23.5)),
]


def overview(notebook: str) -> Figure:
    """The drawing with the parts of this notebook (its name or number) filled. Raises KeyError for a notebook without any."""
    with plt.rc_context(STYLE | {"axes.grid": False}):
        figure, axis = plt.subplots(figsize=(10, 5.6))
    axis.set(xlim=(0, 100), ylim=(-0.5, 58.5))
    axis.axis("off")
    for points, (colour, style, width), label, place in ARROWS:
        axis.plot(*zip(*points, strict=True), color=colour, linestyle=style, linewidth=width, zorder=1)
        tip = {"arrowstyle": "-|>", "color": colour, "linewidth": 0, "mutation_scale": 11 + 2 * width, "shrinkA": 0, "shrinkB": 0}
        axis.annotate("", points[-1], points[-2], arrowprops=tip, zorder=2)
        axis.text(*place, label, ha="center", va="center", fontsize=8.5, style="italic", color=colour, zorder=3)
    for name, (left, bottom, width, height, title, text, numbers) in PARTS.items():
        face, ink = ("#123A5C", "white") if name in HERE[notebook[:2]] else ("#F4F4F4", "0.15")
        box = FancyBboxPatch((left, bottom), width, height, boxstyle="round,pad=0,rounding_size=1", zorder=4)
        box.set(facecolor=face, edgecolor="0.15", linewidth=1.2)
        axis.add_patch(box)
        axis.text(left + 0.9, bottom + height - 2.2, title, fontsize=10, weight="bold", color=ink, va="center", zorder=5)
        axis.text(left + 0.9, bottom + height - 4.2, text, fontsize=8.5, color=ink, va="top", zorder=5)
        axis.text(left + width - 0.6, bottom + 1.5, numbers, fontsize=7.5, color=ink, ha="right", va="center", zorder=5)
    return figure


def where_we_are(notebook: str) -> Image:
    """The drawing for display at the top of a notebook, with its alt text."""
    figure, data = overview(notebook), io.BytesIO()
    figure.savefig(data, format="png", dpi=110, metadata={"Software": None})
    plt.close(figure)
    alt = "The method: tasks, policy, sandbox and judge, feedback, reward; long-term memory above; below, the inner loop over "
    alt += "short-term memory and inner step, and the outer loop; evaluation. Filled, for this notebook: "
    alt += f"{', '.join(name for name in PARTS if name in HERE[notebook[:2]])}."
    return Image(data=data.getvalue(), metadata={"alt": alt}, width=900)
