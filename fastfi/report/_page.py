"""The page as HTML: a template, a style sheet, a script and plotly's, in one file.

Ids, names of classes and texts of errors come from data sets and are not trusted: jinja2 escapes
them in HTML, ``<``, ``>``, ``&`` and quotes in JSON are written as ``\\u003c`` and the like, and
the page's security policy runs only the two scripts whose hashes it names. It forbids every
request.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from importlib.resources import files
from pathlib import Path
from typing import Any, BinaryIO

from fastfi._extras import require
from fastfi.errors import OptionError
from fastfi.report._gallery import Item
from fastfi.report._tables import Group
from fastfi.scoring.files import write_file

__all__ = ["SUFFIXES", "Page", "check_target", "write_page"]

SUFFIXES = (".html", ".htm")
SCRIPTS = ("report_rows.js", "report_marks.js", "report.js")  # one element of the page, in order
# unsafe-eval: WebGL's wrapper in plotly compiles its draw calls as functions. Styles are plotly's.
_POLICY = (
    "default-src 'none'; script-src {hashes} 'unsafe-eval'; style-src 'unsafe-inline'; "
    "img-src data: blob:; base-uri 'none'; form-action 'none'"
)


@dataclass(frozen=True)
class Page:
    """What the template shows; see report.html.jinja. ``data`` is what the script reads."""

    title: str
    sets: list[str]
    counts: list[list[tuple[str, str]]]
    errors: list[list[tuple[str, str]]]
    more_errors: list[int]
    about: list[list[tuple[str, str]]]
    heads: Sequence[str]
    tables: dict[str, list[Group]]
    by: str
    gallery: list[Item]
    gallery_of: str
    variants: dict[str, str]
    blocks: list[str]
    left_out: int
    profiled: bool
    flat: bool
    labelled: bool
    classes: list[tuple[int, str]]
    data: dict[str, Any]


def check_target(path: Path, overwrite: bool) -> None:
    """OptionError unless a page may be written to ``path``."""
    if path.suffix.lower() not in SUFFIXES:
        raise OptionError(f"{path}: expected a name ending in {' or '.join(SUFFIXES)}")
    if not path.parent.is_dir():
        raise OptionError(f"{path}: there is no folder {path.parent}")
    if path.is_dir():
        raise OptionError(f"{path}: is a folder")
    if path.exists() and not overwrite:
        raise OptionError(f"{path}: exists already, and is replaced only where that is asked for")


def _resource(name: str) -> str:
    return files("fastfi.report").joinpath(name).read_text(encoding="utf-8")


def _hash(script: str) -> str:
    digest = hashlib.sha256(script.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"


def _bundle() -> str:
    """plotly's script: see plotly/README.md."""
    script = _resource("plotly/plotly-gl2d.min.js").rstrip()  # as the browser hashes it
    assert "</script" not in script.lower()
    assert "<!--" not in script
    # Its whole is one function handed to another. In parentheses, engines compile it at once, and
    # do not read it twice.
    start = ": this, () => {\n"
    assert script.count(start) == 1
    assert script.endswith("return Plotly;\n}));")
    return script.replace(start, ": this, (() => {\n").removesuffix("}));") + "})));"


def render(page: Page) -> str:
    """The page's HTML."""
    jinja2 = require("jinja2", "writing reports", "report")
    utils = require("jinja2.utils", "writing reports", "report")
    markup = require("markupsafe", "writing reports", "report").Markup
    plotly = _bundle()
    script = "".join(map(_resource, SCRIPTS))
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(_resource("report.html.jinja"))

    def dumps(value: Any, **how: Any) -> str:
        return json.dumps(value, allow_nan=False, separators=(",", ":"))

    values = {field.name: getattr(page, field.name) for field in fields(page)}
    html: str = template.render(
        **{**values, "data": utils.htmlsafe_json_dumps(page.data, dumps=dumps)},
        policy=_POLICY.format(hashes=f"{_hash(plotly)} {_hash(script)}"),
        plotly=markup(plotly),
        script=markup(script),
        style=markup(_resource("report.css")),
    )
    return html


def write_page(page: Page, path: Path) -> None:
    """Writes the page; it appears complete or not at all.

    Raises:
        WriteError: the disk is full, no permission, ...
    """
    # Half a character pair of UTF-16, which JSON can hold, has no place in UTF-8.
    content = render(page).encode("utf-8", "replace")

    def write(file: BinaryIO) -> None:
        file.write(content)

    write_file(path, write)
