"""The records that travel between the stages: Task, Program, Report, Feedback, Episode. Frozen, plain, JSON in and out.

They hold no tensors and no behaviour. A field that is not known is None, never zero.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec

from falconlib.errors import FalconError

T = TypeVar("T")

STATUSES = ("pass", "fail", "runtime_error", "syntax_error", "timeout", "memory")  # a verdict on the program
INFRA_ERROR = "infra_error"  # the harness broke: no verdict, no reward


@dataclass(frozen=True)
class Task:
    """One programming problem.

    task_id: unique name, `<dataset>/<number>`, as the data set spells it.
    dataset: name of the task set ("basics", "humaneval", "mbpp", ...).
    split: "train", "validation" or "test"; memory holds "train" only.
    prompt: the description in words (kind "text"), or the code to be continued (kind "completion").
    kind: "text": the model writes a whole program; "completion": the program is `prompt` + completion.
    entry_point: the function that the tests call; None for programs that read standard input.
    tests: test source, one snippet per item: an assert, or a whole `def check(candidate)` with its call.
        For mode "stdio" each item is a JSON object {"input": text, "output": text}.
    visible: how many of the leading `tests` the prompt shows (0: all hidden).
    setup: trusted source that runs on the judge's side before the tests (helpers, imports).
    gold: a reference program, or None.
    family: meta-task that the problem belongs to ("" when the set has none).
    mode: "assert" or "stdio".
    """

    task_id: str
    dataset: str
    split: str
    prompt: str
    entry_point: str | None
    tests: tuple[str, ...]
    visible: int = 0
    setup: str = ""
    gold: str | None = None
    family: str = ""
    kind: str = "text"
    mode: str = "assert"


@dataclass(frozen=True)
class Program:
    """What the sandbox takes: one candidate and the tests that decide about it (fields as in Task).

    gold: runs where loops decide how many asserts there are, and where a program times out, so that no program gets away with
    fewer asserts than it, and limits fit the task. None: nothing is compared.
    """

    code: str
    tests: tuple[str, ...]
    entry_point: str | None = None
    visible: int = 0
    setup: str = ""
    mode: str = "assert"
    gold: str | None = None


@dataclass(frozen=True)
class TestResult:
    """One executed assertion. `snippet` is the index into Program.tests, `visible` whether the prompt showed it.

    status: one of STATUSES. expected, got: short texts for people, None when the test is no comparison. message: cut text.
    """

    __test__ = False  # not a pytest class

    index: int
    snippet: int
    status: str
    visible: bool = False
    error_type: str | None = None
    message: str | None = None
    line: int | None = None
    expected: str | None = None
    got: str | None = None


@dataclass(frozen=True)
class ErrorInfo:
    """Where a program broke. Lines are 1-based lines of the program's own source; None when there is no such place.

    truncated: for a syntax error, True when the source ends before the statement does.
    """

    type: str
    message: str
    line: int | None = None
    end_line: int | None = None
    text: str | None = None
    function: str | None = None
    traceback: tuple[tuple[str, int], ...] = ()
    truncated: bool = False


@dataclass(frozen=True)
class Report:
    """The sandbox's verdict on one Program.

    status: one of STATUSES, or INFRA_ERROR when the harness itself broke (then nothing may be learnt from it).
    tests: one TestResult per executed assertion; tests_expected: how many there should be (None when not known); runs: where
    that is so, (assert in the source, questions that led to it, how often it ran).
    integrity: "value" (expected values never met the program) or "in_process" (they did; a program could cheat).
    loaded: whether the module body ran to its end.
    cpu_s, wall_s, peak_mb: cost; None when not measured. layers: id of the sandbox layers that were active.
    """

    status: str
    tests: tuple[TestResult, ...] = ()
    tests_expected: int | None = None
    error: ErrorInfo | None = None
    loaded: bool = False
    integrity: str = "value"
    inout: bool = False
    candidate_eq: bool = False
    signal: int | None = None
    stdout: str = ""
    stderr: str = ""
    truncated: bool = False
    cpu_s: float | None = None
    wall_s: float | None = None
    peak_mb: float | None = None
    layers: str = ""
    runs: tuple[tuple[int, int, int], ...] = ()


@dataclass(frozen=True)
class Scores:
    """AI feedback on the paper's scale: integers in {-1, 0, 1, 2}, or None when the judge gave no usable answer."""

    style: int | None = None
    complexity: int | None = None
    instruction: int | None = None


@dataclass(frozen=True)
class Feedback:
    """What a program's run and its judge said, ready for the reward equations.

    status: one of STATUSES, or INFRA_ERROR. pass_ratio: share of passed tests among those that the prompt did not show
    (among all when it showed all), None when unknown. visible_ratio: of those that it showed, None when it showed none; no
    reward uses it. tests: number of assertions. error_class: exception class or status, "" for a pass. scope: which tokens
    the error concerns: "global", "line" or "ignore" (METHOD section 3). lines: first and last 1-based line of the program
    that the error concerns, None unless scope is "line". loaded: whether the program could be run at all (see Report).
    """

    status: str
    pass_ratio: float | None
    tests: int
    error_class: str = ""
    scope: str = "ignore"
    lines: tuple[int, int] | None = None
    message: str = ""
    scores: Scores = Scores()
    visible_ratio: float | None = None
    loaded: bool = True


@dataclass(frozen=True)
class Reward:
    """The components of one program's reward, None where the component does not apply, and their weighted sum.

    unit: R_unit in [-1, 1]. style, complexity, instruction: R_k in [-1, 1]. long_term: R_lt in {-1, 0}.
    total: R_i = unit + sum of weight * component; None when unit is None.
    """

    unit: float | None
    style: float | None = None
    complexity: float | None = None
    instruction: float | None = None
    long_term: float | None = None
    total: float | None = None


@dataclass(frozen=True)
class Episode:
    """One rollout: e = (x, c, y, o) of the method, with what training needs to score it again.

    prompt: the rendered prompt text; memory_text: the recalled part of it ("" for a plain prompt); neighbours: task ids
    it came from. completion: generated text; tokens: its token ids (with the closing eos when it was sampled);
    logprobs: their log-probabilities under the sampling policy at the sampling temperature, same length as tokens.
    prefix: text that `code` has before the completion (completion tasks). code: the extracted program.
    error_mask: one 0/1 per token, 1 where the error-line term applies. group: half-group, "support" or "query".
    """

    task_id: str
    step: int
    rollout: int
    group: str
    prompt: str
    completion: str
    code: str
    tokens: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    memory_text: str = ""
    neighbours: tuple[str, ...] = ()
    feedback: Feedback | None = None
    reward: Reward | None = None
    error_mask: tuple[int, ...] = ()
    finished: bool = True


def to_dict(record: Any) -> dict:
    """A record as plain Python data (dicts, lists, numbers, text)."""
    return msgspec.to_builtins(record)


def to_json(record: Any) -> str:
    """A record as one line of JSON, keys in field order: the same record gives the same bytes."""
    return json.dumps(to_dict(record), ensure_ascii=False)


def from_dict(kind: type[T], data: dict) -> T:
    """The record of class `kind` that `to_dict` gave. Raises FalconError on a missing field, unknown field or wrong type."""
    known = list(kind.__dataclass_fields__)  # type: ignore[attr-defined]
    if unknown := sorted(set(data) - set(known)):
        raise FalconError(f"unknown field {unknown[0]!r} in a {kind.__name__}", f"known: {', '.join(known)}")
    try:
        return msgspec.convert(data, kind)
    except msgspec.ValidationError as error:
        raise FalconError(f"not a {kind.__name__}: {error}", "see falconlib/records.py for its fields") from error


def from_json(kind: type[T], text: str) -> T:
    """The record of class `kind` that `to_json` gave. Raises FalconError on broken JSON or a wrong shape."""
    try:
        data = json.loads(text)
    except ValueError as error:
        raise FalconError(f"broken JSON for a {kind.__name__}: {error}", "one JSON object per record is expected") from error
    if not isinstance(data, dict):
        raise FalconError(f"a {kind.__name__} is a JSON object, not {type(data).__name__}")
    return from_dict(kind, data)
