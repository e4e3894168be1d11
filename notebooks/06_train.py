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
# # 06 · Train one arm, then sample its evaluation
#
# [![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/falcon/blob/main/notebooks/06_train.ipynb)
# [All symbols](https://github.com/OWNER/falcon/blob/main/notebooks/glossary.md)
#
# **Question.** What does one arm of the comparison learn from its own programs, step by step, and which programs does it write
# afterwards on problems that it never trained on?
#
# **Reads** the task sets of the profile and, for reinforcement learning, `train/sft-s<seed>/adapter` (the SFT run of the same
# seed). **Writes** `train/<arm>-s<seed>/`: `metrics.jsonl`, `timings.jsonl`, `budget.json`, `curves.*`, checkpoints, `adapter/`,
# `memory.sqlite` (arms with a long-term memory), `samples.jsonl.gz`, `samples-ltm.jsonl.gz`, `card.json`.
#
# **Run time** per arm, profile `quick`: half a minute to two minutes on 2 CPU cores. Profile `small`: about half an hour on one
# GPU. A run that was killed goes on from its last checkpoint.
#
# This notebook is a grid: `falconlib run` executes it once per arm and seed, each time with other values in the parameters
# cell. To try one by hand: `papermill notebooks/06_train.ipynb out.ipynb -p arm grpo`.

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
import os
from collections import Counter

import matplotlib.pyplot as plt
import pandas as pd
from IPython.display import HTML, Image, Markdown, display

from falconlib import rewards
from falconlib.evaluation.evaluate import benchmark_tasks, evaluate
from falconlib.evaluation.score import evaluation_card, save_samples, summarise
from falconlib.evaluation.submissions import card_text
from falconlib.files import JsonLines, read_json, write_json
from falconlib.judge import StaticJudge
from falconlib.memory.long_term import LongTermMemory
from falconlib.records import Episode, from_dict
from falconlib.reporting import figures, start
from falconlib.reporting.overview import where_we_are
from falconlib.reporting.programs import biographies, side_by_side
from falconlib.sandbox import Sandbox
from falconlib.tasks import fingerprints, load_tasks
from falconlib.training import run_arm
from falconlib.training.arms import SETTINGS, configure

# %% tags=["parameters"]
profile: str = "quick"  # a file of notebooks/profiles: smoke, quick, colab, small-cpu, small, paper, paper-apps
results: str = ""  # results folder; "" is $FALCON_RESULTS, or results/ of the repository
overrides: dict = {}  # settings that differ from the profile's, by dotted name
arm: str = "falcon"  # base, sft, rft, coderl, ppocoder, rltf, grpo, rloo, grpo+sl, grpo+knn, falcon, falcon-ltm, ..., grpo-time
seed: int = 0  # run seed: of the adapters, the curriculum and every random stream

# %%
parameters = {"profile": profile, "results": results, "overrides": overrides, "arm": arm, "seed": seed}
stage = start("06_train", parameters)
config = configure(stage.profile, arm, seed)
batch = bool(os.environ.get("FALCON_BATCH"))  # set by `falconlib run`: no progress bars in a log
print(f"arm {arm!r}, seed {seed}, profile {profile!r}, writes to {stage.key}/")
where_we_are("06")

# %% [markdown]
# *Figure: the method; filled, what this notebook is about. Thin arrows: the way of a program; dashed: the inner loop of one
# task; thick: the outer loop over all tasks; dotted: long-term memory. Small numbers: the notebooks that treat a part.*
#
# ## By hand first: what an advantage is
#
# A policy cannot learn from a reward alone, only from a comparison. Three programs for the same task got the rewards 1, 0 and
# -1. Each is compared with the mean of the *others*:
#
# $$a_i = R_i - \frac{1}{G-1}\sum_{j \ne i} R_j$$
#
# The first: $1 - \tfrac{0 + (-1)}{2} = 1.5$. The second is exactly as good as the mean of the others: 0. The third: -1.5. They
# sum to zero: what one program gains, the others lose.

# %%
worked = rewards.leave_one_out([1.0, 0.0, -1.0])  # a_i = R_i - mean of the others
assert worked == [1.5, 0.0, -1.5] and sum(worked) == 0
print("advantages of the rewards 1, 0, -1:", worked)
print("when all programs are alike nothing is learnt:", rewards.leave_one_out([-1.0, -1.0, -1.0]))

# %% [markdown]
# ## What this arm is
#
# All arms share one loop, one sampler, one sandbox, one count of what they spend. An arm is only what it sets differently from
# FALCON: mostly a weight of 0 or a switch that is off; its file in `falconlib/training/arms/` has the equation of its paper.
# The table shows every such setting, FALCON's value beside this arm's.

# %%
what, changed = SETTINGS[arm]
print(f"{arm}: {what}")
full = configure(stage.profile, "falcon", seed)
rows = []
for dotted in changed or {}:
    group, _, name = dotted.rpartition(".")
    pair = [getattr(getattr(p, group), name) for p in (full, config)]
    rows.append({"setting": dotted, "falcon": pair[0], arm if arm != "falcon" else "this arm": pair[1]})
if changed is None:
    print("No reinforcement learning: the settings of the loop do not concern it.")
elif not rows:
    print("This is the full method: nothing is switched off.")
else:
    display(pd.DataFrame(rows).style.hide(axis="index"))

# %% [markdown]
# ## Training
#
# For the arms with reinforcement learning one step is (METHOD's loop, in words):
#
# 1. draw tasks with probability $\propto p(1-p) + 0.05$: those that are sometimes solved teach most;
# 2. **support** rollouts with $\theta$, half of them with a recalled program in the prompt; run the tests, judge, reward;
# 3. **inner step** (local level): $\delta_x = -\alpha\, g_x / \lVert g_x \rVert$ on the task's short-term memory;
# 4. **query** rollouts with $\theta + \delta_x$;
# 5. **outer step** (global level), with the deltas held fixed:
#    $\tfrac{K_s}{G} L_{pg}(S;\theta) + \tfrac{K_q}{G} L_{pg}(Q;\theta + \delta_x) + b_{sl}\,CE + b_{neg} L_{negative}$
#    ($CE$ is $L_{sl}$);
# 6. remember.
#
# Arms without an inner loop ($J = 0$) skip 3 and 4 and sample all $G$ rollouts with $\theta$.
#
# In a live notebook the curves grow below while it trains; a batch run (`falconlib run`) stays quiet.

# %%
seen: list[dict] = []
chart = None if batch else display(display_id=True)


def redraw(row: dict) -> None:
    """Draws the steps so far into the same place."""
    seen.append({**row, "arm": arm, "seed": seed})
    if chart is not None:
        figure = figures.learning_curves(pd.DataFrame(seen), ["reward_unit", "pass_rate", "length"])
        chart.update(figure, metadata={"image/png": {"alt": f"Curves of arm {arm} up to step {row['step']}"}})
        plt.close(figure)


warm = stage.find(f"train/sft-s{seed}/adapter") if changed is not None else None
policy = run_arm(stage.profile, arm, seed, stage.folder, sft_adapter=warm, progress=not batch, watch=redraw)
budget = read_json(stage.folder / "budget.json")
stage.note(model=f"{policy.name} ({policy.fingerprint})", **budget)
print(f"{policy.name} on {policy.device}: " + ", ".join(f"{value} {name}" for name, value in budget.items()))

# %% [markdown]
# ## The curves of this run
#
# *Figure: one point per step. For reinforcement learning: the mean test reward $R_{unit}$ of the step's rollouts, the share
# that passed, the mean length in tokens. For SFT: the cross-entropy. A few steps of a few rollouts each are noisy; never read a
# trend from training reward alone, the graded reward first buys programs that run, not programs that are right.*

# %%
history = pd.DataFrame([{**row, "arm": arm, "seed": seed} for row in JsonLines(stage.folder / "metrics.jsonl").rows()])
titles = {"reward_unit": "test reward", "pass_rate": "share passed", "length": "tokens per program", "loss": "cross-entropy"}
known = [name for name in titles if name in history and history[name].notna().any()]
if known:
    figure = figures.learning_curves(history, known, titles=[titles[name] for name in known])
    stage.save_figure(figure, f"{stage.key}/curves", history[["arm", "seed", "step", *known]])
    shown = " and ".join(titles[name] for name in known)
    display(
        Image(
            filename=str(stage.path(f"{stage.key}/curves.png")),
            metadata={"alt": f"{shown} of arm {arm} over its steps"},
            width=340 * len(known),
        )
    )
else:
    print(f"{arm} trains nothing: there are no curves.")

# %% [markdown]
# ## Do the two memories help while training?
#
# * **inner_gain** = mean $R_{unit}$ of query rollouts ($\theta + \delta_x$) - mean $R_{unit}$ of plain support rollouts
#   ($\theta$): what one inner step buys on the same tasks.
# * **memory_effect** = mean $R_{unit}$ with the recalled text - without it, same tasks: it also moves the utility of the
#   recalled neighbours.
#
# An empty cell means *unknown* (the arm has no such part, or there was nothing to compare), not zero.

# %%
columns = ["step", "inner_gain", "inner_norm", "memory_effect", "memory_prompts", "zero_variance", "entropy", "grad_norm"]
columns += ["loss_critic", "kl"]  # of the arms that have a critic: CodeRL and PPOCoder
parts = history[[name for name in columns if name in history]] if len(history) else history
display(parts.tail(12).style.hide(axis="index").format(precision=3, na_rep=""))

# %% [markdown]
# ## How the programs of each step ended
#
# Exception classes, `pass`, `fail` (ran, wrong answer), `timeout`. On the way up a model usually trades syntax errors for
# run-time errors, and those for plain wrong answers.

# %%
errors = pd.DataFrame(history["errors"].tolist(), index=history["step"]) if "errors" in history else pd.DataFrame()
errors = errors[errors.sum().sort_values(ascending=False).index[:10]].fillna(0).astype(int)  # the ten most frequent
display(errors.tail(12) if len(errors) else Markdown(f"*{arm} ran no programs while training.*"))
timings = pd.DataFrame(JsonLines(stage.folder / "timings.jsonl").rows())
if len(timings):
    spent = timings.drop(columns="step").sum()
    print("seconds:", ", ".join(f"{name} {value:.1f}" for name, value in spent.items()))

# %% [markdown]
# ## The biography of one task
#
# What the two memories know of the task whose programs fared most differently: what was given, what was written at each step
# under which prompt, how it ended, and what long-term memory kept of it. `gold x 2`: the given program, which the policy wrote
# once as well; `own x 1`: the policy's, seen once; empty: dropped. Of the query half only what was kept is known. Then: whose
# prompts showed a program of this task, and which training tasks would recall it today.

# %%
states, lives = sorted(stage.folder.glob("checkpoints/step-*/state.json")), {}
if (stage.folder / "memory.sqlite").is_file() and states:
    rings = (read_json(states[-1])["short_term"] or {"tasks": []})["tasks"]
    short = [from_dict(Episode, episode) for _, ring in rings for episode in ring]
    learnt = {t.task_id: t for name in config.tasks.train for t in load_tasks(name, "train")}
    with LongTermMemory(stage.folder / "memory.sqlite", read_only=True) as store:
        lives = biographies(store, short, config.inner.support if config.inner.steps else config.train.group)
        asking = [learnt[name] for name in sorted({name for name, *_ in store.positives(list(learnt))})]
        recalls = store.recall(asking, config.long_term.neighbours)
if lives:
    hero = max(lives, key=lambda name: lives[name]["R"].max() - lives[name]["R"].min())
    today = [t.task_id for t, r in zip(asking, recalls, strict=True) if hero in [n.task_id for n in r.neighbours]]
    shown_to = sorted({f"{e.task_id} in step {e.step}" for e in short if hero in e.neighbours})
    display(Markdown(f"**{hero}**: {learnt[hero].prompt}"))
    display(lives[hero].drop(columns="code").style.hide(axis="index").format(precision=2, na_rep=""))
    print("its programs were shown to:", ", ".join(shown_to) or "nobody that short-term memory still holds")
    print(f"today {len(today)} of the {len(asking)} tasks in memory would recall it:", ", ".join(today[:5]) or "none")
else:
    print(f"{arm} keeps none of its programs in a long-term memory: nobody wrote a biography.")

# %%
if lives:
    life = lives[hero].sort_values("R", na_position="first")
    chosen = [life.iloc[k] for k in sorted({0, 1, len(life) - 1} & set(range(len(life))))]
    heads = [f"{row['half']}: {row['verdict']}, R = {row['R']:.2f}".removesuffix(", R = nan") for row in chosen]
    columns = list(zip(heads, [row["code"] for row in chosen], strict=True))
    display(HTML(side_by_side("The given program, the policy's worst and its best:", columns)))

# %% [markdown]
# ## Evaluation on problems that were never trained on
#
# **zero-shot**: $\theta$ and the plain prompt. **+LTM**: the same, with what the training memory recalls in the prompt; the
# memory is opened read-only, and its content hash before and after must be the same. Whatever is sampled is saved with its
# verdict, so that anybody can score it again.

# %%
judge, memory, samples = StaticJudge(), stage.folder / "memory.sqlite", {}
files = {"zero-shot": "samples.jsonl.gz"}
if arm in config.eval.ltm_arms and memory.is_file():
    files["+LTM"] = "samples-ltm.jsonl.gz"
    with LongTermMemory(memory, read_only=True) as store:
        before = store.content_hash()
with Sandbox(config.sandbox) as sandbox:
    layers = dict(sandbox.layers)
    for mode, name in files.items():
        recalled = memory if mode == "+LTM" else None
        samples[mode] = evaluate(policy, config, seed, sandbox, judge, mode=mode, memory=recalled, progress=not batch)
        save_samples(stage.folder / name, samples[mode])
if "+LTM" in files:
    with LongTermMemory(memory, read_only=True) as store:
        assert store.content_hash() == before, "the evaluation changed the memory"
    print("the memory is the same before and after:", before[:16])

# %% [markdown]
# The evaluation card says what somebody needs to repeat the table below it: problems and their fingerprints, decoding, limits,
# sandbox layers, judge, memory.

# %%
tasks = {name: benchmark_tasks(config, name) for name in config.tasks.benchmarks}
cards = {
    mode: evaluation_card(
        [task for own in tasks.values() for task in own],
        config.eval,
        config.sandbox,
        model=policy.name if arm == "base" else f"{policy.name} with {stage.key}/adapter",
        mode=mode,
        seeds=[seed],
        layers=layers,
        judge=judge,
        memory=before if mode == "+LTM" else None,
    )
    for mode in files
}
write_json(stage.folder / "card.json", cards)
stage.note(data=fingerprints(config.tasks), sandbox=layers)
print(card_text(cards["zero-shot"]))

# %%
summary = pd.DataFrame(
    [{"mode": mode, **row} for mode, found in samples.items() for row in summarise([found], draws=config.eval.bootstrap)]
)
columns = ["mode", "benchmark", "metric", "value", "ci_low", "ci_high", "n", "timeouts", "unknown"]
display(summary[columns].style.hide(axis="index").format(precision=3))

# %% [markdown]
# ## A few of its programs
#
# The first one of each outcome, as the model wrote it.

# %%
firsts = {}
for sample in samples["zero-shot"]:
    firsts.setdefault(sample.status, sample)
for status, sample in list(firsts.items())[:4]:
    verdict = f"**{sample.task_id}**: {status}" + (f" ({sample.error_class})" if sample.error_class not in ("", status) else "")
    display(Markdown(f"{verdict}\n\n````python\n{sample.code[:1000].strip()}\n````"))

# %% [markdown]
# ## What we saw

# %%
lines = []
for row in summary.to_dict("records"):
    span = f"{row['value']:.2f} [{row['ci_low']:.2f}, {row['ci_high']:.2f}]"
    lines.append(f"{row['benchmark']}, {row['mode']}, {row['metric']}: {span} of {row['n']} problems")
outcomes = Counter(sample.status for sample in samples["zero-shot"])
lines.append("zero-shot outcomes: " + ", ".join(f"{count} {status}" for status, count in outcomes.most_common()))
if "reward_unit" in history and len(history) > 1:
    first, last = history["reward_unit"].iloc[0], history["reward_unit"].iloc[-1]
    lines.append(f"training reward {first:+.2f} at the first step, {last:+.2f} at the last, of {len(history)} steps")
if "alarms" in history:
    raised = Counter(name for row in history["alarms"].dropna() for name, on in row.items() if on)
    told = ", ".join(f"{name} in {count} steps" for name, count in sorted(raised.items())) or "none"
    forged = ", ".join(f"{n} {verdict}" for verdict, n in history["sentinel"].value_counts().items()) or "none run"
    lines.append(f"reward hacking alarms: {told}; verdicts on forged programs: {forged}")
if "judge_asked" in history:
    asked, silent = history["judge_asked"].sum(), history["judge_unanswered"].sum()
    lines.append(f"model judge: {asked:.0f} questions, {history['judge_repaired'].sum():.0f} repaired, {silent:.0f} unanswered")
if "share_unit" in history:
    means = ", ".join(
        f"{part} {history[f'share_{part}'].astype(float).mean():.0%}" for part in ("unit", "judge", "long_term", "line")
    )
    lines.append(f"shares of the gradient, mean over the steps: {means}")
for name, text in (("inner_gain", "the inner step"), ("memory_effect", "recalled text")):
    values = history[name].dropna().astype(float) if name in history else []
    if len(values):
        lines.append(f"{text} changed the reward by {values.mean():+.3f} on average over {len(values)} steps")
display(Markdown("\n".join(f"* {line}" for line in lines)))

# %% [markdown]
# ## Exercises
#
# 1. Three programs of a group all fail with the same reward. What does the outer step learn from them, and which column of
#    the table above counts such groups?
#
# <details><summary>Solution</summary>
#
# Every $a_i$ is 0, so their policy gradient is 0 (only $L_{sl}$ and $L_{negative}$ act). `zero_variance` is the share of such
# groups. The graded reward ($-0.3 + 1.3\rho$ for a share $\rho$ of passed tests) makes them rarer than a 0/1 reward would.
#
# ```python
# assert all(abs(a) < 1e-12 for a in rewards.leave_one_out([-0.6, -0.6, -0.6]))
# ```
#
# </details>
#
# 2. Run the arm `falcon-inner` with the same seed. Which columns become empty, and do the support rollouts of step 1 differ?
#
# <details><summary>Solution</summary>
#
# `inner_gain` and `inner_norm` are unknown without an inner loop. The random stream of a rollout is a hash of (seed, step,
# task, rollout), so rollouts of step 1 that both arms sample under the same prompt are the same programs: switching one part
# off cannot shift another part's randomness.
#
# ```python
# from falconlib.reporting.run import REPO
#
# log = JsonLines(REPO / "results/reference/quick/ablations/train/falcon-inner-s0/metrics.jsonl")
# assert {(row["inner_gain"], row["inner_norm"]) for row in log.rows()} == {(None, None)}
# ```
#
# </details>

# %%
wanted = ("metrics.jsonl", "budget.json", "card.json", "memory.sqlite", "adapter", *files.values())
stage.finish([f"{stage.key}/{name}" for name in wanted if (stage.folder / name).exists()])
