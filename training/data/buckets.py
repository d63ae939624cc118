"""Aspect-ratio buckets: the sizes to which a dataset's pictures are cropped.

A recipe's limits and a resolution in, sizes (height, width) in pixels out; a picture's own size in,
its bucket's size out. Pure arithmetic: reads no picture.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from captioning import UserError
from training.recipe import Recipe

#: (height, width) in pixels.
Size = tuple[int, int]


@dataclass(frozen=True)
class BucketLimits:
    """What a recipe says of its buckets; trials with equal limits share their latents."""

    step_px: int
    max_ratio: float

    @classmethod
    def of(cls, recipe: Recipe) -> BucketLimits | None:
        """The limits of a recipe; None if every picture is cropped to the square."""
        if not recipe.aspect_buckets:
            return None
        return cls(recipe.bucket_step_px, recipe.bucket_max_ratio)


def crop_sizes(resolution: int, multiple: int, limits: BucketLimits | None) -> tuple[Size, ...]:
    """The sizes that pictures may be cropped to, ascending; the square alone without limits.

    They are those of kohya's `make_bucket_resolutions`: sides are multiples of the step, and each
    side is as long as an area of at most `resolution`² allows for the other; the square is always
    there.
    The long side is at most `max_ratio` times the short one. `multiple` px is what the base's
    latents can be divided by; the sides are multiples of it too. Raises UserError for a resolution
    that it does not divide, and for limits that leave the square alone.
    """
    refuse_other_size("recipe: resolution", resolution, multiple)
    if limits is None:
        return ((resolution, resolution),)
    step, area = math.lcm(limits.step_px, multiple), resolution**2
    square = resolution // step * step
    sizes = {(square, square)} if square else set()
    for side in range(step, math.isqrt(int(area * limits.max_ratio)) + 1, step):
        other = area // side // step * step
        if other and max(side, other) <= limits.max_ratio * min(side, other):
            sizes |= {(side, other), (other, side)}
    if len(sizes) < 2:
        raise UserError(
            "recipe: aspect_buckets",
            f"at {resolution} px, with sides that are multiples of {step} px and ratios up to "
            f"{limits.max_ratio:g}, there is no bucket but the square",
            "use a smaller bucket_step_px or a larger bucket_max_ratio, or leave it out",
        )
    return tuple(sorted(sizes))


def refuse_other_size(where: str, size_px: int, multiple: int) -> None:
    """UserError, naming `where`, for a side that the base's `multiple` px do not divide."""
    if size_px % multiple:
        raise UserError(
            where,
            f"{size_px} px is not a multiple of {multiple}, as the base's latents have to be",
            f"use {max(1, round(size_px / multiple)) * multiple}",
        )


def nearest_size(picture: Size, sizes: Sequence[Size]) -> Size:
    """The one of `sizes` whose ratio is nearest to the picture's; the largest of several such.

    Ratios are compared by their quotient, so that portraits are treated as landscapes are (kohya
    compares width/height by difference). A picture is then never scaled up more
    than for the square crop.
    """
    return min(sizes, key=lambda size: (_quotient(picture, size), -size[0] * size[1], size))


def largest_size(sizes: Sequence[Size]) -> Size:
    """The size with the most pixels, for which a step's memory has to suffice."""
    return max(sizes, key=lambda size: (size[0] * size[1], size))


def _quotient(one: Size, other: Size) -> Fraction:
    """How many times one ratio is the other, at least 1; exact."""
    products = one[0] * other[1], one[1] * other[0]
    return Fraction(max(products), min(products))
