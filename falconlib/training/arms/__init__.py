"""The arms of the comparison: the same loop with other settings, one short file each. An arm is what it sets.

FALCON is the profile as it stands; `config.ARMS` has their order. What an arm does not set it shares with all others: prompts,
sampler, sandbox, seeds, group size, optimizer, and the counters of its budget (completions, programs, trained tokens, time).
"""

from __future__ import annotations

from typing import Any

from falconlib import config
from falconlib.config import ARMS, Profile
from falconlib.errors import did_you_mean
from falconlib.training.arms import base, coderl, falcon, grpo, grpo_knn, grpo_sl, grpo_time, ppocoder, rft, rloo, rltf, sft

MODULES = (base, sft, rft, coderl, ppocoder, rltf, grpo, rloo, grpo_sl, grpo_knn, falcon, grpo_time)
FOUND = {name: arm for module in MODULES for name, arm in module.ARMS.items()}
# name -> (what it is, settings); None: no reinforcement learning
SETTINGS: dict[str, tuple[str, dict[str, Any] | None]] = {name: FOUND[name] for name in ARMS}


def configure(profile: Profile, arm: str, seed: int) -> Profile:
    """The profile of one run of an arm. Raises FalconError for an unknown arm."""
    if arm not in SETTINGS:
        raise did_you_mean("arm", arm, SETTINGS)
    rates = dict(text.split("=") for text in profile.rates)
    rate = rates.get(arm) or rates.get(config.family(arm), str(profile.train.lr))
    settings = {"train.arm": arm, "train.seed": seed, "train.lr": float(rate), **(SETTINGS[arm][1] or {})}
    return config.override(profile, settings)
