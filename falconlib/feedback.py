"""Report and judge scores -> Feedback, and the tokens that an error concerns (METHOD section 3). Pure functions.

An error's scope is decided by exception class and line number, never by message text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from falconlib.errors import FalconError
from falconlib.prompts import FENCE
from falconlib.records import INFRA_ERROR, Feedback, Report, Scores

LINE_BREAK = re.compile(r"\r\n|\r|\n")  # what Python counts as a line break; str.splitlines knows more of them
NO_SCORES = Scores()


def make_feedback(report: Report, code: str, scores: Scores = NO_SCORES) -> Feedback:
    """What the run of `code` and its judge said, ready for the reward equations.

    The judge's scores are dropped (None) when the program did not load, so that every later stage may use what it finds.
    """
    scope, lines = error_scope(report, code)
    shown = next((t.message for t in report.tests if t.visible and t.status != "pass" and t.message), "")
    return Feedback(
        status=report.status,
        pass_ratio=pass_ratio(report),
        tests=len(report.tests) if report.tests_expected is None else max(report.tests_expected, len(report.tests)),
        error_class=error_class(report),
        scope=scope,
        lines=lines,
        message=report.error.message if report.error else shown or "",
        scores=scores if report.loaded else Scores(),
        visible_ratio=visible_ratio(report),
        loaded=report.loaded,
    )


def pass_ratio(report: Report) -> float | None:
    """rho: share of passed tests among those the prompt did not show, among all when it showed all; None when unknown.

    Tests that should have run and did not count as not passed. A program whose status is not "pass" has failed at least
    one: when all its failures are visible tests, one hidden test is counted as failed, so that it never scores as a pass.
    """
    if report.status == INFRA_ERROR:
        return None
    expected = len(report.tests) if report.tests_expected is None else max(report.tests_expected, len(report.tests))
    visible = sum(t.visible for t in report.tests)
    hidden = expected - visible
    passed = sum(t.status == "pass" and (hidden == 0 or not t.visible) for t in report.tests)
    if expected == 0:
        return 0.0 if not report.loaded else None
    total = hidden or expected
    return (passed if report.status == "pass" else min(passed, total - 1)) / total


def visible_ratio(report: Report) -> float | None:
    """Share of passed tests among those that ran and that the prompt showed; None when there are none or no verdict."""
    shown = [t.status == "pass" for t in report.tests if t.visible]
    return sum(shown) / len(shown) if shown and report.status != INFRA_ERROR else None


def error_class(report: Report) -> str:
    """Exception class for errors inside the program, else the status; "" for a pass.

    A time-out or memory kill keeps its status as the class, whatever the program itself raised.
    """
    if report.status == "pass":
        return ""
    if report.status in ("runtime_error", "syntax_error") and report.error:
        return report.error.type
    return report.status


def error_scope(report: Report, code: str) -> tuple[str, tuple[int, int] | None]:
    """Scope and lines (first, last; 1-based) of the error: ("global", None), ("line", (a, b)) or ("ignore", None).

    global: time-out, memory, RecursionError, SyntaxError on the last line or of a truncated program. line: any other
    located error of the program. ignore: failed assertions, passes, no location.
    """
    error = report.error
    if report.status in ("timeout", "memory"):
        return "global", None
    if report.status not in ("runtime_error", "syntax_error") or error is None:
        return "ignore", None
    count = len(LINE_BREAK.split(code.rstrip()))
    at_end = report.status == "syntax_error" and (error.truncated or (error.line or 0) >= count)
    if error.type == "RecursionError" or at_end:
        return "global", None
    if error.line is None or not 1 <= error.line <= count:
        return "ignore", None
    return "line", (error.line, min(max(error.line, error.end_line or 0), count))


def line_span(code: str, first: int, last: int) -> tuple[int, int]:
    """Character positions [start, end) of the lines `first`..`last` (1-based, inclusive), without the last line break.

    Raises FalconError when there are no such lines.
    """
    breaks = [m.span() for m in LINE_BREAK.finditer(code)]
    starts, ends = [0, *(end for _, end in breaks)], [*(start for start, _ in breaks), len(code)]
    if not 1 <= first <= last <= len(starts):
        raise FalconError(f"lines {first}..{last} of a text of {len(starts)} lines", "lines count from 1, the first comes first")
    return starts[first - 1], ends[last - 1]


def error_token_mask(
    offsets: Sequence[tuple[int, int]], completion: str, code: str, feedback: Feedback, cap: float
) -> tuple[int, ...]:
    """m_it: one 0/1 per token of the completion, 1 where the error-line term applies.

    offsets: [start, end) characters of each token in `completion` (start == end for tokens without text, such as eos).
    code: the whole program, for completion tasks with the part that stands in the prompt; the report's lines are its
    lines, and the ones in the prompt mark nothing. cap: at most this share of the tokens is marked, the first of the
    line being kept (METHOD: 30 %), unless the scope is global: then every token is.
    """
    if feedback.scope == "global":
        return (1,) * len(offsets)
    shift = line_shift(completion, code) if feedback.scope == "line" and feedback.lines else None
    first, last = (1, 0) if shift is None or feedback.lines is None else (line - shift for line in feedback.lines)
    if last < 1:  # no place, or one in the prompt
        return (0,) * len(offsets)
    start, end = line_span(completion, max(first, 1), last)
    mask, left = [], int(cap * len(offsets))
    for a, b in offsets:
        mask.append(int(left > 0 and max(a, start) < min(b, end)))
        left -= mask[-1]
    return tuple(mask)


def line_shift(completion: str, code: str) -> int | None:
    """Line number in `code` minus line number in `completion` of the program's text; None when it is not found there.

    The program's last lines are looked for in the completion, indentation aside, since extraction may expand tabs, cut
    blank lines and fences, or drop a repeated header. The place where most lines agree, counted backwards, is taken, the
    first of equals.
    """
    ours = [line.strip() for line in LINE_BREAK.split(code.rstrip())]
    theirs = [line.split(FENCE)[0].strip() for line in LINE_BREAK.split(completion)]
    best, shift = 0, None
    for end in range(len(theirs)):
        run = 0
        for mine, there in zip(reversed(ours), reversed(theirs[: end + 1]), strict=False):
            if mine != there:
                break
            run += 1
        if run == end < len(ours):  # the completion's first line may continue the prompt's last one
            run += bool(theirs[0]) and ours[-1 - end].endswith(theirs[0])
        if run > best:
            best, shift = run, len(ours) - 1 - end
    return shift
