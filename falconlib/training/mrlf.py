"""MRLF: meta-reinforcement learning with feedback rewards, the bi-level loop of the method (METHOD section 5).

    support rollouts with theta -> inner step delta (local level) -> query rollouts with theta + delta
    L_outer(theta) = (K_s/G) L_pg(S; theta) + (K_q/G) L_pg(Q; theta + stop(delta)) + b_sl CE + b_neg L_negative
    clip, AdamW (global level); remember; curriculum

Without the inner loop (J = 0) a step is one group of G rollouts with one normaliser: plain reinforcement learning. The
gradient is first order: `backward` runs while the detached deltas are active, and what reaches `lora_B` is the gradient
at the adapted point.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from falconlib import prompts
from falconlib.config import Profile
from falconlib.errors import FalconError
from falconlib.files import JsonLines, sha256_of
from falconlib.policy.fast_weights import Deltas, FastWeights
from falconlib.policy.models import Policy
from falconlib.records import Episode, Feedback, Task, to_json
from falconlib.rollout import Conductor, stream_seed
from falconlib.tasks import fingerprint, sample_tasks
from falconlib.training import checkpoint
from falconlib.training.advantages import scored
from falconlib.training.inner import Adaptation, adapt, inner_examples
from falconlib.training.losses import (
    Example,
    collate,
    completion_logits,
    count_tokens,
    cross_entropy_loss,
    mean_entropy,
    micro_batches,
    negative_loss,
    policy_gradient_loss,
    token_logprobs,
)
from falconlib.training.metrics import step_metrics

CURRICULUM_RATE = 0.3  # [ours] the running pass rate remembers about three visits
CURRICULUM_FLOOR = 0.05  # [ours] no task is ever out of reach


@dataclass
class MRLF:
    """One training run. tasks: train split only, whose golds fit the sampled length. pass_rate: p[x] of the curriculum."""

    policy: Policy
    conductor: Conductor
    tasks: Sequence[Task]
    profile: Profile
    seed: int
    folder: Path
    pass_rate: dict[str, float] = field(default_factory=dict)
    totals: dict[str, int] = field(default_factory=lambda: {"completions": 0, "programs": 0, "trained_tokens": 0})

    def __post_init__(self) -> None:
        self.by_id = {t.task_id: t for t in self.tasks}
        self.parameters = self.policy.parameters()
        train = self.profile.train
        self.optimizer = torch.optim.AdamW(self.parameters, lr=train.lr, betas=(0.9, 0.99), weight_decay=0.0)
        self.metrics = JsonLines(self.folder / "metrics.jsonl")
        self.timings = JsonLines(self.folder / "timings.jsonl")

    # ---- the loop

    def run(self, progress: bool = True) -> None:
        """Trains from the last checkpoint (or the start) to `train.steps`. Ctrl-C leaves a run that resumes."""
        start = self.resume()
        steps = self.profile.train.steps
        for step in tqdm(
            range(start + 1, steps + 1), desc=self.profile.train.arm, initial=start, total=steps, disable=not progress
        ):
            self.conductor.seconds.clear()
            row = self.conductor.timed("step", self.step, step)
            self.metrics.append({"step": step, **row})
            self.timings.append({"step": step, **{k: round(v, 3) for k, v in self.conductor.seconds.items()}})
            if step % self.profile.train.checkpoint_every == 0 or step == steps:
                self.save(step)

    def step(self, step: int) -> dict[str, Any]:
        """One outer step; returns its metrics."""
        train, inner = self.profile.train, self.profile.inner
        tasks = self.choose(step)
        plain_rl = inner.steps == 0
        support_size = train.group if plain_rl else inner.support
        collect = self.conductor.collect
        support = collect(
            tasks, group="support", step=step, rollouts=range(support_size), memory_share=self.profile.long_term.prompt_share
        )
        adaptation, query = None, []
        if not plain_rl:
            adaptation = self.conductor.timed("inner", self.adapt, tasks, support)
            rollouts = range(support_size, train.group)
            query = collect(tasks, group="query", step=step, rollouts=rollouts, deltas=adaptation.deltas)
        outer = self.conductor.timed("update", self.update, step, tasks, support, query, adaptation)
        effect = self.conductor.remember(support, query)
        self.learn_pass_rates(tasks, [*support, *query])
        self.totals["completions"] += len(support) + len(query)
        self.totals["programs"] += len({(e.task_id, e.code) for e in [*support, *query]})
        self.totals["trained_tokens"] += outer.pop("trained_tokens") + (adaptation.tokens if adaptation else 0)
        return step_metrics(support, query, adaptation, effect, outer, self.profile) | self.totals

    def choose(self, step: int) -> list[Task]:
        """N tasks with probability ~ p (1 - p) + floor: those that are sometimes solved teach most."""
        rates = [self.pass_rate.get(t.task_id, 0.5) for t in self.tasks]
        rng = random.Random(stream_seed(self.seed, step, "curriculum", 0))
        return sample_tasks(self.tasks, [p * (1 - p) + CURRICULUM_FLOOR for p in rates], self.profile.train.tasks, rng)

    def adapt(self, tasks: Sequence[Task], support: Sequence[Episode]) -> Adaptation:
        """The inner loop on M_S(x) and on the verified programs of the nearest tasks."""
        buffers = self.conductor.buffers(tasks, support)
        neighbours = self.conductor.neighbour_programs(tasks)
        positives = [[x for i, code in found for x in self.supervised(i, code)] for found in neighbours]
        return adapt(self.policy, len(tasks), inner_examples(buffers, positives, self.profile), self.profile)

    def learn_pass_rates(self, tasks: Sequence[Task], episodes: Sequence[Episode]) -> None:
        """p[x] <- smoothed pass rate; verdicts that are unknown do not count."""
        for task in tasks:
            known = [e for e in episodes if e.task_id == task.task_id and e.reward and e.reward.unit is not None]
            if known:
                rate = sum(e.feedback.status == "pass" for e in known) / len(known)
                old = self.pass_rate.get(task.task_id, 0.5)
                self.pass_rate[task.task_id] = old + CURRICULUM_RATE * (rate - old)

    # ---- the outer update

    def update(
        self,
        step: int,
        tasks: Sequence[Task],
        support: Sequence[Episode],
        query: Sequence[Episode],
        adaptation: Adaptation | None,
    ) -> dict[str, Any]:
        """Backward of L_outer and one optimizer step; returns losses, gradient norm and counts."""
        train = self.profile.train
        index = {t.task_id: i for i, t in enumerate(tasks)}
        kind = train.advantage
        share = len(support) / (len(support) + len(query))
        self.optimizer.zero_grad(set_to_none=True)
        found = self.policy_gradient(scored(support, self.profile, kind, index), share, None)
        if query:
            more = self.policy_gradient(scored(query, self.profile, kind, index), 1 - share, adaptation.deltas)
            found = {k: found[k] + more[k] for k in found}
        gold = [x for t in tasks for x in self.supervised(t.task_id, t.gold)] if train.b_sl else []
        written = self.conductor.own_programs(tasks, [*support, *query]) if train.b_sl else []
        own = [x for i, code in written for x in self.supervised(i, code)]
        wrong = [x for failure in self.conductor.failures(tasks) for x in self.failure_example(*failure)] if train.b_neg else []
        sl, sl_tokens = self.accumulate([*gold, *own], train.b_sl, cross_entropy_loss)
        neg, neg_tokens = self.accumulate(wrong, train.b_neg, negative_loss)
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, train.clip_norm))
        if not math.isfinite(norm):
            self.give_up(step, [*support, *query])
        for group in self.optimizer.param_groups:
            group["lr"] = train.lr * min(1.0, step / max(train.warmup, 1))
        self.optimizer.step()
        entropy = found["entropy"] / found["rows"] if found["rows"] else None  # of the rows that teach something
        clipped = found["clipped"] / found["tokens"] if found["tokens"] else None
        trained = found["tokens"] + sl_tokens + neg_tokens
        losses = {"loss_pg": found["loss"], "loss_sl": sl, "loss_neg": neg}
        return losses | {"grad_norm": norm, "entropy": entropy, "clipped": clipped, "trained_tokens": trained}

    def policy_gradient(self, examples: Sequence[Example], share: float, deltas: Deltas | None) -> dict[str, float]:
        """Accumulates the gradient of share * L_pg at theta (+ deltas); rows without advantage add nothing and are skipped."""
        train = self.profile.train
        normaliser = count_tokens(examples) / share
        live = [e for e in examples if any(e.advantages)]
        total = {"loss": 0.0, "clipped": 0.0, "entropy": 0.0, "rows": 0, "tokens": 0}
        fast = FastWeights(self.policy.model)
        for chunk in micro_batches(self.policy, live, train.micro_tokens):
            batch = collate(self.policy, chunk)
            with fast.active(deltas if deltas is not None else {}):
                fast.select(batch.task)
                logits = completion_logits(self.policy, chunk, batch.tokens)
                logprobs = token_logprobs(logits, batch.tokens, self.profile.sample.temperature)
                loss, cut = policy_gradient_loss(logprobs, batch, normaliser, train.clip_low, train.clip_high)
                loss.backward()
            total["loss"] += float(loss.detach())
            total["clipped"] += float(cut)
            total["entropy"] += mean_entropy(logits.detach(), batch.mask, self.profile.sample.temperature) * len(chunk)
            total["rows"] += len(chunk)
            total["tokens"] += sum(len(e.tokens) for e in chunk)
        return total

    def supervised(self, task_id: str, code: str | None) -> list[Example]:
        """The program as a target under the task's plain prompt; nothing when it is missing or longer than we sample."""
        task = self.by_id[task_id]
        if not code or not code.startswith(prompts.program_prefix(task)):  # a completion may have restated its header
            return []
        tokens = target_tokens(self.policy, task, code)
        if len(tokens) > self.profile.sample.max_new_tokens + 1:  # + 1: the closing eos
            return []
        return [Example(prompts.render(self.policy.tokenizer, task).text, tokens)]

    def accumulate(
        self, examples: Sequence[Example], weight: float, loss_of: Callable[..., torch.Tensor]
    ) -> tuple[float | None, int]:
        """Accumulates the gradient of weight * loss; returns the loss (None without examples) and the tokens it looked at."""
        if not examples or not weight:
            return None, 0
        normaliser, value = count_tokens(examples), 0.0
        for chunk in micro_batches(self.policy, examples, self.profile.train.micro_tokens):
            batch = collate(self.policy, chunk)
            logprobs = token_logprobs(completion_logits(self.policy, chunk, batch.tokens), batch.tokens)
            loss = loss_of(logprobs, batch, normaliser)
            (weight * loss).backward()
            value += float(loss.detach())
        return value, sum(len(e.tokens) for e in examples)

    def failure_example(self, task_id: str, code: str, feedback: Feedback) -> list[Example]:
        """A stored failure as a target whose mask covers its error lines; nothing when it has no located error."""
        task = self.by_id[task_id]
        if feedback.scope != "line" or not code.startswith(prompts.program_prefix(task)):
            return []
        tokens = target_tokens(self.policy, task, code)[:-1]  # without eos: only the program can be wrong
        mask = self.conductor.error_mask(tokens, self.policy.decode(tokens), code, feedback)
        return [Example(prompts.render(self.policy.tokenizer, task).text, tokens, mask=mask)] if any(mask) else []

    # ---- checkpoints

    def save(self, step: int) -> None:
        """Writes a checkpoint of everything that the next step depends on."""
        short = self.conductor.short_term
        state = {
            "arm": self.profile.train.arm,
            "seed": self.seed,
            "settings": self.settings(),
            "pass_rate": self.pass_rate,
            "totals": self.totals,
            "short_term": short.state() if short is not None else None,
        }
        folder, keep = self.folder / "checkpoints", self.profile.train.keep
        checkpoint.save(folder, step, self.policy, self.optimizer, state, self.conductor.long_term, keep)

    def resume(self) -> int:
        """Loads the last checkpoint and cuts the logs to it; returns its step, 0 for a fresh start."""
        found = checkpoint.existing(self.folder / "checkpoints")
        step = 0
        if found:
            state = checkpoint.load(found[-1], self.policy, self.optimizer)
            if (state["arm"], state["seed"]) != (self.profile.train.arm, self.seed):
                raise FalconError(
                    f"{found[-1]} belongs to arm {state['arm']}, seed {state['seed']}",
                    f"delete {self.folder} or use another folder",
                )
            if state["settings"] != self.settings():
                raise FalconError(f"{found[-1]} was made with other settings", f"delete {self.folder} or use another folder")
            step, self.pass_rate, self.totals = state["step"], state["pass_rate"], state["totals"]
            if self.conductor.short_term is not None:
                self.conductor.short_term.load(state["short_term"])
            if self.conductor.long_term is not None:
                self.conductor.long_term.restore(found[-1] / "long_term.sqlite")
        for log in (self.metrics, self.timings):
            log.truncate(step)
        return step

    def settings(self) -> str:
        """Hash of everything but the number of steps that the run depends on: a checkpoint of other settings is not ours."""
        profile = asdict(self.profile)
        for name in ("name", "arms", "seeds", "ablations", "eval", "sft"):
            del profile[name]
        profile["train"] |= {"steps": 0, "keep": 0, "checkpoint_every": 0}
        return sha256_of([profile, fingerprint(self.tasks)])

    def give_up(self, step: int, episodes: Sequence[Episode]) -> None:
        """A gradient that is not finite stops the run, with the batch saved for whoever looks into it."""
        path = self.folder / f"bad_batch_step{step}.jsonl"
        path.write_text("".join(to_json(e) + "\n" for e in episodes), encoding="utf-8")
        raise FalconError(
            f"the gradient of step {step} is not finite; its episodes are in {path}",
            "lower train.lr, or resume from the last checkpoint",
        )


def target_tokens(policy: Policy, task: Task, code: str) -> tuple[int, ...]:
    """Token ids of a program as a completion of its task: closing fence and eos included."""
    return (*policy.encode(prompts.target_text(code, task)), policy.eos)


def fitting(policy: Policy, tasks: Sequence[Task], max_new_tokens: int) -> list[Task]:
    """The tasks whose gold program fits the sampled length: the others could never be solved in training."""
    usable = [t for t in tasks if t.gold and t.gold.startswith(prompts.program_prefix(t))]
    return [t for t in usable if len(target_tokens(policy, t, t.gold)) - 1 <= max_new_tokens]
