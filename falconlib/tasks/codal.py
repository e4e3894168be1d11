"""CODAL-Bench (Weyssow et al., arXiv 2403.09032; MIT): 500 instructions, each with the preference an answer is judged by.

Columns `instruction` and `preference`, as JSON lines in codal/test.jsonl of a data folder. There are no unit tests.
"""

from __future__ import annotations

from falconlib.records import Task
from falconlib.tasks.files import field, find, read_rows

REMEDY = (
    "put the rows as JSON lines into data/codal/test.jsonl (or $FALCON_DATA/codal/test.jsonl), "
    "or fetch them: python -c \"from falconlib.tasks import download; download('codal')\""
)


def load() -> list[Task]:
    """One test task per row, without tests; family is the preference ("code-readability", "instruction-following", ...)."""
    tasks = []
    for number, row in read_rows(find("codal/test.jsonl", REMEDY)):
        where = f"test.jsonl line {number}"
        prompt, family = field(row, "instruction", str, where), field(row, "preference", str, where)
        tasks.append(Task(f"codal/{number}", "codal", "test", prompt, None, (), family=family))
    return tasks
