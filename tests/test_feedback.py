"""Reports of every kind -> feedback, and the tokens that an error concerns, on text as odd as models write it."""

import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from falconlib.errors import FalconError
from falconlib.feedback import error_token_mask, line_span, make_feedback
from falconlib.prompts import extract_program
from falconlib.records import INFRA_ERROR, ErrorInfo, Feedback, Report, Scores, TestResult

CODE = "def f(x):\n    y = x +\n    return y\n"
LOVED = Scores(2, 2, 2)


def results(*statuses, visible=1):
    return tuple(TestResult(i, i, status, visible=i < visible) for i, status in enumerate(statuses))


def at(line, type_="ValueError", status="runtime_error", **more):
    return Report(status, error=ErrorInfo(type_, "message", line=line, **more))


@pytest.mark.parametrize(
    "report, ratio",
    [
        (Report("pass", results("pass", "pass", "pass"), 3, loaded=True), 1.0),
        (Report("fail", results("pass", "fail", "pass"), 3, loaded=True), 0.5),
        (Report("fail", results("pass", "fail", "pass", visible=0), 3, loaded=True), 2 / 3),
        (Report("fail", results("pass", "fail", "fail", visible=3), 3, loaded=True), 1 / 3),  # all shown: all count
        (Report("fail", results("fail", "pass", "pass"), 3, loaded=True), 0.5),  # only a shown test fails: never a pass
        (Report("fail", results("fail", "pass"), 2, loaded=True), 0.0),
        (Report("timeout", results("pass", "pass", "timeout"), 5, loaded=True), 0.25),  # the others count as not passed
        (Report("runtime_error", (), 3, loaded=False), 0.0),
        (Report("syntax_error", (), None), 0.0),
        (Report("runtime_error", (), None, loaded=True), None),
        (Report(INFRA_ERROR, results("pass"), 3, loaded=True), None),
    ],
)
def test_pass_ratio(report, ratio):
    assert make_feedback(report, CODE).pass_ratio == ratio


@pytest.mark.parametrize(
    "report, ratio",
    [
        (Report("fail", results("pass", "fail", "fail", visible=2), 3, loaded=True), 0.5),
        (Report("pass", results("pass", "pass", visible=0), 2, loaded=True), None),
        (Report("syntax_error", (), None), None),
        (Report(INFRA_ERROR, results("pass"), 3, loaded=True), None),
    ],
)
def test_visible_ratio(report, ratio):
    assert make_feedback(report, CODE).visible_ratio == ratio


@pytest.mark.parametrize(
    "report, scope, lines, name",
    [
        (Report("pass", loaded=True), "ignore", None, ""),
        (Report("fail", loaded=True), "ignore", None, "fail"),
        (Report("fail", error=ErrorInfo("AssertionError", "no", line=2)), "ignore", None, "fail"),
        (at(2), "line", (2, 2), "ValueError"),
        (at(1, end_line=2), "line", (1, 2), "ValueError"),
        (at(2, end_line=99), "line", (2, 3), "ValueError"),
        (at(3, end_line=1), "line", (3, 3), "ValueError"),
        (at(None), "ignore", None, "ValueError"),
        (at(0), "ignore", None, "ValueError"),
        (at(4), "ignore", None, "ValueError"),
        (at(2, "RecursionError"), "global", None, "RecursionError"),
        (at(2, "MemoryError"), "line", (2, 2), "MemoryError"),  # raised by the program itself, not a limit
        (at(2, "TimeoutError", "timeout"), "global", None, "timeout"),
        (at(None, "MemoryError", "memory"), "global", None, "memory"),
        (Report("timeout"), "global", None, "timeout"),
        (Report("runtime_error"), "ignore", None, "runtime_error"),
        (Report(INFRA_ERROR, error=ErrorInfo("OSError", "x", line=1)), "ignore", None, INFRA_ERROR),
        (at(2, "SyntaxError", "syntax_error"), "line", (2, 2), "SyntaxError"),
        (at(2, "IndentationError", "syntax_error"), "line", (2, 2), "IndentationError"),
        (at(3, "SyntaxError", "syntax_error"), "global", None, "SyntaxError"),
        (at(4, "SyntaxError", "syntax_error"), "global", None, "SyntaxError"),  # the parser points behind the end
        (at(1, "SyntaxError", "syntax_error", truncated=True), "global", None, "SyntaxError"),
        (at(None, "SyntaxError", "syntax_error"), "ignore", None, "SyntaxError"),
    ],
)
def test_scope_lines_and_class(report, scope, lines, name):
    f = make_feedback(report, CODE)
    assert (f.scope, f.lines, f.error_class) == (scope, lines, name)


def test_message_text_decides_nothing():
    loud = ErrorInfo("ValueError", "RecursionError: timeout, SyntaxError: unexpected EOF, MemoryError", line=2)
    assert make_feedback(Report("runtime_error", error=loud), CODE).scope == "line"


def test_scores_count_only_for_programs_that_load():
    assert make_feedback(Report("fail", loaded=True), CODE, LOVED).scores == LOVED
    assert make_feedback(Report("runtime_error", loaded=False), CODE, LOVED).scores == Scores()


def test_number_of_tests_and_message():
    shown = TestResult(0, 0, "fail", visible=True, message="f(1) gave 2, not 3")
    hidden = TestResult(1, 1, "fail", message="secret")
    f = make_feedback(Report("fail", (shown, hidden), 5, loaded=True), CODE)
    assert (f.tests, f.message) == (5, shown.message)
    assert make_feedback(Report("fail", (hidden,), loaded=True), CODE).message == ""
    assert make_feedback(Report("fail", (shown, hidden), None), CODE).tests == 2
    assert make_feedback(at(2), CODE).message == "message"


def test_line_span():
    assert line_span("ab\ncd\n", 1, 1) == (0, 2)
    assert line_span("ab\ncd\n", 2, 2) == (3, 5)
    assert line_span("ab\r\ncd\rx", 1, 3) == (0, 8)
    assert line_span("ab\r\ncd", 2, 2) == (4, 6)
    assert line_span("a\n\nb", 2, 2) == (2, 2)
    assert line_span("a\x0c\u2028b\x1c\nc", 2, 2) == (6, 7)  # Python breaks lines at \n, \r\n and \r only
    for first, last in [(0, 1), (2, 1), (1, 3), (-1, -1)]:
        with pytest.raises(FalconError, match="of a text of 2 lines"):
            line_span("a\nb", first, last)


@given(st.text(st.sampled_from("ab \té漢\n\r\x0c\u2028"), max_size=40))
def test_lines_agree_with_python(code):
    """Joined spans and breaks give the text back; the count is that of Python's own universal newlines."""
    count = len(re.sub("\r\n|\r", "\n", code).split("\n"))
    spans = [line_span(code, i, i) for i in range(1, count + 1)]
    assert spans[0][0] == 0 and spans[-1][1] == len(code)
    assert all(code[a:b] in ("\n", "\r", "\r\n") for (_, a), (b, _) in itertools.pairwise(spans))
    with pytest.raises(FalconError):
        line_span(code, 1, count + 1)


def words(text):
    """Offsets of a toy tokenizer: blanks stick to the next word, as in byte-level BPE; the last token is an empty eos."""
    return [m.span() for m in re.finditer(r"\s*\S+|\s+", text)] + [(len(text), len(text))]


def marked(completion, code, lines, cap=1.0):
    offsets = words(completion)
    mask = error_token_mask(offsets, completion, code, Feedback("runtime_error", 0.0, 1, scope="line", lines=lines), cap)
    assert len(mask) == len(offsets)
    return [completion[a:b] for (a, b), m in zip(offsets, mask, strict=True) if m]


def test_mask_covers_the_line():
    assert marked(CODE, CODE, (2, 2)) == ["\n    y", " =", " x", " +"]
    assert marked(CODE, CODE, (1, 2)) == ["def", " f(x):", "\n    y", " =", " x", " +"]
    assert marked(CODE, CODE, (1, 1)) == ["def", " f(x):"]


SECOND = ["    y", " =", " x", " +"]
HEADER = 'from math import *\n\ndef f(x):\n    """Two\n    lines."""'


@pytest.mark.parametrize(
    "completion, prefix, line, expected",
    [
        (f"Sure:\n```python\n{CODE}```\nDone.", "", 2, ["\n" + SECOND[0], *SECOND[1:]]),
        (f"\n\n\n{CODE}\n\n```", "", 2, ["\n" + SECOND[0], *SECOND[1:]]),
        (CODE.rstrip() + "```", "", 3, ["\n    return", " y```"]),
        (CODE.replace("\n", "\r\n"), "", 2, ["\r\n    y", " =", " x", " +"]),
        ("\n    y = x +\n    return y\n```", HEADER, 6, ["\n    y", " =", " x", " +"]),  # goes on behind the docstring
        ("\n\ty = x +\n\treturn y\n```", HEADER, 6, ["\n\ty", " =", " x", " +"]),  # tabs beside a prefix are expanded
        (CODE, HEADER, 4, ["\n    y", " =", " x", " +"]),  # repeats the header: line 4 of the program
        (CODE, HEADER, 1, []),  # an error in what the prompt gave
        ("\n    return y\n", HEADER, 4, []),
    ],
)
def test_mask_finds_what_extraction_took(completion, prefix, line, expected):
    assert marked(completion, extract_program(completion, prefix), (line, line)) == expected


def test_mask_finds_a_completion_that_goes_on_in_the_prompts_last_line():
    assert marked(" + x\n    return y\n", "def f(x):\n    y = 1 + x\n    return y", (2, 2)) == [" +", " x"]
    assert marked(" x + z", "def f(x): return x + z", (1, 1)) == [" x", " +", " z"]


def test_a_program_that_is_not_in_the_completion_marks_nothing():
    assert marked("something else", CODE, (2, 2)) == []


@pytest.mark.parametrize(
    "code, lines, expected",
    [
        ("def f():\r\n\treturn é漢😀 + 1\r\n", (2, 2), ["\r\n\treturn", " é漢😀", " +", " 1"]),
        ("a = 1\n\n\nb\n", (4, 4), ["\n\n\nb"]),
        ("a = 1\n\nb\n", (2, 2), []),  # nothing stands on an empty line
        ("a\x0c = 1\nb", (1, 1), ["a", "\x0c =", " 1"]),
        ("x = " + "1 + " * 2000 + "1", (1, 1), ["x", " ="] + [" 1", " +"] * 2000 + [" 1"]),
    ],
)
def test_mask_on_odd_text(code, lines, expected):
    assert marked(code, code, lines) == expected


def test_mask_is_capped_and_keeps_the_first_tokens():
    code = "x = " + "1 + " * 20 + "1"
    assert marked(code, code, (1, 1), cap=0.3) == (["x", " ="] + [" 1", " +"] * 20)[:13]
    assert marked("a b", "a b", (1, 1), cap=0.3) == []
    assert marked(code, code, (1, 1), cap=0.0) == []


@given(st.integers(0, 60), st.floats(0, 1), st.integers(1, 3), st.integers(0, 2))
def test_mask_never_exceeds_the_cap(count, cap, first, more):
    code = "a b c d\n" * 5
    f = Feedback("runtime_error", 0.0, 1, scope="line", lines=(first, first + more))
    mask = error_token_mask(words(code)[:count], code, code, f, cap)
    assert set(mask) <= {0, 1} and sum(mask) <= cap * len(mask)


def test_global_marks_all_and_ignore_none():
    offsets = words(CODE)
    assert error_token_mask(offsets, CODE, CODE, Feedback("timeout", 0.0, 1, scope="global"), 0.3) == (1,) * len(offsets)
    assert error_token_mask(offsets, CODE, CODE, Feedback("fail", 0.0, 1), 0.3) == (0,) * len(offsets)
    assert error_token_mask([], "", "", Feedback("timeout", 0.0, 1, scope="global"), 0.3) == ()


def test_whether_a_program_loaded_is_told():
    for loaded in (True, False):
        assert make_feedback(Report("runtime_error", loaded=loaded), CODE).loaded is loaded
