"""GRPO (Shao et al. 2024, arXiv 2402.03300), with one normaliser for all tokens and the higher clip of DAPO (arXiv 2503.14476).

    a_i = (R_i - mean(R)) / (std(R) + eps) within the group,   L_pg with the same a_i on every token; no KL term

Equal to TRL's GRPOTrainer (loss_type="dapo") on a fixed batch: tests/test_exactness.py.
"""

from falconlib.training.arms.parts import PLAIN

GRPO = {**PLAIN, "train.advantage": "group"}
ARMS = {"grpo": ("R_unit, (R - mean) / std per group, clipped ratios; no memory", GRPO)}
