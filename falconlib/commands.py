"""What the commands of `falconlib` do: take parsed options, call one function of the library, print what it returns.

The options themselves and the exit codes are in `cli`.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from typing import Any

from falconlib.config import Profile
from falconlib.errors import FalconError, did_you_mean

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
        kind, node = str(fields[part].type), getattr(node, part)
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

    if options.jobs < 1:
        raise FalconError(f"--jobs {options.jobs}: at least 1 is expected", "--jobs 2")
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
    code = workflow.run(flow, steps, options.force, echo=echo, live=sys.stdout.isatty(), jobs=options.jobs)
    table = flow.root / "tables" / "main.csv"
    if code == 0 and table.is_file():
        from falconlib.reporting.tables import as_text

        echo(f"\n{as_text(table)}\n\nresults: {flow.root}")
    return code


def doctor(options: argparse.Namespace) -> int:
    from falconlib import doctor as checks

    rows = checks.examine(options.profile, parse_settings(options.set))
    echo(checks.as_text(rows))
    return 1 if any(row.state == "missing" and row.needed for row in rows) else 0


def train(options: argparse.Namespace) -> int:
    from falconlib import workflow
    from falconlib.config import load_profile
    from falconlib.graph import check_machine
    from falconlib.reporting import results_root, start
    from falconlib.reporting.run import reference_roots
    from falconlib.sandbox import Sandbox
    from falconlib.tasks import fingerprints
    from falconlib.training import run_arm
    from falconlib.training.arms import SETTINGS, configure

    overrides = parse_settings(options.set)
    profile = configure(load_profile(options.profile, overrides), options.arm, options.seed)
    key, learns = f"train/sft-s{options.seed}/adapter", SETTINGS[options.arm][1] is not None
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
        with Sandbox(stage.profile.sandbox) as sandbox:  # the same settings on the same machine: the same layers
            stage.note(model=f"{policy.name} ({policy.fingerprint})", data=fingerprints(profile.tasks), sandbox=sandbox.layers)
        outputs = ("metrics.jsonl", "budget.json", "memory.sqlite", "adapter")
        written = [name for name in outputs if (stage.folder / name).exists()]
        stage.finish([f"{stage.key}/{name}" for name in written])
    echo("  " + "\n  ".join(written))
    return 0


def evaluate(options: argparse.Namespace) -> int:
    from falconlib.config import load_profile, override
    from falconlib.evaluation.evaluate import run_eval
    from falconlib.evaluation.submissions import card_text

    settings = parse_settings(options.set)
    named = options.profile is not None  # a profile brings its own model, task sets and sizes; options given win over it
    base = load_profile(options.profile, settings) if named else override(Profile(), {"tasks.eval_limit": 0} | settings)
    if options.preferences:
        return preferences(options, override(base, {"model.name": options.model or base.model.name}))
    tasks = options.tasks.split(",") if options.tasks else list(base.tasks.benchmarks) if named else ["humaneval"]
    table = run_eval(
        options.model or base.model.name, options.adapter, tasks, options.mode.split(","), options.memory, base=base,
        samples=base.eval.samples if options.samples is None else options.samples,
        limit=base.tasks.eval_limit if options.limit is None else options.limit,
        seed=options.seed, out=options.out, progress=sys.stderr.isatty(),
    )  # fmt: skip
    for card in table.attrs["cards"].values():
        echo(f"{card_text(card)}\n")
    echo("\n".join([table.to_string(index=False, float_format="%.3f"), *(f"note: {note}" for note in table.attrs["notes"])]))
    if options.out:
        echo(f"\nsamples: {options.out}")
    return 0


def preferences(options: argparse.Namespace, profile: Profile) -> int:
    from falconlib.evaluation.preferences import run_preferences

    given = {"--tasks": options.tasks, "--memory": options.memory, "--samples": options.samples, "--seed": options.seed or None}
    given["--mode"] = None if options.mode == "zero-shot" else options.mode
    ignored = [f"{name} {value}" for name, value in given.items() if value is not None]
    if ignored:
        raise FalconError(f"--preferences answers its own prompts greedily: no {', '.join(ignored)}", "leave it out")
    for table in run_preferences(profile, options.adapter, options.limit or 0, options.out, sys.stderr.isatty()):
        echo(table.to_string(index=False, float_format="%.2f", na_rep="unknown") + "\n")
    if options.out:
        echo(f"answers: {options.out}")
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
    if not 0 < options.cpu_s <= 3600:
        raise FalconError(f"--cpu-s {options.cpu_s}: above 0 and at most 3600 seconds are expected", "--cpu-s 2")
    limits, tasks = SandboxConfig(cpu_s=options.cpu_s), load_tasks(options.tasks)
    samples = submissions.load_submissions(options.samples, tasks)
    if options.out:
        submissions.check_out(options.out, options.samples, options.tasks)
    with Sandbox(limits) as sandbox:
        scored, layers = score_samples(tasks, samples, sandbox, progress=sys.stderr.isatty()), sandbox.layers
    found = submissions.result(tasks, scored, limits, layers, ks)
    echo(json.dumps(found) if options.json else submissions.as_text(found))  # first: a disk may be full by now
    if options.out:
        save_samples(options.out, scored)
    return 0 if found["unknown"] < found["samples"] else 1


def compare(options: argparse.Namespace) -> int:
    from falconlib.evaluation import compare_rows, in_short
    from falconlib.reporting.tables import read_main

    rows = compare_rows(read_main(options.run_a), read_main(options.run_b))
    echo(in_short(rows))
    for row in rows:
        name = " ".join(str(row[key]) for key in ("benchmark", "mode", "arm", "metric"))
        numbers = ""
        if row["difference"] is not None:
            numbers = f"{row['a']:.3f} -> {row['b']:.3f}, {row['difference']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]"
        echo(f"{name:48} {numbers:42} {row['verdict']}")
    return 0


def memory(options: argparse.Namespace) -> int:
    import json

    from falconlib.memory import LongTermMemory, export, import_export, verify

    if options.what == "import":
        import_export(options.path, options.out)
        echo(f"{options.out}")
        return 0
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
