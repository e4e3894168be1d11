"""What the commands of `falconlib` do: take parsed options, call one function of the library, print what it returns.

The options themselves and the exit codes are in `cli`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from falconlib.config import Profile
from falconlib.errors import FalconError, did_you_mean
from falconlib.typed import leaves, typed

NOT_SET = {"name": "--profile <name>", "train.arm": "--set arms=grpo,falcon", "train.seed": "--set seeds=0,1"}


def parse_settings(pairs: list[str]) -> dict[str, Any]:
    """["train.steps=5", "arms=grpo,falcon"] -> dotted name -> value, read by the type of the configuration's field.

    Raises FalconError for a pair without "=", an unknown name, a value that is not of the field's type, and for NOT_SET.
    """
    known = leaves(Profile())
    settings: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals:
            raise FalconError(f"--set {pair}: name=value is expected", "--set train.steps=5")
        if name in NOT_SET:  # the grid sets these in each run: a value from here would be lost
            raise FalconError(f"--set {pair}: {name} is not set this way", NOT_SET[name])
        if any(other.startswith(f"{name}.") for other in known):
            raise FalconError(f"parameter {name} is a group of settings", f"--set {name}.<name>=value")
        if name not in known:
            raise did_you_mean("parameter", name, known)
        kind = known[name][0]
        value = [item for item in text.split(",") if item] if kind.startswith("tuple") else text
        settings[name] = typed(value, kind, name, strict=False)
    return settings


def look(model: str, adapter: Path | None) -> None:
    """Raises FalconError for a model or adapter that is not there: what loads them takes half a minute to be imported."""
    from falconlib import doctor as checks

    checks.model(model)
    if adapter is not None and not (adapter / "adapter_config.json").is_file():
        remedy = "name a folder that `falconlib train` wrote"
        raise FalconError(f"no adapter in {adapter}: adapter_config.json is missing", remedy)


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
        workflow.prepare(flow, steps, echo, options.force)
        return 0
    if options.dry_run or options.why:
        echo("\n".join(workflow.plan(flow, steps, options.force, options.why)))
        return 0
    code = workflow.run(flow, steps, options.force, echo=echo, live=sys.stdout.isatty(), jobs=options.jobs)
    table = flow.root / "tables" / "main.csv"
    if code == 0 and table.is_file() and any("tables/main.csv" in step.node.writes for step in steps):
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
    from falconlib.doctor import require
    from falconlib.files import read_json
    from falconlib.reporting import results_root, start
    from falconlib.reporting.run import reference_roots
    from falconlib.sandbox import Sandbox
    from falconlib.tasks import fingerprints
    from falconlib.training import distributed, run_arm
    from falconlib.training.arms import SETTINGS, configure

    overrides = parse_settings(options.set)
    profile = configure(load_profile(options.profile, overrides), options.arm, options.seed)
    key, learns = f"train/sft-s{options.seed}/adapter", SETTINGS[options.arm][1] is not None
    roots = [results_root() / "runs" / profile.name, *reference_roots(profile.name)]
    if learns and not any((root / key).is_dir() for root in roots):  # asked before anything is written
        remedy = f"falconlib train --arm sft --profile {options.profile} --seed {options.seed} first"
        raise FalconError(f"arm {options.arm!r} starts from the SFT adapter, which is not in {roots[0] / key}", remedy)
    require(profile)
    parameters = {"profile": options.profile, "results": "", "overrides": overrides, "arm": options.arm, "seed": options.seed}
    distributed.start(cpu=profile.model.device == "cpu")
    if distributed.rank():  # of several processes the first one writes; this one only helps to train
        distributed.gather([])
        adapter = next(root / key for root in roots if (root / key).is_dir()) if learns else None
        run_arm(profile, options.arm, options.seed, roots[0] / f"train/{options.arm}-s{options.seed}", adapter)
        return 0
    with workflow.lock(roots[0]):
        stage = start("06_train", parameters)
        distributed.gather([])  # the others wait until the folder is ours
        echo(f"{options.arm}, seed {options.seed}, profile {options.profile}: {stage.folder}")
        policy = run_arm(stage.profile, options.arm, options.seed, stage.folder, stage.find(key) if learns else None)
        with Sandbox(stage.profile.sandbox) as sandbox:  # the same settings on the same machine: the same layers
            facts = {"data": fingerprints(profile.tasks), "sandbox": sandbox.layers, **read_json(stage.folder / "budget.json")}
            stage.note(model=f"{policy.name} ({policy.fingerprint})", **facts)
        outputs = ("metrics.jsonl", "budget.json", "memory.sqlite", "adapter")
        written = [name for name in outputs if (stage.folder / name).exists()]
        stage.finish([f"{stage.key}/{name}" for name in written])
    echo("  " + "\n  ".join(written))
    return 0


def search(options: argparse.Namespace) -> int:
    from contextlib import ExitStack

    from falconlib import workflow
    from falconlib.config import load_profile
    from falconlib.evaluation.search import GRID, best, search
    from falconlib.reporting import results_root
    from falconlib.training.arms import SETTINGS

    profile, arms = load_profile(options.profile, parse_settings(options.set)), options.arms.split(",")
    learning = [arm for arm, (_, settings, *_) in SETTINGS.items() if settings is not None]  # base and sft have no such rate
    for unknown in [arm for arm in arms if arm not in learning]:
        raise did_you_mean("arm", unknown, learning)
    try:
        grid = [float(rate) for rate in options.grid.split(",")] if options.grid else GRID
    except ValueError as problem:
        raise FalconError(f"--grid {options.grid}: numbers are expected", "--grid 1e-4,3e-4") from problem
    run = results_root() / "runs" / profile.name
    if not (run / "train" / "sft-s0" / "adapter").is_dir():
        raise FalconError(f"no SFT adapter in {run}", f"falconlib run --profile {profile.name} --only sft --set seeds=0 first")
    with ExitStack() as locks:  # other arms may be searched at the same time
        for arm in sorted(set(arms)):
            locks.enter_context(workflow.lock(run / "search" / arm))
        rows = search(profile, run, arms, grid)
    echo("rates: [" + ", ".join(f"{arm}={lr:g}" for arm, lr in best(rows).items()) + "]")
    return 0


def evaluate(options: argparse.Namespace) -> int:
    from falconlib.config import load_profile, override

    settings = parse_settings(options.set)
    if options.profile:  # brings its own model, task sets and sizes; options given win over it
        base = load_profile(options.profile, settings)
    else:
        base = override(Profile(), {"tasks.eval_limit": 0, "tasks.benchmarks": ["humaneval"]} | settings)
    base = override(base, {"model.name": options.model or base.model.name})
    look(base.model.name, options.adapter)
    from falconlib.evaluation.evaluate import run_eval
    from falconlib.evaluation.submissions import card_text

    if options.preferences:
        return preferences(options, base)
    tasks = options.tasks.split(",") if options.tasks else None
    given = {"tasks.benchmarks": tasks, "eval.samples": options.samples, "tasks.eval_limit": options.limit}
    profile = override(base, {name: value for name, value in given.items() if value is not None})
    modes, live = options.mode.split(","), sys.stderr.isatty()
    table = run_eval(profile, options.adapter, modes, options.memory, seed=options.seed, out=options.out, progress=live)
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
    look(options.model, options.adapter)
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
    from collections import Counter

    from falconlib.evaluation import compare_rows, in_short
    from falconlib.evaluation.compare import KEYS
    from falconlib.reporting.tables import read_main

    one, two = read_main(options.run_a), read_main(options.run_b)
    rows = compare_rows(one, two)
    echo(in_short(rows))
    sizes = [{tuple(row[key] for key in KEYS): row["n"] for row in rows} for rows in (one, two)]
    if any(sizes[0][key] != sizes[1][key] for key in sizes[0].keys() & sizes[1].keys()):
        echo("A and B have other numbers of problems: a difference may be that of the problems")
    echo(f"{'':48} A -> B in percent, difference in points with 95 % interval")
    for row in [row for row in rows if row["difference"] is not None]:
        name = " ".join(str(row[key]) for key in ("benchmark", "mode", "arm", "metric"))
        a, b, *points = (100 * row[key] for key in ("a", "b", "difference", "low", "high"))
        echo(f"{name:48} {f'{a:.1f} -> {b:.1f}, ' + '{:+.1f} [{:+.1f}, {:+.1f}]'.format(*points):38} {row['verdict']}")
    for verdict in ("only in A", "only in B", "unknown"):
        if names := Counter(f"{row['benchmark']} {row['metric']}" for row in rows if row["verdict"] == verdict):
            echo(f"{verdict}: " + ", ".join(f"{name} ({n} rows)" for name, n in names.items()))
    return 0


def memory(options: argparse.Namespace) -> int:
    import json

    from falconlib.config import ModelConfig
    from falconlib.memory import LongTermMemory, export, import_export, verify
    from falconlib.policy.states import policy_states

    if options.what == "import":
        import_export(options.path, options.out)
        echo(f"{options.out}")
        return 0
    if not options.path.is_file():
        raise FalconError(f"{options.path} is no long-term memory: there is no such file", "give the path of a memory.sqlite")
    model = getattr(options, "model", None)
    embedder = policy_states(ModelConfig(name=model)) if model else None
    if options.what == "verify":
        problems = verify(options.path, repair=options.repair, embedder=embedder)
        unmended = bool(problems) and not options.repair
        remedy = [f"  remedy: falconlib memory verify {options.path} --repair"] if unmended else []
        echo("\n".join(problems + remedy) or "sound")
        return int(unmended)
    with LongTermMemory(options.path, embedder, read_only=True) as store:
        if options.what == "stats":
            echo(json.dumps(store.stats(), indent=1))
        elif options.what == "search":
            for found in store.search(options.text, options.k):
                echo(f"{found.similarity:.3f} utility {found.utility:+.3f} {found.task_id}: {found.description}")
        else:
            export(store, options.out)
            echo(f"{options.out}")
    return 0
