"""The arms of the comparison: each is the same loop with other settings, so an arm is what it sets.

FALCON is the profile as it stands. Switches as in METHOD section 4; equations in `training.inner`, `training.losses`, `rewards`.
"""

from __future__ import annotations

from typing import Any

from falconlib import config
from falconlib.config import Profile
from falconlib.errors import did_you_mean

NO_LTM = {"long_term.enabled": False, "train.b_neg": 0.0, "reward.w_long_term": 0.0}
NO_STM = {"short_term.enabled": False}
NO_INNER = {"inner.steps": 0}
NO_AI = {"reward.ai": False}
NO_LINE = {"reward.rho_f": 0.0}
NO_SL = {"train.b_sl": 0.0}

# name -> (what it is, settings); None: no reinforcement learning
SETTINGS: dict[str, tuple[str, dict[str, Any] | None]] = {
    "base": ("the pretrained model", None),
    "sft": ("one epoch of cross-entropy on gold programs (TRL's SFTTrainer)", None),
    "grpo": (
        "R_unit, (R - mean) / std per group, clipped ratios; no memory",
        {**NO_LTM, **NO_STM, **NO_INNER, **NO_AI, **NO_SL, "train.advantage": "group"},
    ),
    "rltf": (
        "R_unit with the error-line penalty and cross-entropy on gold; no memory, no inner loop, no AI feedback",
        {**NO_LTM, **NO_INNER, **NO_AI},
    ),
    "falcon": ("both memories, the inner loop, all feedback", {}),
    "falcon-ltm": ("FALCON without long-term memory", NO_LTM),
    "falcon-stm": ("FALCON without short-term memory", NO_STM),
    "falcon-inner": ("FALCON without the inner loop (J = 0)", NO_INNER),
    "falcon-ai": ("FALCON without AI feedback", NO_AI),
    "falcon-line": ("FALCON without the error-line term", NO_LINE),
    "falcon-sl": ("FALCON without the supervised term", NO_SL),
}


def configure(profile: Profile, arm: str, seed: int) -> Profile:
    """The profile of one run of an arm. Raises FalconError for an unknown arm."""
    if arm not in SETTINGS:
        raise did_you_mean("arm", arm, SETTINGS)
    settings = {"train.arm": arm, "train.seed": seed, **(SETTINGS[arm][1] or {})}
    return config.override(profile, settings)
