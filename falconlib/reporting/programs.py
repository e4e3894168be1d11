"""Programs for people to read: side by side, and what became of each task's programs in the two memories.

Reads memories and episodes; stores, runs and scores nothing.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd

from falconlib.memory import LongTermMemory, export
from falconlib.records import Episode

LIFE = ["step", "half", "prompt", "verdict", "R", "in memory", "code"]


def verdict(status: str | None, error_class: str = "") -> str:
    """A status with its mark, and the error class where it says more: "✓ pass", "✗ runtime_error (NameError)"."""
    more = f" ({error_class})" if error_class not in ("", status) else ""
    return f"{'?' if status in (None, 'infra_error') else '✓' if status == 'pass' else '✗'} {status or 'unknown'}{more}"


def side_by_side(caption: str, programs: Sequence[tuple[str, str]]) -> str:
    """An HTML table with one column per (heading, program); long programs show their last lines."""
    cell = '<td style="vertical-align:top;text-align:left"><b>{}</b><pre style="font-family:monospace">{}</pre></td>'
    cells = [cell.format(html.escape(head), html.escape(code.strip("\n")[-600:])) for head, code in programs]
    return f"<p>{html.escape(caption)}</p><table><tr>{''.join(cells)}</tr></table>"


def biographies(memory: LongTermMemory, short: Sequence[Episode], support: int) -> dict[str, pd.DataFrame]:
    """Task id -> what is known of its programs, one row (columns LIFE) each, in the order of their writing; the given one first.

    Of every task that the policy has tried. short: the episodes that short-term memory holds. Of the others, those that long-term
    memory kept are known; `in memory` says how often it saw a program ("" for one that it dropped, or took for another's twin).
    support: rollouts of a step below this number are the support half.
    """
    with TemporaryDirectory() as folder:
        export(memory, Path(folder) / "memory.parquet")
        kept = pd.read_parquet(Path(folder) / "memory.parquet").dropna(subset="episode_code")
    lives: dict[str, dict[tuple[int, int], tuple[Any, ...]]] = {}
    seen = {}
    for r in kept.itertuples():
        told, gold = verdict(r.episode_status, r.episode_error_class), r.episode_source == "gold"
        place = (-1, -1) if gold else (int(r.episode_step), int(r.episode_rollout))
        how = (None, "given", "") if gold else (place[0], *(("support", "") if place[1] < support else ("query", "plain")))
        seen[r.task_task_id, r.episode_code] = times = f"{r.episode_source} x {r.episode_count:.0f}"
        lives.setdefault(r.task_task_id, {})[place] = (*how, told, r.episode_reward, times, r.episode_code)
    for e in short:
        if e.feedback is not None:
            prompt = f"shows {', '.join(e.neighbours)}" if e.neighbours else "with memory" if e.memory_text else "plain"
            told, R = verdict(e.feedback.status, e.feedback.error_class), e.reward.total if e.reward else None
            row = (e.step, e.group, prompt, told, R, seen.get((e.task_id, e.code), ""), e.code)
            lives.setdefault(e.task_id, {})[e.step, e.rollout] = row
    tables = {task: pd.DataFrame([rows[place] for place in sorted(rows)], columns=LIFE) for task, rows in lives.items()}
    return {task: t.astype({"step": "Int64", "R": float}) for task, t in tables.items() if (t["half"] != "given").any()}
