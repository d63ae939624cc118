"""Picture bytes in, the picture as people see it out: upright 8-bit RGB on white.

The bytes come from anywhere: only plain raster formats are tried (Pillow would hand PostScript to
Ghostscript), and whatever a decoder stumbles over becomes one kind of error with a reason.
"""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import Image as Pillow
from PIL import ImageOps, UnidentifiedImageError

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")
# Pillow's own bound for a decompression bomb: 0.27 GB once decoded.
MAX_PIXELS = 1024 * 1024 * 1024 // 4 // 3
WHITE = (255, 255, 255, 255)


class PictureError(ValueError):
    """The bytes are no picture that can be used; the message says why."""


def decode(data: bytes) -> tuple[Pillow.Image, str]:
    """The upright RGB picture and its format (`PNG`, `JPEG`, ...); raises PictureError.

    Of an animation the first frame. EXIF rotation is applied, transparency is laid on white,
    16-bit greyscale is scaled to 8 bits.
    """
    if not data:
        raise PictureError("an empty file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata; a bomb is refused below
            with Pillow.open(io.BytesIO(data), formats=FORMATS) as opened:
                if opened.width * opened.height > MAX_PIXELS:
                    raise PictureError(f"{opened.width}×{opened.height} px is too large to decode")
                return _as_seen(opened), opened.format or "unknown"
    except PictureError:
        raise
    except UnidentifiedImageError as error:
        raise PictureError("not a picture, whatever its name says") from error
    except Pillow.DecompressionBombError as error:
        raise PictureError("too large to decode") from error
    except Exception as error:  # decoders raise almost anything on damaged bytes
        raise PictureError(f"damaged: {error or type(error).__name__}") from error


def upright_rgb(data: bytes) -> Pillow.Image:
    """What people see of the picture, see `decode`; raises PictureError, a ValueError."""
    return decode(data)[0]


def _as_seen(opened: Pillow.Image) -> Pillow.Image:
    picture = ImageOps.exif_transpose(opened)
    if picture.mode == "F":
        raise PictureError("its pixels are floating-point numbers; save it with 8 bits")
    if picture.mode.startswith("I"):
        # 16-bit greyscale; Pillow's own conversion would cut off everything over 255.
        values = np.clip(np.asarray(picture, np.int64), 0, 65535) >> 8
        picture = Pillow.fromarray(values.astype(np.uint8))
    if picture.has_transparency_data:
        layer = picture.convert("RGBA")
        picture = Pillow.alpha_composite(Pillow.new("RGBA", layer.size, WHITE), layer)
    return picture.convert("RGB")
