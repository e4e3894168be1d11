"""Training: the losses (`losses`), the inner loop (`inner`), the MRLF loop (`mrlf`), SFT (`sft`), the arms (`arms`).

`run_arm` is what the notebook and the command line call.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from falconlib.config import Profile
from falconlib.errors import FalconError

__all__ = ["run_arm"]

# the model card of an adapter, in the place of peft's empty one, which names the cache folder of this machine
CARD = """---
library_name: peft
tags: [lora, code, falcon]
---
# {name}, trained by the arm `{arm}`

A LoRA adapter of {name}, made by `falconlib` (profile {p.name}, seed {p.train.seed}). The arm: {what}.
Results: its run's report. FOLDER is this folder:
`falconlib eval --profile {p.name} --model {name} --adapter FOLDER --tasks humaneval`, or

```python
from falconlib.config import ModelConfig
from falconlib.policy.models import load_policy

policy = load_policy(ModelConfig(name="{name}"), adapter="FOLDER")
```
"""


def run_arm(
    profile: Profile,
    arm: str,
    seed: int,
    folder: Path,
    sft_adapter: Path | None = None,
    progress: bool = True,
    watch=lambda row: None,
):
    """Trains one arm in `folder` (resuming what lies there) and returns its Policy.

    Writes metrics.jsonl, timings.jsonl, budget.json, checkpoints/, adapter/ and, with long-term memory, memory.sqlite.
    "base" trains nothing. Reinforcement learning starts from `sft_adapter`. "grpo-time" needs the finished folder of the falcon
    run of its seed beside its own. watch: called with each row of metrics. Under `accelerate launch` the processes share the
    work (see training.distributed), and the first one writes.

    Raises FalconError: unknown arm, missing SFT adapter, no task whose gold fits the sampled length, no run to equal.
    """
    from falconlib.files import JsonLines, write_json, write_text
    from falconlib.policy.models import load_policy
    from falconlib.tasks import load_tasks
    from falconlib.training import distributed
    from falconlib.training.arms import SETTINGS, configure
    from falconlib.training.outer import fitting
    from falconlib.training.sft import train_sft

    profile = configure(profile, arm, seed)
    distributed.start(cpu=profile.model.device == "cpu")
    folder.mkdir(parents=True, exist_ok=True)
    rl = SETTINGS[arm][1] is not None
    if rl and not (sft_adapter and (sft_adapter / "adapter_config.json").is_file()):
        where = f" in {sft_adapter}" if sft_adapter else ""
        remedy = f"falconlib train --arm sft --seed {seed} first"
        raise FalconError(f"arm {arm!r} starts from the SFT adapter, and there is none{where}", remedy)
    other = profile.train.budget_of
    limit = spent_by(folder.parent / f"{other}-s{seed}", profile.train.budget) if other else None
    policy = load_policy(profile.model, None if arm == "base" or rl else profile.lora, sft_adapter if rl else None, seed)
    chosen = profile.tasks
    tasks = [t for name in chosen.train for t in load_tasks(name, "train", chosen.train_limit, chosen.seed)]
    budget = {"completions": 0, "programs": 0, "trained_tokens": 0}
    if arm == "sft":
        budget["trained_tokens"] = train_sft(policy, tasks, profile, seed, JsonLines(folder / "metrics.jsonl"), progress)
    elif rl:
        fits = fitting(policy, tasks, profile.sample.max_new_tokens)
        short = f"gold program of at most {profile.sample.max_new_tokens} tokens (sample.max_new_tokens)"
        if not fits:
            raise FalconError(f"no training task has a {short}", "raise sample.max_new_tokens")
        if len(fits) < len(tasks) and not distributed.rank():
            sys.stdout.write(f"{len(fits)} of {len(tasks)} training tasks are used: the others have no {short}\n")
        budget = train_rl(policy, fits, profile, seed, folder, progress, watch, limit)
        budget |= {"tasks_used": len(fits), "tasks_given": len(tasks)}
    if distributed.rank():
        return policy
    if arm != "base":
        policy.model.peft_config["default"].base_model_name_or_path = profile.model.name  # not the cache folder of this machine
        policy.model.save_pretrained(folder / "adapter", save_embedding_layers=False)  # "auto" would ask the hub
        card = CARD.format(name=profile.model.name, arm=arm, what=SETTINGS[arm][0], p=profile)
        write_text(folder / "adapter" / "README.md", card)
    write_json(folder / "budget.json", budget)
    return policy


def spent_by(folder: Path, kind: str) -> float:
    """What the training run in `folder` spent, "wall_s" (its steps alone) or "trained_tokens". Raises FalconError unless it is
    complete."""
    from falconlib.files import JsonLines, read_json

    if not (folder / "budget.json").is_file():
        raise FalconError(f"there is no finished run in {folder} whose {kind} could be equalled", "train that arm and seed first")
    if kind == "trained_tokens":
        return read_json(folder / "budget.json")[kind]
    return sum(row["total"] for row in JsonLines(folder / "timings.jsonl").rows())


def train_rl(policy, tasks, profile: Profile, seed: int, folder: Path, progress: bool, watch, limit=None) -> dict[str, int]:
    """Sets up the conductor and its memories, runs the MRLF loop, and returns the budget it used."""
    from falconlib.judge import open_judge
    from falconlib.memory.long_term import LongTermMemory
    from falconlib.memory.short_term import ShortTermMemory
    from falconlib.memory.store import SIDE
    from falconlib.policy.models import load_judge
    from falconlib.policy.states import embedder_for
    from falconlib.rollout import Conductor
    from falconlib.sandbox import Sandbox
    from falconlib.tasks import load_tasks
    from falconlib.training.distributed import rank
    from falconlib.training.mirror import mirror
    from falconlib.training.mrlf import MRLF

    long, short = None, None
    if profile.long_term.enabled:
        # what an interrupted run left behind is not this run's: `resume` restores the checkpoint's own copy
        name = f"memory-{rank()}.sqlite" if rank() else "memory.sqlite"  # every process has its own, with the same content
        for end in SIDE:
            Path(f"{folder / name}{end}").unlink(missing_ok=True)
        embedder = embedder_for(profile.long_term.embedder, profile.model)
        long = LongTermMemory(folder / name, embedder, run_id=folder.name, clock=time.time)
        long.add_tasks(tasks)
        long.add_golds(tasks)
        # what looks like a task that may be evaluated is neither shown nor counted while training
        sets = dict.fromkeys((*profile.tasks.benchmarks, *profile.tasks.train))
        long.blocklist([t for name in sets for t in load_tasks(name) if t.split in ("test", "validation")])
    if profile.short_term.enabled:
        short = ShortTermMemory(profile.short_term.size, profile.short_term.total)
    try:
        with Sandbox(profile.sandbox) as sandbox, open_judge(profile.judge, load_judge) as judge:
            run = MRLF(policy, Conductor(policy, sandbox, judge, profile, seed, long, short), tasks, profile, seed, folder, limit)
            with mirror("" if rank() else profile.train.mirror, folder) as copy:
                run.run(progress and not rank(), lambda row: (copy(row), watch(row)))
            return run.totals
    finally:
        if long is not None:
            long.close()
            for end in SIDE if rank() else ():  # the first process's is the run's; a resumed run takes the checkpoint's
                Path(f"{folder / name}{end}").unlink(missing_ok=True)
