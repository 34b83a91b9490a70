"""Reproduces Shu and Zhu, "Sensitivity Analysis of Deep Neural Networks" (AAAI 2019), and a little
more: trains two networks on MNIST and CIFAR-10, computes every table and figure, writes a report.

What was finished stays in the output folder: the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from examples.shu_zhu_2019 import report
from examples.shu_zhu_2019.config import DATASETS, PRESETS, Config, configure
from examples.shu_zhu_2019.context import Context
from examples.shu_zhu_2019.data import find
from examples.shu_zhu_2019.section import run
from examples.shu_zhu_2019.sections import SECTIONS

__all__ = ["main"]


def _config(parser: argparse.ArgumentParser, options: argparse.Namespace) -> Config:
    preset = options.preset or ("gpu" if torch.cuda.is_available() else "cpu")
    if options.quick:
        preset = "quick"
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


def main(arguments: list[str] | None = None) -> None:
    """The command line; see ``--help``."""
    parser = argparse.ArgumentParser(prog="python -m examples.shu_zhu_2019", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with mnist and cifar10")
    parser.add_argument("--out", type=Path, required=True, help="folder for everything produced")
    parser.add_argument("--quick", action="store_true", help="small networks, fewer images")
    parser.add_argument("--preset", choices=list(PRESETS), help="default: gpu if there is one")
    parser.add_argument("--datasets", nargs="+", choices=DATASETS)
    names = [section.NAME for section in SECTIONS]
    parser.add_argument("--only", nargs="+", choices=names, metavar="PART", help=", ".join(names))
    parser.add_argument("--again", nargs="+", choices=names, default=[], metavar="PART")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="see config.py")
    options = parser.parse_args(arguments)
    config = _config(parser, options)
    config.out.mkdir(parents=True, exist_ok=True)
    context = Context(config)
    start = time.perf_counter()
    for dataset in config.datasets:
        for section in SECTIONS:
            wanted = options.only is None or section.NAME in options.only
            if wanted and dataset in section.DATASETS:
                run(context, section, dataset, section.NAME in options.again)
                report.write(config, SECTIONS)
    print(f"{time.perf_counter() - start:.0f} s; {config.out / 'report.md'}, report.html")


if __name__ == "__main__":
    main()
