"""Fixtures shared by the tests: the tiny policy, and a scripted sandbox for tests that are not about the sandbox."""

from __future__ import annotations

import hashlib
import signal
from collections.abc import Sequence

import pytest

from falconlib.config import LoraConfig, ModelConfig, Profile, build, validate
from falconlib.errors import FalconError
from falconlib.records import ErrorInfo, Program, Report, TestResult

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job starts with Ctrl-C ignored; tests send it

SMALL = {
    "model": {"name": "tiny", "threads": 1},
    "lora": {"r": 4, "alpha": 8, "top_layers": 0},
    "sample": {"max_new_tokens": 12},
    "long_term": {"embedder": "hashed"},
    "inner": {"support": 2},
    "train": {"steps": 2, "tasks": 2, "group": 4},
}


@pytest.fixture
def profile() -> Profile:
    """A profile for the tiny model: two tasks, four rollouts, two steps."""
    return validate(build(Profile, SMALL))


@pytest.fixture
def embedded_dir():
    """Folder of the embedded model; where `make setup` has not fetched it, the test is skipped with the reason."""
    from falconlib.policy.embedded import model_dir

    return got(model_dir)


@pytest.fixture
def minilm():
    """The sentence encoder; where `make setup` has not fetched it, the test is skipped with the reason."""
    from falconlib.memory.embed import MiniLM

    return got(MiniLM)


def got(make):
    """What `make` returns, or a visible skip when its model is not on this machine."""
    try:
        return make()
    except FalconError as error:
        pytest.skip(error.message)


@pytest.fixture
def tiny_policy():
    """A fresh tiny policy with LoRA adapters whose B is not zero, so that adapters matter."""
    import torch

    from falconlib.policy.models import load_policy

    policy = load_policy(ModelConfig(name="tiny", threads=1), LoraConfig(r=4, alpha=8, top_layers=0), seed=3)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return policy


class ScriptedSandbox:
    """Gives every program a verdict that depends on its text alone, without running it."""

    def __init__(self):
        self.programs: list[Program] = []

    def run_many(self, programs: Sequence[Program], progress: bool = False) -> list[Report]:
        self.programs += programs
        return [scripted_report(p) for p in programs]


def scripted_report(program: Program) -> Report:
    """pass, fail, runtime_error at line 1, or infra_error, by a hash of the code; golds (a `def`) pass."""
    if program.code.startswith("def "):
        return Report("pass", (TestResult(0, 0, "pass"),), 1, loaded=True)
    kind = hashlib.blake2b(program.code.encode(), digest_size=1).digest()[0] % 4
    if kind == 0:
        return Report("pass", (TestResult(0, 0, "pass"), TestResult(1, 1, "pass")), 2, loaded=True)
    if kind == 1:
        return Report("fail", (TestResult(0, 0, "pass"), TestResult(1, 1, "fail")), 2, loaded=True)
    if kind == 2:
        return Report("runtime_error", (), 2, ErrorInfo("NameError", "name 'x' is not defined", 1, 1), loaded=False)
    return Report("infra_error")


@pytest.fixture
def scripted_sandbox() -> ScriptedSandbox:
    return ScriptedSandbox()
