"""The offline judge: style by ruff, complexity by complexipy (lizard beside it), instruction following by the syntax tree.

It reads programs and never runs them. No comment can raise a score: suppression comments of both tools are ignored, and a
comment is no statement; one that is badly laid out (E26, E501, W291) costs style like any line. It does not know whether a
program is right.
"""

from __future__ import annotations

import ast
import json
import subprocess
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from falconlib.errors import FalconError
from falconlib.judge.instruction import faults
from falconlib.records import Scores, Task

RUBRIC = "static-2"  # raise it when a rule or a table below changes: scores of different rubrics must not be mixed

# Names that the task dictates (N802, N803), the end of the text, which extraction decides (W292, W391), and matters of
# taste (E226, B905) are no style faults. E1, E2, E3 (blanks and indentation) are preview rules, hence the pinned version.
SELECT = "E,W,F,B,C4,SIM,A001,N801,N806,PIE,RET503"
IGNORE = "W292,W391,E226,B905"
LINE_LENGTH = 100

# The tables: the first row whose bound is not exceeded gives the score; beyond the last row it is -1.
STYLE_TABLE = ((0.0, 2), (0.25, 1), (0.6, 0))  # ruff messages per logical line
COMPLEXITY_TABLE = ((4, 2), (9, 1), (15, 0))  # cognitive complexity of the hardest function; 15 is complexipy's own limit
INSTRUCTION_TABLE = ((0, 2), (1, 1), (2, 0))  # weighted faults, see falconlib/judge/instruction.py

UNREADABLE = Scores(-1, -1, -1)  # does not parse, or holds no statement: nothing to praise


@dataclass(frozen=True)
class Findings:
    """What the tools measured on one program, before the tables.

    messages: ruff's rule codes (None: ruff gave no answer), without those on lines that the prompt of a completion task
    gave. lines: logical lines (statements), likewise. complexity: cognitive, of the hardest function. faults: (text,
    weight) pairs.
    """

    messages: tuple[str, ...] | None
    lines: int
    complexity: int
    faults: tuple[tuple[str, int], ...]

    @property
    def scores(self) -> Scores:
        """The findings on the paper's scale."""
        style = None if self.messages is None else grade(len(self.messages) / max(self.lines, 1), STYLE_TABLE)
        faulty = sum(weight for _, weight in self.faults)
        return Scores(style, grade(self.complexity, COMPLEXITY_TABLE), grade(faulty, INSTRUCTION_TABLE))


class StaticJudge:
    """Deterministic judge without model, key or network. Raises FalconError when ruff or complexipy is not installed."""

    name = "static"

    def __init__(self) -> None:
        try:
            tools = " ".join(f"{tool} {metadata.version(tool)}" for tool in ("ruff", "complexipy"))
        except metadata.PackageNotFoundError as error:
            raise FalconError(f"the static judge needs {error.name}", "pip install ruff==0.17.6 complexipy==8.3.0") from error
        self.version = f"{RUBRIC} ({tools})"
        self.identity = {"rubric": RUBRIC, "model": tools, "select": SELECT, "ignore": IGNORE, "line_length": LINE_LENGTH}

    def score_many(self, pairs: Sequence[tuple[Task, str]]) -> list[Scores]:
        """One Scores per (task, program), in order; -1 everywhere for text that does not parse."""
        return [UNREADABLE if found is None else found.scores for found in self.findings(pairs)]

    def findings(self, pairs: Sequence[tuple[Task, str]]) -> list[Findings | None]:
        """What lies behind the scores, in order; None for text that does not parse or holds no statement.

        ruff runs once for the whole batch; a program that is in it twice is read once.
        """
        trees = {code: tree for code in dict.fromkeys(code for _, code in pairs) if (tree := parse(code)) is not None}
        messages = dict(zip(trees, lint(list(trees)), strict=True))
        return [find(task, code, trees[code], messages[code]) if code in trees else None for task, code in pairs]


def find(task: Task, code: str, tree: ast.Module, messages: Sequence[tuple[str, int]] | None) -> Findings:
    """The findings on one program that parses, given ruff's messages (rule, line) on it."""
    given = given_lines(task, code)
    own = None if messages is None else tuple(rule for rule, row in messages if row > given)
    lines = sum(isinstance(node, ast.stmt) and node.lineno > given for node in ast.walk(tree))
    return Findings(own, lines, cognitive_complexity(code), tuple(faults(task, tree)))


def grade(value: float, table: Sequence[tuple[float, int]]) -> int:
    """The score of the first row (bound, score) with value <= bound, else -1."""
    return next((score for bound, score in table if value <= bound), -1)


def parse(code: str) -> ast.Module | None:
    """The syntax tree, or None when the text does not parse, nests too deeply, or holds no statement."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "invalid escape sequence" in a sample is no news for our user
            tree = ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    return tree if tree.body else None


def given_lines(task: Task, code: str) -> int:
    """How many leading lines of `code` the prompt of a completion task gave: their style is not the program's doing."""
    prompt = task.prompt.rstrip()
    return prompt.count("\n") + 1 if task.kind == "completion" and code.startswith(prompt) else 0


def cognitive_complexity(code: str) -> int:
    """Cognitive complexity (Campbell 2018) of the hardest function, or of the code outside functions if that is harder."""
    import complexipy

    try:
        result = complexipy.code_complexity(code, no_ignore=True, with_plans=False)
    except ValueError:  # parses in Python, but nests too deeply for complexipy
        return COMPLEXITY_TABLE[-1][0] + 1
    functions = [f.complexity for f in result.functions]
    return max([result.complexity - sum(functions), *functions])


def cyclomatic_complexity(code: str) -> int:
    """McCabe's number of the most branched function by lizard: 1 + its branches; 1 for a program without functions.

    For comparison with the cognitive one: no score depends on it.
    """
    import lizard

    functions = lizard.analyze_file.analyze_source_code("program.py", code).function_list
    return max((f.cyclomatic_complexity for f in functions), default=1)


def lint(programs: Sequence[str]) -> list[list[tuple[str, int]] | None]:
    """(rule, 1-based line) of each ruff message, per program, by one ruff process.

    Should ruff break on a batch, its halves are tried, so that one odd program costs only its own answer (None).
    """
    if not programs:
        return []
    found = run_ruff(programs)
    if found is not None:
        return found
    middle = len(programs) // 2
    return [None] if middle == 0 else [*lint(programs[:middle]), *lint(programs[middle:])]


def run_ruff(programs: Sequence[str]) -> list[list[tuple[str, int]] | None] | None:
    """As `lint`, for one process; None when it broke."""
    from ruff import find_ruff_bin

    options = ["--isolated", "--no-cache", "--quiet", "--exit-zero", "--ignore-noqa", "--preview", "--target-version=py311"]
    options += [f"--select={SELECT}", f"--ignore={IGNORE}", f"--line-length={LINE_LENGTH}", "--output-format=json"]
    with tempfile.TemporaryDirectory(prefix="falcon-judge-") as folder:
        for i, code in enumerate(programs):
            Path(folder, f"p{i}.py").write_bytes(code.encode() + b"\n")
        command = [find_ruff_bin(), "check", *options, folder]
        try:
            done = subprocess.run(command, capture_output=True, timeout=60 + len(programs), check=True)
            messages = json.loads(done.stdout)
        except (subprocess.SubprocessError, ValueError):
            return None
    found: list[list[tuple[str, int]] | None] = [[] for _ in programs]
    for message in messages:
        found[int(Path(message["filename"]).stem[1:])].append((message["code"] or "syntax", message["location"]["row"]))  # type: ignore[union-attr]
    return found
