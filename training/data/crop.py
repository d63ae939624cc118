"""A picture as training sees it: upright, scaled, cropped around its centre, on white.

A file and the sizes that are allowed in, pixels with their opacity and place out. Edits no file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image as Picture
from PIL import ImageOps
from torch import Tensor

from captioning import UserError, opacity, upright_rgb
from training.data.buckets import Size, nearest_size


@dataclass(frozen=True)
class Crop:
    """The centre of a picture, and the place that it was cut from."""

    pixels: Tensor  # (3, H, W) fp32 in -1..1
    opacity: Tensor  # (H, W) fp32 in 0..1; what is transparent is white in `pixels`
    original: Size  # of the picture itself
    corner: tuple[int, int]  # (top, left) of the crop in the scaled picture

    @property
    def size(self) -> Size:
        return self.opacity.shape[0], self.opacity.shape[1]


def read_crop(path: Path, sizes: Sequence[Size]) -> Crop:
    """The centre of a picture, scaled and cropped to that of `sizes` whose ratio is nearest.

    The picture is turned by its EXIF orientation; transparency is laid on white. Raises UserError
    if the file cannot be decoded.
    """
    try:
        data = path.read_bytes()
        picture, alpha = upright_rgb(data), opacity(data)
    except (OSError, ValueError, SyntaxError, Picture.DecompressionBombError) as error:
        raise UserError(
            str(path), f"cannot be read as a picture ({error})", "freeze the dataset again"
        ) from error
    original = picture.height, picture.width
    height, width = size = nearest_size(original, sizes)
    picture = ImageOps.fit(picture, (width, height), Picture.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.asarray(picture, dtype=np.float32))  # (H, W, 3)
    seen = torch.ones(size)
    if alpha is not None:
        alpha = ImageOps.fit(alpha, (width, height), Picture.Resampling.LANCZOS)
        seen = torch.from_numpy(np.asarray(alpha, dtype=np.float32)) / 255
    scale = max(own / whole for own, whole in zip(size, original, strict=True))
    top, left = (
        (round(whole * scale) - own) // 2 for own, whole in zip(size, original, strict=True)
    )
    pixels = pixels.permute(2, 0, 1).contiguous() / 127.5 - 1.0
    return Crop(pixels, seen, original, (top, left))


def read_pixels(path: Path, size_px: int) -> Tensor:
    """The pixels of the centre square, `size_px` wide.  # (3, H, W) fp32 in -1..1"""
    return read_crop(path, [(size_px, size_px)]).pixels
