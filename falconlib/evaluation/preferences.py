"""Preferences: five dimensions of a program in the manner of CODAL-Bench, graded and compared by any judge backend.

Static grades are tables over what programs can measure; a model's grade, once bounded, never exceeds them by more than 1, and for
instruction following not at all where the instructions can be checked. Pairs are shown to a model in both orders, and a
preference that does not survive the exchange, or that contradicts a static difference of 2 or more, counts as none. Nothing
is run: every dimension grades form, and a program that keeps all instructions may still compute nothing.
"""

from __future__ import annotations

import math
import tokenize
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm.auto import tqdm

from falconlib.config import Profile
from falconlib.errors import FalconError
from falconlib.evaluation.constraints import depth, docstrings, functions, names, satisfied, tokens
from falconlib.evaluation.stats import paired_difference, wilson
from falconlib.files import canonical, write_json, write_text
from falconlib.judge import CachedChat, StaticJudge, open_chat
from falconlib.judge.model import GRADES, INTRODUCTION, answer_shape, aspects, fenced, question, undressed, wanted
from falconlib.judge.static import grade, parse
from falconlib.records import Task
from falconlib.tasks import load_tasks
from falconlib.tasks.files import DATA, SUFFIXES, field, find, read_rows
from falconlib.watch import addressed

if TYPE_CHECKING:
    import pandas as pd

FIELDS = {
    "instruction": "the form that the task asks for, whether or not it works: 2 all of it, 1 nearly, 0 partly, -1 not",
    "explanation": "docstrings and comments: 2 explain purpose and why, 1 purpose only, 0 hardly, -1 nothing or wrong",
    "complexity": "2 simple and efficient, 1 a little more than needed, 0 complicated, -1 needlessly tangled or slow",
    "readability": "2 reads like prose, 1 clear, 0 takes effort, -1 obscure",
    "style": "layout, naming and idiom: 2 exemplary, 1 good, 0 passable, -1 poor",
}
DIMENSIONS = tuple(FIELDS)
FAULTS_TABLE = ((0, 2), (1, 1), (2, 0))  # faults -> grade; more give -1

Grades = dict[str, int | None]  # dimension -> -1..2, None when unknown


@dataclass(frozen=True)
class Wish:
    """A prompt and what can be checked about its answers: (kind, value) pairs, see constraints.CHECKS; () for CODAL-Bench."""

    task: Task
    constraints: tuple[tuple[str, Any], ...] = ()


def asked_for(wish: Wish, code: str) -> str:
    """The program to judge instruction following by: undressed, unless that changes which wishes it keeps."""
    plain = undressed(code)
    same = all(satisfied(kind, value, code) == satisfied(kind, value, plain) for kind, value in wish.constraints)
    return plain if same or addressed(code) else code


# which dimensions are asked about together, and how their programs are shown: comments and docstrings are for the explanation,
# and for the instruction where it is about them; everything else is judged as ModelJudge shows it
SHOWN: tuple[tuple[tuple[str, ...], Callable[[Wish, str], str]], ...] = (
    (("explanation",), lambda _, code: code),
    (("instruction",), asked_for),
    (("complexity", "readability", "style"), lambda _, code: undressed(code)),
)


def load_wishes(limit: int = 0) -> list[Wish]:
    """CODAL-Bench when a data folder holds it (see tasks/codal.py), else our own prompts; at most `limit` of them, spread
    evenly (0: all). Raises FalconError for a negative limit."""
    if limit < 0:
        raise FalconError(f"--limit {limit}: a number of prompts is expected", "--limit 0 takes all")
    try:
        found = find("codal/test", "", SUFFIXES).is_file()
    except FalconError:  # it is in no data folder
        found = False
    wishes = [Wish(task) for task in load_tasks("codal")] if found else own_wishes()
    return wishes if not 0 < limit < len(wishes) else [wishes[i * len(wishes) // limit] for i in range(limit)]


def own_wishes() -> list[Wish]:
    """The committed prompts, in the order of their file; the task's gold keeps all its constraints."""
    wishes = []
    for number, row in read_rows(DATA / "preferences" / "preferences.jsonl"):
        where = f"preferences.jsonl line {number}"
        prompt, name, family, gold = (field(row, key, str, where) for key in ("prompt", "entry_point", "family", "gold"))
        asked = name if f"def {name}(" in gold else None  # a prompt for a class names it itself
        task = Task(f"preferences/{number:02}", "preferences", "test", prompt, asked, (), gold=gold, family=family)
        wishes.append(Wish(task, tuple((kind, value) for kind, value in field(row, "constraints", list, where))))
    return wishes


# ---- grades


def static_grades(answers: Sequence[tuple[Wish, str]]) -> list[Grades]:
    """Grades by measurement. instruction: share of constraints kept (all 2, two thirds 1, a third 0), None without any; it
    grades form: a stub that returns nothing useful may keep all of them.
    complexity, style: as StaticJudge. explanation, readability: faults counted by `unexplained` and `unreadable`.
    """
    found = []
    for (wish, code), scores in zip(answers, StaticJudge().score_many([(w.task, code) for w, code in answers]), strict=True):
        kept = [satisfied(kind, value, code) for kind, value in wish.constraints]
        tree = parse(code)
        instruction = math.floor(3 * sum(kept) / len(kept)) - 1 if kept else None
        if tree is None:
            found.append({d: -1 if kept or d != "instruction" else None for d in DIMENSIONS})
            continue
        explanation, readability = (grade(f(tree, code), FAULTS_TABLE) for f in (unexplained, unreadable))
        explanation = -1 if addressed(code) else explanation  # a speech to the judge explains nothing
        values = (instruction, explanation, scores.complexity, readability, scores.style)
        found.append(dict(zip(DIMENSIONS, values, strict=True)))
    return found


def unexplained(tree: Any, code: str) -> int:
    """Faults of explanation: no docstring at a function or class 2, one under five words 1, ten lines without a comment 1."""
    texts = docstrings(tree)
    silent = len(code.splitlines()) >= 10 and not tokens(code, tokenize.COMMENT)
    return 2 * (not texts or not all(texts)) + (min((len(t.split()) for t in texts), default=0) < 5) + silent


def unreadable(tree: Any, code: str) -> int:
    """Faults of readability: a line over 88 characters, nesting deeper than 3, a function over 25 lines, a name of one letter
    other than the usual operands, counters and coordinates."""
    long = any((f.end_lineno or f.lineno) - f.lineno >= 25 for f in functions(tree))
    short = any(len(name) == 1 for name in names(tree) - set("_abijknxyz"))
    return sum([max(map(len, code.splitlines())) > 88, depth(tree) > 3, long, short])


def model_grades(chat: CachedChat, answers: Sequence[tuple[Wish, str]]) -> list[Grades]:
    """What a model says, not yet `bounded`, asked as SHOWN. None without an answer, and for text that does not parse: it is not
    asked about."""
    found: list[Grades] = [dict.fromkeys(DIMENSIONS) for _ in answers]
    whole = [i for i, (_, code) in enumerate(answers) if parse(code) is not None]
    for dimensions, shown in SHOWN:
        rubric = {d: FIELDS[d] for d in dimensions}
        prompts = [question(rubric, wanted(answers[i][0].task), shown(*answers[i])) for i in whole]
        for i, reply in zip(whole, chat.choose(prompts, dimensions, GRADES), strict=True):
            found[i] |= {d: int(reply[d]) for d in dimensions} if reply is not None else {}
    return found


def bounded(claimed: Grades, static: Grades) -> Grades:
    """A model's grades, at most the static ones + 1, for instruction following at most the static one where it is known."""
    rooms = {d: 2 if g is None else g + (d != "instruction") for d, g in static.items()}
    return {d: None if g is None else min(g, rooms[d]) for d, g in claimed.items()}


def compared(chat: CachedChat, pairs: Sequence[tuple[Wish, str, str]]) -> list[Any]:
    """Per (wish, before, after) and dimension the preference shown in either order, 1 for after, -1 for before, 0 for neither.

    Programs are SHOWN as for their grades. A vote against a static difference of 2 or more is none. Not asked about: equal texts
    (0), and a text that does not parse (it loses; two of them are unknown). A dimension without an answer is missing.
    """
    one, two = static_grades([(wish, b) for wish, b, _ in pairs]), static_grades([(wish, a) for wish, _, a in pairs])
    whole = [(parse(before) is not None, parse(after) is not None) for _, before, after in pairs]
    found: list[dict[str, list[int]]] = [
        {d: [after - before] * 2 for d in DIMENSIONS} if before != after else {} for before, after in whole
    ]
    signs = {"A": -1, "B": 1, "tie": 0}
    for dimensions, shown in SHOWN:
        texts = {i: (shown(w, b), shown(w, a)) for i, (w, b, a) in enumerate(pairs) if all(whole[i])}
        asked = [i for i, (before, after) in texts.items() if before != after]
        orders = [pair_question(pairs[i][0], dimensions, *programs) for i in asked for programs in (texts[i], texts[i][::-1])]
        replies = chat.choose(orders, dimensions, tuple(signs))
        votes = {i: {d: [0, 0] for d in dimensions} for i in texts if i not in asked}
        for i, ab, ba in zip(asked, replies[::2], replies[1::2], strict=True):
            if ab is not None and ba is not None:
                votes[i] = {
                    d: [credible(vote, one[i][d], two[i][d]) for vote in (signs[ab[d]], -signs[ba[d]])] for d in dimensions
                }
        for i, vote in votes.items():
            found[i] |= vote
    return found


def credible(vote: int, before: int | None, after: int | None) -> int:
    """The vote (1 for after, -1 for before), 0 when it contradicts a static difference of 2 or more."""
    return 0 if before is not None and after is not None and vote * (after - before) <= -2 else vote


def pair_question(asked: Wish, dimensions: Sequence[str], first: str, second: str) -> str:
    """The question which of two programs is better, for each of the dimensions."""
    programs = f"Program A:\n{fenced(first)}\n\nProgram B:\n{fenced(second)}"
    last = f"Which program is better? {answer_shape(dimensions, ('A', 'B', 'tie'))}"
    rubric = aspects({d: FIELDS[d] for d in dimensions})
    return f"{INTRODUCTION}{rubric}\n\nTask: {wanted(asked.task)}\n\n{programs}\n\n{last}"


def judged(wishes: Sequence[Wish], before: Sequence[str], after: Sequence[str], chat: CachedChat | None) -> list[dict[str, Any]]:
    """One row per wish, as JSON data: task_id, before, after (programs), grades and pairs by judge.

    grades[judge] = [grades before, grades after]; claimed[judge] = likewise, as the model said them, before they are bounded;
    pairs[judge] = what `compared` says. Judges: "static" and that of `chat`.
    """
    sides = [list(zip(wishes, side, strict=True)) for side in (before, after)]
    grades = {"static": [static_grades(side) for side in sides]}
    claimed: dict[str, list[list[Grades]]] = {}
    known = [
        {d: [(y > x) - (y < x)] * 2 for d in DIMENSIONS if (x := b[d]) is not None and (y := a[d]) is not None}
        for b, a in zip(*grades["static"], strict=True)
    ]
    pairs: dict[str, list[Any]] = {"static": known}
    if chat is not None:
        claimed[chat.name] = [model_grades(chat, side) for side in sides]
        both = zip(claimed[chat.name], grades["static"], strict=True)
        grades[chat.name] = [[bounded(c, g) for c, g in zip(*side, strict=True)] for side in both]
        pairs[chat.name] = compared(chat, list(zip(wishes, before, after, strict=True)))
    return [
        {
            "task_id": w.task.task_id, "before": before[i], "after": after[i],
            "grades": {name: [side[i] for side in found] for name, found in grades.items()},
            "claimed": {name: [side[i] for side in found] for name, found in claimed.items()},
            "pairs": {name: found[i] for name, found in pairs.items()},
        }
        for i, w in enumerate(wishes)
    ]  # fmt: skip


# ---- tables


def differences(rows: Sequence[dict[str, Any]], judge: str, draws: int = 10000, seed: int = 0) -> pd.DataFrame:
    """After - before by one judge, per dimension: means, difference with its 95 % interval (paired by prompt), n, unknown;
    better, same, worse and swayed by pairs; preferred: better among the decided pairs, with Wilson's interval.

    swayed: pairs whose preference did not survive the exchange of positions; they count as same. unpaired: pairs without an
    answer, which count as nothing.
    """
    import pandas as pd

    table = []
    for d in DIMENSIONS:
        grades = [(b[d], a[d]) for b, a in (row["grades"][judge] for row in rows) if None not in (b[d], a[d])]
        votes = [row["pairs"][judge][d] for row in rows if d in row["pairs"][judge]]
        better, worse = (sum(vote == [side, side] for vote in votes) for side in (1, -1))
        counts = {"better": better, "same": len(votes) - better - worse, "worse": worse, "swayed": sum(x != y for x, y in votes)}
        counts["unpaired"] = len(rows) - len(votes)
        entry: dict[str, Any] = {"judge": judge, "dimension": d, "before": None, "after": None, "difference": None}
        entry |= {"ci_low": None, "ci_high": None, "p": None, "n": len(grades), "unknown": len(rows) - len(grades), **counts}
        if grades:
            one, two = (np.array([values], dtype=float) for values in zip(*grades, strict=True))
            found = paired_difference((two + 1) / 3, (one + 1) / 3, draws, np.random.default_rng(seed))
            entry |= {"before": one.mean(), "after": two.mean(), "p": found.p}
            entry |= {"difference": 3 * found.value, "ci_low": 3 * found.low, "ci_high": 3 * found.high}
        low, high = wilson(better, better + worse)
        entry |= {
            "preferred": better / (better + worse) if better + worse else None,
            "preferred_low": low,
            "preferred_high": high,
        }
        table.append(entry)
    return pd.DataFrame(table).astype(
        dict.fromkeys(("before", "after", "difference", "ci_low", "ci_high", "p", "preferred"), float)
    )


def agreement(rows: Sequence[dict[str, Any]], one: str, two: str) -> pd.DataFrame:
    """How far a model `two` agrees with the static judge `one`, one row per dimension, over all programs that both graded.

    What the model said is compared, before the bound, which would make any two judges alike: n, share of equal, lower and
    higher grades (the equal ones with Wilson's interval), Cohen's kappa with quadratic weights (None when a judge gave one grade
    only), mean difference one - two; bounded: how many of the n the bound then lowered. Rows without what it said are unknown.
    """
    import pandas as pd

    table = []
    for d in DIMENSIONS:
        both = [
            (a[d], b[d], c[d])
            for row in rows
            for a, b, c in zip(row["grades"][one], row.get("claimed", {}).get(two, ()), row["grades"][two], strict=False)
        ]
        known = np.array([grades for grades in both if None not in grades], dtype=float).reshape(-1, 3)
        static, said, kept = known.T
        n, same = len(known), int((static == said).sum())
        low, high = wilson(same, n)
        row = {"judges": f"{one}, {two}", "dimension": d, "n": n, "same": same / n if n else None, "ci_low": low, "ci_high": high}
        row |= {"lower": (said < static).mean() if n else None, "higher": (said > static).mean() if n else None}
        varied = n > 0 and np.ptp(static) > 0 and np.ptp(said) > 0
        row["kappa"] = 1 - ((static - said) ** 2).mean() / ((static[:, None] - said) ** 2).mean() if varied else None
        row |= {"mean_difference": (static - said).mean() if n else None, "bounded": int((kept < said).sum()) if n else None}
        table.append(row)
    floats = ("same", "lower", "higher", "kappa", "mean_difference")
    return pd.DataFrame(table).astype(dict.fromkeys(floats, float) | {"bounded": "Int64"})


# ---- a run


def run_preferences(
    profile: Profile, adapter: Path | None, limit: int = 0, out: Path | None = None, progress: bool = True
) -> list[pd.DataFrame]:
    """Greedy answers of profile.model without and with its adapter, judged statically and by profile.judge: a table of
    differences per judge, then one of agreement with the static judge.

    out: folder for answers.jsonl (the rows of `judged`) and card.json; None writes nothing. Without an adapter both sides are
    the same model and every difference is 0. Raises FalconError for an unknown model or judge, and a negative limit.
    """
    from falconlib import prompts
    from falconlib.policy.generate import Row, generate
    from falconlib.policy.models import load_judge, load_policy

    with open_chat(profile.judge, load_judge) as chat:  # before the minutes of generation: it may be missing
        wishes, sides = load_wishes(limit), []
        for chosen in dict.fromkeys((None, adapter)):
            policy = load_policy(profile.model, adapter=chosen)
            rendered = [prompts.render(policy.tokenizer, w.task) for w in wishes]
            with tqdm(total=len(wishes), desc="with adapter" if chosen else "without adapter", disable=not progress) as bar:
                completions = generate(
                    policy, [p.text for p in rendered], [Row(i, 0) for i in range(len(wishes))],
                    max_new_tokens=profile.eval.max_new_tokens, temperature=0.0, stop=prompts.STOP, progress=bar.update,
                )  # fmt: skip
            sides.append([prompts.extract_program(c.text, p.prefix) for c, p in zip(completions, rendered, strict=True)])
        drafts = zip(wishes, sides[0], sides[-1], strict=True)
        save(out, [{"task_id": w.task.task_id, "before": before, "after": after} for w, before, after in drafts])
        rows = judged(wishes, sides[0], sides[-1], chat)
        card = {"model": policy.name, "fingerprint": policy.fingerprint, "adapter": str(adapter or ""), "prompts": len(wishes)}
        card |= {"judge": "static" if chat is None else {"backend": chat.name, **chat.identity, **chat.counts}}
    save(out, rows)
    if out is not None:
        write_json(Path(out) / "card.json", card)
    names = list(rows[0]["grades"])
    found = [differences(rows, name, profile.eval.bootstrap) for name in names]
    return [*found, *(agreement(rows, "static", name) for name in names[1:])]


def save(out: Path | None, rows: Sequence[dict[str, Any]]) -> None:
    """Writes answers.jsonl: the programs before they are judged, so that no judge can lose them, then the judged rows."""
    if out is not None:
        write_text(Path(out) / "answers.jsonl", "".join(canonical(row) + "\n" for row in rows))
