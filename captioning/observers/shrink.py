"""How a model that looks at small pictures shrinks large ones, as something that can be sent.

Whoever decodes a picture can then shrink it once, before it travels; the model's own preparation
finds it at its size and changes nothing more, so the answers are the same to the last bit.
"""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image

WHITE = (255, 255, 255)


@dataclass(frozen=True)
class Shrink:
    """Bicubic to `side_px`: of the short side, or of the square that the picture is centred on."""

    side_px: int
    on_white_square: bool

    def __call__(self, picture: Image.Image) -> Image.Image:
        """The RGB picture at the model's size, enlarged if it was smaller."""
        if self.on_white_square:
            picture = _on_white_square(picture)
        return picture.resize(self.size(picture), Image.Resampling.BICUBIC)

    def size(self, picture: Image.Image) -> tuple[int, int]:
        """(width, height) that the picture will have, px; the long side is rounded down.

        That is how CLIP's processor rounds (transformers' `get_resize_output_image_size`).
        """
        if self.on_white_square:
            return self.side_px, self.side_px
        long = int(self.side_px * max(picture.size) / min(picture.size))
        wide = picture.width >= picture.height
        return (long, self.side_px) if wide else (self.side_px, long)

    def on(self, picture: Image.Image) -> Shrink:
        """The same for this picture; a square one needs no other square around it."""
        return Shrink(self.side_px, self.on_white_square and picture.width != picture.height)

    def makes_smaller(self, picture: Image.Image) -> bool:
        """Whether fewer pixels are left; a strip or a tiny picture would grow."""
        width, height = self.size(picture)
        return width * height < picture.width * picture.height


def _on_white_square(picture: Image.Image) -> Image.Image:
    side = max(picture.size)
    if picture.size == (side, side):
        return picture
    square = Image.new("RGB", (side, side), WHITE)
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return square
