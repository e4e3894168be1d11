"""Measuring difficulty: resumable, the same numbers either way, never mixed with other settings."""

from __future__ import annotations

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
    assert found["tasks"] == fingerprint(TASKS) and found["samples"] == 2 and found["date"] == "2026-01-01"
    assert all(0 <= passed <= judged <= 2 for passed, judged in found["passed"].values())


@pytest.mark.parametrize("change", [{"temperature": 1.0}, {"samples": 3}])
def test_other_settings_are_never_mixed_in(change, tiny_policy, scripted_sandbox, tmp_path):
    arguments = (tiny_policy, TASKS[:1], scripted_sandbox, tmp_path / "a.json")
    difficulty.measure(*arguments, SETTINGS, "2026-01-01")
    with pytest.raises(FalconError, match=f"another {next(iter(change))}"):
        difficulty.measure(*arguments, {**SETTINGS, **change}, "2026-01-01")
    with pytest.raises(FalconError, match="another tasks"):
        difficulty.measure(tiny_policy, TASKS[:2], scripted_sandbox, tmp_path / "a.json", SETTINGS, "2026-01-01")
