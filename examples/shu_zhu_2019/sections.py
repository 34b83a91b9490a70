"""The parts, in the order of the report."""

from __future__ import annotations

from examples.shu_zhu_2019 import (
    accuracies,
    lumping,
    outliers,
    reweighted,
    rule,
    setup1,
    setup2,
    setup3,
    setup4,
)
from examples.shu_zhu_2019.section import Section

__all__ = ["SECTIONS"]

SECTIONS: tuple[Section, ...] = (
    accuracies,
    setup1,
    outliers,
    setup2,
    setup3,
    setup4,
    rule,
    lumping,
    reweighted,
)
