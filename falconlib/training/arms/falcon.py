"""FALCON (Li et al. 2024, arXiv 2410.21349): the profile as it stands; and FALCON without one of its parts.

    L_outer(theta) = (K_s/G) L_pg(S; theta) + (K_q/G) L_pg(Q; theta + delta) + b_sl CE + b_neg L_negative

Equations in `training.inner`, `training.outer`, `training.losses`, `rewards`.
"""

from falconlib.training.arms.parts import NO_AI, NO_INNER, NO_LINE, NO_LTM, NO_SL, NO_STM

ARMS = {
    "falcon": ("both memories, the inner loop, all feedback", {}),
    "falcon-ltm": ("FALCON without long-term memory", NO_LTM),
    "falcon-stm": ("FALCON without short-term memory", NO_STM),
    "falcon-inner": ("FALCON without the inner loop (J = 0)", NO_INNER),
    "falcon-ai": ("FALCON without AI feedback", NO_AI),
    "falcon-line": ("FALCON without the error-line term", NO_LINE),
    "falcon-sl": ("FALCON without the supervised term", NO_SL),
}
