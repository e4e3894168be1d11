"""MRLF: meta-reinforcement learning with feedback rewards, the bi-level loop of the method (METHOD section 5).

    support rollouts with theta -> inner step delta (local level) -> query rollouts with theta + delta
    -> gradient of L_outer (see training.outer), clip, AdamW (global level) -> remember -> curriculum

Without the inner loop (J = 0) a step is one group of G rollouts with one normaliser: plain reinforcement learning. With several
processes (see training.distributed) a step has N tasks per process, and all of them end it with the same theta and memories.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from falconlib.config import Profile
from falconlib.errors import FalconError
from falconlib.files import JsonLines, write_text
from falconlib.policy.models import Policy
from falconlib.records import Episode, Task, to_json
from falconlib.rollout import Conductor, stream_seed
from falconlib.tasks import fingerprint, sample_tasks
from falconlib.training import checkpoint
from falconlib.training.advantages import GREEDY
from falconlib.training.batches import MicroBatches
from falconlib.training.distributed import gather, rank, world
from falconlib.training.error_critic import ErrorCritic
from falconlib.training.inner import Adaptation, adapt, inner_examples
from falconlib.training.metrics import step_metrics
from falconlib.training.mirror import Watch
from falconlib.training.outer import Outer, SupportHalf
from falconlib.training.value_head import ValueHead
from falconlib.typed import leaves
from falconlib.watch import alarms, forgery

CURRICULUM_RATE = 0.3  # [ours] the running pass rate remembers about three visits
CURRICULUM_FLOOR = 0.05  # [ours] no task is ever out of reach
CRITICS = {"critic": ErrorCritic, "gae": ValueHead}  # of the arms that have one, by train.advantage
FREE = ("name", "arms", "seeds", "ablations", "rates", "eval.", "sft.", "train.steps", "train.keep", "train.checkpoint_every",
        "train.mirror")  # settings that do not change a step  # fmt: skip
LONGEST = 20  # [ours] a run with a budget ends at so many times train.steps all the same


@dataclass
class MRLF:
    """One training run. tasks: train split only, whose golds fit the sampled length. pass_rate: p[x] of the curriculum.
    budget: what it may spend, in units of train.budget; None: train.steps decides."""

    policy: Policy
    conductor: Conductor
    tasks: Sequence[Task]
    profile: Profile
    seed: int
    folder: Path
    budget: float | None = None
    pass_rate: dict[str, float] = field(default_factory=dict)
    totals: dict[str, int] = field(default_factory=lambda: {"completions": 0, "programs": 0, "trained_tokens": 0})

    def __post_init__(self) -> None:
        if len(self.tasks) < world():
            raise FalconError(f"{len(self.tasks)} training tasks for {world()} processes", "start fewer processes")
        train = self.profile.train
        self.parameters = self.policy.parameters()
        self.micro = MicroBatches(self.policy, train.micro_tokens, train.side_by_side)
        known, critic = {t.task_id: t for t in self.tasks}, CRITICS.get(train.advantage)
        self.critic = critic(self.policy, self.profile, self.micro, known) if critic else None
        self.outer = Outer(self.policy, self.conductor, known, self.profile, self.micro, self.critic)
        self.start = theta_hash(self.parameters)
        self.optimizer = torch.optim.AdamW(self.parameters, lr=train.lr, betas=(0.9, 0.99), weight_decay=0.0)
        self.metrics = JsonLines(self.folder / "metrics.jsonl")
        self.counted: dict[str, int] = {}  # the judge's questions up to the last step
        self.timings = JsonLines(self.folder / "timings.jsonl")

    # ---- the loop

    def run(self, progress: bool = True, watch: Watch = lambda row: None) -> None:
        """Trains from the last checkpoint (or the start) to `train.steps`, or until the budget is spent.

        Ctrl-C ends the step at work, writes its checkpoint and then raises KeyboardInterrupt; a second one stops at once.
        """
        start, steps = self.resume(), self.profile.train.steps * (LONGEST if self.budget is not None else 1)
        spent = self.spent()
        bar = tqdm(range(start + 1, steps + 1), desc=self.profile.train.arm, initial=start, total=steps, disable=not progress)
        with interruptible() as asked:
            for step in bar:
                if spent:
                    break
                self.conductor.seconds.clear()
                row = {"step": step, **self.conductor.timed("total", self.step, step)}
                if rank() == 0:
                    self.metrics.append(row)
                    self.timings.append({"step": step, **{k: round(v, 3) for k, v in self.conductor.seconds.items()}})
                    watch(row)
                stop, spent = any(gather([bool(asked)])), self.spent()
                if step % self.profile.train.checkpoint_every == 0 or step == steps or stop or spent:
                    self.save(step)
                if stop:
                    raise KeyboardInterrupt

    def spent(self) -> bool:
        """Whether the budget is spent; the clock is the first process's."""
        if self.budget is None:
            return False
        seconds = sum(row["total"] for row in self.timings.rows()) if rank() == 0 else 0.0
        return any(gather([{"wall_s": seconds, **self.totals}[self.profile.train.budget] >= self.budget]))

    def step(self, step: int) -> dict[str, Any]:
        """One outer step, as in METHOD section 5; returns its metrics."""
        train, share = self.profile.train, self.profile.long_term.prompt_share
        plain_rl = self.profile.inner.steps == 0
        size = train.group if plain_rl else self.profile.inner.support  # K_s
        collect, timed = self.conductor.collect, self.conductor.timed
        tasks = self.choose(step)
        own = tasks[len(tasks) * rank() // world() : len(tasks) * (rank() + 1) // world()]
        best = int(train.advantage == "critic")  # CodeRL's baseline: the last of the G is the likeliest program
        support = gather(collect(own, group="support", step=step, rollouts=range(size - best), memory_share=share))
        if best:
            support += gather(collect(own, group=GREEDY, step=step, rollouts=range(size - best, size), greedy=True))
        adaptation, query, norms = None, [], []
        if not plain_rl:
            adaptation = timed("inner", self.adapt, own, support)  # local level
            norms = gather(list(adaptation.norms))
            if not all(map(math.isfinite, norms)):
                self.give_up(step, support)
            found = collect(own, group="query", step=step, rollouts=range(size, train.group), deltas=adaptation.deltas)
            query = gather(found)
        outer = timed("update", self.update, step, own, tasks, support, query, adaptation)  # global level
        effect = self.conductor.remember(support, query)
        self.learn_pass_rates(tasks, [*support, *query])
        self.totals["completions"] += len(support) + len(query)
        self.totals["programs"] += len({(e.task_id, e.code) for e in [*support, *query]})
        self.totals["trained_tokens"] += outer.pop("trained_tokens") + (sum(gather([adaptation.tokens])) if adaptation else 0)
        row = step_metrics(support, query, norms, effect, outer, self.profile) | self.totals | self.judge_counts()
        done = row["completions"]
        row["sentinel"] = self.conductor.sentinel(tasks[0], done - len(support) - len(query), done)
        if row["sentinel"] == "pass":
            self.distrust(step, tasks[0], forgery(tasks[0], done - len(support) - len(query)))
        return row | {"alarms": alarms([*self.metrics.rows(), row], train.steps)}

    def choose(self, step: int) -> list[Task]:
        """N tasks per process with probability ~ p (1 - p) + floor: those that are sometimes solved teach most."""
        rates = [self.pass_rate.get(t.task_id, 0.5) for t in self.tasks]
        rng = random.Random(stream_seed(self.seed, step, "curriculum", 0))
        weights = [p * (1 - p) + CURRICULUM_FLOOR for p in rates]
        return sample_tasks(self.tasks, weights, self.profile.train.tasks * world(), rng)

    def adapt(self, tasks: Sequence[Task], support: Sequence[Episode]) -> Adaptation:
        """The inner loop on M_S(x) and on the verified programs of the nearest tasks."""
        buffers = self.conductor.buffers(tasks, support)
        neighbours = self.conductor.neighbour_programs(tasks)
        positives = [[x for i, code in found for x in self.outer.supervised(i, code)] for found in neighbours]
        examples = inner_examples(buffers, positives, self.profile)
        half = SupportHalf(self.outer, examples, tasks, support)  # of L_outer, in the same passes
        return adapt(self.policy, len(tasks), examples, self.profile, self.micro, half)

    def update(
        self, step: int, own: Sequence[Task], tasks: Sequence[Task], support: Sequence[Episode], query: Sequence[Episode],
        adaptation: Adaptation | None,
    ) -> dict[str, Any]:  # fmt: skip
        """The gradient of L_outer over all processes, clipped, and one AdamW step; returns losses, norm and counts.

        Raises FalconError when a loss or the gradient is not finite; theta stays, and the batch is saved.
        """
        train = self.profile.train
        for p in self.parameters if adaptation is None or adaptation.half is None else ():
            p.grad = torch.zeros_like(p)
        outer = self.outer.gradient(own, tasks, support, query, adaptation)
        if world() > 1:
            flat = torch.cat([p.grad.flatten() for p in self.parameters if p.grad is not None])  # each has one, be it zeros
            whole = torch.stack(gather([flat.cpu()])).sum(0).to(flat.device)  # in rank order: the same bits everywhere
            for p, g in zip(self.parameters, whole.split([p.numel() for p in self.parameters]), strict=True):
                p.grad = g.view_as(p)
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, train.clip_norm))
        if not all(math.isfinite(v) for v in (norm, *outer.values()) if v is not None):
            self.give_up(step, [*support, *query])
        for group in self.optimizer.param_groups:
            group["lr"] = train.lr * min(1.0, step / max(train.warmup, 1))
        if norm > 0:  # else there was nothing to learn, and momentum alone must not move theta
            self.optimizer.step()
        return outer | {"grad_norm": norm}

    def learn_pass_rates(self, tasks: Sequence[Task], episodes: Sequence[Episode]) -> None:
        """p[x] <- smoothed pass rate; verdicts that are unknown do not count."""
        for task in tasks:
            known = [e for e in episodes if e.task_id == task.task_id and e.reward and e.reward.unit is not None]
            if known:
                rate = sum(e.feedback is not None and e.feedback.status == "pass" for e in known) / len(known)
                old = self.pass_rate.get(task.task_id, 0.5)
                self.pass_rate[task.task_id] = old + CURRICULUM_RATE * (rate - old)

    def judge_counts(self) -> dict[str, int]:
        """judge_asked, judge_repaired, judge_unanswered: questions of this step to a model judge; none for the static one."""
        now = dict(getattr(self.conductor.judge, "counts", {}))
        new = {name: count - self.counted.get(name, 0) for name, count in now.items()}
        self.counted = now
        return {f"judge_{name}": sum(part[name] for part in gather([new])) for name in new}

    # ---- checkpoints

    def save(self, step: int) -> None:
        """Writes a checkpoint of everything that the next step depends on."""
        buffer = self.conductor.short_term
        short = None if buffer is None else buffer.state()
        state = {"arm": self.profile.train.arm, "seed": self.seed, "settings": self.settings(), "pass_rate": self.pass_rate}
        state |= {"totals": self.totals, "micro_tokens": self.micro.tokens, "short_term": short}
        folder, keep = self.folder / "checkpoints", self.profile.train.keep
        if rank() == 0:
            checkpoint.save(folder, step, self.policy, self.optimizer, state, self.conductor.long_term, keep, self.critic)
        gather([])  # nobody goes on before it lies there

    def resume(self) -> int:
        """Loads the last checkpoint and cuts the logs to it; returns its step, 0 for a fresh start."""
        found, step = checkpoint.existing(self.folder / "checkpoints"), 0
        remedy = f"delete {self.folder} or use another folder"
        if found:
            state = checkpoint.load(found[-1], self.policy, self.optimizer, self.critic)
            if (state["arm"], state["seed"]) != (self.profile.train.arm, self.seed):
                raise FalconError(f"{found[-1]} belongs to arm {state['arm']}, seed {state['seed']}", remedy)
            mine = self.settings()
            if other := [name for name in sorted({*mine, *state["settings"]}) if mine.get(name) != state["settings"].get(name)]:
                was, now = state["settings"].get(other[0]), mine.get(other[0])
                raise FalconError(f"{found[-1]} was made with other settings: {other[0]} {was} -> {now}", remedy)
            step, self.pass_rate, self.totals = state["step"], state["pass_rate"], state["totals"]
            self.micro.tokens = state["micro_tokens"]
            if self.conductor.short_term is not None:
                self.conductor.short_term.load(state["short_term"])
            if self.conductor.long_term is not None:
                self.conductor.long_term.restore(found[-1] / "long_term.sqlite")
        for log in (self.metrics, self.timings) if rank() == 0 else ():
            log.truncate(step)
        if rank() == 0 and len(self.metrics.rows()) < step:
            raise FalconError(f"{self.folder / 'metrics.jsonl'} lacks steps before {step}", f"delete {self.folder} to start anew")
        return step

    def settings(self) -> dict[str, Any]:
        """All but the number of steps that the run depends on, by name: a checkpoint of other settings is not ours."""
        known = {name: value for name, (_, value) in leaves(self.profile).items() if not name.startswith(FREE)}
        facts = {"model": self.policy.fingerprint, "theta at the start": self.start, "processes": world()}
        return json.loads(json.dumps(known | facts | {"tasks": fingerprint(self.tasks)}))  # as a checkpoint has them

    def distrust(self, step: int, task: Task, code: str) -> None:
        """A forgery that passes stops the run, with the program saved: whatever lets it pass may have rewarded others."""
        path = write_text(self.folder / f"forgery_step{step}.py", code)
        raise FalconError(
            f"a forged program passed the tests of {task.task_id!r} in step {step}: {path}",
            "no verdict of this run can be trusted; look into the sandbox with: falconlib doctor",
        )

    def give_up(self, step: int, episodes: Sequence[Episode]) -> None:
        """A loss or gradient that is not finite stops the run, with the batch saved for whoever looks into it."""
        path = self.folder / f"bad_batch_step{step}.jsonl"
        path.write_text("".join(to_json(e) + "\n" for e in episodes), encoding="utf-8")
        raise FalconError(
            f"the loss or gradient of step {step} is not finite; its episodes are in {path}",
            "lower train.lr, or resume from the last checkpoint",
        )


def theta_hash(parameters: Sequence[torch.nn.Parameter]) -> str:
    """Hash of what a run starts from: another SFT adapter makes another run."""
    return hashlib.sha256(b"".join(p.detach().float().cpu().numpy().tobytes() for p in parameters)).hexdigest()[:16]


@contextmanager
def interruptible() -> Iterator[list[int]]:
    """Inside the block the first Ctrl-C or SIGTERM only fills the yielded list; the second one does what it did before."""
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield asked
        return

    def note(number: int, _frame: Any) -> None:
        asked.append(number)
        restore()
        sys.stderr.write("falconlib: stopping after this step; Ctrl-C again stops at once\n")

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    try:
        yield asked
    finally:
        restore()
