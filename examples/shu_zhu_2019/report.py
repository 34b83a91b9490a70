"""The report: what the parts kept, in Markdown and HTML. It can be written at any time, and says
which parts have not been run."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jinja2
import markdown
import torch

import fastfi
from examples.shu_zhu_2019.config import NETWORKS, Config
from examples.shu_zhu_2019.section import Section, stored

__all__ = ["environment", "main_template", "write"]

HERE = Path(__file__).parent
NAMES = {"mnist": "MNIST", "cifar10": "CIFAR-10"}
NONE = "-"


def _number(value: float | None) -> str:
    """Three significant digits; powers of ten beyond a thousandth and a million."""
    if value is None:
        return NONE
    if value == 0 or 1e-3 <= abs(value) < 1e6:
        digits = 2 if value == 0 else max(0, 2 - math.floor(math.log10(abs(value))))
        text = f"{value:,.{digits}f}"
        return text.rstrip("0").rstrip(".") if "." in text else text
    return f"{value:.2e}"


def _percent(share: float | None, digits: int = 2) -> str:
    # Adding zero: no minus before a difference that rounds to nothing.
    return NONE if share is None else f"{round(100 * share, digits) + 0.0:.{digits}f} %"


def _count(value: int | None) -> str:
    return NONE if value is None else f"{value:,}"


def _interval(ends: Sequence[float] | None, form: Callable[[float], str] = _number) -> str:
    return NONE if ends is None else f"{form(ends[0])} to {form(ends[1])}"


def environment() -> jinja2.Environment:
    """Templates of this folder, with the filters n, pct, count, name and interval."""
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE / "templates"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # Markdown
    )
    made.filters |= {
        "n": _number,
        "pct": _percent,
        "count": _count,
        "interval": _interval,
        "name": lambda dataset: NAMES[dataset],
    }
    return made


def _part(
    made: jinja2.Environment, config: Config, section: Section, common: dict[str, Any]
) -> tuple[str, dict[str, float]]:
    """A part's text and its seconds by data set; a line where it has not been run."""
    parts, seconds = {}, {}
    for dataset in section.DATASETS:
        kept = stored(config.out, section, dataset)
        if kept is not None:
            parts[dataset], seconds[dataset] = kept[0].values, kept[1]["seconds"]

    def figure(dataset: str, name: str, caption: str) -> str:
        path = f"figures/{dataset}-{section.NAME}-{name}.png"
        if not (config.out / path).is_file():
            raise FileNotFoundError(f"{path}: expected a figure of {section.NAME}, found none")
        return f"![{caption}]({path})\n\n*{caption}*\n"

    if not parts:
        return "", seconds
    template = made.get_template(f"{section.NAME}.md.jinja")
    return template.render(parts=parts, seconds=seconds, figure=figure, **common), seconds


def _machine() -> str:
    """Where the report is written: processor, threads, versions."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.partition(":")[2].strip()
            for line in cpuinfo.read_text().splitlines()
            if line.startswith("model name")
        ]
        processor = names[0] if names else processor
    if torch.cuda.is_available():
        processor = f"{torch.cuda.get_device_name()}, {processor}"
    return (
        f"{processor}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"fastfi {fastfi.__version__}, Python {platform.python_version()}"
    )


def main_template(config: Config, sections: Sequence[Section]) -> str:
    """The whole report in Markdown."""
    made = environment()
    common = {
        "config": config,
        "settings": {k: v for k, v in asdict(config).items() if k not in ("data", "out")},
        "paper": json.loads((HERE / "paper.json").read_text()),
        "NETWORKS": NETWORKS,
    }
    texts, runs = [], []
    for section in sections:
        text, seconds = _part(made, config, section, common)
        texts.append(text)
        cells = [
            f"{seconds[d]:,.0f} s" if d in seconds else "not run" if d in section.DATASETS else NONE
            for d in NAMES
        ]
        runs.append((section.NAME, cells))
    return made.get_template("report.md.jinja").render(
        texts=[text for text in texts if text],
        runs=runs,
        datasets=list(NAMES),
        machine=_machine(),
        **common,
    )


def _replace(path: Path, text: str) -> None:
    hidden = path.with_name(f".{path.name}.tmp")
    hidden.write_text(text, encoding="utf-8")
    os.replace(hidden, path)


def write(config: Config, sections: Sequence[Section]) -> None:
    """Writes ``report.md`` and ``report.html`` of what is in the output folder."""
    text = main_template(config, sections)
    _replace(config.out / "report.md", text)
    body = markdown.markdown(text, extensions=["tables", "toc"], output_format="html")
    page = environment().get_template("page.html.jinja").render(body=body)
    _replace(config.out / "report.html", page)
