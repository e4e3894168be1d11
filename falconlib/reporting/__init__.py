"""Run folders with provenance, tables, figures, the report. Reads results only; trains and scores nothing.

`start` and `Stage` are what every notebook uses; tables, figures and report are imported by the notebooks that need
them, because they load pandas and matplotlib.
"""

from falconlib.reporting.run import Stage, results_root, start

__all__ = ["Stage", "results_root", "start"]
