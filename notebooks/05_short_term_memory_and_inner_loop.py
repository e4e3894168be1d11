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
# # 05 · Short-term memory and the inner loop
#
# [![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/falcon/blob/main/notebooks/05_short_term_memory_and_inner_loop.ipynb)
# [All symbols](https://github.com/OWNER/falcon/blob/main/notebooks/glossary.md)
#
# **Question.** What does one inner step change in the model, what one outer step, and what do they learn from?
#
# **Reads** the committed task set `basics` and the profile's model, untrained. **Writes** `figures/inner_loop.svg`, `.png`,
# `.csv`.
#
# **Run time**, profile `quick`: about half a minute on 2 CPU cores, mostly sampling and two backward passes; on one GPU: seconds,
# after the model is loaded.
#
# Two levels of learning. The *inner* step adapts the policy to one task, from what this very task has just shown; it is thrown
# away afterwards. The *outer* step changes the shared weights, so that all tasks start better. First on a toy with two numbers
# instead of 135 million, then on the model.

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
import importlib
import os
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from IPython.display import Image, Markdown, display

from falconlib.config import override
from falconlib.judge import StaticJudge
from falconlib.memory import LongTermMemory, ShortTermMemory, get_embedder
from falconlib.policy.fast_weights import FastWeights, normalised_step
from falconlib.policy.models import load_policy
from falconlib.reporting import figures, start
from falconlib.reporting.overview import where_we_are
from falconlib.reporting.tables import markdown
from falconlib.rollout import Conductor
from falconlib.sandbox import Sandbox
from falconlib.tasks import load_tasks
from falconlib.training.advantages import sequence_advantages
from falconlib.training.batches import collate, micro_batches, score_batch
from falconlib.training.inner import Adaptation, inner_examples, inner_gradient
from falconlib.training.losses import negative_loss, policy_gradient_loss
from falconlib.training.mrlf import MRLF

# %% tags=["parameters"]
profile: str = "quick"  # a file of notebooks/profiles: smoke, quick, colab, small-cpu, small, paper, paper-apps
results: str = ""  # results folder; "" is $FALCON_RESULTS, or results/ of the repository
overrides: dict = {}  # settings that differ from the profile's, by dotted name

# %%
stage = start("05_short_term_memory_and_inner_loop", {"profile": profile, "results": results, "overrides": overrides})
config = override(stage.profile, {"train.group": 6, "inner.support": 3})  # 3 programs per task and phase
print(f"J = {config.inner.steps}, alpha = {config.inner.alpha}, eta = {config.inner.eta}, model {config.model.name}")
where_we_are("05")

# %% [markdown]
# *Figure: the method; filled, what this notebook is about. Thin arrows: the way of a program; dashed: the inner loop of one
# task; thick: the outer loop over all tasks; dotted: long-term memory. Small numbers: the notebooks that treat a part.*
#
# ## By hand first: a step of fixed length
#
# $$\delta = -\alpha\, g / \lVert g \rVert$$
# For $g = (3, 4)$ the length is 5. With $\alpha = 1$: $\delta = -(3/5, 4/5) = (-0.6, -0.8)$. Where nothing is to be learnt,
# $g = 0$, nothing happens: $\delta = 0$, no division by zero.

# %%
g = {"layer": torch.tensor([[[3.0, 4.0]], [[0.0, 0.0]]])}  # two tasks, one layer of shape 1 x 2
delta, norm = normalised_step({"layer": torch.zeros(2, 1, 2)}, g, alpha=1.0)  # delta - alpha g / ||g||
assert norm.tolist() == [5.0, 0.0]
assert torch.allclose(delta["layer"][0, 0], torch.tensor([-0.6, -0.8])) and not delta["layer"][1].any()
print("||g|| =", norm.tolist(), "delta =", [[round(float(d), 2) for d in row] for row in delta["layer"][:, 0]])

# %% [markdown]
# What is stepped along is the gradient of a loss. The policy-gradient loss multiplies each advantage $A$ by the ratio $r$ of
# the token's probability now and when it was sampled, and clips what would go too far; the negative loss pushes an error token
# of probability $p > 0.1$ away, but never without bound:
# $$L_{pg} = -\tfrac1Z \textstyle\sum_{i,t} \min\bigl(r_{it} A_{it},\ \mathrm{clip}(r_{it}, 0.8, 1.28)\, A_{it}\bigr)
# \qquad L_{negative} = -\tfrac1Z \textstyle\sum_t \log(1 - \min(p_t, 0.99))$$
# A token that became 1.5 times as likely: praised ($A = 1$) it counts only 1.28, blamed ($A = -1$) in full. An error token with
# $p = \tfrac12$ costs $-\log \tfrac12 = 0.69$.

# %%
now, train_config = torch.tensor([[1.5]]).log(), config.train  # log r, as log-probs with those of sampling at 0
token = SimpleNamespace(old_logprobs=torch.zeros(1, 1), mask=torch.ones(1, 1))
clips = (train_config.clip_low, train_config.clip_high)  # 0.2 and 0.28
for a, by_hand in ((1.0, -1.28), (-1.0, 1.5)):
    token.advantages = torch.tensor([[a]])
    loss, cut = policy_gradient_loss(now, token, 1, *clips)  # L_pg = -(1/Z) sum min(r A, clip(r) A)
    assert abs(float(loss) - by_hand) < 1e-6
    print(f"A = {a:+.0f}: L_pg = {float(loss):+.2f}, tokens that the clip cut off: {int(cut)}")
pushed = negative_loss(torch.tensor([[0.5]]).log(), token, 1)  # L_negative = -(1/Z) sum log(1 - p)
assert abs(float(pushed) - 0.6931) < 1e-3

# %% [markdown]
# ## A toy with two parameters
#
# Each task $x$ has its own bowl $L_x(\theta) = \tfrac12 (\theta - c_x)^\top H_x (\theta - c_x)$; one is steep where the other
# is flat. What matters is the loss *after* the inner step, $F(\theta) = \tfrac12 \sum_x L_x\bigl(\theta - \alpha\, g_x / \lVert
# g_x \rVert\bigr)$. Three ways to follow it:
#
# * **second order**: the exact gradient of $F$, through the inner step;
# * **first order**: take the gradient at the adapted point and pretend that the step was a constant:
# $\nabla L_x(\theta + \delta_x)$, with
#   $\delta_x$ detached;
# * **no inner loop**: $\nabla L_x(\theta)$, plain learning.

# %%
torch.set_default_dtype(torch.float64)
centres, steepness, alpha = torch.tensor([[2.0, 0.5], [-1.0, 1.5]]), torch.tensor([[3.0, 0.3], [0.3, 3.0]]), 0.8


def bowl(theta, x):
    return 0.5 * (steepness[x] * (theta - centres[x]) ** 2).sum()  # L_x


def adapted(theta, x, way):
    if way == "no inner loop":
        return theta
    (gradient,) = torch.autograd.grad(bowl(theta, x), theta, create_graph=way == "second order")
    return theta - alpha * gradient / gradient.norm()  # theta + delta; detached unless second order


def outer_gradient(theta, way):
    theta = theta.detach().requires_grad_()
    loss = sum(bowl(adapted(theta, x, way), x) for x in (0, 1)) / 2
    return torch.autograd.grad(loss, theta)[0]


def after_adapting(theta):
    theta = theta.detach().requires_grad_()
    return sum(bowl(adapted(theta, x, "first order"), x).item() for x in (0, 1)) / 2  # F


# %% [markdown]
# Is the second-order gradient right? Finite differences of $F$ must give the same two numbers; the first-order ones differ,
# that is what it neglects. Then 40 outer steps of each learner.

# %%
theta, eps = torch.tensor([0.5, 2.2]), 1e-5
axes = torch.eye(2)
finite = torch.tensor([(after_adapting(theta + eps * e) - after_adapting(theta - eps * e)) / (2 * eps) for e in axes])
exact, first = outer_gradient(theta, "second order"), outer_gradient(theta, "first order")
assert torch.allclose(finite, exact, atol=1e-6)
angle = float(torch.rad2deg(torch.acos(torch.dot(exact, first) / (exact.norm() * first.norm()))))
for name, vector in (("finite differences", finite), ("second order", exact), ("first order", first)):
    print(f"{name:18} ({vector[0]:+.6f}, {vector[1]:+.6f})")
print(f"the first-order gradient points {angle:.1f} degrees away")
ways, steps = ("second order", "first order", "no inner loop"), 40
paths = {way: [theta] for way in ways}
for way, path in paths.items():
    for _ in range(steps):
        path.append(path[-1] - 0.15 * outer_gradient(path[-1], way))  # theta - lr * gradient
losses = {way: [after_adapting(point) for point in path] for way, path in paths.items()}
torch.set_default_dtype(torch.float32)
for way in ways:
    print(f"{way:14} ends at ({paths[way][-1][0]:+.2f}, {paths[way][-1][1]:+.2f}), loss after adapting {losses[way][-1]:.3f}")

# %% [markdown]
# First order may end elsewhere than the exact gradient, and on this toy it does: what it neglects is how the direction of the
# inner step turns when $\theta$ moves. The model uses it all the same: its attention kernels have no second derivative, and it
# costs no more than plain learning.
#
# ## The model: two visits to two tasks
#
# **Short-term memory** keeps the last episodes of each task *across visits*. We visit twice: what the first visit stored is
# there in the second. (The long-term memory gives neighbours' programs to imitate; here with the embedder that needs no model.)

# %%
train = load_tasks("basics", "train")
tasks = [t for t in train if t.task_id in ("basics/strings-01", "basics/dictionaries-01")]
policy = load_policy(config.model, config.lora, seed=0)
folder, sandbox = TemporaryDirectory(), Sandbox(config.sandbox)
long = LongTermMemory(Path(folder.name) / "memory.sqlite", get_embedder("hashed"))
long.add_tasks(train)
long.add_golds(train)
short = ShortTermMemory(config.short_term.size, config.short_term.total)
conductor = Conductor(policy, sandbox, StaticJudge(), config, seed=0, long_term=long, short_term=short)
run = MRLF(policy, conductor, train, config, 0, Path(folder.name))
stage.note(model=f"{policy.name} ({policy.fingerprint})", sandbox=sandbox.layers)
first_visit = conductor.collect(tasks, group="support", step=1, rollouts=range(3))
conductor.remember(first_visit, [])
support = conductor.collect(tasks, group="support", step=2, rollouts=range(3))
buffers = conductor.buffers(tasks, support)
print([len(buffer) for buffer in buffers], f"episodes in the buffers, at most {short.size} per task")

# %% [markdown]
# The buffer of the first task. The advantage $a$ compares within the buffer: old and new episodes stand side by side, with the
# log-probs they were sampled with, so that the ratio $r$ of the policy-gradient loss corrects for the policy having moved.

# %%
rows = []
for e, a in zip(buffers[0], sequence_advantages(buffers[0], "loo"), strict=True):
    lines = "" if e.feedback.lines is None else f"{e.feedback.lines[0]} to {e.feedback.lines[1]}"
    row = {"visit": e.step, "verdict": e.feedback.error_class or "pass", "error lines": lines, "marked tokens": sum(e.error_mask)}
    rows.append(
        row | {"tokens": len(e.tokens), "R": e.reward.total, "a": a, "log-prob per token": sum(e.logprobs) / len(e.tokens)}
    )
display(Markdown(markdown(pd.DataFrame(rows), 2)))

# %% [markdown]
# ## The inner loss and its gradient
#
# $$L_{in}(x;\delta) = L_{pg}^-(M_S(x);\theta+\delta) + \eta\, CE(\text{programs of the nearest tasks};\theta+\delta)$$
# $L_{pg}^-$ damps negative advantages by 0.3, since what is pushed down moves faster than what is pulled up. One gradient per
# task, all tasks in one batch: each task's rows see only its own $\delta_x$, added inside the low-rank layers.

# %%
neighbours = conductor.neighbour_programs(tasks)
positives = [[x for task_id, code in found for x in run.outer.supervised(task_id, code)] for found in neighbours]
examples = inner_examples(buffers, positives, config)  # the terms of L_in
own, imitated = [e for e in examples if e.logprobs], [e for e in examples if not e.logprobs]
fast = FastWeights(policy.model)
gradient = inner_gradient(policy, fast, fast.zeros(len(tasks)), examples, config, run.micro)  # grad_delta L_in at delta = 0
norms = normalised_step(fast.zeros(len(tasks)), gradient, config.inner.alpha)[1].tolist()
print(f"{len(own)} own programs, {len(imitated)} programs of neighbours; ||g|| per task: {[round(n, 3) for n in norms]}")

# %% [markdown]
# ## How far is one step?
#
# We take the step with $\alpha$ = 0.05, 0.1 and 0.3 along the same gradient and score the very same programs again. At $\delta
# = 0$ the forward pass must reproduce the log-probs that sampling recorded: a check that both see the same policy.


# %%
def logprobs(examples, deltas):
    """Mean log-probability per token of each example under theta + delta, at the sampling temperature."""
    found = {}
    for chunk in micro_batches(policy, examples, config.train.micro_tokens):
        batch = collate(policy, [replace(e, logprobs=e.logprobs or (0.0,)) for e in chunk], config.sample.temperature)
        with torch.no_grad(), fast.active(deltas):
            values, _ = score_batch(policy, batch, fast, config)
        found |= {id(e): float(row[: len(e.tokens)].mean()) for e, row in zip(chunk, values, strict=True)}
    return np.array([found[id(e)] for e in examples])


scored_again = [*own, *imitated]
base = logprobs(scored_again, {})
recorded = np.array([np.mean(e.logprobs) for e in own])
drift = float(np.abs(base[: len(own)] - recorded).max()) if own else 0.0
assert drift < 1e-2
print(f"largest difference between scoring and sampling: {drift:.1e} per token")

# %%
signs = np.sign([sum(e.advantages) for e in own])
groups = {"praised": signs > 0, "blamed": signs < 0, "neighbours'": np.ones(len(imitated), dtype=bool)}
rows = []
for a in (0.05, 0.1, 0.3):
    deltas, _ = normalised_step(fast.zeros(len(tasks)), gradient, a)  # delta_x = - alpha g / ||g||
    change = logprobs(scored_again, deltas) - base
    parts = dict(zip(groups, (change[: len(own)], change[: len(own)], change[len(own) :]), strict=True))
    for name, mask in groups.items():
        if mask.any():
            rows.append(
                {"alpha": a, "programs": name, "n": int(mask.sum()), "change of log-prob": float(parts[name][mask].mean())}
            )
moved = pd.DataFrame(rows)
wide = moved.pivot(index="programs", columns="alpha", values="change of log-prob").rename(columns=str).reset_index()
display(Markdown(markdown(wide, 4)))

# %% [markdown]
# ## The outer step
#
# Query programs are sampled from $\theta + \delta_x$, and the gradient is taken *there*, with $\delta_x$ held fixed: what
# reaches `lora_B` is the first-order gradient of the toy. Then one AdamW step on $\theta$, and $\delta_x$ is gone.

# %%
deltas, _ = normalised_step(fast.zeros(len(tasks)), gradient, config.inner.alpha)
adaptation = Adaptation(deltas, tuple(norms), sum(len(e.tokens) for e in examples))
query = conductor.collect(tasks, group="query", step=2, rollouts=range(3, 6), deltas=deltas)
step = max(config.train.warmup, 1)  # behind the warm-up: the whole learning rate
outer = run.update(step, tasks, tasks, support, query, adaptation)  # L_outer, backward, clip, AdamW
after = logprobs(scored_again, {}) - base
assert outer["grad_norm"] == 0 or bool(after.any()), "theta did not move"
parts = {"own programs": after[: len(own)], "neighbours' programs": after[len(own) :]}
print(", ".join(f"{name} = {value:.3f}" for name, value in outer.items() if isinstance(value, float)))
print("change of log-prob per token under theta alone:", {n: round(float(v.mean()), 4) for n, v in parts.items() if len(v)})

# %% [markdown]
# ## The buffer as training goes on
#
# A third visit, after the outer step. The first task's buffer now holds three generations of programs, each with the log-probs
# of the policy that sampled it. The ratio $r = \pi_{now} / \pi_{sampling}$ (geometric mean per token) says how far each
# generation is from the policy of today: 1 for the fresh one, which was sampled by it.

# %%
conductor.remember(support, query)
buffers = conductor.buffers(tasks, conductor.collect(tasks, group="support", step=3, rollouts=range(3)))
buffer = [e for e in buffers[0] if e.tokens]
again = [e for e in inner_examples([buffer], [[]], config) if e.logprobs]
now = dict(zip([e.logprobs for e in again], logprobs(again, {}), strict=True))
rows = []
for e in buffer:
    row = {"visit": e.step, "verdict": e.feedback.error_class or "pass", "tokens": len(e.tokens), "R": e.reward.total}
    row |= {"marked tokens": sum(e.error_mask), "log-prob when sampled": float(np.mean(e.logprobs))}
    rows.append(row | {"r per token": float(np.exp(now[e.logprobs] - np.mean(e.logprobs))) if e.logprobs in now else None})
display(Markdown(markdown(pd.DataFrame(rows), 3)))
by_visit = pd.DataFrame(rows).groupby("visit")["r per token"].mean()
print(f"{len(buffer)} of at most {short.size} episodes; mean r by visit: {by_visit.round(4).to_dict()}")

# %% [markdown]
# *Figure. Left: the toy; contours of the loss after adapting, and the ways of the three learners (named in the middle) from the
# same start. Middle: that loss by outer step. Right: the model; how one inner step of length $\alpha$ moves the log-probability
# per token of praised programs, of blamed ones, and of the neighbours' programs. Tokens that were likely already cannot rise
# much.*

# %%
rows = [{"panel": "toy loss", "series": way, "x": k, "y": value} for way in ways for k, value in enumerate(losses[way])]
rows += [{"panel": "toy path", "series": way, "x": float(p[0]), "y": float(p[1])} for way in ways for p in paths[way]]
rows += [
    {"panel": "model", "series": r["programs"], "x": r["alpha"], "y": r["change of log-prob"]} for r in moved.to_dict("records")
]
frame = pd.DataFrame(rows)
xs, ys = np.linspace(-0.5, 2.8, 41), np.linspace(-0.2, 2.6, 41)
height = [[after_adapting(torch.tensor([x, y], dtype=centres.dtype)) for x in xs] for y in ys]
with plt.rc_context(figures.STYLE):
    drawn, axes = plt.subplots(1, 3, figsize=(12, 3.6))
axes[0].contour(xs, ys, height, levels=12, colors="0.6", linewidths=0.8)
axes[0].scatter(*theta.tolist(), color="black", s=40, zorder=4)
titles = ("toy: three learners", "toy: loss after adapting", "model: one inner step")
for axis, panel, title in zip(axes, ("toy path", "toy loss", "model"), titles, strict=True):
    part = frame[frame["panel"] == panel]
    for name, (colour, marker) in figures.look(list(part["series"].unique())).items():
        own_part = part[part["series"] == name]
        every = 1 if panel == "model" else 5
        axis.plot(own_part["x"], own_part["y"], color=colour, marker=marker, markersize=4, markevery=every, label=name)
    axis.set(title=title)
for axis in axes[1:]:
    axis.legend(frameon=False, fontsize=9)
axes[0].set(xlabel="$\\theta_1$", ylabel="$\\theta_2$")
axes[1].set(xlabel="outer step", ylim=(0, None))
axes[2].set(xlabel="length $\\alpha$", ylabel="change of log-prob per token")
axes[2].axhline(0, color="black", linewidth=0.8)
stage.save_figure(drawn, "figures/inner_loop", frame)

# %%
alt = "Left: paths of three learners in a two-parameter toy. Middle: their losses after adapting, ending at "
alt += ", ".join(f"{losses[way][-1]:.2f} ({way})" for way in ways) + ". Right: change of log-probabilities with the step length."
display(Image(filename=str(stage.path("figures/inner_loop.png")), metadata={"alt": alt}, width=1000))

# %% [markdown]
# *Figure: the toy at one outer step, with the inner steps drawn: from where a learner stands, a dotted line to where one inner
# step takes it for each of the two tasks. In a live notebook a slider below it moves the outer step.*


# %%
def learner(left, right, way, step, colour, marker):
    path = torch.stack(paths[way][: step + 1]).detach()
    left.plot(*path.T, color=colour, marker=marker, markersize=9, markevery=[-1], linewidth=1)
    for x in (0, 1):
        there = adapted(path[-1].clone().requires_grad_(), x, way).detach()  # theta + delta_x
        left.plot(*torch.stack([path[-1], there]).T, color=colour, linestyle=":", marker=".", linewidth=1.5)
    right.plot(losses[way][: step + 1], color=colour, marker=marker, markersize=4, markevery=5, label=way)


def toy(step):
    with plt.rc_context(figures.STYLE):
        shown, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4))
    left.contour(xs, ys, height, levels=12, colors="0.6", linewidths=0.8)
    for way, (colour, marker) in figures.look(ways).items():
        learner(left, right, way, step, colour, marker)
    left.set(xlabel="$\\theta_1$", ylabel="$\\theta_2$", title=f"outer step {step}", xlim=(-0.5, 2.8), ylim=(-0.2, 2.6))
    right.set(xlabel="outer step", title="loss after adapting", xlim=(-1, steps + 1), ylim=(0, 1.1 * losses[ways[0]][0]))
    right.legend(frameon=False)
    display(shown, metadata={"image/png": {"alt": f"The toy's learners at outer step {step}, with their inner steps."}})
    plt.close(shown)


toy(5)
if not os.environ.get("FALCON_BATCH") and find_spec("ipywidgets"):  # not in a run of the graph
    importlib.import_module("ipywidgets").interact(toy, step=(0, steps))

# %% [markdown]
# ## What we saw

# %%
ends = ", ".join(f"{losses[way][-1]:.3f} ({way})" for way in ways)
lines = [f"On the toy the three learners end at {ends}; the first two gradients were {angle:.1f}° apart at the start."]
for name, part in moved.groupby("programs", sort=False):
    values = ", ".join(f"{row['change of log-prob']:+.3f} at {row['alpha']}" for _, row in part.iterrows())
    lines += [f"One inner step moves {name} programs by {values} (log-prob per token, n = {int(part['n'].iloc[0])})."]
gain = [[e.reward.unit for e in half if e.reward.unit is not None] for half in (support, query)]
if all(gain):
    means = f"{np.mean(gain[0]):+.2f} before and {np.mean(gain[1]):+.2f} after"
    lines += [f"Mean test reward {means} the inner step, {len(query)} programs each: luck included."]
lines += [f"One outer step had a gradient of norm {outer['grad_norm']:.3f}."]
display(Markdown("\n".join(f"* {line}" for line in lines)))

# %% [markdown]
# ## Exercises
#
# 1. Make the inner step of the toy plain gradient descent, `theta - 0.3 * gradient`. Does the second-order gradient become
#    more or less different from the first-order one?
#
# <details><summary>Solution</summary>
#
# More. It is then $(I - 0.3 H_x)$ times the first-order one: nearly the same along the flat axis of a bowl (times 0.91), a
# tenth along the steep one (times 0.1), and the steep axes of the two bowls differ. With the normalised step the difference
# depends on the place as well, since the length of the gradient enters.
#
# ```python
# # after the cells above
# here, firsts, seconds = torch.tensor([0.5, 2.2], dtype=centres.dtype), [], []
# for x in (0, 1):
#     end = here - 0.3 * steepness[x] * (here - centres[x])  # one plain inner step
#     firsts.append(steepness[x] * (end - centres[x]))
#     seconds.append((1 - 0.3 * steepness[x]) * firsts[-1])
# one, two = sum(firsts), sum(seconds)
# plain_angle = float(torch.rad2deg(torch.acos(one @ two / (one.norm() * two.norm()))))
# print(f"{plain_angle:.0f} degrees apart, {angle:.1f} with the normalised step")
# assert plain_angle > 10 * angle
# ```
#
# </details>
#
# 2. Set `overrides = {"short_term.enabled": False}`. What is left of $L_{in}$? (Build `short` only when it is enabled.)
#
# <details><summary>Solution</summary>
#
# The buffers are empty, so only the cross-entropy on the neighbours' programs remains, and the line term is off as well, since
# the lines come from short-term memory: this is the ablation *minus STM*.
#
# ```python
# # after the cells above
# left = inner_examples([[] for _ in tasks], positives, config)
# assert len(left) == len(imitated) and not any(e.logprobs for e in left)  # no program of its own
# ```
#
# </details>

# %%
long.close()
sandbox.close()
folder.cleanup()
stage.finish()
