"""The graph of the notebooks: which stages there are, in which order, what is up to date and why not.

Each stage is a notebook with its parameters (06_train: one stage per arm and seed). Its key holds the hashes of its code
cells, of falconlib, of its parameters, of the data it reads, and of what the stages before it wrote; a stage is up to date when
its manifest has the same key and its outputs still have the recorded hashes. Folders, relative to results/runs/<profile>:
the stage's own (manifest.json, attempt.json, log.txt, the executed notebook) and the shared tables/ and figures/.
Runs nothing itself (workflow.py does) and knows nothing of what the notebooks compute.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from falconlib.config import Profile, family, load_profile
from falconlib.doctor import require
from falconlib.errors import FalconError, did_you_mean, shown
from falconlib.files import read_json, sha256, sha256_of
from falconlib.notebook import check_pair, check_parameters_cell, code_hash
from falconlib.reporting.run import REPO, reference_roots, results_root, stage_key
from falconlib.typed import leaves

# these change no notebook's results
WITHOUT = ("graph.py", "workflow.py", "notebook.py", "cli.py", "commands.py", "__main__.py", "doctor.py")

# of a key, what each may differ in, in words
SECTIONS = {"parameters": "{}: {} -> {}", "inputs": "what {} wrote changed", "falconlib": "{} changed", "data": "{} changed"}


@dataclass(frozen=True)
class Node:
    """One notebook of the graph.

    name: without ending. needs: earlier notebooks whose outputs it reads. writes: files below results/runs/<profile>
    that its manifest must list ("{stage}" stands for its own folder). grid: one stage per arm and seed. data: folders of
    data/ that only nodes which name them read; what no node names concerns all of them.
    """

    name: str
    needs: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    grid: bool = False
    data: tuple[str, ...] = ()


def _figure(name: str) -> tuple[str, ...]:
    return tuple(f"figures/{name}.{ending}" for ending in ("svg", "png", "csv"))


GRAPH: tuple[Node, ...] = (
    Node("00_start_here"),
    Node("01_tasks", writes=("tables/tasks.csv",)),
    Node("02_sandbox", writes=("tables/attacks.csv",)),
    Node("03_feedback_and_rewards", writes=_figure("rewards")),
    Node("04_long_term_memory", writes=("tables/retrieval.csv",)),
    Node("05_short_term_memory_and_inner_loop", writes=_figure("inner_loop")),
    Node("06_train", writes=("{stage}/samples.jsonl.gz",), grid=True),
    Node(
        "07_benchmarks",
        needs=("01_tasks", "06_train"),
        writes=("tables/main.csv", "tables/contrasts.csv", *_figure("solved"), *_figure("budget")),
    ),
    Node("08_ablations", needs=("06_train",), writes=("tables/ablations.csv", "tables/hypotheses.csv", *_figure("ablations"))),
    Node("09_preferences", needs=("06_train",), writes=("tables/preferences.csv",), data=("data/preferences/",)),
)
GRAPH += (Node("10_report", needs=tuple(node.name for node in GRAPH[1:]), writes=("report.md", "report.html")),)


@dataclass(frozen=True)
class Step:
    """A stage to run: a node, for the grid with its arm and seed. key: its folder. needs: keys of the steps it reads."""

    node: Node
    key: str
    needs: tuple[str, ...]
    arm: str | None = None
    seed: int | None = None

    @property
    def label(self) -> str:
        return self.node.name if self.arm is None else f"{self.node.name} {self.arm} seed {self.seed}"


def steps_of(graph: tuple[Node, ...], profile: Profile) -> list[Step]:
    """All steps in the order in which they run. Trained arms start from the sft adapter of their seed: it comes first."""
    found: list[Step] = []
    for node in graph:
        needs = tuple(step.key for step in found if step.node.name in node.needs)
        if not node.grid:
            found.append(Step(node, node.name, needs))
            continue
        trained = [arm for arm in profile.arms if arm not in ("base", "sft")]
        arms = [arm for arm in ("base", "sft") if arm in profile.arms or (arm == "sft" and trained)] + trained
        for seed in profile.seeds:
            for arm in dict.fromkeys(arms):
                after: tuple[str, ...] = (stage_key(node.name, "sft", seed),) if arm in trained else ()
                after += (stage_key(node.name, "falcon", seed),) if arm == "grpo-time" else ()  # whose time it may take
                found.append(Step(node, stage_key(node.name, arm, seed), needs + after, arm, seed))
    return found


def select(steps: list[Step], only: str | None, first: str | None) -> list[Step]:
    """The steps that --only and --from name: by number (06), notebook, arm folder (train/falcon-s0), or arm.

    Raises FalconError for a name that fits nothing, and when nothing is left.
    """

    def fits(step: Step, name: str) -> bool:
        names = {step.key, step.node.name, step.node.name.split("_")[0], step.arm, step.key.removeprefix("train/")}
        return name.removesuffix(".ipynb") in names

    known = [*dict.fromkeys(step.node.name for step in steps), *(step.key for step in steps if step.arm)]
    for name in [*(only.split(",") if only else []), *([first] if first else [])]:
        if not any(fits(step, name) for step in steps):
            raise did_you_mean("notebook", name, known)
    if first:
        steps = steps[next(i for i, step in enumerate(steps) if fits(step, first)) :]
    chosen = [step for step in steps if not only or any(fits(step, name) for name in only.split(","))]
    if not chosen:
        raise FalconError(f"--from {first} --only {only}: no stage is left", "name stages at or after --from")
    return chosen


@dataclass(frozen=True)
class Status:
    """state: "up to date", "stale", "missing" or "failed". reasons: why it is not up to date."""

    state: str
    reasons: tuple[str, ...] = ()


class Workflow:
    """The graph of one profile in one results folder.

    Args:
        profile: name. overrides: dotted parameter -> value. results: root ("" for the default). notebooks: their folder.
        graph: the nodes (tests hand in small ones).

    Raises FalconError for an unknown profile or parameter and for what this machine lacks, before anything is written.
    """

    def __init__(
        self,
        profile: str,
        overrides: dict[str, Any] | None = None,
        *,
        results: str = "",
        notebooks: Path = REPO / "notebooks",
        graph: tuple[Node, ...] = GRAPH,
        command: str = "",
    ):
        self.overrides = _absolute({name: _plain(value) for name, value in (overrides or {}).items()})
        self.profile = load_profile(profile, self.overrides)
        require(self.profile)
        self.results, self.notebooks, self.command = results, Path(notebooks), command or f"falconlib run --profile {profile}"
        self.root = results_root(results) / "runs" / self.profile.name
        self.steps = steps_of(graph, self.profile)
        self.library = library_hashes()
        self.data = data_hashes(self.profile)
        self.special = tuple({folder for node in graph for folder in node.data})

    def check(self, steps: list[Step]) -> None:
        """Raises FalconError when a notebook of `steps` is missing, differs from its .py, or does not know its parameters."""
        for node in dict.fromkeys(step.node for step in steps):
            check_pair(self.source(node))
            check_parameters_cell(self.source(node), ["profile", "results", "overrides", *(["arm", "seed"] if node.grid else [])])

    def source(self, node: Node) -> Path:
        return self.notebooks / f"{node.name}.ipynb"

    def executed(self, step: Step) -> Path:
        return self.root / step.key / f"{step.node.name}.ipynb"

    def parameters(self, step: Step) -> dict[str, Any]:
        """What papermill puts into the parameters cell: plain Python values (a tuple would arrive as text)."""
        results = results_root(self.results)
        shown = results.relative_to(REPO).as_posix() if results.is_relative_to(REPO) else str(results)
        values = {"profile": self.profile.name, "results": shown, "overrides": self.overrides}
        return values | ({"arm": step.arm, "seed": step.seed} if step.arm is not None else {})

    def key(self, step: Step) -> dict[str, Any]:
        """Everything that can change what the step writes, as name -> value or hash; the grid's size concerns its readers."""
        config = {name: _plain(value) for name, (_, value) in leaves(self.profile).items()}
        if not step.node.needs:
            config = {name: value for name, value in config.items() if name not in ("arms", "seeds", "ablations")}
            own = (step.arm, family(str(step.arm)))  # the rate of another arm is no concern of this one
            config["rates"] = [rate for rate in config["rates"] if rate.split("=")[0] in own]
        cell = {"arm": step.arm, "seed": step.seed} if step.arm is not None else {}
        inputs = {need: self.outputs_hash(need) for need in step.needs}
        found = {"notebook": code_hash(self.source(step.node)), "falconlib": self.library, "inputs": inputs}
        data = {n: h for n, h in self.data.items() if n.startswith(step.node.data) or not n.startswith(self.special)}
        return found | {"parameters": config | cell, "data": data}

    def outputs_hash(self, key: str) -> str | None:
        """Hash over what a finished stage wrote, None when it is not finished. Equal outputs leave its readers fresh."""
        outputs = record(self.root / key / "manifest.json").get("outputs")
        return None if outputs is None else sha256_of(outputs)[:16]

    def status(self, step: Step) -> Status:
        """Compares the step's manifest with its key, and its outputs with their hashes."""
        folder = self.root / step.key
        manifest = record(folder / "manifest.json")
        attempt = {} if manifest else record(folder / "attempt.json")
        if broken := manifest.get("broken") or attempt.get("broken"):
            return Status("stale", (broken,))
        if not manifest:
            if attempt.get("state") == "failed":
                return Status("failed", (f"the last attempt failed, see {folder / 'log.txt'}",))
            if attempt.get("state") != "running":
                return Status("missing", ("its manifest is gone" if attempt else "never run",))
            changed = differences(attempt, self.key(step))
            why = ("interrupted with other settings: starts anew", *changed) if changed else ("interrupted: resumes",)
            return Status("missing", why)
        if not manifest.get("token"):
            return Status("stale", ("run by hand, not by this command",))
        reasons = differences(manifest, self.key(step)) + self.broken_outputs(step, manifest)
        return Status("stale", tuple(reasons)) if reasons else Status("up to date")

    def broken_outputs(self, step: Step, manifest: dict[str, Any]) -> list[str]:
        """Declared outputs that the manifest does not list, listed files that are gone, empty of their hash, or changed."""
        listed = manifest.get("outputs", {})
        declared = [name.replace("{stage}", step.key) for name in step.node.writes]
        found = [f"{name} is not among its outputs" for name in declared if name not in listed]
        for name, recorded in listed.items():
            path = self.root / name
            if not path.is_file():
                found.append(f"output {name} is gone")
            elif sha256(path) != recorded:
                found.append(f"output {name} was changed after the run")
        return found + ([] if self.executed(step).is_file() else ["its executed notebook is gone"])

    def seconds(self, step: Step) -> float | None:
        """How long the step took last time, here or in the reference results; None when it never ran."""
        for base in (self.root, *reference_roots(self.profile.name)[:1]):
            with contextlib.suppress(FalconError, KeyError, TypeError, ValueError):
                if 0 <= (seconds := float(read_json(base / step.key / "run.json")["wall_s"])) < math.inf:
                    return seconds
        return None


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value  # as JSON gives it back


def _absolute(overrides: dict[str, Any]) -> dict[str, Any]:
    """The overrides with existing relative paths made absolute: a notebook's kernel works in another folder."""

    def place(value: Any) -> Any:
        there = isinstance(value, str) and (Path(value).is_file() or ("/" in value and Path(value).is_dir()))
        return str(Path(value).resolve()) if there else value

    named = {name: overrides[name] for name in ("tasks.train", "tasks.benchmarks", "model.name") if name in overrides}
    return overrides | {n: [place(v) for v in value] if isinstance(value, list) else place(value) for n, value in named.items()}


def library_hashes() -> dict[str, str]:
    """File of falconlib -> short hash; the modules in WITHOUT only start notebooks and are left out."""
    package = Path(__file__).resolve().parent
    files = sorted(path for path in package.rglob("*.py") if path.relative_to(package).as_posix() not in WITHOUT)
    return {f"falconlib/{path.relative_to(package).as_posix()}": sha256(path)[:16] for path in files}


def data_hashes(profile: Profile) -> dict[str, str]:
    """Committed data file, task set that the profile names (wherever it was found), and model -> short hash."""
    from falconlib.policy import embedded
    from falconlib.tasks import fingerprint, load_tasks

    files = [p for p in sorted((REPO / "data").rglob("*")) if p.is_file() and "downloads" not in p.parts and p.suffix != ".md"]
    found = {path.relative_to(REPO).as_posix(): sha256(path)[:16] for path in files}
    for name in dict.fromkeys((*profile.tasks.train, *profile.tasks.benchmarks)):
        found[f"task set {name}"] = fingerprint(load_tasks(name))[:16]
    model = Path(profile.model.name)
    if profile.model.name == embedded.NAME:
        found["model"] = embedded.WHEEL_SHA256[:16]
    elif model.is_dir():  # weights can be many gigabytes: their size and time stand for their content
        files = sorted(path for path in model.rglob("*") if path.is_file())
        found["model"] = sha256_of([[str(f.relative_to(model)), f.stat().st_size, f.stat().st_mtime_ns] for f in files])[:16]
    return found


def record(path: Path) -> dict[str, Any]:
    """A stage's manifest.json or attempt.json: {} when there is none, {"broken": why} when no run can have written it."""
    if not path.is_file():
        return {}
    try:
        found = read_json(path)
    except FalconError as error:
        return {"broken": error.message}
    sound = all(isinstance(found.get(name, {}), dict) for name in (*SECTIONS, "outputs")) and {"outputs", "state"} & {*found}
    return found if sound else {"broken": f"{path} is no record of a run"}


def differences(manifest: dict[str, Any], key: dict[str, Any]) -> list[str]:
    """What of the key is not as the manifest or attempt recorded it, in words."""
    found = [] if manifest.get("notebook") == key["notebook"] else ["its code cells changed"]
    for section, template in SECTIONS.items():
        old, new = manifest.get(section, {}), key[section]
        changed = [name for name in sorted({*old, *new}) if old.get(name) != new.get(name)]
        values = [[shown(part[name]) if name in part else "not set" for part in (old, new)] for name in changed]
        found += [template.format(name, *pair) for name, pair in zip(changed, values, strict=True)]
    return found
