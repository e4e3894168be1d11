"""The policy's hidden states as an embedder, from the setting to the recalled neighbour."""

import contextlib

import numpy as np
import pytest
from conftest import ScriptedSandbox

from falconlib import sandbox, training
from falconlib.config import ModelConfig, load_profile
from falconlib.errors import FalconError
from falconlib.evaluation.evaluate import benchmark_tasks, evaluate
from falconlib.memory import LongTermMemory
from falconlib.policy.models import load_policy
from falconlib.policy.states import SENTENCES, embedder_for, policy_states, recall_from

TINY = ModelConfig(name="tiny", threads=1)
TEXTS = ["Sum the numbers of a list.", "", "Count the vowels in a sentence, whatever their case.", "x" * 3000]


def test_states_are_the_mean_after_a_third_of_the_layers(monkeypatch):
    import torch

    embedder = embedder_for("policy", TINY)
    vectors = embedder.encode(TEXTS)
    assert vectors.shape == (4, embedder.dim) and np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    for i, text in enumerate(TEXTS):  # alone or beside longer texts
        assert np.allclose(embedder.encode([text])[0], vectors[i], atol=1e-5)
    policy = load_policy(TINY)
    seen = {}
    policy.model.model.layers[0].register_forward_hook(lambda _, __, out: seen.update(out=out))  # 1 of 2: a third, rounded up

    def mean(text):
        with torch.inference_mode():
            policy.model(torch.tensor([policy.encode(text)]))
            hidden = seen["out"][0] if isinstance(seen["out"], tuple) else seen["out"]
            return policy.model.model.norm(hidden).reshape(-1, embedder.dim).mean(0).numpy()

    centred = mean(TEXTS[0]) - np.mean([mean(text) for text in SENTENCES], axis=0)  # what every text has in common says nothing
    assert np.allclose(vectors[0], centred / np.linalg.norm(centred), atol=1e-4)
    similar = embedder.encode(SENTENCES) @ embedder.encode(SENTENCES).T
    assert abs(similar[~np.eye(len(SENTENCES), dtype=bool)].mean()) < 0.2
    monkeypatch.setattr("falconlib.policy.states.SENTENCES", SENTENCES[:5])
    assert embedder_for("policy", TINY).fingerprint != embedder.fingerprint


def test_a_run_may_remember_by_the_policy_s_states(tmp_path, monkeypatch):
    profile = load_profile("smoke", {"long_term.embedder": "policy", "train.steps": 1, "sample.max_new_tokens": 96})
    held_back, block = [], LongTermMemory.blocklist
    monkeypatch.setattr(LongTermMemory, "blocklist", lambda self, tasks: held_back.append(tasks) or block(self, tasks))
    monkeypatch.setattr(sandbox, "Sandbox", lambda *_: contextlib.nullcontext(ScriptedSandbox()))
    training.run_arm(profile, "sft", 0, tmp_path / "sft", progress=False)
    policy = training.run_arm(profile, "falcon", 0, tmp_path / "run", tmp_path / "sft" / "adapter", progress=False)
    measured = [t for name in profile.tasks.benchmarks for t in benchmark_tasks(profile, name)]
    ((*held_back,),) = held_back  # in training, too, near-duplicates of evaluated tasks are not shown
    assert {t.task_id for t in measured} < {t.task_id for t in held_back}
    path = tmp_path / "run" / "memory.sqlite"
    with recall_from(path, profile.model) as memory:
        assert memory.embedder_name == "policy" and len(memory.search("Reverse a list.", 3)) == 3
        assert memory._store.rows("SELECT DISTINCT run_id FROM episode") == [("run",)]  # where its programs come from
        before = memory.content_hash()
    found = evaluate(policy, profile, 0, ScriptedSandbox(), benchmarks=["basics"], mode="+LTM", memory=path, progress=False)
    assert found
    with LongTermMemory(path, read_only=True) as memory:
        assert memory.content_hash() == before
        with pytest.raises(FalconError, match="none is given here"):
            memory.search("Reverse a list.")


def test_a_memory_of_another_model_s_states_is_refused(tmp_path):
    mine = policy_states(TINY)
    LongTermMemory(tmp_path / "m", mine).close()
    mine.fingerprint += "/other"
    LongTermMemory(tmp_path / "other", mine).close()
    recall_from(tmp_path / "m", TINY).close()
    with pytest.raises(FalconError, match="was written with embedder"):
        recall_from(tmp_path / "other", TINY)
