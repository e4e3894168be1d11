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
# # 03 · Feedback and rewards: from a verdict to every token
#
# [![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/falcon/blob/main/notebooks/03_feedback_and_rewards.ipynb)
# [All symbols](https://github.com/OWNER/falcon/blob/main/notebooks/glossary.md)
#
# **Question.** How do a test report and a judge's grades become one number per token?
#
# **Reads** one task of the committed set `basics`. **Writes** `figures/rewards.svg`, `.png`, `.csv`.
#
# **Run time**, every profile: seconds on 2 CPU cores. A GPU is not used; no model is needed.
#
# We follow four hand-written programs all the way. Each step is one equation and the line of code that computes it.

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
import inspect
import itertools
import math
import re
from statistics import pstdev

import matplotlib.pyplot as plt
import pandas as pd
from IPython.display import Image, Markdown, display

from falconlib import rewards
from falconlib.feedback import error_token_mask, make_feedback
from falconlib.judge import StaticJudge, static
from falconlib.records import Feedback, Scores
from falconlib.reporting import figures, start
from falconlib.reporting.overview import where_we_are
from falconlib.reporting.tables import markdown
from falconlib.sandbox import Sandbox, program_for
from falconlib.tasks import load_tasks

# %% tags=["parameters"]
profile: str = "quick"  # a file of notebooks/profiles: smoke, quick, colab, small-cpu, small, paper, paper-apps
results: str = ""  # results folder; "" is $FALCON_RESULTS, or results/ of the repository
overrides: dict = {}  # settings that differ from the profile's, by dotted name

# %%
stage = start("03_feedback_and_rewards", {"profile": profile, "results": results, "overrides": overrides})
config = stage.profile.reward
print(config)
where_we_are("03")

# %% [markdown]
# *Figure: the method; filled, what this notebook is about. Thin arrows: the way of a program; dashed: the inner loop of one
# task; thick: the outer loop over all tasks; dotted: long-term memory. Small numbers: the notebooks that treat a part.*
#
# ## By hand first
#
# A program that passes half of the hidden tests: $-0.3 + 1.3 \cdot 0.5 = 0.35$. One that raises: $-0.6$, whatever it passed.
# The best grade 2 of the judge: $(2 - 0.5)/1.5 = 1$; the worst, $-1$: $-1$. Two programs with rewards 1 and 0: each is compared
# with the other, $1 - 0 = 1$ and $0 - 1 = -1$.

# %%
half_right, raises = Feedback("fail", 0.5, tests=5), Feedback("runtime_error", 0.5, tests=5)
assert math.isclose(rewards.unit_reward(half_right), 0.35) and rewards.unit_reward(raises) == -0.6
assert (rewards.ai_reward(2), rewards.ai_reward(-1)) == (1.0, -1.0)
assert rewards.leave_one_out([1.0, 0.0]) == [1.0, -1.0]
print("0.35, -0.6, 1, -1: as computed in the head")

# %% [markdown]
# ## Four programs for one task

# %%
task = next(t for t in load_tasks("basics") if t.task_id == "basics/dictionaries-01")
programs = {
    "right": "def ordered_keys(table):\n    return sorted(table)\n",
    "half right": "def ordered_keys(table):\n    l = []\n    for key in table: l.append(key)\n    return l\n",
    "raises": "def ordered_keys(table):\n    keys = list(table)\n    kyes.sort()\n    return keys\n",
    "cut off": "def ordered_keys(table):\n    keys = list(table)\n    return sorted(keys\n",
}
print(task.prompt, *task.tests, sep="\n")

# %% [markdown]
# ## Report and judge
#
# The sandbox says what happened. The judge reads the program, it never runs it: *style* counts ruff's messages per statement,
# *complexity* is the cognitive complexity of the hardest function (lizard's count of paths stands beside it, for comparison),
# *instruction* counts what the program does not do as asked. Grades are -1, 0, 1, 2, the scale of the paper.

# %%
judge = StaticJudge()
with Sandbox(stage.profile.sandbox) as sandbox:
    stage.note(sandbox=sandbox.layers)
    reports = sandbox.run_many([program_for(task, code) for code in programs.values()])
findings = judge.findings([(task, code) for code in programs.values()])
tables = {
    "style: ruff messages per statement": static.STYLE_TABLE,
    "complexity: cognitive": static.COMPLEXITY_TABLE,
    "instruction: weighted faults": static.INSTRUCTION_TABLE,
}
for measure, table in tables.items():  # the judge's own tables
    print(f"{measure:35}", ", ".join(f"up to {bound:g}: {grade}" for bound, grade in table) + ", more: -1")
rows = []
for name, found in zip(programs, findings, strict=True):
    row = {"program": name, "parses": "no" if found is None else "yes"}
    if found is not None:
        row |= {"ruff": ", ".join(found.messages or ()), "statements": found.lines, "complexity": found.complexity}
        row |= {"paths (lizard)": static.cyclomatic_complexity(programs[name])}
        row |= {"not as asked": "; ".join(text for text, _ in found.faults)}
        row |= {f"{kind} grade": getattr(found.scores, kind) for kind in ("style", "complexity", "instruction")}
    rows.append(row)
grades = pd.DataFrame(rows).astype(object)
display(Markdown(markdown(grades.where(grades.notna(), None), 0)))

# %% [markdown]
# ## Report + grades = feedback
#
# $o$ = (status, share $\rho$ of the *hidden* tests passed, error class $k$, scope of the error, grades). The scope says how far
# the blame goes: **global** (cut off, endless: the whole program), **line** (a located error), **ignore** (a wrong answer has
# no line). Grades of a program that did not load are dropped: they are unknown, not bad.

# %%
scores = [found.scores if found else Scores() for found in findings]
feedback = {n: make_feedback(r, c, s) for (n, c), r, s in zip(programs.items(), reports, scores, strict=True)}
rows = [
    {"program": n, "status": f.status, "rho": f.pass_ratio, "m": f.tests, "error": f.error_class, "scope": f.scope}
    | {"lines": "" if f.lines is None else f"{f.lines[0]} to {f.lines[1]}"}
    | {"grades": "unknown" if f.scores.style is None else f"{f.scores.style}, {f.scores.complexity}, {f.scores.instruction}"}
    for n, f in feedback.items()
]
display(Markdown(markdown(pd.DataFrame(rows), 2)))

# %% [markdown]
# ## The components
#
# $$R_{unit} = \begin{cases} 1 & \text{all tests pass}\\ -0.3 + 1.3\rho & \text{failed tests}\\ -0.6 & \text{raises, endless,
# memory}\\ -1 & \text{does not parse}\end{cases}
# \qquad R_k = \frac{\text{grade} - 0.5}{1.5} \qquad R_{lt} = \begin{cases} -1 & \text{an error that memory knows}\\ 0 &
# \text{else}\end{cases}$$
#
# Suppose that long-term memory has seen `NameError` twice or more near this task. The components are added up with small
# weights, smaller still for many tests:
# $$R_i = R_{unit} + \min(1, 4.3/m)\,\bigl(w_s R_s + w_c R_c + w_i R_i + w_{lt} R_{lt}\bigr)$$

# %%
frequent = {"NameError"}
composed = {name: rewards.compose(f, frequent, config) for name, f in feedback.items()}
rows = []
for name, f in feedback.items():
    row = {"program": name, "R_unit": rewards.unit_reward(f)}  # 1 | -0.3 + 1.3 rho | -0.6 | -1
    row |= {
        kind: rewards.ai_reward(getattr(f.scores, kind)) for kind in ("style", "complexity", "instruction")
    }  # (grade - 0.5) / 1.5
    row |= {"R_lt": rewards.long_term_reward(f, frequent)}  # -1 for a known error
    rows.append(row | {"R": composed[name].total})  # R_unit + min(1, 4.3 / m) * weighted sum
components = pd.DataFrame(rows)
display(Markdown(markdown(components, 3)))

# %% [markdown]
# What each component can do, when it counts, and how it is switched off; "at most" is weight times range:

# %%
table = pd.DataFrame(rewards.components(config))
table["at most"] = table["weight"] * (table["high"] - table["low"])
display(Markdown(markdown(table, 2)))

# %% [markdown]
# The line that adds them up, from the library:

# %%
display(Markdown(f"```python\n{inspect.getsource(rewards.compose)}```"))

# %% [markdown]
# ## Style never beats tests
#
# If good style could outweigh a test, the model would learn to write pretty programs that fail. So we try it: every combination
# of grades and of $R_{lt}$, for 1 to 20 tests, and compare each outcome with the next better one. The best-graded worse outcome
# must stay below the worst-graded better one.

# %%
grade_sets = [Scores(*g) for g in itertools.product((-1, 0, 1, 2), repeat=3)]


def band(status, rho, m):
    """Lowest and highest R of programs with this outcome, over all grades and with or without a known error."""
    choices = [Scores()] if status == "syntax_error" else grade_sets
    everything = [Feedback(status, rho, m, error_class="E", scores=s) for s in choices]
    totals = [rewards.compose(f, known, config).total for f in everything for known in ((), {"E"})]
    return min(totals), max(totals)


def outcomes(m):
    steps = [("fail", k / m) for k in range(m)]
    return [("syntax_error", 0.0), ("runtime_error", 0.0), *steps, ("pass", 1.0)]


gaps = {}
for m in range(1, 21):
    bands = [band(status, rho, m) for status, rho in outcomes(m)]
    gaps[m] = min(above[0] - below[1] for below, above in itertools.pairwise(bands))
print(f"smallest gap between two outcomes: {min(gaps.values()):.4f}, for m = {min(gaps, key=gaps.get)} tests")
assert min(gaps.values()) > 0

# %% [markdown]
# ## Advantages: compared with whom?
#
# $$a_i = R_i - \frac{1}{G-1}\sum_{j\ne i} R_j$$
# The $a_i$ of a group sum to zero: what is better than its companions is raised, the rest is lowered. A reward that is
# unknown is left out.

# %%
totals = [r.total for r in composed.values()]
advantages = rewards.leave_one_out(totals)  # a_i = R_i - mean of the others
scale = max(pstdev(advantages), config.std_floor)  # max(std(a), 0.25)
assert abs(sum(advantages)) < 1e-9
print({name: round(a, 3) for name, a in zip(programs, advantages, strict=True)}, f"normaliser {scale:.3f}")

# %% [markdown]
# ## Blame: which tokens?
#
# The mask $m_{it}$ marks the tokens of the error line (at most 30 % of a program), or all of them when the error concerns the
# whole program. A model's tokenizer would cut otherwise; here a token is a word or a sign.


# %%
def tokens_of(completion):
    return [match.span() for match in re.finditer(r"[ \t]*\w+|[ \t]*[^\w\s]|\n", completion)]


masks, spans = {}, {}
for name, code in programs.items():
    completion = f"{code}```"
    spans[name] = tokens_of(completion)
    masks[name] = error_token_mask(spans[name], completion, code.rstrip(), feedback[name], config.line_cap)
    marked = [completion[a:b].strip() for (a, b), m in zip(spans[name], masks[name], strict=True) if m]
    print(f"{name:10} {sum(masks[name]):2} of {len(masks[name])} tokens marked: {' '.join(marked)}")

# %% [markdown]
# ## The advantage of every token
#
# $$A_{it} = \frac{a_i - \rho_f\, m_{it}}{\max(\mathrm{std}(a), 0.25)}, \qquad A_{it} \leftarrow \min(A_{it}, 0) \text{ where
# the program failed and } m_{it} = 1$$
# The second rule: the line that broke is never praised, even when its program was the best of a bad group.

# %%
token_level = {}
for name, a in zip(programs, advantages, strict=True):
    failed = feedback[name].status != "pass"
    token_level[name] = rewards.token_advantages(a, masks[name], failed, config.rho_f, scale)  # (a - rho_f m) / scale
    values = sorted({round(value, 2) for value in token_level[name]})
    print(f"{name:10} a = {a:+.2f}   A on its tokens: {values}")

# %% [markdown]
# ## The landscape
#
# *Figure. Left: the reward of every outcome of a task with five tests; the dot is $R_{unit}$, the bar reaches from the worst to
# the best grades. The bars do not touch: tests decide, style only orders what they leave equal. Right: the advantage of each
# token of our four programs; a dip is the line term.*

# %%
names = ["does not parse", "raises", *(f"{k} of 5" for k in range(5)), "pass"]
rows = []
for name, (status, rho) in zip(names, outcomes(5), strict=True):
    low, high = band(status, rho, 5)
    unit = rewards.unit_reward(Feedback(status, rho, 5))
    rows.append({"panel": "landscape", "name": name, "x": len(rows), "value": unit, "low": low, "high": high})
for name, values in token_level.items():
    rows += [{"panel": "tokens", "name": name, "x": t, "value": value} for t, value in enumerate(values)]
frame = pd.DataFrame(rows)
with plt.rc_context(figures.STYLE):
    drawn, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.4))
part = frame[frame["panel"] == "landscape"]
left.vlines(part["x"], part["low"], part["high"], color=figures.COLOURS[4], linewidth=6, label="grades, known error")
left.scatter(part["x"], part["value"], color="black", marker="o", s=28, zorder=3, label="$R_{unit}$")
left.set(xticks=part["x"], ylabel="reward R", title="one bar per outcome of the tests")
left.set_xticklabels(part["name"], rotation=40, ha="right")
left.legend(frameon=False, loc="upper left")
for name, (colour, marker) in figures.look(list(programs)).items():
    own = frame[(frame["panel"] == "tokens") & (frame["name"] == name)]
    right.plot(own["x"], own["value"], color=colour, marker=marker, markersize=4, linewidth=1)
    right.annotate(name, (own["x"].max() + 0.7, own["value"].iloc[-1]), va="center", color=colour)
right.axhline(0, color="black", linewidth=0.8)
right.set(xlabel="token", ylabel="advantage $A_{it}$", title="our four programs, token by token", xlim=(-1, 38))
stage.save_figure(drawn, "figures/rewards", frame)

# %%
alt = "Left: reward of every test outcome with the range that grades can add, bars that do not overlap. "
spread = [value for values in token_level.values() for value in values]
alt += f"Right: token advantages of four programs, from {min(spread):.1f} to {max(spread):.1f}."
display(Image(filename=str(stage.path("figures/rewards.png")), metadata={"alt": alt}, width=900))

# %% [markdown]
# ## What we saw

# %%
best, worst = max(composed, key=lambda n: composed[n].total), min(composed, key=lambda n: composed[n].total)
widest = max(row["high"] - row["low"] for row in rows if row["panel"] == "landscape")
high, low = (f"{composed[name].total:.3f}" for name in (best, worst))
lines = [f"Of our four programs *{best}* has the highest reward, {high}, *{worst}* the lowest, {low}."]
lines += [
    f"Grades and known errors move a reward by at most {widest:.3f}; no outcome of the tests is ever overtaken (1 to 20 tests)."
]
lines += [f"{sum(map(sum, masks.values()))} of {sum(map(len, masks.values()))} tokens carry the line term."]
lines += [f"The advantages sum to {abs(sum(advantages)):.1f}; the normaliser is {scale:.2f}."]
display(Markdown("\n".join(f"* {line}" for line in lines)))

# %% [markdown]
# ## Exercises
#
# 1. Raise `w_style` to 0.4 (`overrides = {"reward.w_style": 0.4}`) and run again. What does falconlib say, why, and what would
#    a policy learn?
#
# <details><summary>Solution</summary>
#
# It refuses: the gap between outcomes would become negative ($2 (w_s + w_c + w_i) + w_{lt}$ must stay below 0.3, what a program
# that runs is worth more than one that raises). A failing program with good style would then score above a program that passes
# one test more: the policy learns to write well-formatted wrong answers, which is what a lint reward alone does. `overrides =
# {"reward.ai": False}` switches the judge off altogether.
#
# ```python
# from falconlib.config import load_profile
# from falconlib.errors import FalconError
#
# try:
#     load_profile("quick", {"reward.w_style": 0.4})
# except FalconError as refused:
#     print(refused.message)
# else:
#     raise AssertionError("it was not refused")
# assert 2 * (0.4 + 0.04 + 0.04) + 0.05 > 0.3 and not load_profile("quick", {"reward.ai": False}).reward.ai
# ```
#
# </details>
#
# 2. All four programs of a group are cut off. What are their advantages, and what does the line term still do?
#
# <details><summary>Solution</summary>
#
# All $R_i$ are equal, so all $a_i$ are 0. The scope is global, so $m_{it} = 1$ everywhere and $A_{it} = -0.3 / 0.25 = -1.2$
# (0.25 is the floor of the normaliser): all tokens are pushed down. Without the floor a group of equals would divide by zero.
#
# ```python
# assert rewards.leave_one_out([-1.0] * 4) == [0.0] * 4
# pushed = rewards.token_advantages(0.0, (1, 1), True, 0.3, 0.25)  # a, mask, failed, rho_f, floor of the normaliser
# assert all(math.isclose(value, -1.2) for value in pushed)
# ```
#
# </details>

# %%
stage.finish()
