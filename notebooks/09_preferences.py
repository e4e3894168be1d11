# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 09 · Preferences: style, complexity, instruction following
#
# [![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/falcon/blob/main/notebooks/09_preferences.ipynb)
# [All symbols](https://github.com/OWNER/falcon/blob/main/notebooks/glossary.md)
#
# **Question.** Are the programs *better written* after training than before, and does AI feedback in the reward have to do with
# it?
#
# **Reads** `train/<arm>-s<seed>/samples.jsonl.gz`: held-out programs with the judge's scores (from 06), and the judged answers
# of `falconlib eval --preferences`. **Writes** `tables/preferences.csv`, `tables/dimensions.csv`, `tables/agreement.csv`,
# `figures/preferences`.
#
# **Run time**: seconds on CPU with any profile; no GPU, no model. It reads files only.
#
# The paper reports preference scores on CODAL-Bench, where a large model grades programs written to an instruction. We use its
# scale twice: for three aspects on the held-out problems, and for all five dimensions on prompts of our own, with a judge that
# needs no key and no network, and with a model beside it.

# %%
# On your own machine this cell does nothing. On Colab it fetches the repository and what is missing, never torch or numpy.
import sys

if "google.colab" in sys.modules:
    import os
    import runpy
    import subprocess

    if not os.path.isdir("/content/falcon"):
        subprocess.run(["git", "clone", "-q", "--depth", "1", "https://github.com/OWNER/falcon", "/content/falcon"], check=True)
    os.chdir("/content/falcon")
    runpy.run_path("notebooks/bootstrap.py")["prepare"](drive=False)  # True: finished results are copied to Google Drive

# %%
import pandas as pd
from IPython.display import HTML, Image, Markdown, display

from falconlib.evaluation.preferences import agreement, differences, own_wishes, static_grades
from falconlib.evaluation.score import load_samples
from falconlib.judge import StaticJudge
from falconlib.records import Task
from falconlib.reporting import figures, start
from falconlib.reporting.overview import where_we_are
from falconlib.reporting.pairs import ASPECTS, score_differences
from falconlib.reporting.programs import side_by_side, verdict
from falconlib.reporting.tables import training_runs
from falconlib.tasks.files import DATA, read_rows

# %% tags=["parameters"]
profile: str = "quick"  # a file of notebooks/profiles: smoke, quick, colab, small-cpu, small, paper, paper-apps
results: str = ""  # results folder; "" is $FALCON_RESULTS, or results/ of the repository
overrides: dict = {}  # settings that differ from the profile's, by dotted name

# %%
stage = start("09_preferences", {"profile": profile, "results": results, "overrides": overrides})
where_we_are("09")

# %% [markdown]
# *Figure: the method; filled, what this notebook is about. Thin arrows: the way of a program; dashed: the inner loop of one
# task; thick: the outer loop over all tasks; dotted: long-term memory. Small numbers: the notebooks that treat a part.*
#
# ## By hand first: what the judge sees
#
# Each aspect gets -1, 0, 1 or 2. The static judge reads a program and never runs it:
#
# * **style**: ruff messages per logical line: none gives 2, at most one in four lines 1, at most 0.6 per line 0, else -1;
# * **complexity**: cognitive complexity of the hardest function: up to 4 gives 2, up to 9 gives 1, up to 15 gives 0, else -1;
# * **instruction**: does the program define what was asked for, with that signature, and nothing to read or print? No fault
#   gives 2.
#
# Two programs for "Return the larger of two numbers." Both are right. The first: one `return`, no branch: 2, 2, 2. The second
# has the wrong name, which only instruction following minds; three nested `if` cost $1 + 2 + 3 = 6$: a complexity score of 1;
# and ruff would join them: a style score below 2.

# %%
larger = Task("worked/1", "worked", "test", "Return the larger of two numbers.", "larger", ("assert larger(1, 2) == 2",))
plain = "def larger(a, b):\n    return max(a, b)\n"
nested = "def biggest(a, b):\n  if a > b:\n    if a != b:\n      if a is not None:\n        return a\n  return b\n".replace(
    "  ", "    "
)
worked = StaticJudge().score_many([(larger, plain), (larger, nested)])
assert (worked[0].style, worked[0].complexity, worked[0].instruction) == (2, 2, 2)
assert worked[1].complexity == 1 and worked[1].instruction < 2 and worked[1].style < 2
pd.DataFrame(worked, index=["one return", "nested, wrong name"])

# %% [markdown]
# ## Which programs
#
# Zero-shot programs of every arm. The judge scored those that *load*: text that does not even run says nothing about style. So
# an arm that loads more programs is judged on more of them, and a plain mean over arms would compare different problems. They
# are the samples of the runs' own stages (06), which a judge has scored; 07 may rest on more problems, sampled later.

# %%
train = stage.find(f"train/{stage.profile.arms[0]}-s{stage.profile.seeds[0]}/samples.jsonl.gz").parents[1]
runs = {
    arm: [load_samples(stage.find(f"train/{folder.name}/samples.jsonl.gz")) for folder in folders]
    for arm, folders in training_runs(train).items()
}
rows = []
for arm, found in runs.items():
    programs = [sample.scores for run in found for sample in run]
    judged = [scores for scores in programs if any(getattr(scores, aspect) is not None for aspect in ASPECTS)]
    means = {f"mean {a}": pd.Series([getattr(s, a) for s in judged], dtype=float).mean() for a in ASPECTS}
    rows.append({"arm": arm, "programs": len(programs), "judged": len(judged), **means})
if stage.from_reference:
    print(f"These runs were not made here: they are the committed reference results of profile {train.parent.name}.")
display(pd.DataFrame(rows).style.hide(axis="index").format(precision=2, na_rep="unknown"))

# %% [markdown]
# ## Before and after, problem by problem
#
# For every problem that was judged **both** before (base) and after (the arm), with $s(x)$ the mean score of its judged
# programs:
#
# $$\Delta = \frac{1}{|P|}\sum_{x \in P} \bigl(s_{after}(x) - s_{before}(x)\bigr), \qquad P = \{x : \text{judged on both
# sides}\}$$
#
# `better`, `same`, `worse` count the problems by sign: the preference in the paper's sense. `not_loaded` and `unjudged` are
# unknown, not zero: they stay out and are counted.

# %%
before = "base" if "base" in runs else next(iter(runs))
pairs = {arm: (found, runs[before]) for arm, found in runs.items() if arm != before}
preferences = score_differences(pairs, draws=stage.profile.eval.bootstrap)  # Delta = mean over P of s_after - s_before
preferences = preferences.rename(columns={"comparison": "arm"})
preferences = preferences.assign(against=before, judge=StaticJudge().version)
stage.save_table(preferences, "tables/preferences")
shown = preferences.drop(columns=["against", "judge", "p"])
display(shown.style.hide(axis="index").format(precision=2, na_rep="unknown"))

# %%
drawn = preferences[preferences["difference"].notna()]
drawn = drawn.assign(comparison=drawn["arm"] + " - " + before + ", " + drawn["aspect"])
drawn = drawn[["comparison", "difference", "ci_low", "ci_high"]]
if len(drawn):
    figure = figures.paired_differences(drawn, "difference in the judge's score (-1 to 2)", unit=1)
    stage.save_figure(figure, "figures/preferences", drawn)
    alt = f"Differences to {before} in the judge's style, complexity and instruction scores with 95 % intervals, one line each"
    display(Image(filename=str(stage.path("figures/preferences.png")), metadata={"alt": alt}, width=760))
else:
    print("no problem was judged on both sides: there is nothing to draw")

# %% [markdown]
# *Figure: change of each score, paired by problem, with 95 % intervals; right of the vertical line: better written than
# before.*
#
# A caution that belongs to every such table: this judge also gave the AI feedback in FALCON's training reward. A gain shows
# that the arm learnt what *this judge* likes. And scores do not ask whether the program is right: that is table 07.
#
# ## Side by side
#
# The problems whose scores changed most between before and after, at most three; greedy programs where there are any.

# %%
after = "falcon" if "falcon" in runs else list(runs)[-1]
first = {}
for arm in (before, after):
    for sample in runs[arm][0]:
        first.setdefault((sample.benchmark, sample.task_id), {}).setdefault(arm, sample)
changes = []
for both in first.values():
    known = [[getattr(both[arm].scores, aspect) for aspect in ASPECTS] for arm in (before, after) if arm in both]
    if len(known) == 2 and all(score is not None for scores in known for score in scores):
        changes.append((sum(abs(b - a) for a, b in zip(*known, strict=True)), both, known))
for _, both, known in sorted(changes, key=lambda change: -change[0])[:3]:
    heads = [", ".join(f"{a} {s}" for a, s in zip(ASPECTS, scores, strict=True)) for scores in known]
    found = [both[arm] for arm in (before, after)]
    heads = [f"{arm}: {verdict(s.status, s.error_class)}; {h}" for arm, s, h in zip((before, after), found, heads, strict=True)]
    display(HTML(side_by_side(both[before].task_id, [(h, s.code) for h, s in zip(heads, found, strict=True)])))
print(f"{len(changes)} problems have a judged first program of both {before} and {after}")

# %% [markdown]
# ## Five dimensions, two judges
#
# `data/preferences` holds prompts whose wishes a program can check, such as "no loop" or "a docstring that names the units".
# One command answers them without and with an adapter and lets two judges grade all five dimensions:
#
# `falconlib eval --preferences --adapter <folder> --set judge.backend=local --out results/runs/<profile>/preferences`
#
# It takes a model and minutes, so here its log is read: yours when there is one, else the committed one (the quick profile's
# FALCON adapter; the model judge is the embedded model itself). The static grades are computed again and must agree.

# %%
mine = stage.root / "preferences" / "answers.jsonl"
answers = [row for _, row in read_rows(mine if mine.is_file() else DATA / "preferences" / "answers.jsonl")]
print("answers:", "of this run" if mine.is_file() else "committed, not made here")
wishes = {wish.task.task_id: wish for wish in own_wishes()}
if all(row["task_id"] in wishes for row in answers):  # not those of CODAL-Bench
    asked = [wishes[row["task_id"]] for row in answers]
    for place, side in enumerate(("before", "after")):
        again = static_grades([(wish, row[side]) for wish, row in zip(asked, answers, strict=True)])
        assert again == [row["grades"]["static"][place] for row in answers], side
judges = sorted(answers[0]["grades"], key=lambda judge: judge != "static")
five = pd.concat([differences(answers, judge, stage.profile.eval.bootstrap) for judge in judges])
stage.save_table(five, "tables/dimensions")
display(five.drop(columns=["p"]).style.hide(axis="index").format(precision=2, na_rep="unknown"))

# %% [markdown]
# `better` and `worse` come from pairs. The model sees each pair in both orders; a preference that changes with the order counts
# as none and is `swayed`, and so does one that contradicts a static difference of 2 or more; a pair without an answer is
# `unpaired`. A program that does not parse loses its pair and gets no grade from the model. `preferred` is the share of
# `better` among the decided pairs, with Wilson's interval.
#
# Do the judges agree? The share of equal grades, of `lower` and `higher` ones by the model, and Cohen's $\kappa$ with quadratic
# weights: 1 is agreement, 0 what chance gives; unknown when a judge gives one grade to everything, for then it tells nothing
# apart. Compared is what the model *said*: afterwards its grade is bounded by the static one + 1 (for instruction following by
# the static one itself, where it is known), and a judge that always says 2 would seem to agree. `bounded` counts the grades
# that were lowered so.
#
# The model sees comments and docstrings for the *explanation*, where they are what is judged and may persuade, by 1 at most,
# and for the *instruction* where it asks for such (its grade never exceeds the static one); else they are taken out, and names
# and short strings are all that can speak to it. No pair that static grades decide by 2 or more is turned. Nothing is run:
# *instruction* here is form, and a stub that computes nothing can keep it all.

# %%
for judge in judges[1:]:
    agreed = agreement(answers, judges[0], judge)
    stage.save_table(agreed, "tables/agreement")
    display(agreed.style.hide(axis="index").format(precision=2, na_rep="unknown"))
    apart = []
    for row in answers:
        for static, said in zip(row["grades"][judges[0]], row.get("claimed", {}).get(judge, ()), strict=False):
            both = [(d, static[d], said[d]) for d in static if None not in (static[d], said[d])]
            apart += [(abs(a - b), row["task_id"], d, a, b) for d, a, b in both if a != b]
    for _, task_id, dimension, a, b in sorted(apart, reverse=True)[:5]:
        print(f"{task_id}, {dimension}: {judges[0]} {a}, {judge} says {b}")
    print(f"{len(apart)} grades differ" if any("claimed" in row for row in answers) else "what the model said was not kept")

# %% [markdown]
# ## What we saw

# %%
lines = []
for row in preferences.itertuples():
    if row.n:
        span = f"{row.difference:+.2f} [{row.ci_low:+.2f}, {row.ci_high:+.2f}]"
        lines.append(f"{row.arm}, {row.aspect}: {span} on {row.n} problems, {row.better} better and {row.worse} worse")
    else:
        lines.append(f"{row.arm}, {row.aspect}: unknown, no problem was judged on both sides")
sure = preferences[preferences["p_holm"] < 0.05]
known, dead, silent = preferences["difference"].notna().sum(), preferences["not_loaded"].max(), preferences["unjudged"].max()
lines.append(f"{len(sure)} of {known} known changes stay significant after Holm's adjustment")
lines.append(f"at most {dead} programs of a comparison did not load, {silent} lack a score")
for judge, part in five.groupby("judge", sort=False):
    pairs, swayed = part[["better", "same", "worse"]].to_numpy().sum(), part["swayed"].sum()
    lines.append(f"judge {judge}: {part['better'].sum()} better, {part['worse'].sum()} worse, {swayed} swayed of {pairs} pairs")
display(Markdown("\n".join(f"* {line}" for line in lines)))

# %% [markdown]
# ## Exercises
#
# 1. An arm learns to answer every task with `def f(x): pass`. What happens to its three scores, and what protects the training
#    reward from that?
#
# <details><summary>Solution</summary>
#
# Style and complexity become perfect; instruction following falls if name or signature are wrong, else it is nearly perfect
# too. In the reward, the weights are so small (0.04 each, scaled down with the number of tests) that no combination of judge
# scores can reverse the order given by the unit tests: passing one test more always wins.
#
# ```python
# task = Task("worked/2", "worked", "test", "Return the square of a number.", "f", ("assert f(2) == 4",))
# stub, misnamed = StaticJudge().score_many([(task, "def f(x):\n    pass\n"), (task, "def g(x):\n    pass\n")])
# assert (stub.style, stub.complexity, stub.instruction) == (2, 2, 1) and misnamed.instruction == -1
# ```
#
# </details>
#
# 2. Arm A loads 30 programs with a mean style of 1.2, arm B loads 20 with 1.5. Is B's style better?
#
# <details><summary>Solution</summary>
#
# Not shown. B may simply fail to load its worst ten. Compare only the problems that both loaded, as the table above does.
#
# ```python
# b = [2.0] * 15 + [0.0] * 5  # mean 1.5; had its ten worst programs loaded, at -1 each:
# assert sum(b) / 20 == 1.5 and (sum(b) - 10) / 30 < 1.2
# ```
#
# </details>

# %%
stage.finish()
