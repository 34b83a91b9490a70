"""From stored pixels to float32 tensors: scaling, layout, decoding of compressed images."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastfi._extras import require
from fastfi.errors import DataError

__all__ = ["GRAY_MODES", "RGB_MODES", "Color", "ImageDecoder", "stack", "unit"]

Color = Literal["auto", "gray", "rgb"]

GRAY_MODES = ("1", "L", "LA", "La")
RGB_MODES = ("RGB", "RGBA", "RGBa", "RGBX", "P", "PA", "CMYK", "YCbCr", "HSV")


def unit(pixels: NDArray[Any]) -> Tensor:
    """Pixels as float32: integers over their type's largest value, floats unchanged.

    Args:
        pixels: bool, uint8, uint16 or floating point, any shape and byte order, writable.

    Returns:
        float32, the same shape. The division is done in float32, as other loaders do it.
    """
    if pixels.dtype == np.uint8:
        return torch.from_numpy(pixels).to(torch.float32).div_(255)
    values = torch.from_numpy(pixels.astype(np.float32))
    return values.div_(65535) if pixels.dtype.newbyteorder("=") == np.uint16 else values


def stack(images: Sequence[NDArray[Any]]) -> Tensor:
    """Decoded images as one batch.

    Args:
        images: b arrays of the same shape, [H, W] or [H, W, 3], uint8 or uint16.

    Returns:
        [b, C, H, W] float32, contiguous.
    """
    if all(image.dtype == np.uint8 for image in images):
        x = unit(np.stack(images))
    else:
        x = torch.stack([unit(image) for image in images])
    return x.unsqueeze(1) if x.ndim == 3 else x.permute(0, 3, 1, 2).contiguous()


class ImageDecoder:
    """Decodes compressed images of one data set, all of which must have the same shape.

    With ``color="auto"`` the first image decides between grey and RGB; a grey image among RGB ones
    is expanded, an RGB image among grey ones is an error, as converting it would lose information.
    Transparency is dropped. EXIF orientation is not applied.

    Attributes:
        shape: (C, H, W) of the first image, None before it.
    """

    def __init__(self, color: Color = "auto") -> None:
        require("PIL.Image", "decoding images")
        self._color = color  # "auto" until the first image
        self._first_decides = color == "auto"
        self.shape: tuple[int, int, int] | None = None

    def __call__(self, data: bytes | Path | None, where: str) -> NDArray[Any]:
        """Decodes one image.

        Args:
            data: the file's content, or its path; None where there is nothing.
            where: how an error names the image.

        Returns:
            [H, W] or [H, W, 3], uint8, or uint16 for 16-bit grey.

        Raises:
            DataError: not an image, damaged, or of another shape than the first.
        """
        if data is None:
            raise DataError(f"{where}: no image bytes (null)")
        pillow = require("PIL.Image", "decoding images")  # not kept: decoders can be pickled
        try:
            with pillow.open(io.BytesIO(data) if isinstance(data, bytes) else data) as image:
                pixels = self._pixels(image, where)
        except DataError:
            raise
        except Exception as error:  # Pillow's plugins raise OSError, SyntaxError, struct.error, ...
            raise DataError(
                f"{where}: the image cannot be decoded ({type(error).__name__}: {error})"
            ) from error
        shape = (1 if pixels.ndim == 2 else 3, *pixels.shape[:2])
        if self.shape is None:
            self.shape = shape
        elif shape[1:] != self.shape[1:]:
            raise DataError(
                f"{where}: expected the size of the first image, "
                f"{self.shape[1]} x {self.shape[2]} (height x width), got {shape[1]} x {shape[2]}; "
                "resize the images to one size first"
            )
        return pixels

    def blank(self) -> NDArray[Any]:
        """Zeros in the place of an image that cannot be decoded; only after the first one."""
        assert self.shape is not None
        channels, height, width = self.shape
        return np.zeros((height, width) if channels == 1 else (height, width, 3), np.uint8)

    def _pixels(self, image: Any, where: str) -> NDArray[Any]:
        mode: str = image.mode
        if mode.startswith("I;16"):
            if self._color == "rgb":
                raise DataError(f"{where}: 16-bit grey images cannot be read as RGB")
            self._color = "gray"
            return np.array(image).astype(np.uint16)
        if mode not in GRAY_MODES and mode not in RGB_MODES:
            raise DataError(f"{where}: pixels of mode {mode!r} are not supported")
        gray = mode in GRAY_MODES
        if self._color == "auto":
            self._color = "gray" if gray else "rgb"
        elif self._color == "gray" and not gray and self._first_decides:
            raise DataError(
                f"{where}: an image in colour ({mode}) where the first image is grey; "
                "choose the colour (--color gray or rgb)"
            )
        return np.array(image.convert("L" if self._color == "gray" else "RGB"))
