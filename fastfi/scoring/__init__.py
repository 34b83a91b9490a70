"""Data sets scored into directories of Parquet files, and scores read from them."""

from __future__ import annotations

from fastfi.scoring.comparison import Comparison, compare
from fastfi.scoring.result import PERCENTILES, Scores, Summary, open_scores

__all__ = ["PERCENTILES", "Comparison", "Scores", "Summary", "compare", "open_scores"]
