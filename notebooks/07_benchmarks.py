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
# # 07 · Benchmarks: the main table, with its uncertainty
#
# [![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/falcon/blob/main/notebooks/07_benchmarks.ipynb)
# [All symbols](https://github.com/OWNER/falcon/blob/main/notebooks/glossary.md)
#
# **Question.** Which arms solve more held-out problems than the untrained model, and is any difference larger than chance?
#
# **Reads** `train/<arm>-s<seed>/`: scored samples, cards, metrics (from 06). **Writes** `tables/main.csv`, `tables/paired.csv`,
# `tables/contrasts.csv`, `tables/outcomes.csv`, `tables/errors.csv`, `figures/solved`, `figures/pass_at_k`, `figures/budget`,
# `figures/paired`, `figures/learning`.
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
import pandas as pd
from IPython.display import HTML, Image, Markdown, display

from falconlib.errors import FalconError
from falconlib.evaluation.score import FILES, summarise
from falconlib.evaluation.stats import pass_at_k, wilson
from falconlib.evaluation.submissions import card_text
from falconlib.records import STATUSES
from falconlib.reporting import figures, start, tables
from falconlib.reporting.cards import sampled_cards
from falconlib.reporting.overview import where_we_are
from falconlib.reporting.pairs import pass_differences, planned_contrasts
from falconlib.reporting.programs import side_by_side, verdict
from falconlib.reporting.report import in_short
from falconlib.reporting.run import reference_roots
from falconlib.reporting.tables import (
    main_table,
    metrics_table,
    mode_samples,
    plain,
    sample_file,
    summary,
    training_runs,
    zero_shot_like,
)
from falconlib.tasks import load_tasks

# %% tags=["parameters"]
profile: str = "quick"  # a file of notebooks/profiles: smoke, quick, colab, small-cpu, small, paper, paper-apps
results: str = ""  # results folder; "" is $FALCON_RESULTS, or results/ of the repository
overrides: dict = {}  # settings that differ from the profile's, by dotted name

# %%
stage = start("07_benchmarks", {"profile": profile, "results": results, "overrides": overrides})
where_we_are("07")

# %% [markdown]
# *Figure: the method; filled, what this notebook is about. Thin arrows: the way of a program; dashed: the inner loop of one
# task; thick: the outer loop over all tasks; dotted: long-term memory. Small numbers: the notebooks that treat a part.*
#
# ## By hand first: pass@k, and how sure we may be
#
# A problem got $n$ samples, $c$ of them pass. The chance that at least one of $k$ drawn samples passes is
#
# $$\text{pass@}k = 1 - \binom{n-c}{k} \Big/ \binom{n}{k}$$
#
# With $n = 4$, $c = 1$: one draw finds the good sample in 1 of 4 cases; of the 6 pairs, 3 hold it; four draws take all.
#
# And when 0 of 16 problems are solved, the rate is *not* known to be zero: Wilson's interval reaches up to $z^2/(n + z^2) =
# 3.84/19.84 \approx 0.19$.

# %%
by_hand = [pass_at_k(4, 1, k) for k in (1, 2, 4)]  # pass@k = 1 - C(n - c, k) / C(n, k)
assert by_hand == [0.25, 0.5, 1.0]
low, high = wilson(0, 16)
print(f"pass@1, 2, 4 of one pass in four samples: {by_hand}; 0 of 16 solved: between {low:.0%} and {high:.0%}")

# %% [markdown]
# ## Which runs are compared
#
# Every complete training run in the folder; what `falconlib eval --out` sampled later (`modes/<arm>-s<seed>/`) stands in place
# of its own samples. Their evaluation cards must agree, else the next cell stops. A mode that met fewer problems (`n`) is
# compared on those.

# %%
first = f"{stage.profile.arms[0]}-s{stage.profile.seeds[0]}"
train = stage.find(f"train/{first}/samples.jsonl.gz").parents[1]
runs = training_runs(train)
for folder in (folder for folders in runs.values() for folder in folders):
    drawn = [file for mode in FILES if (file := sample_file(folder, mode))]
    noted = {*drawn, *(file.with_name("card.json") for file in drawn)}
    noted |= {folder / name for name in ("budget.json", "card.json", "metrics.jsonl", FILES["zero-shot"])}
    for file in sorted(file for file in noted if file.is_file()):
        stage.find(file.relative_to(train.parent).as_posix())  # notes in the manifest what was read
for file in train.parent.glob("01_tasks/leakage.csv"):
    stage.find(file.relative_to(train.parent).as_posix())
if any((base / "search/search.jsonl").is_file() for base in (train.parent, reference_roots(train.parent.name)[0])):
    stage.find("search/search.jsonl")  # how many learning rates were tried for an arm
cards, unchecked = sampled_cards(runs)
whole = cards["zero-shot", first]
print("arms and seeds:", ", ".join(name for mode, name in cards if mode == "zero-shot"))
if unchecked:
    print("no evaluation card, so that how they were sampled could not be checked:", "; ".join(unchecked))
if any(name.startswith("train/") for name in stage.from_reference):
    print(f"These runs were not made here: they are the committed reference results of profile {train.parent.name}.")

# %% [markdown]
# ### The evaluation card
#
# What somebody needs to repeat the table below.

# %%
others = {"model": whole["model"] + "; the other arms: with their own adapter", "seeds": list(stage.profile.seeds)}
print(card_text(whole | others))

# %% [markdown]
# ## The main table
#
# Percent of problems solved, with 95 % intervals. `zero-shot`, `+LTM` (retrieved text in the prompt) and the modes that adapt
# or choose at test time (`falconlib eval --mode`) stay apart; `seeds`: trained runs in a row (an interval of one seed knows
# nothing of others). The CSV also holds every seed's value, what each arm cost (completions, programs, trained tokens, seconds,
# configurations tried), and two further ways to count the same samples: MBPP on the two asserts that the prompt does not show,
# and each benchmark without the problems whose nearest training task (01) has a cosine above 0.9.

# %%
main = main_table(train, draws=stage.profile.eval.bootstrap)
stage.save_table(main, "tables/main")
display(summary(main).style.hide(axis="index"))
others = tables.readable(main.drop(plain(main).index))
display(others.style.hide(axis="index") if len(others) else Markdown("*No other way to count applies here.*"))
costs = ["arm", "seeds", "completions", "executed", "trained_tokens", "wall_s", "configs_tried", "device"]
display(main[costs].drop_duplicates("arm").style.hide(axis="index").format(precision=0, na_rep="unknown"))

# %%
metric = tables.headline(main)  # pass@1; greedy where the profile draws no samples
shown = plain(main)[lambda rows: rows["metric"] == metric]
stage.save_figure(figures.pass_rates(shown), "figures/solved", shown)
alt = f"Share of problems solved per arm, with 95 % intervals, one panel for each of {', '.join(shown['benchmark'].unique())}"
display(Image(filename=str(stage.path("figures/solved.png")), metadata={"alt": alt}, width=900))

# %% [markdown]
# *Figure: share of problems solved (pass@1 where samples were drawn, else greedy) with 95 % intervals. Overlapping ones of the
# same problems say little: the paired differences below are sharper.*
#
# ## More than one try: pass@k
#
# The estimate above, zero-shot, for powers of two up to the number of samples; $k = 1$ is the main table's pass@1.

# %%
by_seed = {(arm, mode): own for arm, folders in runs.items() for mode, own in mode_samples(folders).items()}
samples = {key: list(own.values()) for key, own in by_seed.items()}
tries, rows = [2**i for i in range(whole["decoding"]["samples"].bit_length())], []
for arm in runs:
    found = summarise(samples[arm, "zero-shot"], tries, draws=stage.profile.eval.bootstrap)
    rows += [{"arm": arm, "k": int(row["metric"].split("@")[1]), **row} for row in found if row["metric"] != "greedy"]
if rows:
    curve = pd.DataFrame(rows)
    figure = figures.rates_against(curve, "k", "k, samples of a problem", apart=0.02 * max(tries))
    for axis in figure.axes:
        axis.set_xticks(tries)
    stage.save_figure(figure, "figures/pass_at_k", curve)
    alt = f"pass@k over k = {', '.join(map(str, tries))} with 95 % intervals, one line per arm and one panel per benchmark"
    display(Image(filename=str(stage.path("figures/pass_at_k.png")), metadata={"alt": alt}, width=900))
else:
    print("This profile decodes greedily and draws no samples: there is no pass@k.")
    for old in stage.root.glob("figures/pass_at_k.*"):  # of an earlier run: the report would show it
        old.unlink()

# %% [markdown]
# *Figure: pass@k with 95 % intervals.*
#
# ## What a budget buys
#
# The same share against the tokens in an arm's losses. The SFT start, the same for all arms but base and sft, is not counted;
# base was trained on none.

# %%
costs = ["benchmark", "arm", "metric", "value", "ci_low", "ci_high", "seeds", "n", "completions", "trained_tokens"]
budget = shown.loc[shown["mode"] == "zero-shot", costs]
figure = figures.rates_against(budget, "trained_tokens", f"tokens trained on, without the SFT start ({metric})")
stage.save_figure(figure, "figures/budget", budget)
alt = "Share of problems solved against the tokens trained on, with 95 % intervals, one point per arm and one panel per benchmark"
display(Image(filename=str(stage.path("figures/budget.png")), metadata={"alt": alt}, width=900))
unknown = budget.loc[budget["trained_tokens"].isna(), "arm"].unique()
print("budget unknown, not in the figure:", ", ".join(unknown) or "no arm")

# %% [markdown]
# *Figure: one point per arm, with its 95 % interval.*
#
# ## How the programs ended: time-outs counted apart
#
# A time-out is a failed program, but it also depends on the machine; `infra_error` means that *our* harness broke: no verdict,
# left out of every rate, never counted as a failure.

# %%
rows = [(*key, s.benchmark, s.status, s.error_class) for key, found in samples.items() for run in found for s in run]
ends = pd.DataFrame(rows, columns=["arm", "mode", "benchmark", "status", "error_class"])
outcomes = ends.groupby(["arm", "mode", "benchmark"], sort=False)["status"].value_counts().unstack(fill_value=0)
outcomes = outcomes.reindex(columns=[*STATUSES, "infra_error"], fill_value=0).reset_index().rename_axis(columns=None)
stage.save_table(outcomes, "tables/outcomes")
display(outcomes.style.hide(axis="index"))

# %% [markdown]
# ## Error classes before and after
#
# Zero-shot programs that did not pass, by exception class (or `fail` for a wrong answer), in percent of the arm's programs.
# Training that buys programs which *run* moves weight from the upper rows to `fail`, without solving one problem more.

# %%
failed = ends[(ends["mode"] == "zero-shot") & (ends["status"] != "pass")]
kind = failed["error_class"].where(~failed["status"].isin(["fail", "timeout"]), failed["status"])
counts = pd.crosstab(kind.rename("error"), failed["arm"]).reindex(columns=list(runs), fill_value=0)
totals = ends[ends["mode"] == "zero-shot"].groupby("arm").size().reindex(counts.columns)
errors = (counts / totals).loc[counts.sum(axis=1).sort_values(ascending=False).index]
stage.save_table(errors.reset_index(), "tables/errors")
display(errors.head(12).style.format("{:.0%}"))

# %% [markdown]
# ## Gallery: the same problem before and after training
#
# Greedy programs of the first seed (where none was decoded greedily: the first sample). A problem is *gained* by an arm that
# solves it when the first column's arm does not, *lost* the other way round. The table shows problems on which the verdicts
# differ; below it some as code: gained, lost, and what stayed.


# %%
def one_each(arm):
    """task id -> its greedy program of the first seed, else its first sample."""
    ordered = sorted(samples[arm, "zero-shot"][0], key=lambda s: (s.greedy, -s.index))
    return {s.task_id: s for s in ordered}


programs = {arm: one_each(arm) for arm in runs}
before = "base" if "base" in runs else next(iter(runs))
after = "falcon" if "falcon" in runs else list(runs)[-1]
verdicts = {arm: {task: verdict(s.status, s.error_class) for task, s in own.items()} for arm, own in programs.items()}
grid = pd.DataFrame(verdicts, index=list(programs[before])).dropna()
differs = grid[grid.nunique(axis=1) > 1]
display(differs.head(12))
passes = grid.apply(lambda column: column.str.startswith("✓"))
gained = {arm: int((passes[arm] & ~passes[before]).sum()) for arm in runs if arm != before}
lost = {arm: int((passes[before] & ~passes[arm]).sum()) for arm in gained}
print(f"{len(differs)} of {len(grid)} problems have different verdicts, {min(len(differs), 12)} of them are shown")
display(pd.DataFrame({"gained": gained, "lost": lost}).rename_axis(f"against {before}"))

# %%
groups = {
    f"gained: solved by {after} only": passes[after] & ~passes[before],
    f"lost: solved by {before} only": passes[before] & ~passes[after],
    "solved by both": passes[before] & passes[after],
    "solved by neither, failing in another way": ~passes[before] & ~passes[after] & (grid[before] != grid[after]),
}
try:
    words = {t.task_id: t.prompt for name in main["benchmark"].unique() if "(" not in name for t in load_tasks(name)}
except FalconError as missing:  # a task set that is not part of the repository
    words = {}
    print(f"The descriptions are left out: {missing.message}")
for title, which in groups.items():
    chosen = grid.index[which][:2]
    display(Markdown(f"**{title}**: {int(which.sum())} of {len(grid)} problems" + ("" if len(chosen) else ", none to show")))
    for task in chosen:
        both = [(f"{arm}: {grid[arm][task]}", programs[arm][task].code) for arm in (before, after)]
        same = " (the same program, letter for letter)" if both[0][1] == both[1][1] else ""
        about = "" if task.startswith("HumanEval") else f": {words.get(task, '')}"  # there the program holds it
        display(HTML(side_by_side(f"{task}{about}{same}", both)))

# %% [markdown]
# *Table: programs before and after, their verdict above them (✓ passes all tests, ✗ does not, ? no verdict). With a handful of
# changes the gallery says what kind of programs these models write, not which arm is better: for that, see below.*
#
# ## Paired differences
#
# Every arm against the untrained model, FALCON against every other arm (the paper's claim), and each mode against the same arm
# and seeds zero-shot (as many samples of its problems, where drawn): problem by problem, in percentage points. The 95 % interval
# of one seed of greedy programs is Tango's score interval (Wilson's for pairs); of several samples or seeds the bootstrap's
# (seeds, then problems). Many comparisons are made at once: p is adjusted for that (Holm).

# %%
pairs = {f"{arm} - {before}": (samples[arm, "zero-shot"], samples[before, "zero-shot"]) for arm in runs if arm != before}
for arm in [a for a in runs if "falcon" in runs and a not in (before, "falcon")]:
    pairs[f"falcon - {arm}"] = (samples["falcon", "zero-shot"], samples[arm, "zero-shot"])
for (arm, mode), own in by_seed.items():
    if mode != "zero-shot":  # against the same seeds: a mode may have been sampled for some of them only
        some = "" if own.keys() == by_seed[arm, "zero-shot"].keys() else f" (seed {', '.join(map(str, own))})"
        plainly = [zero_shot_like(train / f"{arm}-s{seed}", drawn) for seed, drawn in own.items()]
        pairs[f"{arm} {mode} - {arm}{some}"] = (samples[arm, mode], plainly)
paired = pass_differences(pairs, draws=stage.profile.eval.bootstrap)
stage.save_table(paired, "tables/paired")
shown = paired[paired["metric"] == metric]
shown = shown.assign(comparison=shown["comparison"] + ", " + shown["benchmark"] + ", n = " + shown["n"].astype(str))
stage.save_figure(figures.paired_differences(shown), "figures/paired", shown)
alt = f"Differences to {before} in the share of solved problems with 95 % intervals, one line per arm and benchmark"
display(Image(filename=str(stage.path("figures/paired.png")), metadata={"alt": alt}, width=760))
display(tables.readable(paired).style.hide(axis="index"))

# %% [markdown]
# *Figure: paired difference in percentage points, with 95 % intervals. One that crosses the line at 0 is compatible with no
# difference.*
#
# ## The planned contrasts
#
# These five were written down before any run: FALCON against GRPO, RLTF, RFT, itself without the inner loop, itself without
# long-term memory. All contrasts and benchmarks of one metric are one family for Holm's adjustment, and an arm that was not run
# still counts in it. `detectable` says what a study of this size *could* find: the true difference that 80 % of such studies
# (these seeds, problems, samples) would call significant. A smaller one is neither shown nor ruled out. The CSV holds more:
# every seed's value, the number of samples and of tests, problems left out.

# %%
contrasts = planned_contrasts({arm: samples[arm, "zero-shot"] for arm in runs}, draws=stage.profile.eval.bootstrap)
stage.save_table(contrasts, "tables/contrasts")
display(tables.readable(contrasts).replace({"difference, points": {"": "not run"}}).style.hide(axis="index").format(na_rep=""))

# %% [markdown]
# ## What training looked like

# %%
metrics = metrics_table(train)
if "reward_unit" in metrics:
    learnt = metrics[metrics["reward_unit"].notna()]
    titles = {"reward_unit": "test reward", "pass_rate": "share passed", "length": "tokens per program"}
    stage.save_figure(
        figures.learning_curves(learnt, list(titles), titles=list(titles.values())),
        "figures/learning",
        learnt[["arm", "seed", "step", *titles]],
    )
    alt = f"Test reward, share passed and program length over the training steps of {', '.join(learnt['arm'].unique())}"
    display(Image(filename=str(stage.path("figures/learning.png")), metadata={"alt": alt}, width=900))
else:
    print("no arm with reinforcement learning ran: there are no curves")

# %% [markdown]
# *Figure: means over each step's rollouts, on training tasks, one line per arm (a band from the lowest to the highest seed when
# there are several). The same $R_{unit}$ is shown for all arms, since their total rewards hold different terms. Arms begin with
# the same adapter and the same random streams, so that lines may coincide: dashes lie over wider ones, a little beside.*
#
# ## What we saw

# %%
lines = []
for (benchmark, metric), part in plain(main)[lambda rows: rows["mode"] == "zero-shot"].groupby(
    ["benchmark", "metric"], sort=False
):
    best = part.sort_values("value", ascending=False, kind="stable").iloc[0]
    span = f"{tables.readable(part).loc[best.name, 'solved, %']} % of {best['n']} problems"
    ties = part["arm"][part["value"] == best["value"]].tolist()
    leads = "all arms tie" if len(ties) == len(part) > 1 else f"highest is {' and '.join(ties)}"
    lines.append(f"{benchmark}, {metric}: {leads} with {span}, {tables.count(best['seeds'], 'seed')}")
lines.append(f"{int(((paired['ci_low'] > 0) | (paired['ci_high'] < 0)).sum())} of {len(paired)} paired intervals exclude 0")
lines += in_short(train.parent.name, paired, contrasts)
if after in gained:
    lines.append(f"gallery: {after} gains {gained[after]} and loses {lost[after]} of {len(grid)} problems against {before}")
broken, late = int(outcomes["infra_error"].sum()), int(outcomes["timeout"].sum())
lines.append(f"{late} of {len(ends)} programs timed out, {broken} got no verdict")
display(Markdown("\n".join(f"* {line}" for line in lines)))

# %% [markdown]
# ## Exercises
#
# 1. With 16 problems and one seed, how large must a paired difference be before its interval excludes 0, if the better arm
#    loses no problem that the other one solves?
#
# <details><summary>Solution</summary>
#
# If the arms were equal, each of the $d$ problems on which they differ would be a fair coin toss: the gain $d$ has standard
# deviation $\sqrt{d}$, and Tango's interval leaves out 0 when $d / \sqrt{d} = \sqrt{d} > 1.96$. So four problems, 25 points. The
# exact p-value is stricter: $2 \cdot 2^{-d}$, so that $p < 0.05$ takes six. Differences of a few points need hundreds of problems
# and several seeds.
#
# ```python
# import numpy as np
#
# from falconlib.evaluation.stats import paired_difference
#
# lows, ps = {}, {}
# for d in range(1, 8):
#     gained, none = np.array([[1.0] * d + [0.0] * (16 - d)]), np.zeros((1, 16))
#     found = paired_difference(gained, none, 10000, np.random.default_rng(0))
#     lows[d], ps[d] = found.low, found.p
# assert min(d for d in lows if lows[d] > 0) == 4 and min(d for d in ps if ps[d] < 0.05) == 6
# assert 3**0.5 < 1.96 < 4**0.5
# ```
#
# </details>
#
# 2. Why may a problem whose verdict is `infra_error` not count as unsolved?
#
# <details><summary>Solution</summary>
#
# It says nothing about the program. If the harness breaks more often for one arm (longer programs, more memory), counting its
# breakage as failures turns a property of the machine into a difference between arms. It is left out on both sides and counted.
#
# ```python
# solved, failed, broken = 4, 10, 2  # of 16 problems
# assert solved / (solved + failed) > solved / (solved + failed + broken)  # 29 % became 25 % without any program changing
# ```
#
# </details>

# %%
stage.finish()
