"""What this machine has and lacks for a profile, each lack with the command that mends it. Looks, changes nothing.

A check takes the profile and returns what it found in words; it raises FalconError (or ImportError) for what is missing.
"""

from __future__ import annotations

import ctypes.util
import importlib.metadata
import os
import shutil
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from falconlib.config import Profile, load_profile
from falconlib.errors import FalconError
from falconlib.reporting.run import results_root

TASKS = ("basics", "humaneval", "mbpp")


@dataclass(frozen=True)
class Row:
    """One line of the table. state: "OK" or "missing". needed: whether the profile cannot run without it."""

    name: str
    state: str
    detail: str
    remedy: str = ""
    needed: bool = True


def examine(profile_name: str, overrides: dict[str, Any] | None = None) -> list[Row]:
    """All checks for a profile with overrides. Raises FalconError for unknown ones; a check that breaks is a row, not an end."""
    profile = load_profile(profile_name, overrides)
    checks: dict[str, Callable[[Profile], str]] = {
        "Python": lambda _: ".".join(map(str, sys.version_info[:3])),  # pip refuses what is too old
        "torch": torch_build,
        "faiss": faiss_build,
        "sandbox": sandbox_layers,
        "libseccomp2": seccomp,
        "ruff": lambda _: importlib.metadata.version("ruff"),
        "complexipy": lambda _: importlib.metadata.version("complexipy"),
        "judge": judge,
        "model": lambda p: model(p.model.name),
        "MiniLM": minilm,
        **{f"tasks: {name}": partial(tasks, name=name) for name in TASKS},
        "results": results,
        "disk": disk,
        "memory": memory,
    }
    optional = {"libseccomp2", "memory"} | {f"tasks: {n}" for n in {*TASKS} - {*profile.tasks.train, *profile.tasks.benchmarks}}
    if not profile.long_term.enabled or profile.long_term.embedder != "minilm":
        optional.add("MiniLM")
    rows = []
    for name, check in checks.items():
        try:
            rows.append(Row(name, "OK", check(profile)))
        except (FalconError, ImportError) as error:
            text, remedy = (error.message, error.remedy) if isinstance(error, FalconError) else (str(error), "make setup")
            rows.append(Row(name, "missing", text, remedy, name not in optional))
    return rows


def require(profile: Profile) -> None:
    """Raises FalconError for what the profile names and is not there: task sets and their data, model, encoder, GPU."""
    for name in dict.fromkeys((*profile.tasks.train, *profile.tasks.benchmarks)):
        tasks(profile, name)
    model(profile.model.name)
    if profile.long_term.enabled and profile.long_term.embedder == "minilm":
        minilm(profile)
    if profile.model.device == "cuda":
        torch_build(profile)


def as_text(rows: list[Row]) -> str:
    """The rows as a table, a remedy below each row that needs one."""
    width = max(len(row.name) for row in rows)
    lines = []
    for row in rows:
        state = row.state if row.state == "OK" or row.needed else "missing (optional)"
        lines.append(f"{row.name:{width}}  {state:18}  {row.detail}")
        lines += [f"{'':{width}}  remedy: {row.remedy}"] if row.remedy else []
    return "\n".join(lines)


def torch_build(profile: Profile) -> str:
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    found = f"{torch.__version__}, GPU: {gpu or 'none'}, {torch.get_num_threads()} CPU threads"
    if profile.model.device == "cuda" and not gpu:
        raise FalconError(f"model.device = 'cuda', but torch has none here: {found}", "--set model.device=cpu")
    return found


def faiss_build(profile: Profile) -> str:
    from falconlib.memory._faiss import load_faiss

    if faiss := load_faiss():
        return f"{faiss.__version__}, GPUs: {faiss.get_num_gpus()}"
    return "none: memory searches with numpy; the faster way: pip install -e '.[cpu]'"


def sandbox_layers(profile: Profile) -> str:
    from falconlib.sandbox import Sandbox

    with Sandbox(profile.sandbox) as sandbox:
        tier, layers = sandbox.tier, sandbox.layers
    missing = [name for name, layer in layers.items() if not layer["verified"]]
    found = f"tier {tier}, {len(layers) - len(missing)} of {len(layers)} layers verified"
    return found + (f"; not: {', '.join(missing)}" if missing else "")


def seccomp(profile: Profile) -> str:
    if found := ctypes.util.find_library("seccomp"):
        return found
    raise FalconError("no shared library", "apt install libseccomp2")


def model(name: str) -> str:
    from falconlib.policy.embedded import NAME, model_dir

    if name == NAME:
        return f"{NAME}, {sum(f.stat().st_size for f in model_dir().iterdir()) / 2**20:.0f} MB"
    local = name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).is_dir()  # a hub id is owner/name
    if local and name != "tiny" and not Path(name, "config.json").is_file():
        what = "the folder holds no config.json" if Path(name).is_dir() else "there is no such folder"
        raise FalconError(f"model.name = {name!r}: {what}", "a folder that holds config.json, or a hub id")
    return f"{name} (not the embedded one; found or fetched when it is loaded)"


def judge(profile: Profile) -> str:
    """The configured judge and whether it can be used: a model is looked for, a server's door is knocked at; none is asked."""
    from falconlib.judge import open_chat
    from falconlib.judge.server import ServerChat
    from falconlib.policy.embedded import NAME

    own = profile.judge
    if own.replay:
        with open_chat(own, load=str):
            return f"{own.backend}: the answers of {own.cache}"
    if own.backend == "local":
        return f"local: {model(own.model or NAME)}"
    if own.backend == "static":
        return "static: ruff, complexipy and the syntax tree; no model"
    address = ServerChat(own.model).identity["address"]
    url = urlsplit(address)
    try:
        socket.create_connection((url.hostname, url.port or {"http": 80, "https": 443}[url.scheme]), timeout=3).close()
    except OSError as error:
        remedy = "start that server or mend FALCON_JUDGE_BASE_URL, or --set judge.backend=static"
        raise FalconError(f"openai: {address} does not answer: {error}", remedy) from error
    return f"openai: {address} answers"


def minilm(profile: Profile) -> str:
    from falconlib.memory.embed import MINILM_WHEEL, MiniLM

    MiniLM()
    return MINILM_WHEEL


def tasks(profile: Profile, name: str) -> str:
    from falconlib.tasks import load_tasks

    return f"{len(load_tasks(name))} tasks"


def results(profile: Profile) -> str:
    if not os.access(_results_place(), os.W_OK):
        raise FalconError(str(results_root()), "set FALCON_RESULTS to a writable folder")
    return str(results_root())


def _results_place() -> Path:
    """The nearest folder of the results that exists."""
    root = results_root()
    return next(folder for folder in (root, *root.parents) if folder.is_dir())


def disk(profile: Profile) -> str:
    free = shutil.disk_usage(_results_place()).free / 2**30
    if free < 2:
        raise FalconError(f"{free:.1f} GB free", "free some: 2 GB are needed")
    return f"{free:.1f} GB free"


def memory(profile: Profile) -> str:
    import psutil

    free, total = (getattr(psutil.virtual_memory(), name) / 2**30 for name in ("available", "total"))
    found = f"{free:.1f} of {total:.1f} GB free, {os.cpu_count()} cores"
    if free < 4:
        raise FalconError(found, "close other programs: 4 GB are needed")
    return found
