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
# # 08 · Ablations: one switch off at a time
#
# [![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/falcon/blob/main/notebooks/08_ablations.ipynb)
# [All symbols](https://github.com/OWNER/falcon/blob/main/notebooks/glossary.md)
#
# **Question.** Which part of FALCON does the work: the long-term memory, the short-term memory, the inner loop, the AI
# feedback, the error line, or the supervised term?
#
# **Reads** the runs of the ablation arms. Training them again costs more than all other arms together, so when this run did not
# train them, this notebook plots **committed logs** (`results/reference/<profile>/ablations/`) and prints the command that made
# them; where there are none, it shows the arms that did run, and says so. **Writes** `tables/ablations.csv`,
# `tables/hypotheses.csv`, `figures/ablations`, `figures/ablation_curves`.
#
# **Run time**: seconds on CPU with any profile; no GPU, no model. It reads files only.

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
import os.path
from dataclasses import replace

import pandas as pd
from IPython.display import Image, Markdown, display

from falconlib.evaluation.score import load_samples, summarise
from falconlib.evaluation.stats import holm
from falconlib.evaluation.submissions import card_text
from falconlib.files import JsonLines, read_json
from falconlib.reporting import figures, start
from falconlib.reporting.cards import sampled_cards
from falconlib.reporting.overview import where_we_are
from falconlib.reporting.pairs import pass_differences
from falconlib.reporting.run import REPO, reference_roots
from falconlib.reporting.tables import count, headline, metrics_table, readable, sample_file, span, training_runs
from falconlib.training.arms import SETTINGS

# %% tags=["parameters"]
profile: str = "quick"  # a file of notebooks/profiles: smoke, quick, colab, small-cpu, small, paper, paper-apps
results: str = ""  # results folder; "" is $FALCON_RESULTS, or results/ of the repository
overrides: dict = {}  # settings that differ from the profile's, by dotted name

# %%
stage = start("08_ablations", {"profile": profile, "results": results, "overrides": overrides})
where_we_are("08")

# %% [markdown]
# *Figure: the method; filled, what this notebook is about. Thin arrows: the way of a program; dashed: the inner loop of one
# task; thick: the outer loop over all tasks; dotted: long-term memory. Small numbers: the notebooks that treat a part.*
#
# ## By hand first: many comparisons at once
#
# Six switches are six comparisons, and one in twenty "succeeds" at $p < 0.05$ by luck alone. Holm's adjustment orders the $m$
# p-values and multiplies the smallest by $m$, the next by $m - 1$, and so on, never letting a later one fall below an earlier
# one:
#
# $$\tilde p_{(i)} = \max_{j \le i} \min\bigl(1, (m - j + 1)\, p_{(j)}\bigr)$$
#
# For 0.01, 0.04, 0.03: $3 \times 0.01 = 0.03$; then $2 \times 0.03 = 0.06$; then $1 \times 0.04$, which may not be below 0.06.
# Only one of three survives.

# %%
adjusted = holm([0.01, 0.04, 0.03])  # p~_(i) = max over j <= i of (m - j + 1) p_(j)
assert [round(p, 9) for p in adjusted] == [0.03, 0.06, 0.06]
print("adjusted:", [round(p, 3) for p in adjusted])

# %% [markdown]
# ## What each ablation switches off
#
# An ablation is FALCON with the settings below and nothing else; the tests of the library check that each switch removes its
# part and leaves the random streams of the others alone.

# %%
switches = [arm for arm in SETTINGS if arm.startswith("falcon-")]
rows = {arm: {name: str(value) for name, value in SETTINGS[arm][1].items()} for arm in switches}
table = pd.DataFrame(rows).T.fillna("")
display(table.style.set_caption("setting of the ablation; empty: as in FALCON"))

# %% [markdown]
# ## Where the runs come from
#
# First choice: this run trained FALCON and at least one ablation of it. Else the committed logs, else the committed results of
# this profile. Else the arms of the grid, which are no ablation.


# %%
def ablated(train):
    """The arms falcon and falcon-... that are complete in this folder; none unless both kinds are there."""
    arms = {path.parent.name.rpartition("-s")[0] for path in train.glob("falcon*-s*/manifest.json")}
    return arms if "falcon" in arms and len(arms) > 1 else set()


wanted, seeds, logs = stage.profile.ablations, stage.profile.seeds, reference_roots(stage.profile.name)[0] / "ablations"
places = {"this run": stage.root / "train", "committed logs": logs / "train", "committed results": logs.parent / "train"}
source = next((name for name, place in places.items() if ablated(place)), "arms of the grid")
train = places.get(source) or stage.find(f"train/{stage.profile.arms[0]}-s{seeds[0]}").parent
missing = [arm for arm in wanted if arm not in ablated(train)]
found = training_runs(train)
if source == "arms of the grid":
    trained = [arm for arm in found if SETTINGS[arm][1] is not None]
    found = {arm: found[arm] for arm in trained} or found
else:
    found = {arm: folders for arm, folders in found.items() if arm.startswith("falcon")}
for folder in (folder for folders in found.values() for folder in folders):
    files = [sample_file(folder), sample_file(folder).with_name("card.json"), folder / "metrics.jsonl", folder / "run.json"]
    for name in [file.relative_to(train.parent).as_posix() for file in files if file.is_file()]:
        stage.find(f"{'ablations/' if source == 'committed logs' else ''}{name}")  # notes what was read
sampled_cards(found)  # stops when they may not stand in one table
print(f"source: {source}; arms: {', '.join(found)}")

# %%
facts = [read_json(folder / "run.json") for folders in found.values() for folder in folders]
commands, steps = {run["command"] for run in facts}, {run["config"]["train"]["steps"] for run in facts}
again = f"falconlib run --profile {profile} --only 06 --set arms={','.join(['falcon', *switches])}"
elsewhere = (
    "**These runs were not made here.** The curves and numbers below are read from files committed to the repository, made "
)
elsewhere += f"by `{'`, `'.join(sorted(commands))}`."
says = {
    "this run": "The ablation arms below were trained by this run.",
    "committed logs": elsewhere,
    "committed results": elsewhere,
    "arms of the grid": f"**This is no ablation.** What follows compares arms of profile `{train.parent.name}` that did run, so "
    "that the notebook can be read; it says nothing about FALCON's parts. There are no committed logs.",
}
if missing:
    says[source] += f" Not trained: {', '.join(missing)}."
display(Markdown(f"{says[source]}\n\nTo train them: `{again}` (a minute or two per arm with `quick`, hours with `small`)."))

# %% [markdown]
# ## The table
#
# Its evaluation card first, of the first arm; the others differ in their adapter. Then zero-shot pass rates on held-out
# problems in percent. `difference` = ablation - FALCON in percentage points, paired by problem: **below zero means that the
# part helps**, since without it fewer problems are solved. p is adjusted for all rows (Holm).

# %%
samples = {arm: [load_samples(sample_file(folder)) for folder in folders] for arm, folders in found.items()}
draws, full = stage.profile.eval.bootstrap, "falcon" if "falcon" in samples else next(iter(samples))
rates = pd.DataFrame([{"arm": arm, **row} for arm, runs in samples.items() for row in summarise(runs, draws=draws)])
pairs = {arm: (runs, samples[full]) for arm, runs in samples.items() if arm != full}
differences = pass_differences(pairs, draws=draws).rename(columns={"comparison": "arm"})
differences = differences.rename(columns={"ci_low": "difference_low", "ci_high": "difference_high"}).drop(columns="n")
ablations = rates.drop(columns=["interval", "completions"]).merge(differences, how="left", on=["arm", "benchmark", "metric"])
ablations.insert(1, "what", [SETTINGS[arm][0] for arm in ablations["arm"]])
ablations = ablations.assign(against=full, source=source)
stage.save_table(ablations, "tables/ablations")
print(card_text(read_json(sample_file(next(iter(found.values()))[0]).with_name("card.json"))["zero-shot"]))
display(readable(ablations).style.hide(axis="index"))  # the CSV has every seed's value, time-outs, unknown verdicts as well

# %%
metric = headline(ablations)
drawn = ablations[(ablations["metric"] == metric) & ablations["difference"].notna()]
lines = drawn[["difference", "difference_low", "difference_high"]].set_axis(["difference", "ci_low", "ci_high"], axis=1)
lines = lines.assign(comparison=drawn["arm"] + " - " + full + ", " + drawn["benchmark"])
figure = figures.paired_differences(lines, f"{metric}: difference to {full} in percentage points")
stage.save_figure(figure, "figures/ablations", lines)
alt = f"Differences of {', '.join(dict.fromkeys(drawn['arm']))} to {full} in the share of solved problems, with 95 % intervals"
display(Image(filename=str(stage.path("figures/ablations.png")), metadata={"alt": alt}, width=760))

# %% [markdown]
# *Figure: one line per ablation and benchmark, its paired difference to the full method with the 95 % interval. Left of the
# vertical line: solving fewer problems than the full method.*
#
# ## Learning curves
#
# The test reward alone may be compared across ablations: the total reward of an arm without AI feedback lacks terms of the
# others.

# %%
metrics = metrics_table(train)
metrics = metrics[metrics["arm"].isin(found) & metrics.get("reward_unit", pd.Series(index=metrics.index)).notna()]
titles = {"reward_unit": "test reward", "pass_rate": "share passed", "inner_gain": "gain of the inner step"}
if len(metrics):
    curves = metrics[["arm", "seed", "step", *titles]]
    figure = figures.learning_curves(curves, list(titles), titles=list(titles.values()))
    stage.save_figure(figure, "figures/ablation_curves", curves)
    alt = f"Test reward, share passed and inner-step gain over the steps of {', '.join(dict.fromkeys(curves['arm']))}"
    display(Image(filename=str(stage.path("figures/ablation_curves.png")), metadata={"alt": alt}, width=900))
else:
    print("none of these arms trains by reinforcement: there are no curves")

# %% [markdown]
# *Figure: means over each step's rollouts, one line per arm. An arm without an inner loop has no line in the right panel.*
#
# ## Temperature
#
# Pass rate of the same model against the sampling temperature: low temperatures repeat the best guess (good pass@1), higher
# ones try different programs (pass@k catches up), too high ones write nonsense. The samples are committed where they were
# drawn.

# %%
points, heats = [], [stage.root / "ablations/temperature", logs / "temperature"]  # of this run, else committed ones
for file in next((files for heat in heats if (files := sorted(heat.glob("*/samples.jsonl.gz")))), []):
    temperature = read_json(file.with_name("card.json"))["zero-shot"]["decoding"]["temperature"]
    rows = summarise([load_samples(stage.find(f"ablations/temperature/{file.parent.name}/{file.name}"))], draws=draws)
    points += [{"temperature": temperature, **row} for row in rows if row["metric"] != "greedy"]
if points:
    heat = pd.DataFrame(points).sort_values(["metric", "temperature"])
    curves = heat.pivot(index=["benchmark", "temperature"], columns="metric", values="value").reset_index()
    curves = curves.rename(columns={"benchmark": "arm"}).assign(seed=0)  # one line per benchmark
    figure = figures.learning_curves(curves, sorted(set(heat["metric"])), x="temperature")
    stage.save_figure(figure, "figures/temperature", heat)
    alt = "Share of problems solved against the sampling temperature, one line per benchmark"
    display(Image(filename=str(stage.path("figures/temperature.png")), metadata={"alt": alt}, width=760))
else:
    trained = [base / f"train/{full}-s{seeds[0]}/adapter" for base in (stage.root, logs.parent)]
    adapter = next((place for place in trained if place.is_dir()), trained[0])
    adapter, folder = (os.path.relpath(place, REPO) for place in (adapter, stage.root / "ablations/temperature/0.2"))
    one = f"falconlib eval --profile {profile} --adapter {adapter} --samples 8 --set eval.temperature=0.2 --out {folder}"
    print(f"No samples at other temperatures are here. Per temperature: {one}")

# %% [markdown]
# ## Hypotheses, on validation tasks
#
# A change of FALCON's settings is kept when it solves more **validation** tasks; no test task is looked at. Each line is one
# change against the default at the same learning rate and seed, paired by task over all validation sets, in percentage points
# of pass@1 with a 95 % interval (bootstrap over tasks). Rows and samples are committed in `search/hypotheses/<change>/`, each
# made by
# `falconlib search --profile PROFILE --arms falcon --grid RATE --set eval.samples=4 --set tasks.eval_limit=0 --set CHANGE`
# in a folder of its own (`FALCON_RESULTS`) that holds the run's `train/sft-s0`; the lab book, LOG.md, tells why they were tried.
# Tasks are pooled here; `value` in `search.jsonl` is the mean over the sets, in which the small set of `basics` counts as much.

# %%
words = {
    "long_term.prompt_share=0": "no recalled text in prompts: what harms at test time may harm in training",
    "train.b_sl=1.0": "more of the verified programs",
    "inner.alpha=0.3": "a longer inner step",
}


def validated(change):
    """(arm, rate, seed, steps) -> its sampled programs on the validation tasks, all sets taken as one."""
    log = JsonLines(stage.find(f"search/hypotheses/{change}/search.jsonl"))
    runs = [(row["arm"], row["lr"], row["seed"], row["steps"]) for row in log.rows()]
    places = {run: f"search/hypotheses/{change}/{run[0]}-lr{run[1]:g}/validation.jsonl.gz" for run in runs}
    files = {run: stage.find(place) for run, place in places.items()}
    return {run: [replace(s, benchmark="validation") for s in load_samples(file) if not s.greedy] for run, file in files.items()}


# %%
tested = next((base / "search/hypotheses" for base in (stage.root, logs.parent) if (base / "search/hypotheses").is_dir()), None)
changes = {folder.name for folder in tested.iterdir() if folder.is_dir()} - {"default"} if tested else set()
assert not changes or (tested / "default").is_dir(), f"{tested} lacks the runs of the default: search with no change"
default, pairs = validated("default") if changes else {}, {}
for change in sorted(changes, key=[*words, *sorted(changes)].index):
    changed = validated(change)
    alone = [run for run in changed if run not in default]
    assert not alone, f"{change}: the default was not run with arm, rate, seed, steps {alone[0]}"
    pairs |= {(change, *run): ([own], [default[run]]) for run, own in changed.items()}
rows = []
for row in pass_differences(pairs, ks=(1,), draws=draws).itertuples():
    change, arm, rate, *_ = row.comparison
    size = {"tasks": row.n, "samples": len(default[row.comparison[1:]]) // row.n}
    rows.append({"hypothesis": words.get(change, ""), "change": change, "arm": arm, "rate": rate, **size})
    rows[-1] |= {"difference": row.difference, "low": row.ci_low, "high": row.ci_high}
names = ["hypothesis", "change", "arm", "rate", "tasks", "samples", "difference", "low", "high"]
hypotheses = pd.DataFrame(rows, columns=names)
stage.save_table(hypotheses, "tables/hypotheses")
inside = int(((hypotheses["low"] <= 0) & (hypotheses["high"] >= 0)).sum())
if len(hypotheses):
    print(f"{inside} of {len(hypotheses)} intervals include 0: those changes are not distinguishable from none")
    points = [span(ends, "+") for ends in hypotheses[["difference", "low", "high"]].itertuples(index=False)]
    told = hypotheses.drop(columns=["difference", "low", "high"]).assign(**{"difference, points": points})
    display(told.style.hide(axis="index").format({"rate": "{:g}"}))
else:
    print(f"Profile {stage.profile.name} has tested none.")

# %% [markdown]
# ## What we saw

# %%
seeded = count(max(len(folders) for folders in found.values()), "seed")
lines = [f"source: {source}; {len(found)} arms, {seeded}, {' or '.join(map(str, sorted(steps)))} steps each"]
for row, points in zip(drawn.itertuples(), readable(drawn)["difference, points"], strict=True):
    side = "includes 0" if row.difference_low <= 0 <= row.difference_high else "excludes 0"
    lines.append(f"{row.arm} against {full}, {row.benchmark}: {points} points, which {side}")
sure = int((ablations["p_holm"] < 0.05).sum())
lines.append(f"{sure} of {int(ablations['difference'].notna().sum())} differences are significant after Holm's adjustment")
if not sure:
    lines.append("so **no part is shown to help or to harm** by these runs")
display(Markdown("\n".join(f"* {line}" for line in lines)))

# %% [markdown]
# ## Exercises
#
# 1. FALCON minus its inner loop solves two problems more than FALCON. Name two explanations besides "the inner loop harms".
#
# <details><summary>Solution</summary>
#
# Chance: two of sixteen problems lie well inside the interval. And a real trade: with an inner loop half of the rollouts come
# from adapted policies, so fewer rollouts estimate the gradient at $\theta$ itself, while zero-shot evaluation measures exactly
# $\theta$.
#
# ```python
# import numpy as np
#
# from falconlib.evaluation.stats import paired_difference
#
# two_more = np.array([[1.0, 1.0] + [0.0] * 14])
# found = paired_difference(two_more, np.zeros((1, 16)), 10000, np.random.default_rng(0))
# assert found.low <= 0 <= found.high and found.p == 0.5
# ```
#
# </details>
#
# 2. Why is `falcon-ltm` not the same as RLTF?
#
# <details><summary>Solution</summary>
#
# It still has the inner loop and the AI feedback. Compare their settings: `configure(stage.profile, "rltf", 0)` against
# `configure(stage.profile, "falcon-ltm", 0)`. RLTF also sets `inner.steps = 0` and `reward.ai = False`.
#
# ```python
# from falconlib.config import load_profile
# from falconlib.training.arms import configure
#
# rltf, without = (configure(load_profile("quick"), arm, 0) for arm in ("rltf", "falcon-ltm"))
# assert (rltf.inner.steps, without.inner.steps) == (0, 1) and (rltf.reward.ai, without.reward.ai) == (False, True)
# ```
#
# </details>

# %%
stage.finish()
