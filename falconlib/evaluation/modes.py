"""Test-time modes: fast weights for one problem, from its neighbours' programs or from practice on the tests that it shows.

    +LTM adapt   delta_x from the cross-entropy on the verified programs of the nearest training tasks; nothing is executed
    +STM adapt   K rollouts with theta on the shown tests, then the inner step on them
    best-of-K    the control of equal budget: the same K rollouts, but one only chooses among them by the shown tests

A problem that shows no test is answered as zero-shot. Hidden tests never come here; theta and memory stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from falconlib.errors import FalconError
from falconlib.evaluation.score import Sample
from falconlib.feedback import make_feedback
from falconlib.policy.fast_weights import Deltas
from falconlib.records import Episode, Task
from falconlib.rollout import Conductor
from falconlib.sandbox import program_for
from falconlib.tasks import load_tasks, visible_tests
from falconlib.training.batches import Example, MicroBatches
from falconlib.training.inner import adapt, inner_examples
from falconlib.training.outer import Outer


def shown(task: Task) -> Task:
    """The task with the tests that its prompt shows and no others; its prompt stays as it is."""
    tests = visible_tests(task)
    return replace(task, tests=tests, visible=0 if task.kind == "completion" else len(tests), gold=None)


def practise(conductor: Conductor, tasks: Sequence[Task]) -> list[list[Episode]]:
    """K = inner.support rollouts with theta per task, scored on its shown tests; none for a task that shows no test."""
    able = [shown(task) for task in tasks if visible_tests(task)]
    size = conductor.profile.inner.support
    episodes = conductor.collect(able, group="support", step=0, rollouts=range(size)) if able else []
    return [[e for e in episodes if e.task_id == task.task_id] for task in tasks]


def deltas_for(conductor: Conductor, tasks: Sequence[Task], mode: str, practice: Sequence[Sequence[Episode]]) -> Deltas:
    """Fast weights of "+LTM adapt" or "+STM adapt", one row per task; zero where there is nothing to adapt to.

    practice: of `practise` (not read by "+LTM adapt"). Raises FalconError for a policy without adapters, and for a memory of
    tasks that are not in the train split of `tasks.train`.
    """
    policy, profile = conductor.policy, conductor.profile
    if not policy.parameters():
        raise FalconError(f"mode {mode!r} adapts LoRA weights, and the model has none", "--adapter FOLDER")
    micro = MicroBatches(policy, profile.train.micro_tokens, profile.train.side_by_side)
    positives: list[list[Example]] = [[] for _ in tasks]
    if mode == "+LTM adapt":
        known = {t.task_id: t for name in profile.tasks.train for t in load_tasks(name, "train")}
        found = conductor.neighbour_programs(tasks)
        if strange := next((i for own in found for i, _ in own if i not in known), None):
            raise FalconError(f"the memory holds {strange!r}, which is not in tasks.train", "--profile: the one it was made with")
        outer = Outer(policy, conductor, known, profile, micro)
        positives = [[x for i, code in own for x in outer.supervised(i, code)] for own in found]
    examples = inner_examples(practice if mode == "+STM adapt" else [()] * len(tasks), positives, profile)
    return adapt(policy, len(tasks), examples, profile, micro).deltas


def best_of(
    conductor: Conductor, samples: Sequence[Sample], tasks: Sequence[Task], practice: Sequence[Sequence[Episode]]
) -> list[Sample]:
    """Each zero-shot sample, or the rollout of its task that passes more of the shown tests (the first of the best)."""
    by_id = {task.task_id: (shown(task), own) for task, own in zip(tasks, practice, strict=True)}
    able = [i for i, s in enumerate(samples) if by_id[s.task_id][1]]
    reports = conductor.sandbox.run_many([program_for(by_id[samples[i].task_id][0], samples[i].code) for i in able])
    found = list(samples)
    for i, report in zip(able, reports, strict=True):
        rivals = [(e.feedback.pass_ratio or 0.0 if e.feedback else 0.0, e) for e in by_id[samples[i].task_id][1]]
        ratio, best = max(rivals, key=lambda pair: pair[0])
        if ratio > (make_feedback(report, samples[i].code).pass_ratio or 0.0):
            found[i] = replace(samples[i], completion=best.completion, code=best.code, tokens=len(best.tokens))
    return found
