"""One task in anybody's words: what memory recalls for it, the policy's programs, their verdicts, and the best of them.

Says only what was checked: asserts in the text are the tests; without them, running is all that is known of a program.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from falconlib import config
from falconlib.errors import FalconError
from falconlib.evaluation.evaluate import check_memory, complete
from falconlib.evaluation.score import Sample, score_samples
from falconlib.policy.models import load_policy
from falconlib.policy.states import recall_from
from falconlib.records import INFRA_ERROR, Task
from falconlib.rollout import Conductor
from falconlib.sandbox import Sandbox
from falconlib.tasks.mbpp import entry_point

NAMED = re.compile(r"`([A-Za-z_]\w*)(?:\([^`]*\))?`")  # `name` or `name(arguments)`


def solve(
    text: str,
    model: str,
    adapter: Path | None = None,
    memory: Path | None = None,
    samples: int = 4,
    *,
    seed: int = 0,
    progress: bool = True,
) -> str:
    """A report in plain text: what is recalled, one verdict per program (one greedy, `samples` sampled), the best program.

    Args:
        text: the task; its lines that begin with `assert` are its tests, shown in the prompt.
        memory: long-term memory to recall from, read-only; None for a plain prompt.

    Raises:
        FalconError: no task in the text, an assert that is no Python, unknown model, missing adapter or memory.
    """
    task, profile = task_of(text), config.override(config.Profile(), {"model.name": model, "eval.samples": samples})
    if memory is not None:
        check_memory(memory)
    policy = load_policy(profile.model, adapter=adapter)
    # no block list: this is help, not a measurement, and the report says what was recalled and how near it is
    long = recall_from(memory, profile.model) if memory is not None else None
    try:
        with Sandbox(profile.sandbox) as sandbox:
            conductor = Conductor(policy, sandbox, None, profile, seed, long)
            found = complete(conductor, [("solve", task)], seed, "+LTM" if long else "zero-shot", progress)
            tested = task if task.tests else replace(task, mode="stdio", tests=(json.dumps({"input": "", "output": ""}),))
            scored = score_samples([tested], found, sandbox)
        recalled = recalled_lines(conductor, task)
    finally:
        if long is not None:
            long.close()
    return "\n".join([*recalled, *verdict_lines(task, scored)])


def task_of(text: str) -> Task:
    """The task in a free text. Its function: the one that the first assert calls, else the first `name` in backticks."""
    lines = [line.strip() for line in text.splitlines()]
    tests = tuple(line for line in lines if re.match(r"assert\b", line))
    prompt = "\n".join(line for line in text.strip().splitlines() if line.strip() not in tests).strip()
    if not prompt:
        raise FalconError("there is no task in the text", 'falconlib solve "Reverse the words of a sentence."')
    for test in tests:
        try:
            ast.parse(test)
        except (SyntaxError, ValueError) as error:
            raise FalconError(f"{test!r} is no Python: {error}", "write each assert on one line of its own") from error
    named = NAMED.search(prompt)
    name = entry_point(tests[0], "") if tests else named[1] if named else None
    if tests and name is None:
        raise FalconError(f"{tests[0]!r} calls no function", "let the first assert call the function that is asked for")
    return Task("solve", "solve", "test", prompt, name, tests, len(tests))


def recalled_lines(conductor: Conductor, task: Task) -> list[str]:
    """The nearest stored tasks, and which of them the prompt showed."""
    if conductor.long_term is None:
        return []
    ((_, _, shown),) = conductor.prompts([task], True)
    (recall,) = conductor.recall([task])
    lines = ["recalled"]
    for n in recall.neighbours if recall else ():
        mark = " (its program is in the prompt)" if n.task_id in shown else ""
        lines.append(f"  {n.similarity:.2f} {n.task_id}: {' '.join(n.description.split())[:90]}{mark}")
    return [*(lines if len(lines) > 1 else ["recalled: nothing"]), ""]


def verdict_lines(task: Task, scored: Sequence[Sample]) -> list[str]:
    """One line per program, then the best program under a heading that claims no more than was checked."""
    lines = ["programs"]
    for s in scored:
        lines.append(f"  {'greedy' if s.greedy else f'sample {s.index + 1}':10} {verdict(task, s)}")
    best = max(scored, key=lambda s: rank(task, s))  # the first of equals
    if task.tests:
        asserts = "the assert in your text" if len(task.tests) == 1 else f"the {len(task.tests)} asserts in your text"
        good, bad = f"passes {asserts}; nothing else was checked", f"no program passes {asserts}; this one comes nearest"
    else:
        good = "runs without error; the text has no assert, so whether it is right is unknown"
        bad = "no program runs without error; this is the first"
    passed = rank(task, best) == 1.0
    return [*lines, "", f"best program ({good if passed else bad})", best.code.strip() or "(empty)"]


def verdict(task: Task, sample: Sample) -> str:
    """What is known of one program, in words."""
    if sample.status == INFRA_ERROR:
        return "no verdict: the sandbox could not judge it"
    if not task.tests and rank(task, sample) == 1.0:
        return "runs without error"
    detail = f" ({sample.error_class})" if sample.error_class not in ("", sample.status) else ""
    share = f", {sample.pass_ratio:.0%} of the asserts" if task.tests and sample.status == "fail" else ""
    return f"{sample.status}{detail}{share}"


def rank(task: Task, sample: Sample) -> float:
    """1 for the best that can be known, below 0 for no verdict. Without tests a program was given an empty input, and what it
    printed is no matter: it ran to its end or it did not."""
    if sample.status == INFRA_ERROR:
        return -1.0
    if not task.tests:
        return float(sample.status in ("pass", "fail"))
    return 1.0 if sample.status == "pass" else min(sample.pass_ratio or 0.0, 0.99)
