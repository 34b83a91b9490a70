"""Reproduces Shu and Zhu, "Sensitivity Analysis of Deep Neural Networks" (AAAI 2019), and a little
more: trains two networks on MNIST and CIFAR-10, computes every table and figure, writes a report.

What was finished stays in the output folder: the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from examples.shu_zhu_2019 import report
from examples.shu_zhu_2019.config import DATASETS, PRESETS, Config, configure
from examples.shu_zhu_2019.context import Context
from examples.shu_zhu_2019.data import find
from examples.shu_zhu_2019.files import replace_text
from examples.shu_zhu_2019.section import COMMON, run
from examples.shu_zhu_2019.sections import SECTIONS

__all__ = ["main"]


def _config(parser: argparse.ArgumentParser, options: argparse.Namespace) -> Config:
    preset = options.preset or ("gpu" if torch.cuda.is_available() else "cpu")
    try:
        config = configure(preset, options.data, options.out, options.datasets, options.set)
    except ValueError as error:
        parser.error(f"--set: {error}")
    if config.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("this preset needs a CUDA device; add --set device=cpu, or take --preset cpu")
    for dataset in config.datasets:
        try:
            find(config.data, dataset)
        except FileNotFoundError as error:
            parser.error(f"--data: {error}")
    return config


def _same_networks(config: Config) -> None:
    """Notes what the networks and scores in the output folder depend on; SystemExit where it holds
    those of other settings, before anything is computed or mixed."""
    path = config.out / "settings.json"
    now = {name: getattr(config, name) for name in COMMON}
    if not path.exists():
        replace_text(path, json.dumps(now, indent=1) + "\n")
        return
    kept = json.loads(path.read_text())
    other = [f"{k} {kept.get(k)}, now {now[k]}" for k in now if kept.get(k) != now[k]]
    if other:
        raise SystemExit(
            f"{config.out}: holds networks and scores of other settings ({'; '.join(other)}); "
            "choose another --out"
        )


def main(arguments: list[str] | None = None) -> None:
    """The command line; see ``--help``."""
    parser = argparse.ArgumentParser(prog="python -m examples.shu_zhu_2019", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with mnist and cifar10")
    parser.add_argument("--out", type=Path, required=True, help="folder for everything produced")
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument(
        "--quick", dest="preset", action="store_const", const="quick",
        help="small networks, fewer images: minutes on two cores",
    )  # fmt: skip
    sizes.add_argument("--preset", choices=list(PRESETS), help="default: gpu if there is one")
    several: dict[str, Any] = {"nargs": "+", "action": "extend"}
    names = [section.NAME for section in SECTIONS]
    parser.add_argument("--datasets", **several, choices=DATASETS, help="default: the preset's")
    parser.add_argument(
        "--only", **several, choices=names, metavar="PART", help=f"of {', '.join(names)}"
    )
    parser.add_argument(
        "--again", **several, choices=names, default=[], metavar="PART",
        help="compute these parts again, with the networks and scores that are there",
    )  # fmt: skip
    parser.add_argument(
        "--set", **several, default=[], metavar="NAME=VALUE", help="other sizes: see config.py"
    )
    options = parser.parse_args(arguments)
    config = _config(parser, options)
    parts = [
        (dataset, section)
        for dataset in config.datasets
        for section in SECTIONS
        if dataset in section.DATASETS and (not options.only or section.NAME in options.only)
    ]
    if not parts:
        parser.error(f"--only: expected a part of {', '.join(config.datasets)}, got none")
    config.out.mkdir(parents=True, exist_ok=True)
    _same_networks(config)
    context = Context(config)
    start = time.perf_counter()
    for dataset, section in parts:
        run(context, section, dataset, section.NAME in options.again)
        report.write(config, SECTIONS)
    print(f"{time.perf_counter() - start:.0f} s; {config.out / 'report.md'}, report.html")


if __name__ == "__main__":
    main()
