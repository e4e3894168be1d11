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
# # 01 · Tasks: what is learnt from, what is measured on
#
# [![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/falcon/blob/main/notebooks/01_tasks.ipynb)
# [All symbols](https://github.com/OWNER/falcon/blob/main/notebooks/glossary.md)
#
# **Question.** What is a task, which tasks may be learnt from, and could an answer leak from the training tasks into the tests?
#
# **Reads** the committed set `basics`, HumanEval from its wheel, MBPP where `FALCON_DATA` or `data/` holds it. **Writes**
# `tables/tasks.csv`, `01_tasks/families.*`, `01_tasks/difficulty.*`, `01_tasks/decontamination.csv`, `01_tasks/leakage.*`.
#
# **Run time**, every profile: seconds on 2 CPU cores. A GPU is not used.

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
import random
from collections import Counter
from statistics import median

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from IPython.display import Image, Markdown, display

from falconlib.errors import FalconError
from falconlib.files import read_json
from falconlib.memory.embed import HashedTfidf
from falconlib.prompts import user_message
from falconlib.reporting import figures, start
from falconlib.reporting.overview import where_we_are
from falconlib.reporting.tables import markdown
from falconlib.tasks import basics as basics_set
from falconlib.tasks import fingerprint, load_tasks, visible_tests
from falconlib.tasks.leakage import decontaminate, description, ngrams, shapes
from falconlib.tasks.meta import by_family, by_problem

# %% tags=["parameters"]
profile: str = "quick"  # a file of notebooks/profiles: smoke, quick, colab, small-cpu, small, paper, paper-apps
results: str = ""  # results folder; "" is $FALCON_RESULTS, or results/ of the repository
overrides: dict = {}  # settings that differ from the profile's, by dotted name

# %%
stage = start("01_tasks", {"profile": profile, "results": results, "overrides": overrides})
settings = stage.profile.tasks
print(f"profile {stage.profile.name} learns from {settings.train} and is measured on {settings.benchmarks}")
where_we_are("01")

# %% [markdown]
# *Figure: the method; filled, what this notebook is about. Thin arrows: the way of a program; dashed: the inner loop of one
# task; thick: the outer loop over all tasks; dotted: long-term memory. Small numbers: the notebooks that treat a part.*
#
# ## By hand first: when is a test task too close to a training task?
#
# Two descriptions share an *n-gram* when n words follow each other in both. "the sum of all numbers" and "the sum of all even
# numbers" share, for n = 3: *the sum of*, *sum of all*. The first has three 3-grams, so the overlap is 2/3. The second measure
# is the cosine of two embeddings: 1 for the same text, about 0 for texts without a common word.

# %%
first, second = ngrams("the sum of all numbers", 3), ngrams("the sum of all even numbers", 3)
assert len(first) == 3 and len(first & second) == 2
one, same, other = HashedTfidf().encode(["sum a list", "sum a list", "reverse words"])
print(
    f"3-gram overlap {len(first & second)}/{len(first)}; cosine with itself {one @ same:.2f}, with another task {one @ other:.2f}"
)

# %% [markdown]
# ## One task, field by field
#
# A `Task` is a frozen record. The model sees the description, the name and the shown test; the sandbox runs all tests; the
# reference program (`gold`) is for training tasks only.

# %%
basics = load_tasks("basics")
task = basics[0]
for name in ("task_id", "split", "family", "entry_point", "visible", "tests", "gold"):
    print(f"{name:12}", repr(getattr(task, name)))
print("\nwhat the model reads:\n" + user_message(task))

# %% [markdown]
# HumanEval is of the other kind: the prompt is the beginning of the program, and the model goes on. Its official tests are all
# hidden; the `>>>` examples of its docstring, where it has some, are what a reader sees.

# %%
humaneval = load_tasks("humaneval")
with_examples = sum(bool(visible_tests(task)) for task in humaneval)
print(f"{humaneval[2].task_id}, kind {humaneval[2].kind!r}\n{humaneval[2].prompt}")
print(f"{len(humaneval)} tasks, {with_examples} with usable examples in the docstring; shown here: {visible_tests(humaneval[2])}")

# %% [markdown]
# ## The sets and their splits
#
# Training, selection and measurement never share a task: weights and memory see `train`, choices are made on `validation`,
# numbers are reported on `test`. MBPP is not part of the repository; without its file the cell says so and goes on.

# %%
sets = {"basics": basics, "humaneval": humaneval}
try:
    sets["mbpp"] = load_tasks("mbpp")
except FalconError as missing:
    print(f"MBPP is left out.\n{missing.remedy}")
sets |= {name: load_tasks(name) for name in (*settings.train, *settings.benchmarks) if name not in sets}  # one's own files
counts = pd.DataFrame({name: Counter(task.split for task in tasks) for name, tasks in sets.items()}).fillna(0).astype(int)
display(Markdown(markdown(counts.rename_axis("split").reset_index())))
measured = {n: len(load_tasks(n, "test", settings.eval_limit, settings.seed)) for n in settings.benchmarks}
print("of these, this profile measures on:", measured)

# %% [markdown]
# ## Families
#
# A *family* is what meta-learning calls a distribution of tasks: strings, dates, matrices... Two families of `basics` have no
# training task at all, so that the test split asks for both near and far transfer.
#
# *Figure: tasks of `basics` per family; blue bars training, hatched bars held out (validation and test).*

# %%
table = pd.crosstab([t.family for t in basics], ["train" if t.split == "train" else "held out" for t in basics])
table = table.rename_axis("family").sort_values(["train", "held out"]).reset_index()
with plt.rc_context(figures.STYLE):
    drawn, axis = plt.subplots(figsize=(7, 3.2))
axis.bar(table["family"], table["train"], color=figures.COLOURS[0], label="train")
axis.bar(table["family"], table["held out"], bottom=table["train"], color=figures.COLOURS[4], hatch="//", label="held out")
axis.tick_params(axis="x", rotation=90)
axis.set(ylabel="tasks", axisbelow=True)
axis.legend(frameon=False, ncols=2, loc="upper center", bbox_to_anchor=(0.5, 1.15))
stage.save_figure(drawn, f"{stage.key}/families", table)
far = table[table["train"] == 0]["family"].tolist()
alt = f"Bar chart of {len(table)} task families; {len(far)} of them have no training task."
display(Image(filename=str(stage.path(f"{stage.key}/families.png")), metadata={"alt": alt}, width=700))
print("families without a training task:", ", ".join(far))

# %% [markdown]
# *Meta-tasks.* The paper's inner loop takes one *problem* as a task: some of its rollouts adapt (support), the others are
# judged (query). The other reading takes a *family*: different problems adapt and are judged, and no problem is in both parts.

# %%
train, draw = [t for t in basics if t.split == "train"], random.Random(settings.seed)
problem, family = by_problem(train, 1, draw)[0], by_family(train, 1, 2, 2, draw)[0]
for meta in (problem, family):
    print(f"{meta.name}: support {[t.task_id for t in meta.support]}, query {[t.task_id for t in meta.query]}")
assert not {t.task_id for t in family.support} & {t.task_id for t in family.query}

# %% [markdown]
# ## How hard are they?
#
# Measured, not guessed: the share of the untrained base model's samples that pass all tests of a task. *easy*: half of them or
# more; *medium*: a quarter; *hard*: at least one; *unsolved*: none of them, which with so few samples does not mean never.
#
# *Figure: tasks of `basics` per measured difficulty, per place in its family (1 is meant to be the simplest).*

# %%
rates, names = basics_set.pass_rates(), ["easy", "medium", "hard", "unsolved"]
place = [f"{int(t.task_id[-2:]):02d}" for t in basics]
levels = pd.crosstab(place, [basics_set.difficulty(rates.get(t.task_id)) or "not measured" for t in basics])
levels = levels.reindex(columns=names, fill_value=0).rename_axis("place").reset_index()
with plt.rc_context(figures.STYLE):
    drawn, axis = plt.subplots(figsize=(7, 2.8))
bottom = np.zeros(len(levels))
for hatch, (name, (colour, _)) in zip(("", "//", "..", "xx"), figures.look(names).items(), strict=True):
    axis.bar(levels["place"], levels[name], bottom=bottom, color=colour, hatch=hatch, edgecolor="white", label=name)
    bottom += levels[name]
axis.set(xlabel="place in the family", ylabel="tasks", axisbelow=True)
axis.legend(frameon=False, ncols=4, loc="upper center", bbox_to_anchor=(0.5, 1.2))
stage.save_figure(drawn, f"{stage.key}/difficulty", levels)
counted = ", ".join(f"{name} {int(levels[name].sum())}" for name in names)
alt = f"Stacked bars of measured difficulty by place in the family: {counted}."
display(Image(filename=str(stage.path(f"{stage.key}/difficulty.png")), metadata={"alt": alt}, width=700))
facts = {key: value for key, value in read_json(basics_set.RATES).items() if key not in ("passed", "tasks")}
display(Markdown(" · ".join(f"{key}: {value}" for key, value in facts.items())))

# %% [markdown]
# ## Could an answer leak?
#
# For every task that is not trained on: its nearest training task by cosine, the share of its 4-grams that some training task
# contains, and whether its reference program is, names and layout aside, also the reference program of a
# training task (for two-line programs that happens by honest coincidence). A high cosine alone is no leak, "the largest number"
# and "the smallest number" are neighbours; the memory holds back everything above 0.97 during evaluation all the same.


# %%
def nearest(tasks, train):
    vectors, known = (HashedTfidf().encode([description(t) for t in some]) for some in (tasks, train))
    cosines = vectors @ known.T  # rows have length 1: inner product = cosine
    seen = set().union(*(ngrams(description(t), 4) for t in train))
    programs = set().union(*(shapes(t.gold or "") for t in train))
    rows = []
    for task, row in zip(tasks, cosines, strict=True):
        own, best = ngrams(description(task), 4), int(np.argmax(row))
        rows.append({"task": task.task_id, "nearest": train[best].task_id, "cosine": float(row[best])})
        same = bool(shapes(task.gold or "") & programs)
        rows[-1] |= {"4-grams": len(own & seen) / len(own) if own else None, "same program": same}
    return pd.DataFrame(rows, columns=["task", "nearest", "cosine", "4-grams", "same program"]).astype({"cosine": float})


learnt = [task for name in settings.train if name in sets for task in sets[name] if task.split == "train"]
found = {name: nearest([t for t in tasks if t.split in ("test", "validation")], learnt) for name, tasks in sets.items()}
closest = pd.concat(found.values()).nlargest(5, "cosine")
display(Markdown(markdown(closest, 2)))

# %% [markdown]
# ### What decontamination drops
#
# A training task leaks when it shares a run of 8 words with a held-out one, or a program of three lines or more (names aside),
# or lies at cosine 0.9 or above. Every pair of training and held-out sets is compared. `basics` was written until nothing of it
# was close to HumanEval or MBPP; its own splits share a phrase or two. MBPP repeats itself: train on it, and its test split is
# partly known.

# %%
rows, dropped = [], {}
for source in [name for name in sets if any(t.split == "train" for t in sets[name])]:
    train = [t for t in sets[source] if t.split == "train"]
    for name, tasks in sets.items():
        kept, why = decontaminate(train, [t for t in tasks if t.split in ("test", "validation")], HashedTfidf().encode)
        reasons, dropped[source, name] = Counter(leak.reason for leak in why), why
        row = {"learnt from": f"{source} train", "measured on": name, "tasks": len(train), "dropped": len(train) - len(kept)}
        rows.append(row | {reason: reasons[reason] for reason in ("words", "program", "embedding")})
drops = pd.DataFrame(rows)
stage.save_table(drops, f"{stage.key}/decontamination")
display(Markdown(markdown(drops)))
for leak in [leak for why in dropped.values() for leak in why][:8]:
    print(f"{leak.task_id} is too close to {leak.held_out}: {leak.reason}, {leak.value:.2f}")

# %% [markdown]
# The closest pair of all, side by side. Judge for yourself whether knowing the one gives away the other:

# %%
by_id = {task.task_id: task for tasks in sets.values() for task in tasks}
pair = closest.iloc[0]
for role, name in (("measured on", pair["task"]), ("learnt from", pair["nearest"])):
    code = (by_id[name].gold or "# no reference program").rstrip()
    display(Markdown(f"{role} **{name}**: {by_id[name].prompt}\n\n```python\n{code}\n```"))

# %% [markdown]
# *Figure: how close every held-out task comes to the nearest training task, per set; the dashed line is the bound above which
# the memory never recalls a neighbour while it is being evaluated.*

# %%
from falconlib.memory.recall import NEAR

distances = pd.concat([frame.assign(set=name) for name, frame in found.items()])[["set", "task", "nearest", "cosine"]]
with plt.rc_context(figures.STYLE):
    drawn, axis = plt.subplots(figsize=(7, 1 + 0.7 * len(found)))
for place, (name, (colour, marker)) in enumerate(figures.look(list(found)).items()):
    values = distances[distances["set"] == name]["cosine"].sort_values().to_numpy()
    height = place + 0.3 * np.sin(np.arange(len(values)) * 2.4)  # spread for the eye, no meaning
    axis.scatter(values, height, color=colour, marker=marker, s=14, alpha=0.7)
axis.axvline(NEAR, color="black", linestyle="--", linewidth=1)
axis.set(yticks=range(len(found)), yticklabels=list(found), xlim=(0, 1.02), xlabel="cosine to the nearest training task")
stage.save_figure(drawn, f"{stage.key}/leakage", distances)
alt = f"Cosine of each held-out task to its nearest training task; the largest is {distances['cosine'].max():.2f}."
display(Image(filename=str(stage.path(f"{stage.key}/leakage.png")), metadata={"alt": alt}, width=700))

# %% [markdown]
# ## The table
#
# One row per set and split, with a fingerprint of the contents: whoever has the same fingerprint has the same tasks, to the
# letter.

# %%
rows = []
for name, tasks in sets.items():
    for split in dict.fromkeys(task.split for task in tasks):
        part = [task for task in tasks if task.split == split]
        near = found[name][found[name]["task"].isin([task.task_id for task in part])]
        row = {"set": name, "split": split, "tasks": len(part), "families": len({t.family for t in part if t.family})}
        row |= {"tests": median(len(t.tests) for t in part), "words": median(len(t.prompt.split()) for t in part)}
        row |= {"program lines": median([len(t.gold.strip().splitlines()) for t in part if t.gold] or [0])}
        row |= {"nearest train, max cosine": near["cosine"].max() if len(near) else None}
        row |= {"same program as a train task": int(near["same program"].sum()) if len(near) else None}
        rows.append(row | {"fingerprint": fingerprint(part)[:12]})
summary = pd.DataFrame(rows).astype({"same program as a train task": "Int64"})
stage.save_table(summary, "tables/tasks")
stage.note(data={name: fingerprint(tasks) for name, tasks in sets.items()})
display(Markdown(markdown(summary.astype(object).where(summary.notna(), None), 2)))

# %% [markdown]
# ## What we saw

# %%
held_out = distances[~distances["task"].isin([t.task_id for t in learnt])]
copies = sum(int(frame["same program"].sum()) for frame in found.values())
lines = [f"{len(learnt)} tasks are learnt from, {len(held_out)} are held out in {len(sets)} sets."]
lines += [f"The median held-out task is at cosine {held_out['cosine'].median():.2f} from its nearest training task."]
lines += [f"{int((held_out['cosine'] > NEAR).sum())} held-out tasks lie above the memory's bound of {NEAR}."]
lines += [f"{copies} held-out tasks have, names aside, the reference program of a training task."]
lines += [f"{len(far)} families ({', '.join(far)}) are never trained on."]
lines += [
    f"{row['dropped']} of {row['tasks']} tasks of {row['learnt from']} would be dropped for {row['measured on']}."
    for row in drops.to_dict("records")
]
lines += [f"Measured difficulty of basics: {counted}."]
display(Markdown("\n".join(f"* {line}" for line in lines)))

# %% [markdown]
# ## Exercises
#
# 1. Compute the 2-gram overlap instead of the 4-gram overlap. Why is it so much higher, and why does that not mean a leak?
#
# <details><summary>Solution</summary>
#
# `ngrams(description(task), 2)` finds pairs such as *of the* or *a list*, which most descriptions of list tasks share. An
# overlap becomes telling when n is long enough that a chance match is unlikely.
#
# ```python
# basics, shares = load_tasks("basics"), {}
# for n in (2, 4):
#     seen = set().union(*(ngrams(description(t), n) for t in basics if t.split == "train"))
#     own = [ngrams(description(t), n) for t in basics if t.split == "test"]
#     shares[n] = sum(len(grams & seen) / len(grams) for grams in own if grams) / len(own)
# print({n: f"{share:.0%}" for n, share in shares.items()})
# assert shares[2] > 3 * shares[4]
# ```
#
# </details>
#
# 2. Bring your own tasks: write three lines of JSON with `task_id`, `prompt`, `tests` into a file and load it.
#
# <details><summary>Solution</summary>
#
# `load_tasks("my.jsonl")` accepts any such file, and `my.parquet` with the same columns. Tasks without a `split` belong to
# "test": nothing is trained on unasked. The same path works as a task set of a profile, for example `--set
# tasks.benchmarks=my.jsonl`.
#
# ```python
# from pathlib import Path
# from tempfile import TemporaryDirectory
#
# row = '{"task_id": "mine/1", "prompt": "Double n.", "tests": ["assert double(2) == 4"]}'
# with TemporaryDirectory() as folder:
#     Path(folder, "my.jsonl").write_text(row)
#     (mine,) = load_tasks(f"{folder}/my.jsonl")
# assert mine.split == "test"
# ```
#
# </details>

# %%
stage.finish()
