"""The search for learning rates: validation tasks alone, every try logged once, the best of them used by its arm alone."""

from types import SimpleNamespace

import pytest

from falconlib.config import load_profile
from falconlib.errors import FalconError
from falconlib.evaluation import search
from falconlib.evaluation.score import Sample
from falconlib.files import write_json
from falconlib.graph import Workflow
from falconlib.training.arms import configure

PASSES = {3e-5: 1, 1e-4: 3, 3e-4: 3}


@pytest.fixture
def tried(monkeypatch):
    """Training and evaluation replaced: the rate decides how many of four problems are solved."""
    seen = SimpleNamespace(splits=[], runs=[])

    def run_arm(profile, arm, seed, folder, adapter, progress):
        seen.runs.append((arm, profile.train.lr, profile.rates, adapter.parent.name))
        folder.mkdir(parents=True)
        write_json(folder / "budget.json", {"trained_tokens": 7})
        return profile.train.lr

    def evaluate(policy, profile, seed, sandbox, *, benchmarks, split, progress):
        seen.splits.append((tuple(benchmarks), split))
        return [Sample(f"b/{i}", "basics", 0, "", "", True, status="pass" if i < PASSES[policy] else "fail") for i in range(4)]

    monkeypatch.setattr(search, "run_arm", run_arm)
    monkeypatch.setattr(search, "evaluate", evaluate)
    return seen


def test_every_configuration_is_tried_once_on_validation_tasks(tried, tmp_path):
    profile = load_profile("smoke", {"rates": ["grpo=5e-4"], "eval.samples": 0})
    first = search.search(profile, tmp_path, ["grpo"], [3e-5, 1e-4])
    rows = search.search(profile, tmp_path, ["grpo", "rltf"], [3e-5, 1e-4, 3e-4])
    assert rows[:2] == first and len(rows) == len(tried.runs) == 6, "what stands in the log is not run again"
    assert set(tried.splits) == {(profile.tasks.train, "validation")}
    assert {(rates, adapter) for _, _, rates, adapter in tried.runs} == {((), "sft-s0")}, "the grid, not an earlier choice"
    assert len(rows[1].pop("settings")) == 16 and len({row["settings"] for row in rows[2:]}) == 3, "of three rates"
    assert rows[1] == {
        **{"arm": "grpo", "lr": 1e-4, "seed": 0, "steps": profile.train.steps, "metric": "greedy", "value": 0.75},
        **{"sets": {"basics": 0.75}, "n": 4, "trained_tokens": 7},
    }
    assert search.best(rows) == {"grpo": 1e-4, "rltf": 1e-4}, "of equal rates the smaller"
    with pytest.raises(FalconError, match=r"search.jsonl holds grpo at 3e-05 with other settings"):
        search.search(load_profile("smoke", {"eval.samples": 0, "inner.alpha": 0.3}), tmp_path, ["grpo"], [3e-5])
    assert len(tried.runs) == 6


def test_a_chosen_rate_is_that_of_its_arm_alone():
    profile = load_profile("smoke", {"rates": ["grpo=5e-4"]})
    assert configure(profile, "grpo", 0).train.lr == 5e-4
    assert configure(profile, "falcon", 0).train.lr == profile.train.lr != 5e-4
    assert [configure(profile, arm, 0).train.lr for arm in ("grpo+sl", "grpo+knn", "grpo-time")] == [5e-4] * 3
    both = load_profile("smoke", {"rates": ["falcon=5e-4", "falcon-stm=2e-4"]})
    assert [configure(both, arm, 0).train.lr for arm in ("falcon-ltm", "falcon-stm", "rltf")] == [5e-4, 2e-4, both.train.lr]


def test_a_new_rate_makes_its_own_arm_stale_and_no_other():
    def keys(rates):
        flow = Workflow("smoke", {"rates": rates, "arms": ["base", "sft", "grpo", "falcon", "falcon-ltm"]})
        return {step.key: str(flow.key(step)["parameters"]) for step in flow.steps}

    before, after = keys([]), keys(["falcon=5e-4"])
    changed = {key for key in before if before[key] != after[key]}
    assert changed == {"train/falcon-s0", "train/falcon-ltm-s0", "07_benchmarks", "08_ablations", "09_preferences", "10_report"}


@pytest.mark.parametrize("wrong", ["grop=1e-4", "grpo", "grpo=fast", "grpo=-1"])
def test_a_wrong_rate_is_named_before_anything_runs(wrong):
    with pytest.raises(FalconError, match=r"unknown arm 'grop'|arm=learning rate"):
        load_profile("smoke", {"rates": [wrong]})


def test_the_command_prints_the_best_rates_and_keeps_a_second_search_from_the_same_arm(tried, tmp_path, monkeypatch, capsys):
    from falconlib import workflow
    from falconlib.cli import main

    monkeypatch.setenv("FALCON_RESULTS", str(tmp_path))
    run = tmp_path / "runs" / "smoke"
    command = ["search", "--profile", "smoke", "--set", "eval.samples=0", "--grid", "3e-5,1e-4"]
    assert main([*command, "--arms", "grpo"]) == 2 and "only sft" in capsys.readouterr().err
    (run / "train" / "sft-s0" / "adapter").mkdir(parents=True)
    assert main([*command, "--arms", "grpo,gpro"]) == 2 and "gpro" in capsys.readouterr().err
    assert main([*command, "--arms", "sft"]) == 2 and "unknown arm 'sft'" in capsys.readouterr().err, "it has no train.lr"
    with workflow.lock(run / "search" / "grpo"):
        assert main([*command, "--arms", "rltf,grpo"]) == 2 and "another run" in capsys.readouterr().err
        assert main([*command, "--arms", "rltf"]) == 0
    assert capsys.readouterr().out == "rates: [rltf=0.0001]\n" and len(tried.runs) == 2
