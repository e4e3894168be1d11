"""Supervised warm start: cross-entropy on gold programs with TRL's SFTTrainer, under the prompts that everything else uses.
TRL's trains decoders only; an encoder-decoder gets the Trainer of transformers, on which TRL's is built.

Prompts and targets are tokenised here, so that SFT, sampling and the outer loop see the same tokens and every label ends
with eos. No memory, no rewards.
"""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
import warnings
from collections.abc import Sequence
from typing import Any

from falconlib import prompts
from falconlib.config import Profile
from falconlib.files import JsonLines
from falconlib.policy.models import Policy
from falconlib.records import Task
from falconlib.training.distributed import rank, world
from falconlib.training.outer import target_tokens


def examples(policy: Policy, tasks: Sequence[Task]) -> list[dict[str, list[int]]]:
    """input_ids and completion_mask (1 on the gold program, its fence and eos) of each task that has a gold."""
    rows = []
    for task in tasks:
        if task.gold and task.gold.startswith(prompts.program_prefix(task)):
            prompt = policy.encode(prompts.render(policy.tokenizer, task).text)
            target = target_tokens(policy, task, task.gold)
            rows.append({"input_ids": [*prompt, *target], "completion_mask": [0] * len(prompt) + [1] * len(target)})
    return rows


def train_sft(policy: Policy, tasks: Sequence[Task], profile: Profile, seed: int, log: JsonLines, progress: bool = True) -> int:
    """Trains theta in place; writes loss and gradient norm of each step to `log`. Returns the number of trained tokens.

    With several processes each of them takes `sft.batch` examples a step, and the first one writes."""
    from datasets import Dataset
    from datasets.utils.logging import disable_progress_bar
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments
    from trl import SFTConfig, SFTTrainer

    class Record(TrainerCallback):
        """Trainer logs -> metrics rows, without clock values."""

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
            if logs and "loss" in logs and rank() == 0:
                log.append(
                    {"step": state.global_step, "loss": logs["loss"], "grad_norm": logs["grad_norm"], "lr": logs["learning_rate"]}
                )

    disable_progress_bar()
    rows, sft = examples(policy, tasks), profile.sft
    if rank() == 0:
        log.truncate(0)
    with tempfile.TemporaryDirectory() as scratch, quiet():
        shared = dict(
            output_dir=scratch, num_train_epochs=sft.epochs, max_steps=sft.max_steps or -1, per_device_train_batch_size=sft.batch,
            learning_rate=sft.lr, lr_scheduler_type="cosine", warmup_steps=0.1, max_grad_norm=profile.train.clip_norm,
            weight_decay=0.0, gradient_checkpointing=False, use_cpu=policy.device.type == "cpu",
            bf16=profile.model.dtype == "bfloat16" and policy.device.type == "cuda",
            dataloader_pin_memory=policy.device.type == "cuda", logging_steps=1, save_strategy="no", report_to="none",
            disable_tqdm=not progress, seed=seed, data_seed=seed,
        )  # fmt: skip
        common = {"model": policy.model, "processing_class": policy.tokenizer, "callbacks": [Record()]}
        if policy.seq2seq:
            ends = [len(r["input_ids"]) - sum(r["completion_mask"]) for r in rows]
            pairs = [{"input_ids": r["input_ids"][:n], "labels": r["input_ids"][n:]} for r, n in zip(rows, ends, strict=True)]
            collator = DataCollatorForSeq2Seq(policy.tokenizer)
            trainer = Trainer(
                **common, args=TrainingArguments(**shared), train_dataset=Dataset.from_list(pairs), data_collator=collator
            )
        else:
            settings = SFTConfig(**shared, completion_only_loss=True, max_length=None, packing=False)
            trainer = SFTTrainer(**common, args=settings, train_dataset=Dataset.from_list(rows))
        trainer.train()
        steps = trainer.state.global_step
    policy.model.eval()
    policy.tokenizer.padding_side = "left"
    whole = sum(sum(r["completion_mask"]) for r in rows)  # of one epoch
    return round(steps * sft.batch * world() * whole / max(len(rows), 1)) if sft.max_steps else round(sft.epochs * whole)


@contextlib.contextmanager
def quiet():
    """The trainer prints its log dictionaries; they are in metrics.jsonl already."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of TRL's own use of renamed options
            yield
    finally:
        logger.setLevel(level)
