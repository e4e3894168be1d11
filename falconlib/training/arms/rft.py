"""RFT, rejection sampling fine-tuning (Yuan et al. 2023, arXiv 2308.01825): learn from what passed, forget the rest.

    L = -(1/Z) sum over distinct y_i ~ pi(. | x) with all tests passed of sum_t log pi(y_it | x, y_i,<t)

The paper samples once from the SFT model; here each step samples from the policy as it is [ours], so that the arm has the
completions, prompts and updates of the others. No gold programs: they are in SFT already. The simple arm that must be beaten.
"""

from falconlib.training.arms.parts import PLAIN

ARMS = {
    "rft": (
        "cross-entropy on its own verified programs; no policy gradient",
        {**PLAIN, "train.b_pg": 0.0, "train.b_sl": 1.0, "train.targets": "own"},
    )
}
