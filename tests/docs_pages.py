"""The Markdown pages of the repository, taken apart: code blocks, links, anchors.

markdown-it-py (which rich brings) is a CommonMark parser, so fences, comments and links are found
as GitHub finds them. Libraries that run blocks (pytest-examples, sybil) see only those of the
languages they know; an unknown one has to be an error here.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from markdown_it import MarkdownIt
from markdown_it.token import Token

__all__ = ["LANGUAGES", "PAGES", "ROOT", "RUN", "Block", "Link", "Page"]

ROOT = Path(__file__).parents[1]
RUN = ("python", "bash")
LANGUAGES = (*RUN, "text")  # text: formulas and what programs print
# Pages whose blocks are run. The others are reports of what was run once.
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

_PARSER = MarkdownIt("commonmark").enable("table")
_NAMES = re.compile(r"<!-- names: (.+?) -->")
_NOT_RUN = re.compile(r"<!-- not run: (.+?) -->")


class Block(NamedTuple):
    """A code block.

    Attributes:
        line: where its first line of code stands, from 1.
        language: of the fence; "" for indented code and fences without one.
        text: the code.
        reason: why it is not run; None where it is.
    """

    line: int
    language: str
    text: str
    reason: str | None


class Link(NamedTuple):
    """A link or picture: where it stands, and to what."""

    line: int
    target: str


@dataclass(frozen=True)
class Page:
    """A Markdown file."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.relative_to(ROOT).as_posix()

    def _tokens(self) -> list[Token]:
        return _PARSER.parse(self.path.read_text(encoding="utf-8"))

    def names(self) -> list[str]:
        """The names that the page's Python blocks are given."""
        found = _NAMES.findall(self.path.read_text(encoding="utf-8"))
        return [name for line in found for name in line.split()]

    def blocks(self) -> Iterator[Block]:
        reason = None
        for token in self._tokens():
            if token.type in ("fence", "code_block"):
                assert token.map is not None
                language = token.info.split()[0] if token.info.strip() else ""
                first = token.map[0] + (2 if token.type == "fence" else 1)
                yield Block(first, language, token.content, reason)
            if token.level == 0:  # a comment is about the block that follows it at once
                found = _NOT_RUN.search(token.content) if token.type == "html_block" else None
                reason = found[1] if found else None

    def links(self) -> Iterator[Link]:
        for token in self._tokens():
            line = token.map[0] + 1 if token.map else 0
            for inner in token.children or ():
                target = inner.attrGet("href" if inner.type == "link_open" else "src")
                if target is not None:
                    yield Link(line, str(target))

    def anchors(self) -> set[str]:
        """The headings' anchors, made as GitHub and the site make them."""
        found: Counter[str] = Counter()
        anchors = set()
        tokens = self._tokens()
        for heading, inline in pairwise(tokens):
            if heading.type == "heading_open":
                text = "".join(t.content for t in inline.children or ())
                slug = re.sub(r"[^\w\- ]", "", text.lower()).strip().replace(" ", "-")
                anchors.add(f"{slug}-{found[slug]}" if found[slug] else slug)
                found[slug] += 1
        return anchors
