"""Scores samples and says how sure we may be: verdicts and summaries (`score`), estimates and intervals (`stats`),
two tables side by side (`compare`). It never trains."""

from falconlib.evaluation.compare import compare_rows, in_short
from falconlib.evaluation.score import Sample, evaluation_card, load_samples, save_samples, score_samples, summarise

__all__ = ["Sample", "compare_rows", "evaluation_card", "in_short", "load_samples", "save_samples", "score_samples", "summarise"]
