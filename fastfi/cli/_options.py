"""The options that commands share, and what their texts mean."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

import fastfi
from fastfi.cli._batches import Labels
from fastfi.errors import OptionError

__all__ = ["FORMATS", "as_inverse", "as_wrt", "integers", "numbers", "parse_bytes"]

FORMATS = (
    "A folder of IDX files (MNIST), an .npz file, Parquet in the Hugging Face image layout (file "
    "or folder), or an image folder"
)

ModelOption = Annotated[
    str,
    typer.Option(
        help="package.module:factory; the factory is called without arguments and returns an "
        "nn.Module. The current directory is importable."
    ),
]
WeightsOption = Annotated[
    Path | None,
    typer.Option(help="safetensors, or a PyTorch state dict; pickled code is never run."),
]
SplitOption = Annotated[str | None, typer.Option(help="train, test, ...")]
LabelsOption = Annotated[
    Labels, typer.Option(help="Whose influence: of the true or of the predicted label.")
]
WrtOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="WHAT",
        help="What is perturbed: input (the default), params (all trainable parameters), all "
        "(both), layers (each by itself), or the module or parameter of that name; repeat the "
        "option for several names.",
    ),
]
InverseOption = Annotated[
    Literal["exact", "truncated", "damped"], typer.Option(help="Inverse of the metric.")
]
RtolOption = Annotated[float | None, typer.Option(help="Rank tolerance of --inverse exact.")]
EpsOption = Annotated[float | None, typer.Option(help="Cut of --inverse truncated.")]
AlphaOption = Annotated[float | None, typer.Option(help="Damping of --inverse damped.")]
ObjectiveOption = Annotated[
    str, typer.Option(help="cross_entropy, logit, margin, entropy or nll_of_others.")
]
OutputsOption = Annotated[
    Literal["logits", "log_probs", "probs"], typer.Option(help="What the model returns.")
]
LumpOption = Annotated[
    float | None,
    typer.Option(help="Merge each image's least likely classes, up to this probability."),
]
BatchSizeOption = Annotated[int, typer.Option(min=1, help="Images read and worked on at once.")]
MemoryBudgetOption = Annotated[
    str | None, typer.Option(help="Memory for the backward passes, e.g. 2GB.")
]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")]
MeanOption = Annotated[
    str, typer.Option(help="Subtracted from pixels in 0..1; one number, or one per channel.")
]
StdOption = Annotated[str, typer.Option(help="Then divided by; likewise.")]
ImageKeyOption = Annotated[
    str | None, typer.Option(help="Array (npz) or column (Parquet) of the images.")
]
LabelKeyOption = Annotated[str | None, typer.Option(help="The same for the labels.")]
LayoutOption = Annotated[
    Literal["chw", "hwc"] | None, typer.Option(help="Axis order of 4-dimensional npz arrays.")
]
ColorOption = Annotated[
    Literal["auto", "gray", "rgb"], typer.Option(help="Conversion of compressed images.")
]
LimitOption = Annotated[int | None, typer.Option(min=1, help="Take only the first images.")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace existing results.")]
ProgressOption = Annotated[
    bool | None,
    typer.Option("--progress/--no-progress", help="Default: only on a terminal."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
TracebackOption = Annotated[
    bool, typer.Option("--traceback", help="Show where an error came from.")
]

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY_UNITS = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_bytes(text: str) -> int:
    """Bytes from "2GB", "512 MiB", "1.5g" or "1000000".

    Raises:
        OptionError: not a positive amount of memory.
    """
    match = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*([kmgt]i?)?b?\s*", text.lower())
    try:
        amount = float(match[1]) * {**_UNITS, **_BINARY_UNITS}[match[2] or ""] if match else 0.0
    except ValueError:
        amount = 0.0
    if amount < 1:
        raise OptionError(f"expected an amount of memory such as 2GB or 512MiB, got {text!r}")
    return int(amount)


def numbers(option: str, text: str) -> tuple[float, ...]:
    """ "0.49,0.48,0.45" as numbers."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise OptionError(
            f"{option}: expected numbers separated by commas, got {text!r}"
        ) from error


def integers(option: str, text: str) -> tuple[int, ...]:
    """ "1,3,5,7" as integers."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise OptionError(
            f"{option}: expected integers separated by commas, got {text!r}"
        ) from error


def as_wrt(given: Sequence[str] | None) -> str | list[str]:
    """``wrt`` of :func:`fastfi.influence`: a single word of its own, or names.

    Raises:
        OptionError: a name is given twice, and would make two columns of that name.
    """
    names = list(given or ["input"])
    if len(names) == 1 and names[0] in ("input", "params", "all", "layers"):
        return names[0]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise OptionError(f"--wrt: expected different names, got {twice!r} more than once")
    return names


def as_inverse(
    name: str, rtol: float | None, eps: float | None, alpha: float | None
) -> fastfi.Exact | fastfi.Truncated | fastfi.Damped:
    """The inverse of that name with its parameter; an OptionError for another one's."""
    given = {"--rtol": ("exact", rtol), "--eps": ("truncated", eps), "--alpha": ("damped", alpha)}
    for option, (owner, value) in given.items():
        if value is not None and name != owner:
            raise OptionError(f"{option} belongs to --inverse {owner}, not to {name}")
    if name == "exact":
        return fastfi.Exact(rtol=rtol)
    if name == "truncated":
        return fastfi.Truncated() if eps is None else fastfi.Truncated(eps=eps)
    return fastfi.Damped() if alpha is None else fastfi.Damped(alpha=alpha)
