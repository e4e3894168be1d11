"""How hard the tasks of `basics` are for the embedded base model: share of its samples that pass, written to data/basics.

`python -m falconlib.evaluation.difficulty` takes about ten minutes on 2 idle CPU cores; started again, it resumes, and after a
change of some tasks it measures those alone.
`falconlib.tasks.basics` reads the file and derives the labels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from falconlib import prompts
from falconlib.config import Profile
from falconlib.errors import FalconError
from falconlib.evaluation.score import Sample, score_samples
from falconlib.files import read_json, write_json
from falconlib.policy.generate import Row, generate
from falconlib.policy.models import Policy, load_policy
from falconlib.records import INFRA_ERROR, Task
from falconlib.rollout import stream_seed
from falconlib.sandbox import Sandbox
from falconlib.tasks import basics, fingerprint

COMMAND = "python -m falconlib.evaluation.difficulty"
SETTINGS = {"samples": 8, "temperature": 0.7, "max_new_tokens": 96, "seed": 0}  # [ours] as training samples, with a longer limit


def measure(
    policy: Policy,
    tasks: Sequence[Task],
    sandbox: Sandbox,
    path: Path,
    settings: dict[str, Any],
    date: str,
    at_once: int = 16,
    progress: Callable[[int], object] = lambda done: None,
) -> dict[str, Any]:
    """Samples the tasks that `path` does not hold as they are now, and writes it anew after every `at_once` tasks.

    settings: as SETTINGS. date: of the measurement. progress: called with the number of measured tasks.
    Returns what the file holds: model, settings, command, date of the latest part, "tasks": task id -> start of its
    fingerprint, and "passed": task id -> [samples that passed, samples with a verdict].
    Raises FalconError when the file was made with other settings or another model.
    """
    facts = {"model": f"{policy.name} ({policy.fingerprint})", **settings, "command": COMMAND}
    found = read_json(path) if path.is_file() else facts | {"tasks": {}, "passed": {}}
    if odd := next((name for name, value in facts.items() if found.get(name) != value), None):
        raise FalconError(f"{path} was measured with another {odd}: {found.get(odd)!r}", f"remove {path.name} to begin anew")
    now = {task.task_id: fingerprint([task])[:16] for task in tasks}
    same = {name for name, value in found["tasks"].items() if now.get(name) == value}
    found |= {key: {name: value for name, value in found[key].items() if name in same} for key in ("tasks", "passed")}
    left = [task for task in tasks if task.task_id not in same]
    for start in range(0, len(left), at_once):
        part = left[start : start + at_once]
        scored = score_samples(part, sampled(policy, part, settings), sandbox)
        for task in part:
            verdicts = [s.status for s in scored if s.task_id == task.task_id and s.status != INFRA_ERROR]
            found["passed"][task.task_id] = [verdicts.count("pass"), len(verdicts)]
            found["tasks"][task.task_id] = now[task.task_id]
        write_json(path, found := found | {"date": date})
        progress(len(found["passed"]))
    return found


def sampled(policy: Policy, tasks: Sequence[Task], settings: dict[str, Any]) -> list[Sample]:
    """The unscored samples, in task order; each has a random stream of its own."""
    rendered, each = [prompts.render(policy.tokenizer, task) for task in tasks], range(settings["samples"])
    seeds = [[stream_seed(settings["seed"], 0, f"difficulty|{task.task_id}", k) for k in each] for task in tasks]
    completions = generate(
        policy, [p.text for p in rendered], [Row(i, seed) for i, own in enumerate(seeds) for seed in own],
        max_new_tokens=settings["max_new_tokens"], temperature=settings["temperature"], stop=prompts.STOP,
    )  # fmt: skip
    pairs = [(i, k) for i in range(len(tasks)) for k in each]
    codes = [prompts.extract_program(c.text, rendered[i].prefix) for (i, _), c in zip(pairs, completions, strict=True)]
    drawn = zip(pairs, completions, codes, strict=True)
    return [Sample(tasks[i].task_id, "basics", k, c.text, code, tokens=len(c.tokens)) for (i, k), c, code in drawn]


if __name__ == "__main__":
    profile, today = Profile(), datetime.now(UTC).date().isoformat()
    with Sandbox(profile.sandbox) as walls, tqdm(total=300, desc="tasks") as bar:
        policy, every = load_policy(profile.model), basics.load()
        measure(policy, every, walls, basics.RATES, SETTINGS, today, progress=lambda done: bar.update(done - bar.n))
