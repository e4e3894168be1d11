"""GRPO + SL: GRPO with FALCON's supervised term, which sees gold programs: L_pg + b_sl CE(gold and own verified programs).

What FALCON owes to seeing gold is what this arm has over GRPO.
"""

from falconlib.training.arms.grpo import GRPO

ARMS = {
    "grpo+sl": (
        "GRPO with FALCON's cross-entropy on gold and own verified programs",
        {name: value for name, value in GRPO.items() if name not in ("train.b_sl", "train.targets")},
    )
}
