"""PPOCoder (Shojaee et al. 2023, arXiv 2301.13816): PPO with a value head; the gold program's syntax and data flow in the reward.

    R_t = [t = T] (r(y) + ast(y, y*) + dfg(y, y*)) - beta (log pi(y_t) - log pi_sft(y_t))    r = -1 | -0.6 | -0.3 | 1
    A_t = sum_{l >= 0} (gamma lambda)^l (R_{t+l} + gamma V_{t+l+1} - V_{t+l}),   gamma = 1, lambda = 0.95
    L   = -(1/Z) sum min(ratio A, clip(ratio, 0.8, 1.2) A),   L_V = 1/2 (V_t - (A_t + V_t)_fixed)^2

See `training.value_head` and `training.similarity`. One update per batch [ours], as in all arms.
"""

from falconlib.training.arms.parts import PLAIN

ARMS = {
    "ppocoder": (
        "PPO with a value head, GAE and adaptive KL; the reward adds the match of syntax and data flow with gold",
        {**PLAIN, "train.advantage": "gae", "train.clip_low": 0.2, "train.clip_high": 0.2},
    )
}
