"""HumanEval+ and MBPP+ (EvalPlus, Liu et al., arXiv 2305.01210; Apache-2.0): more inputs for the tasks of both sets.

The files hold inputs and a canonical solution, no expected values. The solution goes into `setup`, renamed: the judge's
process, inside the sandbox, calls it on each input, and the program's answer is compared there. A program passes when it
agrees on the base inputs and on the plus inputs; tests[:n] of n base inputs are the base tests.

As in EvalPlus: with an atol, and for floats always (1e-6 then), numbers agree within it plus 1e-7 of the expected value;
some tasks compare sets or truth, and find_zero is judged by the polynomial. Its four MBPP+ tasks with a second accepted
answer (164, 295, 558, 581) are judged by the canonical solution alone; `contract` is not used, since the inputs keep it.
"""

from __future__ import annotations

import ast
import re
from typing import Any

from falconlib.errors import FalconError
from falconlib.records import Task
from falconlib.tasks.files import field, parse_row
from falconlib.tasks.humaneval import helpers

REMEDY = "put the file of that name from EvalPlus's releases into data/ (or $FALCON_DATA) under this path"
REFERENCE = "reference_solution"  # the canonical solution's name on the judge's side
SETS = ("similar_elements", "find_char_long", "common_in_nested_lists", "extract_singly", "larg_nnum", "intersection_array",
        "find_dissimilar", "Diff")  # fmt: skip
TRUTHS = ("check_str", "text_match_three", "text_starta_endb")  # True or a match object, which stays with the program
COMPARE = """
inf, nan = float("inf"), float("nan")

def agrees(got, want, atol):
    parts = want if isinstance(want, (list, tuple)) else [want]
    floats = len(parts) > 0 and all(isinstance(part, float) for part in parts)
    return got == want or ((atol > 0 or floats) and close(got, want, atol or 1e-6))

def close(got, want, atol):
    if isinstance(want, (list, tuple)):
        return type(got) is type(want) and len(got) == len(want) and all(map(close, got, want, [atol] * len(want)))
    if isinstance(want, (int, float, complex)) and isinstance(got, (int, float, complex)):
        return got == want or abs(got - want) <= atol + 1e-7 * abs(want) or (got != got and want != want)
    return got == want
"""
TRUTH = """
def told(candidate, *given):
    answer = candidate(*given)
    return answer is not None and answer is not False and (True or answer.span)
"""


def from_row(row: dict, dataset: str, where: str) -> Task:
    """One Task from task_id, prompt, entry_point, canonical_solution, base_input, plus_input, optional atol and assertion.

    Raises FalconError naming `where` for a field that is missing or wrong, and for a solution without the entry point.
    """
    prompt, name = field(row, "prompt", str, where), field(row, "entry_point", str, where)
    solution = field(row, "canonical_solution", str, where)
    whole = not defines(prompt + "\n    pass\n", name)  # MBPP+ has whole programs behind a prompt in words
    gold = solution if whole else prompt + solution
    if not defines(gold, name):
        raise FalconError(f"{where}: canonical_solution and prompt make no program with {name!r}", f"mend {where}")
    examples = arguments(field(row, "assertion", str, where, "") or prompt, name)
    base, plus = (inputs(row, key, where) for key in ("base_input", "plus_input"))
    if not base + plus:
        raise FalconError(f"{where}: no inputs: nothing can be judged", f"mend {where}")
    tests = [test(name, typed(list(given), examples[0] if examples else None), atol_of(row, where)) for given in [*base, *plus]]
    parts = ["" if whole else helpers(prompt, name), TRUTH if name in TRUTHS else COMPARE, reference(gold, name)]
    task_id, text = field(row, "task_id", str, where), prompt.strip().strip('"').strip() if whole else prompt
    setup, kind = "\n".join(part.strip() for part in parts if part), "text" if whole else "completion"
    return Task(task_id, dataset, "test", text, name, tuple(tests), setup=setup, gold=gold, kind=kind)


def defines(source: str, name: str) -> bool:
    """Whether a program with a function `name` on its top level stands there."""
    try:
        return any(isinstance(node, ast.FunctionDef) and node.name == name for node in ast.parse(source).body)
    except (SyntaxError, ValueError):
        return False


def inputs(row: dict, key: str, where: str) -> list[list]:
    """The argument lists of a field: a list, or in Parquet its JSON text."""
    if isinstance(row.get(key), str):
        row = parse_row(f'{{"{key}": {row[key]}}}', f"{where}: {key}")
    found = field(row, key, list, where)
    if not all(isinstance(item, list) for item in found):
        raise FalconError(f"{where}: {key} holds something else than lists of arguments", f"mend {where}")
    return found


def atol_of(row: dict, where: str) -> float:
    """The absolute tolerance for floats."""
    value = row.get("atol") or 0
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
        raise FalconError(f"{where}: atol = {value!r}, a number of at least 0 is expected", f"mend {where}")
    return float(value)


def arguments(text: str, name: str) -> list[list]:
    """The literal arguments of each call of `name` in the asserts of a text."""
    found = []
    for line in re.findall(r"^\s*(assert .*)", text, re.MULTILINE):
        try:
            calls = [n for n in ast.walk(ast.parse(line)) if isinstance(n, ast.Call) and getattr(n.func, "id", "") == name]
            found += [[ast.literal_eval(argument) for argument in call.args] for call in calls]
        except (SyntaxError, ValueError):
            continue  # not every assert has literal arguments
    return found


def typed(value: Any, example: Any) -> Any:
    """`value` with the types of `example`, which JSON does not know: tuples, sets and complex numbers."""
    if isinstance(example, complex) and isinstance(value, str):
        return complex(value)
    if isinstance(example, dict) and isinstance(value, dict) and example:
        return {key: typed(item, next(iter(example.values()))) for key, item in value.items()}
    if not isinstance(example, list | tuple | set) or not isinstance(value, list):
        return value
    like = list(example)
    like = like if len(like) == len(value) else like[:1] * len(value) or [None] * len(value)
    return type(example)(typed(item, shape) for item, shape in zip(value, like, strict=True))


def test(name: str, given: list, atol: float) -> str:
    """One assert: the program's answer against the canonical solution's."""
    listed = ", ".join(map(repr, given))
    ours, theirs = f"{name}({listed})", f"{REFERENCE}({listed})"
    if name == "find_zero":
        return f"assert abs(poly({listed}, {ours})) <= {atol!r}"
    if name in SETS:
        return f"assert set({ours}) == set({theirs})"
    if name in TRUTHS:
        return f"assert told({name}, {listed}) == told({REFERENCE}, {listed})"
    return f"assert agrees({ours}, {theirs}, {atol!r})"


class Renamed(ast.NodeTransformer):
    """Renames one function and its calls."""

    def __init__(self, old: str, new: str):
        self.old, self.new = old, new

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.name = self.new if node.name == self.old else node.name
        return self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> ast.AST:
        node.id = self.new if node.id == self.old else node.id
        return node


def reference(gold: str, name: str) -> str:
    """The gold as one function REFERENCE, its other names hidden inside, so that none of them is taken for the program's.

    `from m import *` must stay outside; `from __future__` only concerns annotations, which nothing here reads.
    """
    maker = ast.parse(f"def make_reference():\n    return {REFERENCE}\n{REFERENCE} = make_reference()")
    tree = Renamed(name, REFERENCE).visit(ast.parse(gold))
    outside = [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.names[0].name == "*"]
    (function,) = (node for node in maker.body if isinstance(node, ast.FunctionDef))
    function.body[:0] = [node for node in tree.body if node not in outside and getattr(node, "module", "") != "__future__"]
    evaluates = any(isinstance(node, ast.Name) and node.id == "eval" for node in ast.walk(tree))
    lead = "from builtins import eval\n" if evaluates else ""  # `eval` alone would mean that the tests read the program
    return lead + "".join(f"{ast.unparse(node)}\n" for node in outside) + ast.unparse(maker)
