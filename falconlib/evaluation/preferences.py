"""Preferences: five dimensions of a program in the manner of CODAL-Bench, graded and compared by any judge backend.

Static grades are tables over what programs can measure; a model's grade never exceeds them by more than 1, and for
instruction following not at all where the instructions can be checked. Pairs are shown to a model in both orders, and a
preference that does not survive the exchange, or that contradicts a static difference of 2 or more, counts as none. Nothing
is run: every dimension grades form, and a program that keeps all instructions may still compute nothing.
"""

from __future__ import annotations

import math
import tokenize
from collections.abc import Sequence
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
from falconlib.judge import Chat, StaticJudge, open_chat
from falconlib.judge.model import GRADES, INTRODUCTION, answer_shape, aspects, fenced, question, undressed, wanted
from falconlib.judge.static import grade, parse
from falconlib.records import Task
from falconlib.tasks import load_tasks
from falconlib.tasks.files import DATA, SUFFIXES, field, find, read_rows

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
DRESSED = ("explanation",)  # the dimensions for which a pair is shown with its comments and docstrings
FAULTS_TABLE = ((0, 2), (1, 1), (2, 0))  # faults -> grade; more give -1

Grades = dict[str, int | None]  # dimension -> -1..2, None when unknown


@dataclass(frozen=True)
class Wish:
    """A prompt and what can be checked about its answers: (kind, value) pairs, see constraints.CHECKS; () for CODAL-Bench."""

    task: Task
    constraints: tuple[tuple[str, Any], ...] = ()


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
            found.append(dict.fromkeys(DIMENSIONS, -1) | {"instruction": -1 if kept else None})
            continue
        explanation, readability = (grade(f(tree, code), FAULTS_TABLE) for f in (unexplained, unreadable))
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
    long = any(f.end_lineno - f.lineno >= 25 for f in functions(tree))
    short = any(len(name) == 1 for name in names(tree) - set("_abijknxyz"))
    return sum([max(map(len, code.splitlines())) > 88, depth(tree) > 3, long, short])


def model_grades(chat: Chat, answers: Sequence[tuple[Wish, str]]) -> list[Grades]:
    """Grades by a model, which sees docstrings and comments (fenced), bounded by the static grades.

    None without an answer, and for text that does not parse: it is not asked about.
    """
    found = static_grades(answers)
    prompts = {i: question(FIELDS, wanted(wish.task), code) for i, (wish, code) in enumerate(answers) if parse(code) is not None}
    replies = dict(zip(prompts, chat.choose(list(prompts.values()), DIMENSIONS, GRADES), strict=True))
    for i, grades in enumerate(found):
        rooms = {d: 2 if g is None else g + (d != "instruction") for d, g in grades.items()}
        reply = replies.get(i)
        found[i] = {d: None if reply is None else min(int(reply[d]), rooms[d]) for d in DIMENSIONS}
    return found


def compared(chat: Chat, pairs: Sequence[tuple[Wish, str, str]]) -> list[Any]:
    """Per (wish, before, after) and dimension the preference shown in either order, 1 for after, -1 for before, 0 for neither.

    Programs are shown as ModelJudge shows them, without comments and docstrings but for the dimension that is about them. A
    vote against a static difference of 2 or more is none. Not asked about: equal texts (0), and a text that does not parse
    (it loses; two of them are unknown). A dimension without an answer is missing.
    """
    one, two = (static_grades([(pair[0], pair[side]) for pair in pairs]) for side in (1, 2))
    whole = [(parse(before) is not None, parse(after) is not None) for _, before, after in pairs]
    found: list[dict[str, list[int]]] = [
        {d: [after - before] * 2 for d in DIMENSIONS} if before != after else {} for before, after in whole
    ]
    signs = {"A": -1, "B": 1, "tie": 0}
    for dimensions, shown in ((DRESSED, str), (tuple(d for d in DIMENSIONS if d not in DRESSED), undressed)):
        texts = {i: (shown(b), shown(a)) for i, (_, b, a) in enumerate(pairs) if all(whole[i])}
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
    return 0 if None not in (before, after) and vote * (after - before) <= -2 else vote


def pair_question(asked: Wish, dimensions: Sequence[str], first: str, second: str) -> str:
    """The question which of two programs is better, for each of the dimensions."""
    programs = f"Program A:\n{fenced(first)}\n\nProgram B:\n{fenced(second)}"
    last = f"Which program is better? {answer_shape(dimensions, ('A', 'B', 'tie'))}"
    rubric = aspects({d: FIELDS[d] for d in dimensions})
    return f"{INTRODUCTION}{rubric}\n\nTask: {wanted(asked.task)}\n\n{programs}\n\n{last}"


def judged(wishes: Sequence[Wish], before: Sequence[str], after: Sequence[str], chat: Chat | None) -> list[dict[str, Any]]:
    """One row per wish, as JSON data: task_id, before, after (programs), grades and pairs by judge.

    grades[judge] = [grades before, grades after]; pairs[judge] = what `compared` says. Judges: "static" and that of `chat`.
    """
    one, two = ([(w, code) for w, code in zip(wishes, side, strict=True)] for side in (before, after))
    graders = {"static": static_grades}
    if chat is not None:
        graders[chat.name] = lambda answers: model_grades(chat, answers)
    grades = {name: list(zip(grader(one), grader(two), strict=True)) for name, grader in graders.items()}
    known = [
        {d: [(a[d] > b[d]) - (a[d] < b[d])] * 2 for d in DIMENSIONS if None not in (b[d], a[d])} for b, a in grades["static"]
    ]
    pairs: dict[str, list[Any]] = {"static": known}
    if chat is not None:
        pairs[chat.name] = compared(chat, [(w, b, a) for (w, b), (_, a) in zip(one, two, strict=True)])
    return [
        {
            "task_id": w.task.task_id, "before": before[i], "after": after[i],
            "grades": {name: list(found[i]) for name, found in grades.items()},
            "pairs": {name: found[i] for name, found in pairs.items()},
        }
        for i, w in enumerate(wishes)
    ]  # fmt: skip


# ---- tables


def differences(rows: Sequence[dict[str, Any]], judge: str, draws: int = 10000, seed: int = 0) -> pd.DataFrame:
    """After - before by one judge, per dimension: means, difference with its 95 % interval (paired by prompt), n, unknown;
    better, same, worse and swayed by pairs; preferred: better among the decided pairs, with Wilson's interval.

    swayed: pairs whose preference did not survive the exchange of positions; they count as same.
    """
    import pandas as pd

    table = []
    for d in DIMENSIONS:
        grades = [(b[d], a[d]) for b, a in (row["grades"][judge] for row in rows) if None not in (b[d], a[d])]
        votes = [row["pairs"][judge][d] for row in rows if d in row["pairs"][judge]]
        better, worse = (sum(vote == [side, side] for vote in votes) for side in (1, -1))
        counts = {"better": better, "same": len(votes) - better - worse, "worse": worse, "swayed": sum(x != y for x, y in votes)}
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
    """How far two judges agree, one row per dimension, over all programs that both graded: n, share of equal grades with Wilson's
    interval, Cohen's kappa with quadratic weights (None when a judge gave one grade only), mean difference one - two.
    """
    import pandas as pd

    table = []
    for d in DIMENSIONS:
        both = [(a[d], b[d]) for row in rows for a, b in zip(row["grades"][one], row["grades"][two], strict=True)]
        known = np.array([pair for pair in both if None not in pair], dtype=float).reshape(-1, 2)
        n, same = len(known), int((known[:, 0] == known[:, 1]).sum())
        low, high = wilson(same, n)
        row = {"judges": f"{one}, {two}", "dimension": d, "n": n, "same": same / n if n else None, "ci_low": low, "ci_high": high}
        varied = n > 0 and (np.ptp(known, axis=0) > 0).all()
        chance = ((known[:, :1] - known[:, 1]) ** 2).mean() if varied else 1.0
        row["kappa"] = 1 - ((known[:, 0] - known[:, 1]) ** 2).mean() / chance if varied else None
        table.append(row | {"mean_difference": (known[:, 0] - known[:, 1]).mean() if n else None})
    return pd.DataFrame(table).astype({"same": float, "kappa": float, "mean_difference": float})


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
