"""Colours of the plots, light and dark.

Seven colours in turn, as in the other pictures, Okabe and Ito's without yellow; on a dark ground
they are lighter. The page's own colours are in report.css.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["THEMES", "Theme"]


@dataclass(frozen=True)
class Theme:
    """Colours of one theme.

    Attributes:
        ink, muted: text, and lines that stand back; at least 4.5:1 against the ground.
        grid, panel: lines of the grid, and the ground of labels.
        palette: of the classes, in turn.
        parts: of the two sets of scores.
    """

    ink: str
    muted: str
    grid: str
    panel: str
    palette: tuple[str, ...]
    parts: tuple[str, str]

    def layout(self) -> dict[str, Any]:
        """The keys of a plot's layout that depend on the theme, as plotly's relayout takes them."""
        axes = ["xaxis", "yaxis"]
        keys: dict[str, Any] = {
            "font.color": self.ink,
            "hoverlabel.bgcolor": self.panel,
            "hoverlabel.bordercolor": self.muted,
            "hoverlabel.font.color": self.ink,
            "modebar.bgcolor": "rgba(0,0,0,0)",
            "modebar.color": self.muted,
            "modebar.activecolor": self.ink,
        }
        for axis in axes:
            keys[f"{axis}.gridcolor"] = self.grid
            keys[f"{axis}.linecolor"] = self.muted
            keys[f"{axis}.tickfont.color"] = self.ink
            keys[f"{axis}.title.font.color"] = self.ink
        return keys


THEMES = {
    "light": Theme(
        ink="#1b1f24",
        muted="#57606a",
        grid="#e6e8eb",
        panel="#ffffff",
        palette=("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#555555"),
        parts=("#0072B2", "#D55E00"),
    ),
    "dark": Theme(
        ink="#e8eaed",
        muted="#a8b0b9",
        grid="#32383f",
        panel="#1d2126",
        palette=("#3D9BE0", "#E69F00", "#1FB88C", "#CC79A7", "#8FD0F5", "#F0783A", "#B4B4B4"),
        parts=("#56B4E9", "#F0883E"),
    ),
}
