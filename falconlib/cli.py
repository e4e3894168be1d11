"""The command `falconlib`: its options and exit codes; what each command does is in `commands`.

Exit codes: 0 done, 1 a stage or a check failed, 2 bad input (one message with its remedy), 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path
from typing import Any

from falconlib import __version__, commands
from falconlib.config import ARMS
from falconlib.errors import FalconError
from falconlib.tasks import TASK_SETS


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


def number(text: str) -> int:
    """A whole number; argparse calls it by this name: invalid number value."""
    return int(text)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _add_set(new: argparse.ArgumentParser) -> None:
    new.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a parameter: train.steps=5 (repeatable)")


def _add_policy(new: argparse.ArgumentParser, samples: int | None) -> None:
    new.add_argument("--adapter", type=Path, help="folder of a LoRA adapter")
    new.add_argument("--memory", type=Path, help="a long-term memory (memory.sqlite), opened read-only")
    new.add_argument("--samples", type=number, default=samples, help=f"samples per task besides greedy (default: {samples or 0})")


def _add_rest(command: Any, menu: Any) -> None:
    new = command("search", commands.search, "the learning rate of each arm, chosen on validation tasks")
    new.add_argument("--profile", default="small")
    new.add_argument("--arms", required=True, help="comma-separated")
    new.add_argument("--grid", help="comma-separated rates (default: 3e-5,1e-4,3e-4)")
    _add_set(new)

    new = command("score", commands.score, "pass@k of anybody's samples, in our sandbox")
    new.add_argument(
        "samples",
        type=Path,
        help=".jsonl or .jsonl.gz; a line has a task_id and a completion (follows the prompt) or a solution (a whole program); "
        "several lines of one task are its samples; programs see the standard library only",
    )
    new.add_argument("--tasks", default="humaneval", help=f"{', '.join(TASK_SETS)}, or a .jsonl or .parquet file of tasks")
    new.add_argument("--k", default="1,5,10", help="comma-separated (default: 1,5,10)")
    new.add_argument("--cpu-s", type=float, default=2.0, help="CPU seconds per program (default: 2)")
    new.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    new.add_argument("--out", type=Path, help="write the samples with their verdicts here (.jsonl.gz)")

    new = command("compare", commands.compare, "differences between two runs, with intervals")
    new.add_argument("run_a", type=Path, help="a run folder (results/runs/quick) or its main.csv")
    new.add_argument("run_b", type=Path)

    sandbox = menu.add_parser("sandbox", help="the sandbox's self-test").add_subparsers(required=True, metavar="command")
    new = command("check", commands.sandbox_check, "run a corpus of attacks with canaries", under=sandbox)
    new.add_argument("--corpus", type=Path, required=True, help="JSONL of attacks")
    new.add_argument("--tier", help="force a tier, e.g. B")
    new.add_argument("--json", type=Path, help="write the verdicts here")

    stored = menu.add_parser("memory", help="look into a long-term memory").add_subparsers(required=True, metavar="command")
    texts = {"stats": "counts, utilities, sizes", "search": "the nearest tasks", "export": "its contents as a Parquet file"}
    texts |= {"import": "a new memory from an exported file", "verify": "is it sound"}
    for what, text in texts.items():
        new = command(what, commands.memory, text, under=stored)
        new.set_defaults(what=what)
        new.add_argument("path", type=Path, help="an exported Parquet file" if what == "import" else "memory.sqlite")
        if what == "search":
            new.add_argument("text", help="a task in words")
            new.add_argument("--k", type=number, default=8)
        if what in ("verify", "search"):
            new.add_argument("--model", help="the policy, where its hidden states are the memory's embedder")
        if what == "verify":
            new.add_argument("--repair", action="store_true", help="mend what is wrong; a damaged file is kept beside it")
        if what in ("export", "import"):
            new.add_argument("--out", type=Path, required=True, help="file to write")


def parser() -> argparse.ArgumentParser:
    """All commands with their options."""
    top = argparse.ArgumentParser(prog="falconlib", description="FALCON: code models, reinforcement learning, two memories")
    top.epilog = "Exit codes: 0 done, 1 a stage or a check failed, 2 bad input (with its remedy), 130 interrupted."
    top.add_argument("--version", action="version", version=__version__)
    menu = top.add_subparsers(required=True, metavar="command")

    def command(name: str, action: Any, text: str, under: Any = menu) -> argparse.ArgumentParser:
        made = under.add_parser(name, help=text, description=text)
        made.set_defaults(action=action)
        return made

    new = command("run", commands.run, "run the notebook graph; what is up to date is skipped")
    new.add_argument("--profile", default="quick", help="smoke, quick (default), colab, small-cpu, small, paper, paper-apps")
    new.add_argument("--from", dest="start", metavar="NAME", help="begin with this notebook, e.g. 06")
    new.add_argument("--only", metavar="NAME", help="only these notebooks or arms, e.g. 04 or grpo or 06,07")
    new.add_argument("--force", action="store_true", help="run them even when they are up to date")
    new.add_argument("--dry-run", action="store_true", help="say what would run")
    new.add_argument("--why", action="store_true", help="say what would run, with every reason")
    new.add_argument("--jobs", type=number, default=1, metavar="N", help="so many notebooks at once, such as the arms of 06")
    new.add_argument("--prepare", metavar="NAME", help="write this notebook with its parameters filled in, to open in JupyterLab")
    _add_set(new)

    new = command("doctor", commands.doctor, "what this machine has and lacks, with remedies")
    new.add_argument("--profile", default="quick", help="whose needs are checked (default: quick)")
    _add_set(new)

    new = command("train", commands.train, "train one arm without a notebook")
    new.add_argument("--arm", required=True, help=", ".join(ARMS))
    new.add_argument("--profile", default="quick")
    new.add_argument("--seed", type=number, default=0)
    _add_set(new)

    new = command("eval", commands.evaluate, "generate, execute, and score with intervals")
    new.epilog = (
        "Judges of --preferences: --set judge.backend=static (default), local (judge.model: a hub id or folder) or openai, a "
        "server: FALCON_JUDGE_BASE_URL, FALCON_JUDGE_MODEL, FALCON_JUDGE_API_KEY, FALCON_JUDGE_PER_MINUTE, "
        "FALCON_JUDGE_SAMPLING. judge.cache=FILE keeps its answers."
    )
    new.add_argument("--profile", help="take model, task sets, sizes and limits from this profile (default: none)")
    new.add_argument("--model", help="embedded name, hub id or folder (default: SmolLM2-135M-Instruct)")
    new.add_argument("--tasks", help="comma-separated task sets or JSONL files (default: humaneval)")
    new.add_argument("--mode", default="zero-shot", help="comma-separated: zero-shot, ltm, ltm-adapt, stm-adapt, best-of-k")
    new.add_argument(
        "--preferences", action="store_true", help="grade the form of answers without and with --adapter (see below)"
    )
    new.add_argument("--limit", type=number, help="at most so many tasks of each set (default: 0, all)")
    new.add_argument("--seed", type=number, default=0, help="of the samples' random streams (default: 0)")
    new.add_argument("--out", type=Path, help="folder for the samples with their verdicts, and the cards")
    _add_policy(new, samples=None)
    _add_set(new)

    new = command("solve", commands.solve, "one task: what is recalled, the samples, their verdicts, the best program")
    new.add_argument("text", help="the task in words")
    new.add_argument("--model", default="SmolLM2-135M-Instruct", help="embedded name, hub id or folder")
    _add_policy(new, samples=4)

    _add_rest(command, menu)
    return top
