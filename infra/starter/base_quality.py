"""Measures a base by the pictures that it draws for the captions of kept-out characters.

The judges are the bundles of the starter tagger and CLIP, whose own errors count against the
pictures. 25 DDIM steps, one seed for each picture, prompts half tags and half prose.
"""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import captions
import groups
import numpy as np
import pictures
import resemblance
import sheets
import torch
from avatars import Avatar
from diffusers import StableDiffusionPipeline
from judge import Tagger

GUIDANCES = (3.0, 4.0, 5.0)
# At this guidance the groups of attributes and the resemblance are measured, on CROWD pictures.
MAIN_GUIDANCE = 4.0
GENERATED = 64
CROWD = 256
STEPS = 25
SEED = 27
BATCH = 32
SHOWN = 20


@dataclass(frozen=True)
class BaseQuality:
    """What was measured; every share is of the prompted tags that the tagger finds."""

    shares: dict[float, float]  # guidance to share, GENERATED pictures each
    groups: dict[str, float]  # group of attributes to share, CROWD pictures
    drawn_groups: dict[str, float]  # the same for the drawn pictures of the same avatars
    kernel_distance: float  # CROWD pictures to all kept-out pictures
    copied_share: float  # see resemblance.copied_share


def measure(
    pipe: StableDiffusionPipeline,
    pixels: np.ndarray,
    avatars: list[Avatar],
    trained: np.ndarray,
    sheet: Path,
) -> BaseQuality:
    """All measures of a base on kept-out characters; `trained` are the training pictures.

    The first generated pictures and their prompts are shown in `sheet`.
    """
    rows = random.Random(SEED).sample(range(len(avatars)), CROWD)
    prompted = [avatars[row] for row in rows]
    tagger, shares = Tagger(), {}
    true = tagger.truth(prompted)
    for guidance in GUIDANCES:
        count = CROWD if guidance == MAIN_GUIDANCE else GENERATED
        prompts = [prompt(avatar, number) for number, avatar in enumerate(prompted[:count])]
        drawn = generate(pipe, prompts, guidance)
        found = tagger.found(drawn)
        shares[guidance] = share(found[:GENERATED], true[:GENERATED])
        if guidance == MAIN_GUIDANCE:
            crowd, crowd_found = drawn, found
            sheets.captioned(drawn[:SHOWN], prompts[:SHOWN], sheet)
    kept_out, generated = resemblance.features(pixels), resemblance.features(crowd)
    return BaseQuality(
        shares,
        by_group(crowd_found, true, tagger.names),
        by_group(tagger.found(pixels[rows]), true, tagger.names),
        resemblance.kernel_distance(generated, kept_out),
        resemblance.copied_share(generated, kept_out, resemblance.features(trained)),
    )


def prompt(avatar: Avatar, number: int) -> str:
    return captions.prose(avatar) if number % 2 else captions.tag_caption(avatar)


def share(found: np.ndarray, true: np.ndarray) -> float:
    """The share of the true tags (N, tags) that are found."""
    return float((found & true).sum() / true.sum())


def by_group(found: np.ndarray, true: np.ndarray, names: list[str]) -> dict[str, float]:
    """`share` for every group of attributes apart."""
    columns = defaultdict(list)
    for column in np.flatnonzero(true.any(0)):
        columns[groups.group(names[column])].append(column)
    return {name: share(found[:, columns[name]], true[:, columns[name]]) for name in groups.GROUPS}


def generate(pipe: StableDiffusionPipeline, prompts: list[str], guidance: float) -> np.ndarray:
    """Pictures (N, 64, 64, 3) uint8, each from a seed of its own."""
    drawn = []
    for start in range(0, len(prompts), BATCH):
        part = prompts[start : start + BATCH]
        seeds = [torch.Generator().manual_seed(SEED + start + row) for row in range(len(part))]
        out = pipe(
            part,
            height=pictures.SIZE_PX,
            width=pictures.SIZE_PX,
            num_inference_steps=STEPS,
            guidance_scale=guidance,
            generator=seeds,
            output_type="np",
        ).images
        drawn.append((out * 255).round().astype(np.uint8))
    return np.concatenate(drawn)
