"""The report: what the parts kept, in Markdown and HTML. It can be written at any time, and says
which parts have not been run."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import markdown

from examples.shu_zhu_2019.config import NETWORKS, Config, changed
from examples.shu_zhu_2019.files import replace_text
from examples.shu_zhu_2019.section import Section, settings, stored

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


class _Part(NamedTuple):
    """A part's text, and by data set its seconds and where they were taken."""

    text: str
    seconds: dict[str, float]
    machines: dict[str, str]


def _part(
    made: jinja2.Environment, config: Config, section: Section, common: dict[str, Any]
) -> _Part:
    parts, seconds, machines, others = {}, {}, {}, []
    for dataset in section.DATASETS:
        kept = stored(config.out, section, dataset)
        if kept is None:
            continue
        facts = kept[1]
        parts[dataset], seconds[dataset] = kept[0].values, facts["seconds"]
        machines[dataset] = facts["machine"]
        now = settings(config, section)
        differ = [
            f"{k} {facts['settings'].get(k)}" for k in now if facts["settings"].get(k) != now[k]
        ]
        if differ:
            others.append(f"{NAMES[dataset]} with {', '.join(differ)}")

    def figure(dataset: str, name: str, caption: str) -> str:
        path = f"figures/{dataset}-{section.NAME}-{name}.png"
        if not (config.out / path).is_file():
            return f"*{caption}: not drawn yet; the next run of this part draws it.*\n"
        return f"![{caption}]({path})\n\n*{caption}*\n"

    if not parts:
        return _Part("", {}, {})
    template = made.get_template(f"{section.NAME}.md.jinja")
    text = template.render(parts=parts, seconds=seconds, figure=figure, **common)
    if others:
        heading, rest = text.lstrip().split("\n", 1)
        note = f"**Computed with other settings than above:** {'; '.join(others)}."
        text = f"{heading}\n\n{note}\n{rest}"
    return _Part(text, seconds, machines)


def _command(config: Config) -> str:
    """The command of this run, without the paths."""
    words = ["python -m examples.shu_zhu_2019 --data DIR --out DIR"]
    words.append("--quick" if config.preset == "quick" else f"--preset {config.preset}")
    words.append(f"--datasets {' '.join(config.datasets)}")
    other = [f"{k}={str(v).lower()}" for k, v in changed(config).items()]
    return " ".join([*words, *(["--set", *other] if other else [])])


def main_template(config: Config, sections: Sequence[Section]) -> str:
    """The whole report in Markdown; ``notes.md`` in the output folder, which a reader of the report
    should know, goes below what was run."""
    made, notes = environment(), config.out / "notes.md"
    common = {
        "config": config,
        "settings": {k: v for k, v in asdict(config).items() if k not in ("data", "out")},
        "paper": json.loads((HERE / "paper.json").read_text()),
        "NETWORKS": NETWORKS,
    }
    texts, runs, machines = [], [], []
    for section in sections:
        text, seconds, where = _part(made, config, section, common)
        texts.append(text)
        machines += where.values()
        cells = [
            f"{seconds[d]:,.0f} s" if d in seconds else "not run" if d in section.DATASETS else NONE
            for d in NAMES
        ]
        runs.append((section.NAME, cells))
    return made.get_template("report.md.jinja").render(
        texts=[text for text in texts if text],
        runs=runs,
        datasets=list(NAMES),
        machines=list(dict.fromkeys(machines)),
        command=_command(config),
        notes=notes.read_text(encoding="utf-8") if notes.is_file() else "",
        **common,
    )


def write(config: Config, sections: Sequence[Section]) -> None:
    """Writes ``report.md`` and ``report.html`` of what is in the output folder."""
    text = main_template(config, sections)
    replace_text(config.out / "report.md", text)
    body = markdown.markdown(text, extensions=["tables", "toc"], output_format="html")
    page = environment().get_template("page.html.jinja").render(body=body)
    replace_text(config.out / "report.html", page)
