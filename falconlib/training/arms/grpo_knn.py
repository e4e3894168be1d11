"""GRPO + nearest neighbour: FALCON's prompts without its memory's learning. The honest control for memory.

    y ~ pi(. | x, c) in `prompt_share` of the rollouts,  c = gold program of the training task nearest to x, not x itself

The memory stays as it began: gold programs of the training tasks; no episodes, no utilities, nothing in reward or loss.
"""

from falconlib.training.arms.grpo import GRPO

ARMS = {
    "grpo+knn": (
        "GRPO with the nearest training task's gold program in half of its prompts; the memory learns nothing",
        {**GRPO, "long_term.enabled": True, "long_term.learns": False},
    )
}
