"""Checkpoints of a training run: adapter, optimizer, counters and the positions of both memories, written atomically.

A checkpoint folder is complete or absent: it is written beside its place, synced, and renamed.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from falconlib.errors import FalconError
from falconlib.files import REMEDIES, disk_errors, sha256, sha256_of
from falconlib.policy.models import Policy


def theta(policy: Policy) -> dict[str, torch.Tensor]:
    """The trainable parameters by name."""
    return {n: p for n, p in policy.model.named_parameters() if p.requires_grad}


def save(
    folder: Path, step: int, policy: Policy, optimizer: torch.optim.Optimizer, state: dict[str, Any], memory=None, keep: int = 2,
    critic=None,
) -> Path:  # fmt: skip
    """Writes `step` into `folder`, with a hash of every file, and drops all but the last `keep` checkpoints. `memory` is a
    LongTermMemory or None, `critic` a Critic or None.

    Raises FalconError when the disk is full or not writable; the checkpoints before stay.
    """
    try:
        with disk_errors(folder):
            return _write(folder, step, policy, optimizer, state, memory, keep, critic)
    except (SafetensorError, RuntimeError) as error:  # how safetensors and torch.save report a failed write
        raise FalconError(f"cannot write checkpoint {step} in {folder}: {error}", REMEDIES[errno.ENOSPC]) from error


def _write(folder: Path, step: int, policy: Policy, optimizer, state: dict, memory, keep: int, critic) -> Path:
    target, scratch = folder / f"step-{step:06d}", folder / ".writing"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    save_file({n: p.detach().cpu().contiguous() for n, p in theta(policy).items()}, scratch / "theta.safetensors")
    torch.save(optimizer.state_dict(), scratch / "optimizer.pt")
    if critic is not None:
        torch.save(critic.state_dict(), scratch / "critic.pt")
    if memory is not None:
        memory.snapshot(scratch / "long_term.sqlite")
    whole = {"step": step, **state, "files": {path.name: sha256(path) for path in sorted(scratch.iterdir())}}
    (scratch / "state.json").write_text(json.dumps(whole | {"hash": sha256_of(whole)}), encoding="utf-8")
    for path in scratch.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    shutil.rmtree(target, ignore_errors=True)
    os.replace(scratch, target)
    for old in existing(folder)[:-keep]:
        shutil.rmtree(old)
    return target


def existing(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(p for p in folder.glob("step-*") if (p / "state.json").is_file())


def load(path: Path, policy: Policy, optimizer: torch.optim.Optimizer, critic=None) -> dict[str, Any]:
    """Puts a checkpoint back into policy, optimizer and critic and returns its state.

    Raises FalconError when it does not fit, and when any of its bytes are not those that were written."""
    others = [p.name for p in existing(path.parent) if p != path]
    remedy = f"delete {path}" + (f"; the run then resumes at {others[-1]}" if others else "; the run then starts anew")
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        if state.pop("hash") != sha256_of(state) or path.name != f"step-{state['step']:06d}":
            raise ValueError("state.json is damaged, or of another step")
        if broken := [name for name, digest in state["files"].items() if sha256(path / name) != digest]:
            raise ValueError(f"{broken[0]} is damaged")
        stored = load_file(path / "theta.safetensors")
        mine = theta(policy)
        if {n: t.shape for n, t in stored.items()} != {n: p.shape for n, p in mine.items()}:
            raise ValueError("its adapters have other names or shapes than this model's")
        moments = torch.load(path / "optimizer.pt", weights_only=True)
        if critic is not None:
            critic.load_state_dict(torch.load(path / "critic.pt", weights_only=True))
    except Exception as error:
        raise FalconError(f"checkpoint {path} cannot be loaded: {error}", remedy) from error
    with torch.no_grad():
        for name, parameter in mine.items():
            parameter.copy_(stored[name])
    optimizer.load_state_dict(moments)
    return state
