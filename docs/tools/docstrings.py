"""The docstrings are written for readers of the source; this makes Markdown of them for the site.

Sphinx roles become links to what the site documents, and code otherwise. A "Raises:" that is a
sentence, not a list of exceptions, becomes a paragraph, since griffe would drop it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import griffe

_API = Path(__file__).parents[1] / "api"
# Functions named like their module are documented by their full path under a heading of their own.
_ENTRY = re.compile(r"^::: (\S+)\n(?:    options:\n      heading: (\S+)\n)?", re.MULTILINE)
_ROLE = re.compile(r":(?:func|class|meth|attr|mod|data|exc):`(~?)([^`]+)`")
_LITERAL = re.compile(r"``(.+?)``", re.DOTALL)
_RAISES = re.compile(r"^Raises:\n((?:(?: {4}.*)?\n?)+)", re.MULTILINE)
_EXCEPTION = re.compile(r"\s*([A-Z]\w*(?:Error|Exit|Interrupt))\s*:\s")


def documented() -> dict[str, str]:
    """Identifiers by the names under which docstrings mention them."""
    found: dict[str, str] = {}
    for page in sorted(_API.glob("*.md")):
        for identifier, heading in _ENTRY.findall(page.read_text(encoding="utf-8")):
            name = heading or identifier
            found[name] = identifier
            found.setdefault(name.removeprefix("fastfi."), identifier)
            found.setdefault(name.rpartition(".")[2], identifier)
    return found


_NAMES = documented()


def _link(match: re.Match[str]) -> str:
    short, name = match[1], match[2]
    text = name.rpartition(".")[2] if short else name
    identifier = _NAMES.get(name)
    if identifier is None and "." in name:  # a class's attribute or method: the class
        identifier = _NAMES.get(name.rpartition(".")[0])
    return f"[`{text}`][{identifier}]" if identifier else f"`{text}`"


def _raises(match: re.Match[str]) -> str:
    body = match[1]
    if _EXCEPTION.match(body):
        return match[0]
    text = " ".join(body.split())
    return f"**Raises:** {text}\n\n"


def markdown(text: str) -> str:
    """A docstring with Sphinx's markup replaced."""
    text = _ROLE.sub(_link, text)
    text = _LITERAL.sub(lambda m: f"`{' '.join(m[1].split())}`", text)
    text = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)
    return _RAISES.sub(_raises, text)


class Docstrings(griffe.Extension):
    """Rewrites every docstring before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is None:
            return
        text = markdown(obj.docstring.value)
        if isinstance(obj, griffe.Function) and obj.returns is not None:
            # Otherwise what stands before a colon would be taken for the type.
            text = re.sub(r"^Returns:\n {4}", f"Returns:\n    {obj.returns}: ", text, flags=re.M)
        obj.docstring.value = text
