"""The sandbox: runs a program against tests that it never meets, and says what came of it.

`Sandbox` owns the processes, `program_for` makes a Program of a Task. How it works: pool (supervisor) -> zygote (fork
server) -> candidate and judge (one process each), behind the walls of `kernel`.
"""

from falconlib.records import Program, Task
from falconlib.sandbox.pool import Sandbox


def program_for(task: Task, code: str) -> Program:
    """The Program that decides whether `code` solves `task`."""
    return Program(code, tuple(task.tests), task.entry_point, task.visible, task.setup, task.mode)


__all__ = ["Sandbox", "program_for"]
