"""Two processes (gloo on CPU) against one with the doubled batch, and the mirror of the metrics."""

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from falconlib.errors import FalconError
from falconlib.training.mirror import mirror, numbers

SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
from conftest import SMALL, ScriptedSandbox
from test_mrlf import TASKS, make_run
from falconlib.config import Profile, build, override
from falconlib.files import JsonLines
from falconlib.policy.models import load_policy
from falconlib.training import distributed
from falconlib.training.sft import train_sft

distributed.start(cpu=True)
folder = Path(sys.argv[2]) / f"{distributed.world()}-{distributed.rank()}"
folder.mkdir()
profile = override(build(Profile, SMALL), {"train.tasks": 4 // distributed.world(), "train.warmup": 0})
run = make_run(folder, profile, ScriptedSandbox(), "falcon")
run.run(progress=False)
sft = override(profile, {"sft.batch": 4 // distributed.world(), "sft.max_steps": 3})
warm = load_policy(profile.model, profile.lora)
tokens = train_sft(warm, TASKS[:4], sft, 0, JsonLines(folder / "sft.jsonl"), progress=False)
memory = (run.conductor.long_term.content_hash(), run.conductor.short_term.state(), run.pass_rate)
theta = [p.detach() for p in [*run.parameters, *warm.parameters()]]
torch.save({"theta": theta, "memory": repr(memory), "sft_tokens": tokens}, folder / "end.pt")
if distributed.world() > 1:
    torch.distributed.destroy_process_group()
"""


def test_two_processes_equal_one_with_the_doubled_batch(tmp_path, monkeypatch):
    script, tests = tmp_path / "script.py", Path(__file__).parent
    script.write_text(SCRIPT)
    ddp = tests.parent / "notebooks" / "profiles" / "accelerate" / "ddp.yaml"
    port = str(20000 + os.getpid() % 20000)
    launch = ["-m", "accelerate.commands.launch", "--config_file", str(ddp), "--main_process_port", port]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *launch, str(script), str(tests), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    monkeypatch.setattr(sys, "argv", ["", str(tests), str(tmp_path)])
    exec(compile(SCRIPT, "one", "exec"), {})  # alone it needs no process of its own
    one, first, second = (torch.load(tmp_path / name / "end.pt") for name in ("1-0", "2-0", "2-1"))
    assert first["memory"] == second["memory"]
    assert all(torch.equal(a, b) for a, b in zip(first["theta"], second["theta"], strict=True))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(one["theta"], first["theta"], strict=True))
    assert one["sft_tokens"] == first["sft_tokens"]
    rows = [
        [json.loads(x) for log in ("metrics", "sft") for x in (tmp_path / n / f"{log}.jsonl").read_text().splitlines()]
        for n in ("1-0", "2-0")
    ]
    for alone, both in zip(*rows, strict=True):
        assert alone.keys() == both.keys()
        for name, value in alone.items():
            assert both[name] == (pytest.approx(value, rel=1e-4, abs=1e-5) if isinstance(value, float) else value), name
    assert not list((tmp_path / "2-1").glob("*.jsonl")) and not (tmp_path / "2-1" / "checkpoints").exists()


@pytest.mark.slow
def test_the_command_of_the_shipped_configuration_trains_on_two_processes(tmp_path):
    ddp = Path(__file__).parent.parent / "notebooks" / "profiles" / "accelerate" / "ddp.yaml"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "FALCON_RESULTS": str(tmp_path)}
    for place, arm in enumerate(("sft", "falcon")):
        port = str(20000 + (os.getpid() + place) % 20000)
        command = ["-m", "accelerate.commands.launch", "--config_file", str(ddp), "--main_process_port", port, "-m", "falconlib"]
        command += ["train", "--arm", arm, "--profile", "smoke", "--set", "model.device=cpu", "--set", "train.steps=1"]
        done = subprocess.run(
            [sys.executable, *command], capture_output=True, text=True, env=environment, check=False, timeout=300
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("seed 0, profile smoke") == 1, "only the first process speaks"
        folder = tmp_path / "runs" / "smoke" / "train" / f"{arm}-s0"
        rows = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert rows == sorted(set(rows)) and (folder / "manifest.json").is_file()
        assert (folder / "adapter" / "adapter_model.safetensors").is_file() and not list(folder.glob("memory-1*"))


def test_the_mirror_gets_every_known_number(tmp_path, monkeypatch):
    row = {"step": 2, "reward": 0.5, "inner_gain": None, "errors": {"fail": 3}, "completions": 8}
    assert numbers(row) == {"reward": 0.5, "errors/fail": 3.0, "completions": 8.0}
    seen = []
    fake = types.SimpleNamespace(
        init=lambda **k: seen.append(k), log=lambda values, step: seen.append((step, values)), finish=lambda: seen.append("end")
    )
    monkeypatch.setitem(sys.modules, "trackio", fake)
    monkeypatch.delenv("TRACKIO_DIR", raising=False)
    with mirror("trackio", tmp_path / "run") as watch:
        watch(row)
    assert seen == [{"project": "falcon", "name": "run"}, (2, numbers(row)), "end"]
    assert os.environ["TRACKIO_DIR"] == str(tmp_path / "run" / "trackio")
    with mirror("", tmp_path) as watch:
        watch(row)


@pytest.mark.parametrize("kind", ["tensorboard", "trackio"])
def test_a_mirror_that_is_not_installed_is_a_clear_error(kind, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(FalconError, match="not installed"), mirror(kind, tmp_path):
        pass
