"""The profiles of the study and of the paper: arms, sizes, and a dry run of the encoder-decoder one on a stand-in."""

import contextlib

import pytest
from conftest import ScriptedSandbox
from test_exactness import policy_of

from falconlib import sandbox, training
from falconlib.config import load_profile
from falconlib.files import JsonLines
from falconlib.reporting.pairs import PLANNED


@pytest.mark.parametrize("name", ["small", "small-cpu", "paper", "paper-apps"])
def test_a_study_holds_every_arm_of_its_planned_contrasts(name):
    profile = load_profile(name)
    assert {"base", "sft", "falcon", *PLANNED} == set(profile.arms) and len(profile.seeds) >= 3
    assert profile.eval.samples >= 4 and "falcon" in profile.eval.ltm_arms


def test_the_cpu_study_differs_from_the_gpu_study_in_sizes_alone():
    gpu, cpu = load_profile("small"), load_profile("small-cpu")
    for same in ("arms", "seeds", "reward", "long_term", "short_term", "inner"):
        assert getattr(gpu, same) == getattr(cpu, same), same
    assert (gpu.tasks.train, gpu.tasks.benchmarks, gpu.tasks.seed) == (cpu.tasks.train, cpu.tasks.benchmarks, cpu.tasks.seed)
    assert cpu.tasks.eval_limit > 0 == gpu.tasks.eval_limit


def test_profile_paper_apps_runs_every_kind_of_arm_on_a_tiny_encoder_decoder(tmp_path, monkeypatch):
    policy = policy_of("t5", tmp_path / "t5")
    policy.tokenizer.save_pretrained(tmp_path / "t5")
    sizes = {"model.name": str(tmp_path / "t5"), "model.dtype": "float32", "model.device": "cpu", "tasks.train": ["basics"]}
    sizes |= {"tasks.benchmarks": ["basics"], "tasks.eval_limit": 2, "tasks.train_limit": 12, "long_term.embedder": "hashed"}
    sizes |= {"train.steps": 1, "train.tasks": 2, "train.group": 4, "inner.support": 2, "sample.max_new_tokens": 96}
    profile = load_profile("paper-apps", sizes | {"sft.max_steps": 1})
    monkeypatch.setattr(sandbox, "Sandbox", lambda *_: contextlib.nullcontext(ScriptedSandbox()))
    for arm in ("base", "sft", "grpo", "rft", "falcon"):
        adapter = None if arm in ("base", "sft") else tmp_path / "sft" / "adapter"
        assert training.run_arm(profile, arm, 0, tmp_path / arm, adapter, progress=False).seq2seq
        assert (tmp_path / arm / "budget.json").is_file()
    assert JsonLines(tmp_path / "falcon" / "metrics.jsonl").rows()[0]["completions"] == 2 * profile.train.group
