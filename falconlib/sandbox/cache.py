"""A file of verdicts: a program that was judged once is not run again under the same conditions.

Kept is what would come out the same again: no infra_error, no unexplained kill, and no timeout, which depends on the machine
and what else it does. A program that reads the clock or true random numbers keeps its first verdict, with its costs.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import platform
import sqlite3
import sys
from collections.abc import Iterable
from pathlib import Path

from falconlib import records
from falconlib.config import SandboxConfig
from falconlib.errors import FalconError
from falconlib.records import INFRA_ERROR, Program, Report, from_json, to_dict

_TABLE = "CREATE TABLE IF NOT EXISTS verdicts (key TEXT PRIMARY KEY, report TEXT NOT NULL) WITHOUT ROWID"


def repeats(report: Report) -> bool:
    """Whether another run would end alike; a SIGKILL may have come from somebody else on the machine."""
    killed = report.error is not None and report.error.type == "SIGKILL"
    return report.status not in (INFRA_ERROR, "timeout") and not killed


class VerdictCache:
    """Verdicts in the SQLite file `path`; each call opens it anew, so processes and threads may share it.

    The key of a program is the SHA-256 of itself with its tests, the limits, and the image: layers, Python, machine, and the
    sources of the sandbox. Raises FalconError when the file cannot be used.
    """

    def __init__(self, path: str | Path, limits: SandboxConfig, layers_id: str):
        self.path = Path(path)
        sources = hashlib.sha256()
        for source in (Path(records.__file__), *sorted(Path(__file__).parent.glob("*.py"))):
            sources.update(source.read_bytes())
        bounds = [limits.cpu_s, limits.memory_mb, limits.output_kb, limits.min_integrity]
        self.conditions = [*bounds, layers_id, sys.version, platform.machine(), sources.hexdigest()]
        self.find(())

    def key(self, program: Program) -> str:
        return hashlib.sha256(json.dumps([to_dict(program), *self.conditions], sort_keys=True).encode()).hexdigest()

    @contextlib.contextmanager
    def opened(self):
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.closing(sqlite3.connect(self.path, timeout=60)) as db, db:
                db.execute(_TABLE)
                yield db
        except (OSError, sqlite3.Error) as error:
            remedy = "delete the file, it is filled again; or set sandbox.cache to another path"
            raise FalconError(f"{self.path} is no cache of verdicts: {error}", remedy) from error

    def find(self, programs: Iterable[Program]) -> dict[Program, Report]:
        """The known ones of `programs` with their Reports."""
        with self.opened() as db:
            rows = ((p, db.execute("SELECT report FROM verdicts WHERE key = ?", (self.key(p),)).fetchone()) for p in programs)
            return {p: from_json(Report, row[0]) for p, row in rows if row}

    def keep(self, found: dict[Program, Report]) -> None:
        """Stores those verdicts that another run would repeat."""
        rows = [(self.key(p), json.dumps(to_dict(r))) for p, r in found.items() if repeats(r)]
        with self.opened() as db:
            db.executemany("INSERT OR REPLACE INTO verdicts VALUES (?, ?)", rows)
