"""Decoded pictures as arrays that travel, and back, without touching a pixel.

Pillow keeps four bytes for each RGB pixel, the last of no meaning, and hands its memory out and
takes it in by Arrow's C interface. An array here is that memory: to unpack it to three bytes and
to pack it again would cost as much as decoding the picture does.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from PIL import Image

CELL_BYTES = 4  # the bytes of a pixel in Pillow's memory


def pixels_of(picture: Image.Image) -> np.ndarray:
    """An RGB picture's own memory, (H, W, 4) uint8, not to be written to.

    It is a copy where the memory lies in pieces, as Pillow keeps pictures of more than 16 MB.
    """
    shape = picture.height, picture.width, CELL_BYTES
    try:
        cells = pa.array(picture)
    except ValueError:
        return np.frombuffer(picture.tobytes("raw", "RGBX"), np.uint8).reshape(shape)
    pixels: np.ndarray = cells.flatten().to_numpy(zero_copy_only=True)
    return pixels.reshape(shape)


def picture_of(pixels: np.ndarray) -> Image.Image:
    """The RGB picture whose memory `pixels` (H, W, 4) is; who changes it gets a copy."""
    cells = pa.FixedSizeListArray.from_arrays(pa.array(pixels.reshape(-1)), CELL_BYTES)
    height, width = pixels.shape[:2]
    return Image.fromarrow(cells, "RGB", (width, height))
