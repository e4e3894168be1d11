"""What this machine has and lacks for a profile, each lack with the command that mends it. Looks, changes nothing."""

from __future__ import annotations

import ctypes.util
import dataclasses
import importlib.metadata
import importlib.util
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
    checks: dict[str, Callable[[Profile], Row]] = {
        "Python": python,
        "torch": torch_row,
        "faiss": faiss_row,
        "sandbox": sandbox_row,
        "libseccomp2": seccomp_row,
        "ruff": lambda p: tool_row("ruff"),
        "complexipy": lambda p: tool_row("complexipy"),
        "judge": judge_row,
        "model": model_row,
        "MiniLM": minilm_row,
        **{f"tasks: {name}": partial(tasks_row, name=name) for name in ("basics", "humaneval", "mbpp")},
        "results": results_row,
        "disk": disk_row,
        "memory": memory_row,
    }
    rows = []
    for name, check in checks.items():
        try:
            rows.append(check(profile))
        except FalconError as error:
            rows.append(Row(name, "missing", error.message, error.remedy))
        except ImportError as error:
            rows.append(Row(name, "missing", str(error), "make setup"))
    return rows


def as_text(rows: list[Row]) -> str:
    """The rows as a table, a remedy below each row that needs one."""
    width = max(len(row.name) for row in rows)
    lines = []
    for row in rows:
        state = row.state if row.state == "OK" or row.needed else "missing (optional)"
        lines.append(f"{row.name:{width}}  {state:18}  {row.detail}")
        lines += [f"{'':{width}}  remedy: {row.remedy}"] if row.state != "OK" and row.remedy else []
    return "\n".join(lines)


def python(profile: Profile) -> Row:
    version = ".".join(map(str, sys.version_info[:3]))
    return Row("Python", "OK" if sys.version_info >= (3, 11) else "missing", version, "install Python 3.11 or newer")


def torch_row(profile: Profile) -> Row:
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    wanted = profile.model.device == "cuda"
    detail = f"{torch.__version__}, GPU: {gpu or 'none'}, {torch.get_num_threads()} CPU threads"
    return Row("torch", "missing" if wanted and not gpu else "OK", detail, "--set model.device=cpu, or a machine with a GPU")


def faiss_row(profile: Profile) -> Row:
    """The installed build; two at once overwrite each other's files."""
    names = {d.metadata["Name"] for d in importlib.metadata.distributions() if (d.metadata["Name"] or "").startswith("faiss")}
    if len(names) > 1:
        builds = " ".join(sorted(names))
        return Row(
            "faiss", "missing", f"two builds at once: {builds}", f"pip uninstall -y {builds}, then pip install 'falconlib[cpu]'"
        )
    if importlib.util.find_spec("faiss") is None:
        return Row("faiss", "missing", "not installed; memory searches with numpy", "pip install -e '.[cpu]'", needed=False)
    from falconlib.memory._faiss import load_faiss

    return Row("faiss", "OK", f"{', '.join(names)} {load_faiss().__version__}")


def sandbox_row(profile: Profile) -> Row:
    from falconlib.sandbox import Sandbox

    with Sandbox(profile.sandbox) as sandbox:
        tier, layers = sandbox.tier, sandbox.layers
    missing = [name for name, layer in layers.items() if not layer["verified"]]
    detail = f"tier {tier}, {len(layers) - len(missing)} of {len(layers)} layers verified"
    return Row("sandbox", "OK", detail + (f"; not: {', '.join(missing)}" if missing else ""))


def seccomp_row(profile: Profile) -> Row:
    found = ctypes.util.find_library("seccomp")
    return Row("libseccomp2", "OK" if found else "missing", found or "no shared library", "apt install libseccomp2", needed=False)


def model_row(profile: Profile) -> Row:
    from falconlib.policy.embedded import NAME, model_dir

    if profile.model.name == NAME:
        folder = model_dir()
        return Row("model", "OK", f"{NAME}, {sum(f.stat().st_size for f in folder.iterdir()) / 2**20:.0f} MB")
    return Row("model", "OK", f"{profile.model.name} (not the embedded one; found or fetched when it is loaded)")


def tool_row(name: str) -> Row:
    """A package that the static judge runs."""
    try:
        return Row(name, "OK", importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Row(name, "missing", "not installed; the static judge needs it", "make setup")


def judge_row(profile: Profile) -> Row:
    """The configured judge and whether it can be used: a model is looked for, a server's door is knocked at; none is asked."""
    from falconlib.judge import open_chat
    from falconlib.judge.server import ServerChat
    from falconlib.policy.embedded import NAME

    judge = profile.judge
    if judge.replay:
        with open_chat(judge, load=str):
            return Row("judge", "OK", f"{judge.backend}: the answers of {judge.cache}")
    if judge.backend == "local":
        row = model_row(dataclasses.replace(profile, model=dataclasses.replace(profile.model, name=judge.model or NAME)))
        return dataclasses.replace(row, name="judge", detail=f"local: {row.detail}")
    if judge.backend == "openai":
        address = ServerChat(judge.model).identity["address"]
        url = urlsplit(address)
        try:
            socket.create_connection((url.hostname, url.port or {"http": 80, "https": 443}[url.scheme]), timeout=3).close()
        except OSError as error:
            remedy = "start that server or mend FALCON_JUDGE_BASE_URL, or --set judge.backend=static"
            return Row("judge", "missing", f"openai: {address} does not answer: {error}", remedy)
        return Row("judge", "OK", f"openai: {address} answers")
    return Row("judge", "OK", "static: ruff, complexipy and the syntax tree; no model")


def minilm_row(profile: Profile) -> Row:
    from falconlib.memory.embed import MINILM_WHEEL, MiniLM

    try:
        MiniLM()
    except FalconError as error:
        needed = profile.long_term.enabled and profile.long_term.embedder == "minilm"
        return Row("MiniLM", "missing", error.message, error.remedy, needed)
    return Row("MiniLM", "OK", MINILM_WHEEL)


def tasks_row(profile: Profile, name: str) -> Row:
    from falconlib.tasks import load_tasks

    needed = name in (*profile.tasks.train, *profile.tasks.benchmarks)
    try:
        return Row(f"tasks: {name}", "OK", f"{len(load_tasks(name))} tasks")
    except FalconError as error:
        return Row(f"tasks: {name}", "missing", error.message, error.remedy, needed)


def results_row(profile: Profile) -> Row:
    good = os.access(_results_place(), os.W_OK)
    return Row("results", "OK" if good else "missing", str(results_root()), "set FALCON_RESULTS to a writable folder")


def _results_place() -> Path:
    """The nearest folder of the results that exists."""
    root = results_root()
    return next(folder for folder in (root, *root.parents) if folder.is_dir())


def disk_row(profile: Profile) -> Row:
    free = shutil.disk_usage(_results_place()).free / 2**30
    return Row("disk", "OK" if free >= 2 else "missing", f"{free:.1f} GB free", "free some: 2 GB are needed")


def memory_row(profile: Profile) -> Row:
    import psutil

    free, total = (getattr(psutil.virtual_memory(), name) / 2**30 for name in ("available", "total"))
    detail = f"{free:.1f} of {total:.1f} GB free, {os.cpu_count()} cores"
    return Row("memory", "OK" if free >= 4 else "missing", detail, "close other programs: 4 GB are needed", needed=False)
