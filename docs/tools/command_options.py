"""Tables of the commands' options, from the command line itself."""

from __future__ import annotations

from typing import Any

import typer

from fastfi.cli._app import app

__all__ = ["commands", "option_table"]


def commands() -> dict[str, Any]:
    """The commands by name, and those of groups as "group command"."""
    found: dict[str, Any] = {}

    def add(group: Any, prefix: str) -> None:
        for name, command in group.commands.items():
            if command.hidden:
                continue
            if hasattr(command, "commands"):
                add(command, f"{prefix}{name} ")
            else:
                found[prefix + name] = command

    add(typer.main.get_command(app), "")
    return found


def _cell(text: str) -> str:
    for plain, escaped in (("|", "\\|"), ("<", "&lt;"), ("*", "\\*"), ("\n", " ")):
        text = text.replace(plain, escaped)
    return text


def _paragraphs(text: str) -> str:
    return "\n\n".join(" ".join(p.split()) for p in text.split("\n\n")).replace("<", "&lt;")


def option_table(command: Any) -> str:
    """What ``--help`` says of a command, in Markdown."""
    context = command.make_context(command.name, [], resilient_parsing=True)
    lines = [_paragraphs(command.help or ""), "", "| option | what it does |", "|:--|:--|"]
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if record is not None and "--help" not in parameter.opts:
            names, text = record
            # <code>: a table's backquotes take backslashes before bars as they are on some sites
            lines.append(f"| <code>{_cell(names)}</code> | {_cell(text)} |")
    return "\n".join(lines) + "\n"
