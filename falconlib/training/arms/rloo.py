"""RLOO (Ahmadian et al. 2024, arXiv 2402.14740): REINFORCE with the mean of the group's other members as baseline.

    a_i = R_i - 1/(G-1) sum_{j != i} R_j,   grad L = -(1/N) sum_i a_i grad log pi(y_i | x)

On policy, the gradient has the direction of TRL's RLOOTrainer (tests/test_exactness.py). A batch is divided by one number
(its tokens, times the spread of its a_i) where RLOO divides by N: AdamW undoes such a factor.
"""

from falconlib.training.arms.parts import PLAIN

ARMS = {"rloo": ("R_unit, R - mean of the others per group; no memory", {**PLAIN, "train.advantage": "loo"})}
