"""The drawing of the method and the tables of programs: nothing overlaps, nothing is lost, nothing is invented."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from falconlib.memory import LongTermMemory, get_embedder
from falconlib.records import Episode, Feedback, Reward, Task
from falconlib.reporting.overview import HERE, PARTS, overview, where_we_are
from falconlib.reporting.programs import biographies, side_by_side, verdict


@pytest.mark.parametrize("number", sorted(HERE))
def test_each_notebook_fills_its_parts_and_no_other(number):
    figure = overview(number)
    filled = [name for name, patch in zip(PARTS, figure.axes[0].patches, strict=True) if sum(patch.get_facecolor()[:3]) < 1]
    assert filled == [name for name in PARTS if name in HERE[number]] and filled
    assert set(HERE[number]) <= set(PARTS)


def test_the_words_of_the_overview_neither_overlap_nor_leave_their_boxes():
    figure = overview("00")
    figure.canvas.draw()
    axis = figure.axes[0]
    words = [(text.get_text(), text.get_window_extent()) for text in axis.texts if text.get_text()]
    for (one, a), (two, b) in itertools.combinations(words, 2):
        assert not a.overlaps(b), f"{one!r} lies on {two!r}"
    boxes = [patch.get_window_extent() for patch in axis.patches]
    for one, a in words:
        for box in (box for box in boxes if box.overlaps(a)):
            inside = box.x0 <= a.x0 and a.x1 <= box.x1 and box.y0 <= a.y0 and a.y1 <= box.y1
            assert inside, f"{one!r} crosses the edge of a box"
        assert figure.bbox.x0 <= a.x0 and a.x1 <= figure.bbox.x1 and figure.bbox.y0 <= a.y0 and a.y1 <= figure.bbox.y1, one


def test_the_overview_can_be_read_in_greyscale_and_says_what_is_filled():
    figure = overview("05")
    grey = {patch.get_facecolor(): np.dot(patch.get_facecolor()[:3], (0.299, 0.587, 0.114)) for patch in figure.axes[0].patches}
    assert max(grey.values()) - min(grey.values()) > 0.6
    lines = {(line.get_color(), str(line.get_linestyle()), line.get_linewidth()) for line in figure.axes[0].lines}
    assert len({style[1:] for style in lines}) == len(lines) == 4  # each kind of arrow differs without its colour
    picture = where_we_are("05_short_term_memory_and_inner_loop")
    assert picture.metadata["alt"].endswith("Filled, for this notebook: short-term memory, inner step, outer step.")
    assert picture.data == where_we_are("05").data and picture.data.startswith(b"\x89PNG")


def test_programs_side_by_side_are_shown_as_text():
    page = side_by_side("x & y", [("✓ pass", "return a < b\n"), ("✗ fail", "x" * 700)])
    assert (
        "a &lt; b" in page and "<b>✓ pass</b>" in page and page.count("<td") == 2 and "x" * 600 in page and "x" * 601 not in page
    )


@pytest.mark.parametrize(
    ("status", "error", "text"),
    [("pass", "", "✓ pass"), ("fail", "fail", "✗ fail"), ("runtime_error", "NameError", "✗ runtime_error (NameError)"),
     ("infra_error", "", "? infra_error"), (None, "", "? unknown")],
)  # fmt: skip
def test_a_verdict_has_its_mark(status, error, text):
    assert verdict(status, error) == text


def test_a_biography_tells_what_is_known_and_no_more(tmp_path):
    given = "def f(x):\n    return x\n"
    tasks = [Task(f"toy/{n}", "toy", "train", f"Return {n}.", "f", ("assert f(1) == 1",), gold=given) for n in ("one", "two")]

    def episode(step, rollout, code, feedback, total, group="support", **more):
        return Episode(
            "toy/one", step, rollout, group, "", "", code, feedback=feedback, reward=Reward(total, total=total), **more
        )

    wrong = Feedback("runtime_error", 0.0, 1, error_class="NameError")
    first = episode(1, 0, "y = z", wrong, -0.6, memory_text="text", neighbours=("toy/two",))
    query = episode(1, 1, "z = y", wrong, -0.5, group="query")
    twin = episode(2, 0, given, Feedback("pass", 1.0, 1), 1.1)
    with LongTermMemory(tmp_path / "memory.sqlite", get_embedder("hashed")) as memory:
        memory.add_tasks(tasks)
        memory.add_golds(tasks)
        memory.add_episodes([first, query, twin, episode(4, 0, "v = 1", wrong, -0.4)])
        lives = biographies(memory, [first, twin, episode(3, 0, "w = 1", None, 0.0)], support=1)
    assert list(lives) == ["toy/one"]  # nobody tried the other
    told = lives["toy/one"].astype(object).where(lives["toy/one"].notna(), None).to_dict("records")
    assert [(r["step"], r["half"], r["prompt"], r["R"], r["in memory"]) for r in told] == [
        (None, "given", "", None, "gold x 2"),
        (1, "support", "shows toy/two", -0.6, "own x 1"),
        (1, "query", "plain", -0.5, "own x 1"),
        (2, "support", "plain", 1.1, "gold x 2"),
        (4, "support", "", -0.4, "own x 1"),  # whether it saw memory text is known of those in short-term memory alone
    ]
    assert [r["verdict"] for r in told if r["R"] != 1.1] == ["✓ pass", *["✗ runtime_error (NameError)"] * 3]
