"""CodeRL (Le et al. 2022, arXiv 2207.01780): a greedy baseline, and a critic that predicts how a program ends.

    L_rl = -(1/Z) sum_i (r(y_i) - r(y_greedy)) sum_t q(u_i | y_i,<=t, x) log pi(y_it)    r = -1 | -0.6 | -0.3 | 1
    L_critic = -log p(u_i | y_i, x),   u = does not parse | runtime error | fails a test | passes

See `training.error_critic`. The greedy program is one of the G of its task [ours]: all arms sample equally many. L_rl and the
cross-entropy on gold take turns, by steps [ours]; both weigh 1, for they are never added up [ours].
"""

from falconlib.training.arms.parts import PLAIN

ARMS = {
    "coderl": (
        "reward above the greedy program's, weighted per token by a 4-class error critic; alternates with cross-entropy on gold",
        {**PLAIN, "train.advantage": "critic", "train.b_sl": 1.0, "train.alternate": True},
    )
}
