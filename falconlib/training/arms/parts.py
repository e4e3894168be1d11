"""The switches of METHOD section 4: what each of FALCON's parts is switched off by."""

NO_LTM = {"long_term.enabled": False, "train.b_neg": 0.0, "reward.w_long_term": 0.0, "train.targets": "gold"}
NO_STM = {"short_term.enabled": False}
NO_INNER = {"inner.steps": 0}
NO_AI = {"reward.ai": False}
NO_LINE = {"reward.rho_f": 0.0}
NO_SL = {"train.b_sl": 0.0}
PLAIN = {**NO_LTM, **NO_STM, **NO_INNER, **NO_AI, **NO_LINE, **NO_SL}  # R_unit and a policy gradient, nothing else
