"""Benchmark runs: prompts, completions and verdicts of a policy, zero-shot or in a test-time mode (see `modes`).

Sampling and greedy decoding are separate samples of one task. theta is not trained, and memory is opened read-only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm.auto import tqdm

from falconlib import config, prompts
from falconlib.config import Profile
from falconlib.errors import FalconError, did_you_mean
from falconlib.evaluation import modes
from falconlib.evaluation.score import FILES, Sample, at_once, evaluation_card, save_samples, score_samples, summarise
from falconlib.files import read_json, sha256, write_json
from falconlib.judge import Judge
from falconlib.memory.long_term import LongTermMemory
from falconlib.policy.fast_weights import Deltas
from falconlib.policy.generate import Row, generate
from falconlib.policy.models import Policy, load_policy
from falconlib.policy.states import recall_from
from falconlib.records import INFRA_ERROR, Task
from falconlib.rollout import Conductor, stream_seed
from falconlib.sandbox import Sandbox
from falconlib.tasks import load_tasks

if TYPE_CHECKING:
    import pandas as pd

MODES = {mode.lower().lstrip("+").replace(" ", "-"): mode for mode in FILES}  # as the command line spells them
COLUMNS = ("mode", "benchmark", "metric", "value", "ci_low", "ci_high", "n", "completions", "timeouts", "unknown")


def benchmark_tasks(profile: Profile, name: str, split: str = "test") -> list[Task]:
    """The evaluated tasks of a benchmark: its test split, at most `tasks.eval_limit` of them, drawn by `tasks.seed`."""
    return load_tasks(name, split, profile.tasks.eval_limit, profile.tasks.seed)


def evaluate(
    policy: Policy,
    profile: Profile,
    seed: int,
    sandbox: Sandbox,
    judge: Judge | None = None,
    *,
    benchmarks: Sequence[str] = (),
    split: str = "test",
    mode: str = "zero-shot",
    memory: Path | None = None,
    progress: bool = True,
) -> list[Sample]:
    """Greedy and sampled completions of the benchmarks' tasks, with verdicts.

    Args:
        seed: of the random streams. benchmarks: names or paths ((): the profile's). split: of them. mode: one of FILES.
        memory: file of the long-term memory that "+LTM" and "+LTM adapt" recall from; it is opened read-only.

    Raises:
        FalconError: unknown mode or benchmark, a mode with LTM without a memory file, one that adapts without adapters.
    """
    if mode not in FILES:
        raise did_you_mean("mode", mode, FILES)
    chosen = {name: benchmark_tasks(profile, name, split) for name in benchmarks or profile.tasks.benchmarks}
    everything = [task for tasks in chosen.values() for task in tasks]
    problems = [(name, task) for name, tasks in chosen.items() for task in tasks]
    long = recall_from(check_memory(memory), profile.model) if "LTM" in mode else None  # its file names its embedder
    try:
        if long is not None:
            long.blocklist(everything)
        conductor = Conductor(policy, sandbox, judge, config.override(profile, {"reward.ai": False}), seed, long)
        # a problem's fast weights are kept while it is answered: only so many at once
        size = max(1, profile.train.tasks if mode in ("+LTM adapt", "+STM adapt") else len(problems))
        parts = [problems[start : start + size] for start in range(0, len(problems), size)]
        samples = [s for part in parts for s in answered(conductor, part, seed, mode, progress)]
    finally:
        if long is not None:
            long.close()
    return score_samples(everything, samples, sandbox, judge, progress=False)


def answered(conductor: Conductor, problems: Sequence[tuple[str, Task]], seed: int, mode: str, progress: bool) -> list[Sample]:
    """The unscored samples of (benchmark, task) pairs in this mode; only tests that prompts show are run."""
    tasks = [task for _, task in problems]
    practice = modes.practise(conductor, tasks) if mode in ("+STM adapt", "best-of-K") else []
    deltas = modes.deltas_for(conductor, tasks, mode, practice) if mode in ("+LTM adapt", "+STM adapt") else None
    samples = complete(conductor, problems, seed, mode, progress, deltas)
    return modes.best_of(conductor, samples, tasks, practice) if mode == "best-of-K" else samples


def complete(
    conductor: Conductor, problems: Sequence[tuple[str, Task]], seed: int, mode: str, progress: bool, deltas: Deltas | None = None
) -> list[Sample]:
    """The unscored samples of (benchmark, task) pairs: one greedy and `eval.samples` sampled ones per task, in task order.

    All benchmarks share the batches: a batch costs little more than its longest row.
    """
    settings = conductor.profile.eval
    rendered = [p for p, _, _ in conductor.prompts([t for _, t in problems], mode == "+LTM")]
    texts, found = [p.text for p in rendered], []
    rows = [Row(i, 0, i, greedy=True) for i in range(len(problems))]  # with the sampled ones: prompts are prefilled once
    for i, (_, task) in enumerate(problems):
        rows += [Row(i, stream_seed(seed, 0, f"eval|{task.task_id}", k), i) for k in range(settings.samples)]
    batch = at_once(conductor.policy.model.num_parameters())
    with tqdm(total=len(rows), desc=mode, disable=not progress) as bar:
        completions = generate(
            conductor.policy, texts, rows, max_new_tokens=settings.max_new_tokens, temperature=settings.temperature,
            top_p=settings.top_p, stop=prompts.STOP, deltas=deltas, batch_rows=batch, progress=bar.update,
        )  # fmt: skip
    for place, (row, c) in enumerate(zip(rows, completions, strict=True)):
        benchmark, task = problems[row.prompt]
        index = 0 if row.greedy else (place - len(problems)) % settings.samples
        code = prompts.extract_program(c.text, rendered[row.prompt].prefix, task.entry_point)
        found.append(Sample(task.task_id, benchmark, index, c.text, code, row.greedy, len(c.tokens)))
    return found


def run_eval(
    profile: Profile,
    adapter: Path | None,
    modes: Sequence[str],
    memory: Path | None = None,
    *,
    seed: int = 0,
    out: Path | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Generates, executes and summarises: one row per mode, benchmark and metric, with the columns COLUMNS.

    Args:
        profile: model, task sets (`tasks.benchmarks`, their test splits), sizes and limits. adapter: folder of LoRA adapters.
        modes: of FILES, or as in MODES. memory: long-term memory of the modes with LTM, read-only.
        out: folder for samples*.jsonl.gz and card.json, which keeps its other modes; None writes nothing.

    Returns:
        The table; `attrs["cards"]` has the evaluation card of each mode, `attrs["notes"]` what the table does not show.

    Raises:
        FalconError: unknown mode, task set or model, tasks without tests, +LTM without a memory.
    """
    import pandas as pd

    chosen = list(dict.fromkeys(mode_name(mode) for mode in modes))
    if any("LTM" in mode for mode in chosen):
        check_memory(memory)
    tasks = profile.tasks.benchmarks
    everything = [task for name in dict.fromkeys(tasks) for task in benchmark_tasks(profile, name)]
    if bare := next((task.task_id for task in everything if not task.tests), None):
        raise FalconError(f"task {bare!r} has no unit tests: nothing can be scored", "--tasks humaneval, mbpp, basics or apps")
    if len({task.task_id for task in everything}) < len(everything):
        raise FalconError(f"the task sets {', '.join(tasks)} share task ids", "evaluate them one by one")
    policy = load_policy(profile.model, adapter=adapter)
    rows, cards, notes, ks = [], {}, [], (1, 5, 10)
    with Sandbox(profile.sandbox) as sandbox:
        for mode in chosen:
            recalled = memory if "LTM" in mode else None
            found = evaluate(policy, profile, seed, sandbox, mode=mode, memory=recalled, progress=progress)
            rows += [{"mode": mode, **row} for row in summarise([found], ks, draws=profile.eval.bootstrap)]
            notes += unjudged(mode, tasks, found)
            cards[mode] = evaluation_card(
                everything, profile.eval, profile.sandbox,
                model=f"{policy.name} ({policy.fingerprint})" + named(adapter),
                mode=mode, seeds=[seed], layers=sandbox.layers, memory=content_hash(recalled), ks=ks,
            )  # fmt: skip
            if out is not None:  # the card of older samples never stands beside new ones
                known = read_json(file) if (file := Path(out) / "card.json").is_file() else {}
                write_json(file, {name: card for name, card in known.items() if name != mode})
                save_samples(Path(out) / FILES[mode], found)
                write_json(file, known | {mode: cards[mode]})
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    table.attrs |= {"cards": cards, "notes": notes}
    return table


def named(adapter: Path | None) -> str:
    """ " with falcon-s0/adapter (hash of its weights)", for a card: where it lay on this machine helps nobody. "" without one."""
    if adapter is None:
        return ""
    hashes = [sha256(file)[:16] for file in sorted(adapter.glob("adapter_model.*"))]
    return f" with {'/'.join(adapter.resolve().parts[-2:])} ({', '.join(hashes)})"


def unjudged(mode: str, benchmarks: Sequence[str], samples: Sequence[Sample]) -> list[str]:
    """A note on each benchmark without a single verdict: it has no row in the table."""
    judged, notes = {s.benchmark for s in samples if s.status != INFRA_ERROR}, []
    for name in [name for name in benchmarks if name not in judged]:
        counts = Counter(s.error_class for s in samples if s.benchmark == name)
        reasons = ", ".join(f"{n} {why}" for why, n in counts.most_common(3))
        notes.append(f"{mode}: no program of {name} got a verdict ({reasons})")
    return notes


def mode_name(mode: str) -> str:
    """ "ltm", "LTM", "+ltm" -> "+LTM". Raises FalconError for an unknown mode."""
    name = mode.lower().lstrip("+").replace(" ", "-")
    if name not in MODES:
        raise did_you_mean("mode", mode, MODES)
    return MODES[name]


def check_memory(memory: Path | None) -> Path:
    """The path. Raises FalconError unless the file is there."""
    if memory is None or not memory.is_file():
        what = f"there is no long-term memory at {memory}" if memory else "a mode with ltm needs a long-term memory"
        raise FalconError(what, "--memory train/falcon-s0/memory.sqlite of a run")
    return memory


def content_hash(memory: Path | None) -> str | None:
    """Content hash of a long-term memory, None for none."""
    if memory is None:
        return None
    with LongTermMemory(memory, read_only=True) as store:
        return store.content_hash()
