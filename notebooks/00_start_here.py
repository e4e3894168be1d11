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
# # 00 · Start here: the whole method on two tasks
#
# [![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/falcon/blob/main/notebooks/00_start_here.ipynb)
# [All symbols](https://github.com/OWNER/falcon/blob/main/notebooks/glossary.md)
#
# **Question.** What does FALCON do with one task, from its description to a changed model?
#
# **Reads** the committed task set `basics` and the profile's model. **Writes** `00_start_here/overview.*` and
# `rewards.*`: each as `.svg`, `.png`, and the plotted data as `.csv`.
#
# **Run time**, profile `quick`: about 15 seconds on 2 CPU cores, most of it sampling and the two backward passes. On one GPU:
# seconds, after the model is loaded.
#
# The method in one line (the paper is arXiv 2410.21349): *recall, write, test, judge, reward, adapt to the task, write again,
# learn, remember.* Each of these words is one cell below, and each cell calls the very function that training calls. The
# notebooks 01 to 05 take the parts one by one; 06 trains.

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
from pathlib import Path
from tempfile import TemporaryDirectory

import matplotlib.pyplot as plt
import pandas as pd
from IPython.display import Image, Markdown, display

from falconlib import prompts, rewards
from falconlib.config import override
from falconlib.judge import StaticJudge
from falconlib.memory import LongTermMemory, ShortTermMemory
from falconlib.policy.models import load_policy
from falconlib.policy.states import embedder_for
from falconlib.reporting import figures, start
from falconlib.reporting.overview import PARTS, overview, where_we_are
from falconlib.reporting.tables import markdown
from falconlib.rollout import Conductor
from falconlib.sandbox import Sandbox, program_for
from falconlib.tasks import load_tasks
from falconlib.training.advantages import sequence_advantages
from falconlib.training.mrlf import MRLF

# %% tags=["parameters"]
profile: str = "quick"  # a file of notebooks/profiles: smoke, quick, colab, small-cpu, small, paper, paper-apps
results: str = ""  # results folder; "" is $FALCON_RESULTS, or results/ of the repository
overrides: dict = {}  # settings that differ from the profile's, by dotted name

# %%
stage = start("00_start_here", {"profile": profile, "results": results, "overrides": overrides})
config = override(stage.profile, {"train.group": 8, "inner.support": 4})  # 4 programs per task before adapting, 4 after
print(f"profile {config.name}, model {config.model.name}, writes to {stage.key}/")
parts = pd.DataFrame([(name, part[-1]) for name, part in PARTS.items()], columns=["part", "notebooks"])
stage.save_figure(overview("00"), f"{stage.key}/overview", parts)
where_we_are("00")

# %% [markdown]
# *Figure: the method; filled, what this notebook is about. Thin arrows: the way of a program; dashed: the inner loop of one
# task; thick: the outer loop over all tasks; dotted: long-term memory. Small numbers: the notebooks that treat a part.*
#
# ## By hand first: from tests to a lesson
#
# A program that fails gets part of the credit: with the share $\rho$ of hidden tests passed, $R_{unit} = -0.3 + 1.3\rho$. Half
# of the tests: $-0.3 + 0.65 = 0.35$. A reward alone teaches nothing; it is compared with the mean of the *other* programs for
# the same task. One pass among four, the rest 0: the pass stands 1 above the others, each of the rest $0 - \tfrac13$ below.

# %%
half_right = -0.3 + 1.3 * 0.5  # R_unit = -0.3 + 1.3 rho
a = rewards.leave_one_out([1.0, 0.0, 0.0, 0.0])  # a_i = R_i - mean of the others
assert round(half_right, 9) == 0.35 and a[0] == 1.0 and a[1] == -1 / 3
print("R_unit of a half-right program:", round(half_right, 2), "· advantages:", [round(x, 2) for x in a])

# %% [markdown]
# ## The two tasks
#
# A task is a description, one test that the prompt shows, and tests that it does not show. These two come from the training
# split: nothing of the test split is touched here.

# %%
train = load_tasks("basics", "train")
tasks = [task for task in train if task.task_id in ("basics/strings-01", "basics/dictionaries-01")]
for task in tasks:
    hidden = task.tests[task.visible :]
    display(Markdown(f"**{task.task_id}** {task.prompt} Shown: `{task.tests[0]}`; hidden: {len(hidden)}, such as `{hidden[0]}`"))

# %% [markdown]
# ## The parts: model, sandbox, judge, two memories
#
# The **long-term memory** $M_L$ starts with the training tasks and their reference programs; the **short-term memory** $M_S$ is
# empty. The **conductor** is the only one that touches them. `MRLF` holds the two learning steps.

# %%
policy = load_policy(config.model, config.lora, seed=0)  # base frozen; LoRA adapters theta = (A, B), B = 0 at first
sandbox, folder = Sandbox(config.sandbox), TemporaryDirectory()
long = LongTermMemory(Path(folder.name) / "memory.sqlite", embedder_for(config.long_term.embedder, config.model))
long.add_tasks(train)
long.add_golds(train)
short = ShortTermMemory(config.short_term.size, config.short_term.total)
conductor = Conductor(policy, sandbox, StaticJudge(), config, seed=0, long_term=long, short_term=short)
run = MRLF(policy, conductor, train, config, 0, Path(folder.name))
stage.note(model=f"{policy.name} ({policy.fingerprint})")
print(f"{policy.name} on {policy.device}, {sum(p.numel() for p in run.parameters):,} trainable numbers;",
      f"{long.stats()['tasks']} tasks in long-term memory, {len(short)} episodes in short-term memory")  # fmt: skip

# %% [markdown]
# ## Recall, and the prompt
#
# Memory looks for the $n_{nb}$ training tasks whose descriptions are most similar (never the task itself) and puts one verified
# program of theirs before the question. Half of the first programs will see this text, half the plain prompt: the difference
# says whether the memory helped.

# %%
for task, recall in zip(tasks, conductor.recall(tasks), strict=True):
    near = ", ".join(f"{n.task_id} ({n.similarity:.2f})" for n in recall.neighbours)
    print(f"{task.task_id} recalls {near}")
text, _ = conductor.memory_text(conductor.recall(tasks)[0])
print("-" * 40, prompts.render(policy.tokenizer, tasks[0], text).text, sep="\n")

# %% [markdown]
# ## Write, test, judge, reward
#
# `collect` samples the **support** programs with $\theta$, runs each in the sandbox against all its tests, lets the judge grade
# those that load, and adds up
# $$R_i = R_{unit} + \min(1, 4.3/m)\,\bigl(\textstyle\sum_k w_k R_k + w_{lt} R_{lt}\bigr)$$
# for $m$ tests. The small terms can order programs that the tests hold for equal; they can never overturn the tests.


# %%
def table(episodes):
    rows = []
    for e, a in zip(episodes, sequence_advantages(episodes, "loo"), strict=True):
        r = e.reward
        row = {"task": e.task_id, "sees memory": "yes" if e.memory_text else "no", "verdict": e.feedback.error_class or "pass"}
        row |= {"rho": e.feedback.pass_ratio, "R_unit": r.unit, "style": r.style, "complexity": r.complexity}
        row |= {"instruction": r.instruction, "long term": r.long_term, "tokens": len(e.tokens)}
        row |= {"R": r.total, "a": a}  # R_i = R_unit + min(1, 4.3 / m) (the small terms); a_i = R_i - mean of the others
        rows.append(row)
    return pd.DataFrame(rows)


support = conductor.collect(tasks, group="support", step=1, rollouts=range(4), memory_share=0.5)
display(Markdown(markdown(table(support), 2)))

# %% [markdown]
# The last column is the advantage $a_i = R_i - \frac{1}{3}\sum_{j\ne i} R_j$, within the four programs of a task. One of the
# programs, as the model wrote it, and its verdict test by test:

# %%
chosen = max(support[:4], key=lambda e: e.reward.total if e.reward.total is not None else -9.0)
display(Markdown(f"````python\n{chosen.code}\n````"))
report = sandbox.run(program_for(tasks[0], chosen.code))
verdicts = [
    {"test": tasks[0].tests[t.snippet], "shown": "yes" if t.visible else "no", "verdict": t.status, "got": t.got or t.error_type}
    for t in report.tests
]
display(Markdown(markdown(pd.DataFrame(verdicts)) if verdicts else f"No test ran: {report.status}."))

# %% [markdown]
# ## The inner step: adapt to the task
#
# Each task gets fast weights $\delta_x$ of its own on top of the shared $\theta$. One step of fixed length $\alpha$ against the
# gradient of the task's loss (its short-term memory, and the programs of its neighbours):
# $$\delta_x = -\alpha\, g_x / \lVert g_x \rVert$$

# %%
adaptation = run.adapt(tasks, support)  # delta_x = - alpha g / ||g||, for both tasks in one batch
for i, task in enumerate(tasks):
    length = sum(float(d[i].pow(2).sum()) for d in adaptation.deltas.values()) ** 0.5
    print(f"{task.task_id}: ||g|| = {adaptation.norms[i]:.3f}, ||delta|| = {length:.3f}, alpha = {config.inner.alpha}")

# %% [markdown]
# ## Write again, adapted
#
# The **query** programs come from $\theta + \delta_x$, under the plain prompt.

# %%
query = conductor.collect(tasks, group="query", step=1, rollouts=range(4, 8), deltas=adaptation.deltas)
display(Markdown(markdown(table(query), 2)))

# %% [markdown]
# *Figure: the reward $R$ of every program, by task; circles before, squares after the inner step; bars mark the means. Four
# programs are far too few to tell a difference from luck.*

# %%
everything = pd.concat([table(support).assign(half="before"), table(query).assign(half="after")])
frame = everything[["task", "half", "R"]].astype({"R": float})
looks = figures.look(["before", "after"])
with plt.rc_context(figures.STYLE):
    drawn, axis = plt.subplots(figsize=(6, 3))
for place, task in enumerate(tasks):
    for shift, (half, (colour, marker)) in zip((-0.15, 0.15), looks.items(), strict=True):
        values = frame[(frame["task"] == task.task_id) & (frame["half"] == half)]["R"].dropna()
        x = [place + shift + 0.045 * (k - 1.5) for k in range(len(values))]
        axis.scatter(x, values, color=colour, marker=marker, s=45, label=f"{half} the inner step" if place == 0 else None)
        axis.hlines(values.mean(), place + shift - 0.1, place + shift + 0.1, color=colour, linewidth=2)
axis.set(xticks=range(len(tasks)), xticklabels=[t.task_id for t in tasks], ylabel="reward R", ylim=(-1.25, 1.25))
axis.legend(frameon=False, loc="upper center", ncols=2, bbox_to_anchor=(0.5, 1.18))
stage.save_figure(drawn, f"{stage.key}/rewards", frame)
alt = f"Rewards of {len(frame)} programs for two tasks before and after the inner step, with their means."
display(Image(filename=str(stage.path(f"{stage.key}/rewards.png")), metadata={"alt": alt}, width=600))

# %% [markdown]
# ## The outer step: learn for all tasks, and remember
#
# $$L_{outer}(\theta) = \tfrac{K_s}{G} L_{pg}(S;\theta) + \tfrac{K_q}{G} L_{pg}(Q;\theta + \delta_x) + b_{sl}\,CE + b_{neg}
# L_{negative}$$
# The two policy-gradient terms learn from both halves, the cross-entropy $CE$ ($L_{sl}$) keeps what is verified, $L_{negative}$
# pushes away from stored error lines. Then AdamW moves $\theta$, $\delta_x$ is thrown away, and both memories take the
# episodes in.

# %%
before = [p.detach().clone() for p in run.parameters]
losses = run.update(1, tasks, tasks, support, query, adaptation)  # gradient of L_outer, then AdamW; one process has all tasks
conductor.remember(support, query)
moved = max(float((p.detach() - b).abs().max()) for p, b in zip(run.parameters, before, strict=True))
print(", ".join(f"{name} = {value:.3f}" for name, value in losses.items() if isinstance(value, float)))
print(f"largest change of a weight: {moved:.1e}")
stored = sum(len(found([t.task_id for t in tasks])) for found in (long.positives, long.failures))
print(f"long-term memory holds {stored} programs for these tasks; short-term memory: {len(short)} episodes")

# %% [markdown]
# ## What we saw


# %%
def mean_reward(episodes):
    known = [e.reward.total for e in episodes if e.reward.total is not None]
    return f"{sum(known) / len(known):+.2f}" if known else "unknown"


passed = [sum(e.feedback.status == "pass" for e in half) for half in (support, query)]
lines = [f"{passed[0]} of {len(support)} programs passed before the inner step, {passed[1]} of {len(query)} after it."]
lines += [f"Mean reward {mean_reward(support)} before, {mean_reward(query)} after: an illustration, no evidence."]
with_text, plain = [e for e in support if e.memory_text], [e for e in support if not e.memory_text]
lines += [
    f"Programs that saw a recalled one: mean reward {mean_reward(with_text)}; under the plain prompt: {mean_reward(plain)}."
]
lines += [f"One outer step moved no weight by more than {moved:.1e}; training takes many of them (notebook 06)."]
display(Markdown("\n".join(f"* {line}" for line in lines)))

# %% [markdown]
# ## Exercises
#
# 1. A task's four programs all get the same reward. What do their advantages become, and what is left of the inner step?
#
# <details><summary>Solution</summary>
#
# All $a_i$ are 0 (the mean of the others equals $R_i$), so short-term memory gives no gradient, error lines aside. What is left
# is the cross-entropy on the neighbours' programs, weighted by $\eta$; without long-term memory $g = 0$ and $\delta_x = 0$.
#
# ```python
# assert rewards.leave_one_out([-0.6] * 4) == [0.0] * 4
# ```
#
# </details>
#
# 2. Switch the long-term memory off by building the conductor with `long_term=None` and run the cells again. Which columns of
#    the table change?
#
# <details><summary>Solution</summary>
#
# `sees memory` is "no" everywhere and `long term` is empty, which is not zero: the term does not exist. The programs under the
# plain prompt stay the same ones, because every rollout draws from its own random stream.
#
# ```python
# # after the cells above
# without = Conductor(policy, sandbox, StaticJudge(), config, seed=0, short_term=short)
# again = without.collect(tasks, group="support", step=1, rollouts=range(4), memory_share=0.5)
# assert not any(e.memory_text for e in again) and {e.reward.long_term for e in again} == {None}
# plain = [i for i, e in enumerate(support) if not e.memory_text]
# assert [again[i].tokens for i in plain] == [support[i].tokens for i in plain]
# ```
#
# </details>

# %%
long.close()
sandbox.close()
folder.cleanup()
stage.finish()
