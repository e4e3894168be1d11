"""APPS (Hendrycks et al., arXiv 2105.09938; MIT): competition problems, from standard input or as a function call.

Reads the hub's columns (apps/train.jsonl, apps/test.jsonl or apps/*.jsonl in a data folder, or the same as Parquet) and the
original folders (apps/APPS/{train,test}/0000/). family is the difficulty: introductory, interview or competition.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from falconlib.errors import FalconError
from falconlib.records import Task
from falconlib.tasks.files import field, parse_row

LISTED = "def listed(value):\n    return list(value) if isinstance(value, tuple) else value"  # runs on the judge's side
REMEDY = (
    "put the hub's rows into data/apps/train.jsonl and data/apps/test.jsonl, or the original folders into data/apps/APPS, "
    "or fetch them: python -c \"from falconlib.tasks import download; download('apps')\""
)


def folders(folder: Path) -> list[Path]:
    """The problems of the original format in or below `folder`, sorted: APPS/train/0000, ..."""
    return [found.parent for depth in ("APPS/*/*", "*/*", "*") for found in sorted(folder.glob(f"{depth}/question.txt"))]


def from_folder(path: Path, split: str) -> Task | None:
    """One problem of the original format: question.txt, input_output.json, optional solutions, metadata, starter code."""
    texts = {p.name: p.read_text(encoding="utf-8") for p in path.iterdir() if p.is_file()}
    meta = parse_row(texts.get("metadata.json") or "{}", f"{path.name}/metadata.json")
    row = {
        "problem_id": int(path.name),
        "question": texts["question.txt"],
        "solutions": texts.get("solutions.json", ""),
        "input_output": texts.get("input_output.json", ""),
        "starter_code": texts.get("starter_code.py", ""),
        "difficulty": meta.get("difficulty", ""),
    }
    return from_row(row, split, f"APPS/{split}/{path.name}")


def from_row(row: dict, split: str, where: str) -> Task | None:
    """One Task, or None for a problem without tests. Tests stay hidden: the examples stand in the question's text.

    Raises FalconError naming `where` for a missing or wrong field.
    """
    number = field(row, "problem_id", int, where)
    cases = parse_row(field(row, "input_output", str, where, "") or "{}", f"{where}: input_output")
    solutions = json.loads(field(row, "solutions", str, where, "").strip() or "[]")
    starter = field(row, "starter_code", str, where, "").strip()
    inputs, outputs = (field(cases, key, list, f"{where}: input_output", []) for key in ("inputs", "outputs"))
    name = field(cases, "fn_name", str, f"{where}: input_output", None)
    if len(inputs) != len(outputs):
        raise FalconError(f"{where}: {len(inputs)} inputs but {len(outputs)} outputs", f"mend {where}")
    if not all(isinstance(given, list) for given in inputs if name) or not (name or "f").isidentifier():
        raise FalconError(f"{where}: {name!r} is to be called with lists of arguments", f"mend {where}")
    if not isinstance(solutions, list) or not all(isinstance(code, str) for code in solutions):
        raise FalconError(f"{where}: solutions is no list of programs", f"mend {where}")
    if not inputs:
        return None
    pairs = list(zip(inputs, outputs, strict=True))
    method = f"Solution().{name}" if "class Solution" in starter else name
    prompt = "\n\n".join(part for part in (field(row, "question", str, where).strip(), starter) if part)
    tests = tuple(call(method, i, o) if name else stdio(i, o) for i, o in pairs)
    level, gold = field(row, "difficulty", str, where, ""), next(iter(solutions), None)
    how = {"setup": LISTED if name else "", "gold": gold, "family": level, "mode": "assert" if name else "stdio"}
    return Task(f"apps/{split}/{number}", "apps", split, prompt, "Solution" if name and method != name else name, tests, **how)


def stdio(given: Any, wanted: Any) -> str:
    """One case for a program that reads standard input; some rows hold lists of lines."""
    texts = ["\n".join(map(str, part)) if isinstance(part, list) else str(part) for part in (given, wanted)]
    return json.dumps({"input": texts[0], "output": texts[1]}, ensure_ascii=False)


def call(name: str, arguments: list, wanted: Any) -> str:
    """One assert for a function. JSON has no tuples, and many rows wrap the result in a list of one: both forms count."""
    result = f"listed({name}({', '.join(map(repr, arguments))}))"
    wrapped = isinstance(wanted, list) and len(wanted) == 1
    return f"assert {result} in ({wanted!r}, {wanted[0]!r})" if wrapped else f"assert {result} == {wanted!r}"
