"""Picture bytes in, the picture as people see it out: upright 8-bit RGB on white.

The bytes come from anywhere: only plain raster formats are tried (Pillow would hand PostScript to
Ghostscript), and whatever a decoder stumbles over becomes one kind of error with a reason.
"""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import Image as Pillow
from PIL import ImageOps, UnidentifiedImageError

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")
# Pillow's own bound for a decompression bomb: 0.27 GB once decoded.
MAX_PIXELS = 1024 * 1024 * 1024 // 4 // 3
WHITE = (255, 255, 255, 255)


class PictureError(ValueError):
    """The bytes are no picture that can be used; the message says why."""


@dataclass(frozen=True)
class PictureFacts:
    """What intake keeps of a picture; width and height are those of the upright one, in px.

    `frames` counts those of an animation, or the pages of a TIFF; only the first is ever decoded.
    """

    width: int
    height: int
    format: str
    frames: int


def decode(data: bytes, at_least_px: int | None = None) -> tuple[Pillow.Image, str]:
    """The upright RGB picture and its format (`PNG`, `JPEG`, ...); raises PictureError.

    An animation gives its first frame. EXIF rotation is applied, transparency is laid on white,
    16-bit greyscale is scaled to 8 bits. With `at_least_px` a JPEG may come at a half, a quarter
    or an eighth of its size, its short side never below that (nor enlarged): the decoder then
    leaves out the frequencies that would be thrown away, several times faster.
    """
    picture, facts = _decoded(data, at_least_px)
    return picture, facts.format


def inspect(data: bytes) -> PictureFacts:
    """Decode the whole picture, so that damage shows, and say what it is; raises PictureError."""
    return _decoded(data, None)[1]


def upright_rgb(data: bytes) -> Pillow.Image:
    """What people see of the picture, see `decode`; raises PictureError, a ValueError."""
    return decode(data)[0]


def opacity(data: bytes) -> Pillow.Image | None:
    """The upright picture's alpha channel, 0 to 255; None if nothing of it can be seen through.

    Raises PictureError, a ValueError.
    """
    facts = inspect(data)
    with Pillow.open(io.BytesIO(data), formats=FORMATS) as opened:
        picture = ImageOps.exif_transpose(opened)
        if not picture.has_transparency_data:
            return None
        alpha = picture.convert("RGBA").getchannel("A")
    if alpha.size != (facts.width, facts.height):
        raise PictureError("its transparency has another size")
    return None if alpha.getextrema() == (255, 255) else alpha


def _decoded(data: bytes, at_least_px: int | None) -> tuple[Pillow.Image, PictureFacts]:
    if not data:
        raise PictureError("an empty file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns about odd metadata
            with Pillow.open(io.BytesIO(data), formats=FORMATS) as opened:
                if opened.width * opened.height > MAX_PIXELS:
                    raise PictureError(f"{opened.width}×{opened.height} px is too large to decode")
                kind = opened.format or "unknown"
                # A camera's MPO is one photo with a preview or a depth map behind it.
                frames = 1 if kind == "MPO" else int(getattr(opened, "n_frames", 1))
                if at_least_px is not None:
                    opened.draft(None, (at_least_px, at_least_px))  # only JPEG heeds it
                picture = _as_seen(opened)
                return picture, PictureFacts(*picture.size, kind, frames)
    except PictureError:
        raise
    except UnidentifiedImageError as error:
        raise PictureError("not a picture, whatever its name says") from error
    except Pillow.DecompressionBombError as error:
        raise PictureError("too large to decode") from error
    except Exception as error:  # decoders raise almost anything on damaged bytes
        raise PictureError(f"damaged: {error or type(error).__name__}") from error


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
    # A conversion to the same mode would copy all pixels once more.
    return picture if picture.mode == "RGB" else picture.convert("RGB")
