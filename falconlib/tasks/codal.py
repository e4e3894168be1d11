"""CODAL-Bench (Weyssow et al., arXiv 2403.09032; MIT): 500 instructions, each with the preference an answer is judged by.

Columns `instruction` and `preference`, in codal/test.jsonl (or .parquet) of a data folder. There are no unit tests.
"""

from __future__ import annotations

from falconlib.records import Task
from falconlib.tasks.files import field

REMEDY = (
    "put the rows as JSON lines into data/codal/test.jsonl (or $FALCON_DATA/codal/test.jsonl), "
    "or fetch them: python -c \"from falconlib.tasks import download; download('codal')\""
)


def from_row(row: dict, number: int, where: str) -> Task:
    """One test task, without tests; family is the preference ("code-readability", "instruction-following", ...)."""
    prompt, family = field(row, "instruction", str, where), field(row, "preference", str, where)
    return Task(f"codal/{number}", "codal", "test", prompt, None, (), family=family)
