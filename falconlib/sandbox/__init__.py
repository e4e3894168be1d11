"""The sandbox: runs a program against tests that it never meets, and says what came of it.

`Sandbox` owns the processes, `program_for` makes a Program of a Task. How it works: pool (supervisor) -> zygote (fork
server) -> candidate and judge (one process each), behind the walls of `kernel`, which `layers` tries and grades.
`cache` remembers verdicts; `ray_pool.RaySandbox` is the same over the nodes of a Ray cluster.

Tier A has namespaces, Landlock, seccomp, no capabilities and limits; tier B does without namespaces (default containers,
Colab). There is no tier for macOS, and none that starts a container: run the whole of falconlib inside one
(`docker run --network none --cap-drop ALL --security-opt no-new-privileges ...`), which gives at least tier B in it.
A candidate sees the standard library and nothing else: no third-party package, no writable folder, no other process. So
`import numpy` ends as a runtime_error with ModuleNotFoundError, and a file opened for writing as one with OSError (only
/dev/null takes text); to admit a package would mean to grant its folder in `kernel.library`, and whatever else lies there.
Nor are there temporary files, semaphores (multiprocessing, its ThreadPool), higher limits, thread stacks larger than the memory
limit, or the text of the program's own source.
Where there is no mount namespace a candidate still learns names, sizes and dates of files (stat), never their content.
Asserts in loops, in branches and after a return have to run as often as with the gold program, which runs once for that, after
as many questions to the program, and so do not end early where an answer is short or `zip` stops; where right answers differ in
length, or the gold draws from the clock or the system, right programs fail there. Without a gold that passes (a warning is
logged) their number is unknown, tests_expected is None: there write `assert f(x) == [...]`. The gold also sets the limit of a
task that needs more than `cpu_s`: 3 times what it took, at most 5 times `cpu_s` (mbpp/123 is such a task). Asserts before the
program is asked for anything, and those that name nothing of it, are no tests. What a pass may rest on when a program returns
objects stands in `proxies`.
Tests that fail whatever the program is (a missing package, an error before the first call, a sleep, an exit) are an
infra_error named BrokenTests; those whose arguments do not travel (objects of the tests' own classes, named tuples, enums,
open files, patterns, slices) an IntegrityError. Not carried: coroutines, arguments and own classes of exceptions, an `except
AssertionError` around an assert, changes of an argument but by a bare `f(xs)` before the assert, names of the program that
the tests bind as well (where no entry point names it), `is` for a constant of the program, and values of other types than those
in `codec` (array, Path, memoryview, `...`, exceptions). Identity and sharing are not: `f(xs) is xs` is false, and `[[0] * n] * n`
arrives as n lists. A `with` on an object of the program does not tell it of an exception, and on a function's return value it
is an error. A test that computes for longer than the limit counts as a value that stalls the judge: a timeout.
On tier B without root, threads are bounded by memory alone, as their number is counted per user; where root lends uids,
sandboxes beside each other share theirs, and so their limit of threads.
Nothing is unforgeable: what is claimed is which layers were verified, and that no program of the corpora forges a pass.
"""

from falconlib.records import Program, Task
from falconlib.sandbox.pool import Sandbox


def program_for(task: Task, code: str) -> Program:
    """The Program that decides whether `code` solves `task`."""
    return Program(code, tuple(task.tests), task.entry_point, task.visible, task.setup, task.mode, task.gold)


__all__ = ["Sandbox", "program_for"]
