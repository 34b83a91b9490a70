"""A page about scores: a Manhattan plot, percentiles, the most influential images.

The page is one HTML file that needs no network. plotly and jinja2 are imported when it is written;
they come with ``pip install "fastfi[report]"``.
"""

from fastfi.report._page import SUFFIXES
from fastfi.report._write import write_report

__all__ = ["SUFFIXES", "write_report"]
