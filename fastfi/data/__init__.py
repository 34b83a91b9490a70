"""Readers of image data sets, in bounded memory.

:func:`open_dataset` recognises MNIST-style IDX folders, npz files, Parquet in the Hugging Face
image layout, image folders and single images, and returns an :class:`ImageSource` that yields
:class:`Batch` objects.
"""

from __future__ import annotations

from fastfi.data._open import open_dataset
from fastfi.data._select import select
from fastfi.data._source import Batch, ImageSource

__all__ = ["Batch", "ImageSource", "open_dataset", "select"]
