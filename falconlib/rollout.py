"""The conductor: recall -> prompt -> generate -> execute -> judge -> feedback -> reward -> remember.

The only module that reads and writes the two memories. It collects episodes; it never touches the policy's weights.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from falconlib import prompts, rewards, watch
from falconlib.config import Profile
from falconlib.feedback import error_token_mask, make_feedback
from falconlib.judge import Judge
from falconlib.memory.long_term import LongTermMemory
from falconlib.memory.recall import Recall
from falconlib.memory.short_term import ShortTermMemory
from falconlib.policy.fast_weights import Deltas
from falconlib.policy.generate import Completion, Row, generate
from falconlib.policy.models import Policy
from falconlib.records import Episode, Feedback, Report, Scores, Task
from falconlib.sandbox import Sandbox, program_for

Clock = Callable[[], float]


@dataclass
class Conductor:
    """Owns one run's memories and tools.

    long_term, short_term: None when switched off. seconds: time spent per phase since it was last cleared (for
    timings.jsonl only; no decision depends on the clock).
    """

    policy: Policy
    sandbox: Sandbox
    judge: Judge | None  # None: no AI feedback
    profile: Profile
    seed: int
    long_term: LongTermMemory | None = None
    short_term: ShortTermMemory | None = None
    clock: Clock = time.perf_counter
    seconds: dict[str, float] = field(default_factory=dict)

    # ---- recall and prompts

    def recall(self, tasks: Sequence[Task]) -> list[Recall | None]:
        """The nearest tasks of each task in long-term memory; None for every task when it is off."""
        if self.long_term is None:
            return [None] * len(tasks)
        return list(self.long_term.recall(tasks, self.profile.long_term.neighbours))

    def memory_text(self, recall: Recall | None) -> tuple[str, tuple[str, ...]]:
        """Prompt text c of a recall (the first verified neighbour program that fits, the frequent error near) and whose it is."""
        if recall is None or not recall.neighbours:
            return "", ()
        errors = [(count, name, text) for n in recall.neighbours for name, count, text in n.errors]
        _, name, text = max(errors, key=lambda e: (e[0], e[1]), default=(0, "", ""))
        advice = f"{name}: {text}" if text else name
        tokenizer, limit = self.policy.tokenizer, self.profile.long_term.prompt_tokens
        for n in recall.neighbours:
            shown = prompts.memory_prompt(n.code or "", n.description, advice, tokenizer, limit)
            if n.code and n.code.strip() in shown:
                return shown, (n.task_id,)
        return prompts.memory_prompt("", "", advice, tokenizer, limit), ()

    def prompts(self, tasks: Sequence[Task], with_memory: bool) -> list[tuple[prompts.Prompt, str, tuple[str, ...]]]:
        """Prompt, recalled text and whose program it shows, per task; the text is empty without memory."""
        recalled = [self.memory_text(r) for r in self.recall(tasks)] if with_memory else [("", ())] * len(tasks)
        return [(prompts.render(self.policy.tokenizer, t, c), c, n) for t, (c, n) in zip(tasks, recalled, strict=True)]

    # ---- one phase of rollouts

    def collect(
        self,
        tasks: Sequence[Task],
        *,
        group: str,
        step: int,
        rollouts: range,
        memory_share: float = 0.0,
        deltas: Deltas | None = None,
        greedy: bool = False,
    ) -> list[Episode]:
        """Rolls out each task `len(rollouts)` times, in task-major order, and scores every program.

        Args:
            group: "support" or "query". rollouts: their numbers within the step, which choose the random streams.
            memory_share: share of a task's rollouts that see the recalled text (where there is any), spread evenly, so
                that a rollout's number alone decides and other group sizes leave it as it was.
            deltas: fast weights, one per task, for query rollouts. greedy: the likeliest program, not a sampled one.
        """
        recalls = self.recall(tasks)
        recalled = [self.memory_text(r) if memory_share else ("", ()) for r in recalls]
        plain = [prompts.render(self.policy.tokenizer, t) for t in tasks]
        texts = [p.text for p in plain]
        both = zip(tasks, texts, recalled, strict=True)
        with_text = [prompts.render(self.policy.tokenizer, t, c).text if c else text for t, text, (c, _) in both]
        drafts: list[Episode] = []
        rows: list[Row] = []
        for i, task in enumerate(tasks):
            for rollout in rollouts:
                sees = int((rollout + 1) * memory_share) > int(rollout * memory_share)
                memory, neighbours = recalled[i] if sees else ("", ())
                rows.append(Row(i + len(tasks) * bool(memory), stream_seed(self.seed, step, task.task_id, rollout), i))
                text = with_text[i] if memory else texts[i]
                drafts.append(
                    Episode(task.task_id, step, rollout, group, text, "", "", memory_text=memory, neighbours=neighbours)
                )
        sampling, temperature = self.profile.sample, 0.0 if greedy else self.profile.sample.temperature
        completions = self.timed(
            "generate", generate, self.policy, texts + with_text, rows,
            max_new_tokens=sampling.max_new_tokens, temperature=temperature, stop=prompts.STOP, deltas=deltas,
        )  # fmt: skip
        prefixes = [plain[row.task].prefix for row in rows]
        drafts = [spoken(d, c, p) for d, c, p in zip(drafts, completions, prefixes, strict=True)]
        return self.score(drafts, [tasks[row.task] for row in rows], [recalls[row.task] for row in rows])

    def score(self, drafts: Sequence[Episode], tasks: Sequence[Task], recalls: Sequence[Recall | None]) -> list[Episode]:
        """Executes, judges and rewards drafted episodes: one task and one recall per draft."""
        programs = [program_for(t, d.code) for t, d in zip(tasks, drafts, strict=True)]
        reports = self.timed("execute", self.sandbox.run_many, programs)
        scores = self.timed("judge", self.judge_loaded, tasks, drafts, reports)
        feedback = [make_feedback(r, d.code, s) for r, d, s in zip(reports, drafts, scores, strict=True)]
        episodes = []
        for draft, recall, f in zip(drafts, recalls, feedback, strict=True):
            frequent = recall.frequent_errors if recall is not None else None
            reward = rewards.compose(f, frequent, self.profile.reward)
            mask = self.error_mask(draft.tokens, draft.completion, draft.code, f)
            episodes.append(replace(draft, feedback=f, reward=reward, error_mask=mask))
        return episodes

    def judge_loaded(self, tasks: Sequence[Task], drafts: Sequence[Episode], reports: Sequence[Report]) -> list[Scores]:
        """AI feedback for programs that load; no scores for the others, and none at all when it is off or weighs nothing."""
        scores = [Scores()] * len(drafts)
        weights = self.profile.reward
        if self.judge is not None and weights.ai and (weights.w_style or weights.w_complexity or weights.w_instruction):
            loaded = [i for i, r in enumerate(reports) if r.loaded]
            for i, s in zip(loaded, self.judge.score_many([(tasks[i], drafts[i].code) for i in loaded]), strict=True):
                scores[i] = s
        return scores

    def error_mask(self, tokens: Sequence[int], completion: str, code: str, feedback: Feedback) -> tuple[int, ...]:
        """1 for the completion's tokens that the error concerns; empty when it concerns none."""
        if feedback.scope == "ignore":
            return ()
        return error_token_mask(token_offsets(self.policy, tokens), completion, code, feedback, self.profile.reward.line_cap)

    def sentinel(self, task: Task, before: int, after: int) -> str | None:
        """The verdict on a forged program for this task when one is due (see `watch`): never "pass". Nothing remembers it."""
        if not watch.sentinel_due(before, after):
            return None
        forged = watch.forgery(task, before)
        return self.sandbox.run_many([program_for(task, forged)])[0].status

    # ---- memory

    def remember(self, support: Sequence[Episode], query: Sequence[Episode]) -> float | None:
        """Stores the step's episodes and updates the utility of the recalled tasks.

        u[neighbour] += rate * (mean R_unit with c - mean R_unit plain - u), over this task's support rollouts.
        Returns the mean effect of memory text on R_unit in this step, None when there was nothing to compare.
        """
        if self.short_term is not None:
            self.short_term.add(support)
        if self.long_term is None:
            return None
        effects, learns = memory_effects(support), self.profile.long_term.learns
        self.long_term.add_episodes([*support, *query] if learns else [])
        targets: dict[str, list[float]] = {}
        for (_, neighbours), effect in effects.items() if learns else ():
            for n in neighbours:
                targets.setdefault(n, []).append(effect)
        self.long_term.update_utility({n: sum(v) / len(v) for n, v in targets.items()}, self.profile.long_term.utility_rate)
        return sum(effects.values()) / len(effects) if effects else None

    def buffers(self, tasks: Sequence[Task], support: Sequence[Episode]) -> list[list[Episode]]:
        """M_S(x) of each task: its older episodes and the fresh support ones; empty lists when short-term memory is off."""
        if self.short_term is None:
            return [[] for _ in tasks]
        fresh = {t.task_id: [e for e in support if e.task_id == t.task_id] for t in tasks}
        return [[*self.short_term.get(t.task_id), *fresh[t.task_id]][-self.short_term.size :] for t in tasks]

    def neighbour_programs(self, tasks: Sequence[Task]) -> list[list[tuple[str, str]]]:
        """(task id, program) of the verified programs of each task's nearest tasks; empty lists when memory is off."""
        found = []
        for recall in self.recall(tasks):
            ids = [n.task_id for n in recall.neighbours] if recall is not None else []
            found.append([(i, code) for i, code, _ in self.long_term.positives(ids)] if self.long_term and ids else [])
        return found

    def own_programs(self, tasks: Sequence[Task], fresh: Sequence[Episode]) -> list[tuple[str, str]]:
        """(task id, program) of the verified programs that the policy itself wrote for these tasks: the stored ones and
        those of the `fresh` episodes, whatever prompt they were sampled with; only these when memory is off."""
        kept = self.long_term.positives([t.task_id for t in tasks]) if self.long_term is not None else []
        stored = [(i, code) for i, code, source in kept if source != "gold"]
        passed = [(e.task_id, e.code) for e in fresh if e.feedback is not None and e.feedback.status == "pass"]
        return list(dict.fromkeys([*stored, *passed]))

    def failures(self, tasks: Sequence[Task]) -> list[tuple[str, str, Feedback]]:
        """(task id, program, feedback) of these tasks' stored failures; none when memory is off."""
        return [] if self.long_term is None else self.long_term.failures([t.task_id for t in tasks])

    def timed(self, phase: str, work: Callable, *args, **kwargs):
        """Runs `work` and adds its seconds to `phase`."""
        start = self.clock()
        result = work(*args, **kwargs)
        self.seconds[phase] = self.seconds.get(phase, 0.0) + self.clock() - start
        return result


def stream_seed(run_seed: int, step: int, task_id: str, rollout: int) -> int:
    """Seed of one rollout's random stream: switching one part off cannot shift another part's randomness."""
    digest = hashlib.blake2b(f"{run_seed}|{step}|{task_id}|{rollout}".encode(), digest_size=7).digest()
    return int.from_bytes(digest, "big")


def spoken(draft: Episode, completion: Completion, prefix: str) -> Episode:
    """The draft with what the policy said."""
    code = prompts.extract_program(completion.text, prefix)
    return replace(
        draft,
        completion=completion.text,
        code=code,
        tokens=completion.tokens,
        logprobs=completion.logprobs,
        finished=completion.finished,
    )


def token_offsets(policy: Policy, tokens: Sequence[int]) -> list[tuple[int, int]]:
    """Character span of each token in the decoded completion. Tokens that share a character (bytes of one) share its span."""
    spans: list[tuple[int, int]] = []
    start = waiting = first = before = 0
    for i in range(1, len(tokens) + 1):
        text = policy.decode(tokens[first:i])
        if text.endswith("\ufffd"):  # an unfinished character: the token that ends it says how far it goes
            waiting += 1
            continue
        end = max(start, before + len(text))
        spans += [(start, end)] * (waiting + 1)
        start, waiting = end, 0
        if i - first >= 32:  # decode on from a few tokens back: from the beginning each time it would be quadratic
            first = i - 8
            before = end - len(policy.decode(tokens[first:i]))
    return spans + [(start, start)] * waiting


def memory_effects(support: Sequence[Episode]) -> dict[tuple[str, tuple[str, ...]], float]:
    """mean R_unit with memory text - mean R_unit plain, per (task, neighbours); tasks without both kinds are left out."""
    effects = {}
    for task_id in dict.fromkeys(e.task_id for e in support):
        known = [(e, e.reward.unit) for e in support if e.task_id == task_id and e.reward and e.reward.unit is not None]
        with_text = [(e.neighbours, unit) for e, unit in known if e.memory_text]
        plain = [unit for e, unit in known if not e.memory_text]
        if with_text and plain:
            effect = sum(unit for _, unit in with_text) / len(with_text) - sum(plain) / len(plain)
            effects[(task_id, with_text[0][0])] = effect
    return effects
