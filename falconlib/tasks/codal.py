"""CODAL-Bench (Weyssow et al., arXiv 2403.09032; MIT): 500 instructions, each with the preference an answer is judged by.

Columns `instruction` and `preference`, in codal/test.jsonl (or .parquet) of a data folder. There are no unit tests.
"""

from __future__ import annotations

from falconlib.records import Task
from falconlib.tasks.files import SUFFIXES, field, find, read_rows

REMEDY = (
    "put the rows as JSON lines into data/codal/test.jsonl (or $FALCON_DATA/codal/test.jsonl), "
    "or fetch them: python -c \"from falconlib.tasks import download; download('codal')\""
)


def load() -> list[Task]:
    """One test task per row, without tests; family is the preference ("code-readability", "instruction-following", ...)."""
    tasks = []
    path = find("codal/test", REMEDY, SUFFIXES)
    for number, row in read_rows(path):
        where = f"{path.name} line {number}"
        prompt, family = field(row, "instruction", str, where), field(row, "preference", str, where)
        tasks.append(Task(f"codal/{number}", "codal", "test", prompt, None, (), family=family))
    return tasks
