"""One rule for each operation that reads parameters: what to keep for their gradients.

A rule runs the operation, and returns its output, or NotImplemented where it does not apply; it is
found by the function's name. Operations without a rule are left to the taps on whole modules.
"""

from fastfi.layers.rules import broadcast, linear, norms, tables
from fastfi.layers.rules._table import AFFINE, RULES

__all__ = ["AFFINE", "RULES", "broadcast", "linear", "norms", "tables"]
