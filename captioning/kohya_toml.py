"""sd-scripts' dataset config for a folder of pictures with captions beside them."""

from __future__ import annotations

import json
from collections.abc import Iterable

# Buckets are multiples of 64 px; more than 1024 px no base of today is trained at.
BUCKET_PX, MAX_RESOLUTION_PX = 64, 1024


def dataset_toml(
    image_dir: str, class_word: str, short_sides_px: Iterable[int], num_repeats: int = 1
) -> str:
    """The text of a dataset.toml; `num_repeats` is how often an epoch shows each picture.

    The resolution is that of the smallest picture, so that none is enlarged. keep_tokens leaves
    the trigger in front when captions are shuffled.
    """
    side_px = min(short_sides_px)
    resolution = max(BUCKET_PX, min(MAX_RESOLUTION_PX, side_px // BUCKET_PX * BUCKET_PX))
    # A JSON string is a TOML basic string.
    return (
        "[general]\ncaption_extension = '.txt'\nkeep_tokens = 1\nshuffle_caption = true\n\n"
        f"[[datasets]]\nresolution = {resolution}\nenable_bucket = true\n\n"
        f"  [[datasets.subsets]]\n  image_dir = {json.dumps(image_dir, ensure_ascii=False)}\n"
        f"  class_tokens = {json.dumps(class_word, ensure_ascii=False)}\n"
        f"  num_repeats = {num_repeats}\n"
    )
