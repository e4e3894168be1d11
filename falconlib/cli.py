"""The command `falconlib`. Parses, calls one function of the library per command, prints what it returns.

Exit codes: 0 done, 1 a stage or a check failed, 2 bad input (one message with its remedy), 130 interrupted.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import signal
import sys
from pathlib import Path
from typing import Any

from falconlib import __version__
from falconlib.config import ARMS, Profile
from falconlib.errors import FalconError, did_you_mean


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns its exit code. A FalconError becomes one message on stderr, never a traceback."""
    try:
        options = parser().parse_args(argv)
    except SystemExit as stop:  # argparse: 0 after --help, 2 after a usage error
        return int(stop.code or 0)
    previous = signal.signal(signal.SIGTERM, _interrupt)
    try:
        return options.action(options)
    except FalconError as problem:
        print(f"falconlib: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("falconlib: interrupted; the same command resumes", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `falconlib ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as problem:  # a full disk, a path without rights: nothing that a traceback would explain
        print(f"falconlib: {FalconError(str(problem), 'check the path, its rights and the free disk space')}", file=sys.stderr)
        return 2
    finally:
        signal.signal(signal.SIGTERM, previous)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


NOT_SET = {"name": "--profile <name>", "train.arm": "--set arms=grpo,falcon", "train.seed": "--set seeds=0,1"}


def parse_settings(pairs: list[str]) -> dict[str, Any]:
    """["train.steps=5", "arms=grpo,falcon"] -> dotted name -> value, read by the type of the configuration's field.

    Raises FalconError for a pair without "=", an unknown name, a value that is not of the field's type, and for NOT_SET.
    """
    settings: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals:
            raise FalconError(f"--set {pair}: name=value is expected", "--set train.steps=5")
        if name in NOT_SET:  # the grid sets these in each run: a value from here would be lost
            raise FalconError(f"--set {pair}: {name} is not set this way", NOT_SET[name])
        settings[name] = _value(name, text)
    return settings


def _value(name: str, text: str) -> Any:
    node: Any = Profile()
    for part in name.split("."):
        fields = {f.name: f for f in dataclasses.fields(node)} if dataclasses.is_dataclass(node) else {}
        if part not in fields:
            raise did_you_mean("parameter", name, _names())
        kind, node = fields[part].type, getattr(node, part)
    if dataclasses.is_dataclass(node):
        raise FalconError(f"parameter {name} is a group of settings", f"--set {name}.<name>=value")
    try:
        if kind == "bool":
            return {"true": True, "false": False}[text.lower()]
        if kind.startswith("tuple"):
            items = [item for item in text.split(",") if item]
            return [int(item) for item in items] if "int" in kind else items
        return {"int": int, "float": float, "str": str}[kind](text)
    except (ValueError, KeyError) as error:
        raise FalconError(
            f"parameter {name} = {text!r} has the wrong type: {kind} is expected", f"--set {name}={node!r}"
        ) from error


def _names(node: Any = None, prefix: str = "") -> list[str]:
    found: list[str] = []
    for f in dataclasses.fields(node or Profile()):
        value = getattr(node or Profile(), f.name)
        found += _names(value, f"{f.name}.") if dataclasses.is_dataclass(value) else [prefix + f.name]
    return found


def echo(line: str) -> None:
    """Prints a line at once; one that redraws a terminal line brings its own end."""
    print(line, end="" if line.startswith("\r") else "\n", flush=True)


def run(options: argparse.Namespace) -> int:
    from falconlib import workflow
    from falconlib.graph import Workflow, select

    settings = parse_settings(options.set)
    command = " ".join(["falconlib run --profile", options.profile, *(f"--set {pair}" for pair in options.set)])
    flow = Workflow(options.profile, settings, command=command)
    steps = select(flow.steps, options.prepare or options.only, options.start)
    flow.check(steps)
    if options.prepare:
        workflow.prepare(flow, steps, echo)
        return 0
    if options.dry_run or options.why:
        for line in workflow.plan(flow, steps, options.force, options.why):
            echo(line)
        return 0
    code = workflow.run(flow, steps, options.force, echo=echo, live=sys.stdout.isatty())
    table = flow.root / "tables" / "main.csv"
    if code == 0 and table.is_file():
        from falconlib.reporting.tables import as_text

        echo(f"\n{as_text(table)}\n\nresults: {flow.root}")
    return code


def doctor(options: argparse.Namespace) -> int:
    from falconlib import doctor as checks

    rows = checks.examine(options.profile)
    echo(checks.as_text(rows))
    return 1 if any(row.state == "missing" and row.needed for row in rows) else 0


def train(options: argparse.Namespace) -> int:
    from falconlib import workflow
    from falconlib.config import load_profile
    from falconlib.graph import check_machine
    from falconlib.reporting import results_root, start
    from falconlib.reporting.run import reference_roots
    from falconlib.tasks import fingerprint, load_tasks
    from falconlib.training import run_arm
    from falconlib.training.arms import SETTINGS, configure

    overrides = parse_settings(options.set)
    profile = configure(load_profile(options.profile, overrides), options.arm, options.seed)
    key, learns, own = f"train/sft-s{options.seed}/adapter", SETTINGS[options.arm][1] is not None, profile.tasks
    roots = [results_root() / "runs" / profile.name, *reference_roots(profile.name)]
    if learns and not any((root / key).is_dir() for root in roots):  # asked before anything is written
        raise FalconError(
            f"arm {options.arm!r} starts from the SFT adapter, which is not in {roots[0] / key}",
            f"falconlib train --arm sft --profile {options.profile} --seed {options.seed} first",
        )
    check_machine(profile)
    parameters = {"profile": options.profile, "results": "", "overrides": overrides, "arm": options.arm, "seed": options.seed}
    with workflow.lock(roots[0]):
        stage = start("06_train", parameters)
        echo(f"{options.arm}, seed {options.seed}, profile {options.profile}: {stage.folder}")
        policy = run_arm(stage.profile, options.arm, options.seed, stage.folder, stage.find(key) if learns else None)
        data = {n: fingerprint(load_tasks(n, "train", own.train_limit, own.seed)) for n in own.train}
        stage.note(model=f"{policy.name} ({policy.fingerprint})", data=data)
        outputs = ("metrics.jsonl", "budget.json", "memory.sqlite", "adapter")
        written = [name for name in outputs if (stage.folder / name).exists()]
        stage.finish([f"{stage.key}/{name}" for name in written])
    echo("  " + "\n  ".join(written))
    return 0


def evaluate(options: argparse.Namespace) -> int:
    from falconlib.evaluation.evaluate import run_eval
    from falconlib.evaluation.submissions import card_text

    table = run_eval(
        options.model, options.adapter, options.tasks.split(","), options.mode.split(","), options.memory,
        samples=options.samples, limit=options.limit, seed=options.seed, out=options.out, progress=sys.stderr.isatty(),
    )  # fmt: skip
    for card in table.attrs["cards"].values():
        echo(f"{card_text(card)}\n")
    echo(table.to_string(index=False, float_format="%.3f"))
    if options.out:
        echo(f"\nsamples: {options.out}")
    return 0


def solve(options: argparse.Namespace) -> int:
    from falconlib.evaluation.solve import solve as solve_one

    progress = sys.stderr.isatty()
    echo(solve_one(options.text, options.model, options.adapter, options.memory, options.samples, progress=progress))
    return 0


def sandbox_check(options: argparse.Namespace) -> int:
    from falconlib.sandbox.check import check_corpus

    return check_corpus(options.corpus, tier=options.tier, json_out=options.json)


def score(options: argparse.Namespace) -> int:
    import json

    from falconlib.config import SandboxConfig
    from falconlib.evaluation import save_samples, score_samples, submissions
    from falconlib.sandbox import Sandbox
    from falconlib.tasks import load_tasks

    ks = [int(k) if k.isdecimal() else 0 for k in options.k.split(",")]
    if min(ks) < 1:
        raise FalconError(f"--k {options.k}: numbers of at least 1 are expected", "--k 1,5,10")
    if options.out and options.out.suffix != ".gz":
        raise FalconError(f"--out {options.out}: the verdicts are written as gzipped JSON lines", f"--out {options.out}.gz")
    limits, tasks = SandboxConfig(cpu_s=options.cpu_s), load_tasks(options.tasks)
    samples = submissions.load_submissions(options.samples, tasks)
    with Sandbox(limits) as sandbox:
        scored, layers = score_samples(tasks, samples, sandbox, progress=sys.stderr.isatty()), sandbox.layers
    found = submissions.result(tasks, scored, limits, layers, ks)
    if options.out:
        save_samples(options.out, scored)
    echo(json.dumps(found) if options.json else submissions.as_text(found))
    return 0


def compare(options: argparse.Namespace) -> int:
    from falconlib.evaluation import compare_rows
    from falconlib.reporting.tables import read_main

    rows = compare_rows(read_main(options.run_a), read_main(options.run_b))
    for row in rows:
        name = " ".join(str(row[key]) for key in ("benchmark", "mode", "arm", "metric"))
        numbers = ""
        if row["difference"] is not None:
            numbers = f"{row['a']:.3f} -> {row['b']:.3f}, {row['difference']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]"
        echo(f"{name:48} {numbers:42} {row['verdict']}")
    return 0


def memory(options: argparse.Namespace) -> int:
    import json

    from falconlib.memory import LongTermMemory, export, verify

    if not options.path.is_file():
        raise FalconError(f"{options.path} is no long-term memory: there is no such file", "give the path of a memory.sqlite")
    if options.what == "verify":
        problems = verify(options.path, repair=options.repair)
        unmended = bool(problems) and not options.repair
        remedy = [f"  remedy: falconlib memory verify {options.path} --repair"] if unmended else []
        echo("\n".join(problems + remedy) or "sound")
        return int(unmended)
    with LongTermMemory(options.path, None, read_only=True) as store:
        if options.what == "stats":
            echo(json.dumps(store.stats(), indent=1))
        elif options.what == "search":
            for found in store.search(options.text, options.k):
                echo(f"{found.similarity:.3f} utility {found.utility:+.3f} {found.task_id}: {found.description}")
        else:
            export(store, options.out)
            echo(f"{options.out}")
    return 0


def _add_set(new: argparse.ArgumentParser) -> None:
    new.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="a parameter, e.g. train.steps=5 (repeatable)"
    )


def _add_policy(new: argparse.ArgumentParser, samples: int) -> None:
    new.add_argument("--adapter", type=Path, help="folder of a LoRA adapter")
    new.add_argument("--memory", type=Path, help="a long-term memory (memory.sqlite), opened read-only")
    new.add_argument("--samples", type=int, default=samples, help=f"samples per task besides greedy (default: {samples})")


def _add_rest(command: Any, commands: Any) -> None:
    new = command("score", score, "pass@k of anybody's samples, in our sandbox")
    new.add_argument("samples", type=Path, help="JSONL with task_id and completion (or solution)")
    new.add_argument("--tasks", default="humaneval", help="task set, or a JSONL file of tasks")
    new.add_argument("--k", default="1,5,10", help="comma-separated (default: 1,5,10)")
    new.add_argument("--cpu-s", type=float, default=2.0, help="CPU seconds per program (default: 2)")
    new.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    new.add_argument("--out", type=Path, help="write the samples with their verdicts here (.jsonl.gz)")

    new = command("compare", compare, "differences between two runs, with intervals")
    new.add_argument("run_a", type=Path, help="a run folder (results/runs/quick) or its main.csv")
    new.add_argument("run_b", type=Path)

    sandbox = commands.add_parser("sandbox", help="the sandbox's self-test").add_subparsers(required=True, metavar="command")
    new = command("check", sandbox_check, "run a corpus of attacks with canaries", under=sandbox)
    new.add_argument("--corpus", type=Path, required=True, help="JSONL of attacks")
    new.add_argument("--tier", help="force a tier, e.g. B")
    new.add_argument("--json", type=Path, help="write the verdicts here")

    stored = commands.add_parser("memory", help="look into a long-term memory").add_subparsers(required=True, metavar="command")
    texts = {
        "stats": "counts, utilities, sizes",
        "search": "the nearest tasks",
        "export": "its contents as a Parquet file",
        "verify": "is it sound",
    }
    for what, text in texts.items():
        new = command(what, memory, text, under=stored)
        new.set_defaults(what=what)
        new.add_argument("path", type=Path, help="memory.sqlite")
        if what == "search":
            new.add_argument("text", help="a task in words")
            new.add_argument("--k", type=int, default=8)
        if what == "verify":
            new.add_argument("--repair", action="store_true", help="mend what is wrong; a damaged file is kept beside it")
        if what == "export":
            new.add_argument("--out", type=Path, required=True, help="file to write")


def parser() -> argparse.ArgumentParser:
    """All commands with their options."""
    top = argparse.ArgumentParser(prog="falconlib", description="FALCON: code models, reinforcement learning, two memories")
    top.add_argument("--version", action="version", version=__version__)
    commands = top.add_subparsers(required=True, metavar="command")

    def command(name: str, action: Any, text: str, under: Any = commands) -> argparse.ArgumentParser:
        made = under.add_parser(name, help=text, description=text)
        made.set_defaults(action=action)
        return made

    new = command("run", run, "run the notebook graph; what is up to date is skipped")
    new.add_argument("--profile", default="quick", help="smoke, quick, colab, small or paper (default: quick)")
    new.add_argument("--from", dest="start", metavar="NAME", help="begin with this notebook, e.g. 06")
    new.add_argument("--only", metavar="NAME", help="only these notebooks or arms, e.g. 04 or grpo or 06,07")
    new.add_argument("--force", action="store_true", help="run them even when they are up to date")
    new.add_argument("--dry-run", action="store_true", help="say what would run")
    new.add_argument("--why", action="store_true", help="say what would run, with every reason")
    new.add_argument("--prepare", metavar="NAME", help="write this notebook with its parameters filled in, to open in JupyterLab")
    _add_set(new)

    new = command("doctor", doctor, "what this machine has and lacks, with remedies")
    new.add_argument("--profile", default="quick", help="whose needs are checked (default: quick)")

    new = command("train", train, "train one arm without a notebook")
    new.add_argument("--arm", required=True, help=", ".join(ARMS))
    new.add_argument("--profile", default="quick")
    new.add_argument("--seed", type=int, default=0)
    _add_set(new)

    new = command("eval", evaluate, "generate, execute, and score with intervals")
    new.add_argument("--model", default="SmolLM2-135M-Instruct", help="embedded name, hub id or folder")
    new.add_argument("--tasks", default="humaneval", help="comma-separated task sets or JSONL files")
    new.add_argument("--mode", default="zero-shot", help="comma-separated: zero-shot, ltm")
    new.add_argument("--limit", type=int, default=0, help="at most so many tasks of each set (0: all)")
    new.add_argument("--seed", type=int, default=0, help="of the samples' random streams (default: 0)")
    new.add_argument("--out", type=Path, help="folder for the samples with their verdicts, and the cards")
    _add_policy(new, samples=0)

    new = command("solve", solve, "one task: what is recalled, the samples, their verdicts, the best program")
    new.add_argument("text", help="the task in words")
    new.add_argument("--model", default="SmolLM2-135M-Instruct", help="embedded name, hub id or folder")
    _add_policy(new, samples=4)

    _add_rest(command, commands)
    return top
