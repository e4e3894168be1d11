"""Measuring difficulty: resumable, the same numbers either way, never mixed with other settings."""

from __future__ import annotations

from dataclasses import replace

import pytest

from falconlib.errors import FalconError
from falconlib.evaluation import difficulty
from falconlib.files import read_json
from falconlib.tasks import fingerprint, load_tasks

TASKS = load_tasks("basics")[:5]
SETTINGS = {"samples": 2, "temperature": 0.7, "max_new_tokens": 4, "seed": 0}


def test_interrupted_and_resumed_is_the_same_as_at_once(tiny_policy, scripted_sandbox, tmp_path):
    def stop(done):
        raise KeyboardInterrupt

    def measure(name, **more):
        return difficulty.measure(tiny_policy, TASKS, scripted_sandbox, tmp_path / name, SETTINGS, "2026-01-01", 2, **more)

    with pytest.raises(KeyboardInterrupt):
        measure("a.json", progress=stop)
    assert set(read_json(tmp_path / "a.json")["passed"]) == {t.task_id for t in TASKS[:2]}
    ran, seen = len(scripted_sandbox.programs), []
    found = measure("a.json", progress=seen.append)
    assert seen == [4, 5] and len(scripted_sandbox.programs) == ran + 3 * SETTINGS["samples"]
    assert measure("b.json") == found == read_json(tmp_path / "a.json")
    assert (
        found["tasks"] == {t.task_id: fingerprint([t])[:16] for t in TASKS}
        and found["samples"] == 2
        and found["date"] == "2026-01-01"
    )
    assert all(0 <= passed <= judged <= 2 for passed, judged in found["passed"].values())


def test_each_sample_has_a_stream_of_its_own_and_counts_only_with_a_verdict(tiny_policy, monkeypatch, tmp_path):
    texts = [s.completion for s in difficulty.sampled(tiny_policy, TASKS[:2], {**SETTINGS, "samples": 3, "max_new_tokens": 12})]
    assert len(set(texts)) == len(texts) == 6
    alone = difficulty.sampled(tiny_policy, TASKS[1:2], {**SETTINGS, "samples": 3, "max_new_tokens": 12})
    assert [s.completion for s in alone] == texts[3:]  # whatever else is measured beside it
    verdicts = iter(["pass", "infra_error", "fail", "pass"])
    monkeypatch.setattr(
        difficulty, "score_samples", lambda tasks, samples, sandbox: [replace(s, status=next(verdicts)) for s in samples]
    )
    found = difficulty.measure(tiny_policy, TASKS[:2], None, tmp_path / "a.json", SETTINGS, "2026-01-01")
    assert found["passed"] == {TASKS[0].task_id: [1, 1], TASKS[1].task_id: [1, 2]}


@pytest.mark.parametrize("change", [{"temperature": 1.0}, {"samples": 3}])
def test_other_settings_are_never_mixed_in(change, tiny_policy, scripted_sandbox, tmp_path):
    arguments = (tiny_policy, TASKS[:1], scripted_sandbox, tmp_path / "a.json")
    difficulty.measure(*arguments, SETTINGS, "2026-01-01")
    with pytest.raises(FalconError, match=f"another {next(iter(change))}"):
        difficulty.measure(*arguments, {**SETTINGS, **change}, "2026-01-01")


def test_only_changed_tasks_are_measured_again(tiny_policy, scripted_sandbox, tmp_path):
    arguments = (scripted_sandbox, tmp_path / "a.json", SETTINGS)
    first = difficulty.measure(tiny_policy, TASKS[:3], *arguments, "2026-01-01")
    ran, changed = len(scripted_sandbox.programs), replace(TASKS[1], tests=TASKS[1].tests[:-1])
    found = difficulty.measure(tiny_policy, [TASKS[0], changed, TASKS[4]], *arguments, "2026-02-02")
    assert len(scripted_sandbox.programs) == ran + 2 * SETTINGS["samples"] and found["date"] == "2026-02-02"
    assert set(found["passed"]) == set(found["tasks"]) == {t.task_id for t in (TASKS[0], TASKS[1], TASKS[4])}
    assert found["tasks"][TASKS[0].task_id] == first["tasks"][TASKS[0].task_id] and found == read_json(tmp_path / "a.json")
    assert found["tasks"][changed.task_id] == fingerprint([changed])[:16] != first["tasks"][changed.task_id]
