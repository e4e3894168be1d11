"""One step of reinforcement learning here and in TRL, on the same prompts, completions, adapters and machine.

    python benchmarks/rl_step.py [--prompts 8 --group 8 --tokens 96 --rank 16 --dtype bfloat16] [--json]

Three parts, one process each, one after another: TRL's `GRPOTrainer`, our GRPO step, our FALCON step (two generation phases,
inner and outer update, both memories). SmolLM2-135M, LoRA in float32 on all linear layers. Every completion gets exactly
`--tokens` tokens (no part may stop early) and a reward that is a hash of its text (no group may be skipped for having no
variance); all parts execute every program in the sandbox. TRL runs without gradient checkpointing, its faster way, with its
own bf16 where the base has that type, in micro-batches of `--group` rows; ours take `--micro` tokens at once (the library's
default), two micro-batches side by side. One run is one step of each: repeat it. Every part but the floor first makes an
untimed small step of its own (see WARM_UP), so that cold memory and first calls do not count.
The FALCON step is one whose tasks come for the first time: their short-term buffers hold this step's support only. A task that
comes back brings up to 16 older episodes into the inner loop; in a study of some hundred tasks and steps few do.

floor: 0.27 GFLOP per token and forward pass at the speed of a large product of that type, measured in the same run; each distinct
prompt and each completion token counted once for sampling and twice (forward, backward) for the update.
`--json` prints one line: ratio_grpo_vs_trl, ratio_falcon_vs_trl, ratio_rollout_vs_generate (TRL's generation time / ours),
share_of_floor, and the seconds of all parts.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

GFLOP_PER_TOKEN = 0.27  # SmolLM2-135M: 2 x 134.5 M weights, the tied vocabulary layer included
TEMPERATURE = 0.7
WARM_UP = {"prompts": 2, "group": 4, "tokens": 8}


def hashed_reward(text: str) -> float:
    """A number in [-1, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big") / 2**31 - 1


def setting(options, arm: str):
    """Profile, policy and tasks of all parts."""
    from falconlib.config import Profile, override
    from falconlib.policy.models import load_policy
    from falconlib.tasks import load_tasks
    from falconlib.training.arms import configure

    sizes = {"train.tasks": options.prompts, "train.group": options.group, "inner.support": options.group // 2}
    lora = {"lora.r": options.rank, "lora.alpha": 2 * options.rank, "lora.top_layers": 0}
    other = {"sample.max_new_tokens": options.tokens, "sample.temperature": TEMPERATURE, "train.warmup": 0}
    other |= {"model.dtype": options.dtype, "train.micro_tokens": options.micro}
    profile = configure(override(Profile(), sizes | lora | other), arm, 0)
    tasks = [t for t in load_tasks("basics", "train") if t.gold][: options.prompts]
    return profile, load_policy(profile.model, profile.lora if arm != "base" else None), tasks


def ours(options, arm: str) -> dict:
    """One step of an arm: seconds of its phases."""
    from falconlib.judge import StaticJudge
    from falconlib.memory import LongTermMemory, ShortTermMemory, get_embedder
    from falconlib.policy.generate import Ending
    from falconlib.records import Reward
    from falconlib.rollout import Conductor
    from falconlib.sandbox import Sandbox
    from falconlib.training.mrlf import MRLF

    profile, policy, tasks = setting(options, arm)
    long = short = None
    with tempfile.TemporaryDirectory() as folder, Sandbox(profile.sandbox) as sandbox:
        if profile.long_term.enabled:
            long = LongTermMemory(Path(folder) / "memory.sqlite", get_embedder(profile.long_term.embedder))
            long.add_tasks(tasks)
            long.add_golds(tasks)
            short = ShortTermMemory(profile.short_term.size, profile.short_term.total)
        conductor = Conductor(policy, sandbox, StaticJudge(), profile, 0, long, short)
        score, add = conductor.score, Ending.add

        def rewarded(*args):
            values = [(e, hashed_reward(e.completion)) for e in score(*args)]
            return [dataclasses.replace(e, reward=Reward(unit=v, total=v)) for e, v in values]

        conductor.score = rewarded
        run = MRLF(policy, conductor, tasks, profile, 0, Path(folder))
        with mock.patch.object(Ending, "add", lambda *args: bool(add(*args)) and False):
            start = time.perf_counter()
            row = run.step(1)
            seconds = time.perf_counter() - start
        spent = conductor.seconds
        if long is not None:
            long.close()
    update = spent["update"] + spent.get("inner", 0.0)
    scoring = spent["execute"] + spent.get("judge", 0.0)
    assert row["length"] == options.tokens
    return {"seconds": seconds, "generation": spent["generate"], "scoring": scoring, "update": update}


def trl(options) -> dict:
    """One optimizer step of TRL's GRPOTrainer."""
    import peft
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from falconlib import prompts
    from falconlib.policy.models import lora_targets
    from falconlib.sandbox import Sandbox, program_for

    profile, policy, tasks = setting(options, "base")
    texts = {prompts.render(policy.tokenizer, t).text: t for t in tasks}
    spent = {"generation": 0.0, "scoring": 0.0}
    sandbox = Sandbox(profile.sandbox)

    def reward(prompts_, completions, **_):
        codes = [prompts.extract_program(c, "") for c in completions]
        sandbox.run_many([program_for(texts[p], c) for p, c in zip(prompts_, codes, strict=True)])
        return [hashed_reward(c) for c in completions]

    def timed(work, name):
        def call(*args, **kwargs):
            start = time.perf_counter()
            found = work(*args, **kwargs)
            spent[name] += time.perf_counter() - start
            return found

        return call

    class Clock(TrainerCallback):
        def on_step_begin(self, *_args, **_kwargs):
            spent["begin"] = time.perf_counter()

        def on_step_end(self, *_args, **_kwargs):
            spent["seconds"] = time.perf_counter() - spent.pop("begin")

    with tempfile.TemporaryDirectory() as folder:
        settings = GRPOConfig(
            output_dir=folder, max_steps=1, num_generations=options.group, per_device_train_batch_size=options.group,
            gradient_accumulation_steps=options.prompts, max_completion_length=options.tokens, temperature=TEMPERATURE, top_k=0,
            generation_kwargs={"min_new_tokens": options.tokens}, gradient_checkpointing=False, use_cpu=True,
            bf16=options.dtype == "bfloat16", learning_rate=profile.train.lr, report_to="none", save_strategy="no", beta=0.0,
            dataloader_pin_memory=False, disable_tqdm=True, epsilon=profile.train.clip_low, epsilon_high=profile.train.clip_high,
        )  # fmt: skip
        targets = lora_targets(policy.model, 0)
        lora = peft.LoraConfig(r=options.rank, lora_alpha=2 * options.rank, target_modules=targets, task_type="CAUSAL_LM")
        trainer = GRPOTrainer(
            model=policy.model, args=settings, peft_config=lora, processing_class=policy.tokenizer, callbacks=[Clock()],
            train_dataset=Dataset.from_list([{"prompt": t} for t in texts]),
            reward_funcs=lambda prompts, completions, **rest: reward(prompts, completions, **rest),
        )  # fmt: skip
        trainer._generate = timed(trainer._generate, "generation")
        trainer._calculate_rewards = timed(trainer._calculate_rewards, "scoring")
        trainer.train()
    sandbox.close()
    length = trainer.state.log_history[0]["completions/mean_length"]
    assert length == options.tokens, f"TRL sampled {length} tokens per completion"
    return spent | {"update": spent["seconds"] - spent["generation"] - spent["scoring"]}


def floor(options) -> dict:
    """Speed of a large matrix product in GFLOP/s, and the seconds that the step's arithmetic needs at that speed."""
    import torch

    from falconlib import prompts

    _, policy, tasks = setting(options, "base")
    x, w, best = *(torch.randn(n, 576, dtype=getattr(torch, options.dtype)) for n in (4096, 1536)), 0.0
    for _ in range(20):
        start = time.perf_counter()
        for _ in range(5):
            x @ w.T
        best = max(best, 5 * 2 * x.shape[0] * w.numel() / (time.perf_counter() - start) / 1e9)
    distinct = sum(len(policy.encode(prompts.render(policy.tokenizer, t).text)) for t in tasks)
    tokens = distinct + options.prompts * options.group * options.tokens
    return {"gflops": best, "prompt_tokens": distinct / len(tasks), "seconds": 3 * tokens * GFLOP_PER_TOKEN / best}


def measure(options, part: str) -> dict:
    """A part in its own process: its dictionary."""
    sizes = [f"--{name}={getattr(options, name)}" for name in ("prompts", "group", "tokens", "rank", "dtype", "micro")]
    done = subprocess.run([sys.executable, __file__, *sizes, "--part", part], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"part {part} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("prompts", 8), ("group", 8), ("tokens", 96), ("rank", 16)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the base's weights, in all parts"
    )
    parser.add_argument("--micro", type=int, default=1024, help="train.micro_tokens of our parts")
    parser.add_argument("--part", choices=("trl", "grpo", "falcon", "floor"), help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true", help="one line of JSON only")
    options = parser.parse_args()
    if options.part:
        work = {"trl": trl, "floor": floor}.get(options.part, lambda o: ours(o, o.part))
        if options.part != "floor":
            work(argparse.Namespace(**(vars(options) | WARM_UP)))
        found = work(options) | {"peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
        print("\n" + json.dumps({k: round(v, 2) for k, v in found.items()}))
        return
    parts = {part: measure(options, part) for part in ("floor", "grpo", "falcon", "trl")}
    sampled = options.prompts * options.group * options.tokens
    for part in ("grpo", "falcon", "trl"):
        parts[part]["tokens_per_s"] = round(sampled / parts[part]["seconds"], 1)
    found = {
        "ratio_grpo_vs_trl": round(parts["trl"]["seconds"] / parts["grpo"]["seconds"], 2),
        "ratio_falcon_vs_trl": round(parts["trl"]["seconds"] / parts["falcon"]["seconds"], 2),
        "ratio_rollout_vs_generate": round(parts["trl"]["generation"] / parts["grpo"]["generation"], 2),
        "share_of_floor": round(parts["floor"]["seconds"] / parts["grpo"]["seconds"], 2),
        **parts,
    }
    if options.json:
        print(json.dumps(found))
        return
    for name in ("grpo", "falcon", "trl"):
        print(f"{name:7}", ", ".join(f"{k} {v:g}" for k, v in parts[name].items()))
    print("floor  ", ", ".join(f"{k} {v:g}" for k, v in parts["floor"].items()))
    print(", ".join(f"{k} {v}" for k, v in found.items() if k.startswith(("ratio", "share"))))


if __name__ == "__main__":
    main()
