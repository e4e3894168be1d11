"""SFT: L = -(1/Z) sum_t log pi(y*_t | x, y*_<t) on the gold programs y* of the training tasks; where all others start.

See `training.sft`.
"""

ARMS = {"sft": ("one epoch of cross-entropy on gold programs (TRL's SFTTrainer)", None)}
