"""GRPO at equal time: GRPO until it has spent what the FALCON run of the same seed beside it spent.

FALCON's inner step costs a forward and a backward more per step; here GRPO takes as many steps as that time allows. The
profile's `train.budget` says what is equal: "wall_s", or "trained_tokens", which no other load on the machine can shift.
"""

from falconlib.training.arms.grpo import GRPO

ARMS = {"grpo-time": ("GRPO for as long as FALCON took", {**GRPO, "train.budget_of": "falcon"})}
