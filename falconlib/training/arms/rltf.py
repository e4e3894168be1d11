"""RLTF (Liu et al. 2023, arXiv 2307.04349): online learning from unit tests, with a penalty on the tokens of the error's line.

A_it = (a_i - rho_f m_it) / std,   L = L_pg + b_sl CE(gold)    m_it = 1 on the line that the error names
"""

from falconlib.training.arms.parts import NO_AI, NO_INNER, NO_LTM

ARMS = {
    "rltf": (
        "R_unit with the error-line penalty and cross-entropy on gold; no memory, no inner loop, no AI feedback",
        {**NO_LTM, **NO_INNER, **NO_AI},
    )
}
