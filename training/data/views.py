"""Views per image: what a number of steps means for a dataset of any size and any batch size.

Guides count in steps, repeats and epochs, which can't be compared: 450 steps are 90 views of each
of 20 pictures at batch 4, and 22.5 at batch 1. Plain arithmetic; nothing here trains.
"""

from __future__ import annotations

import math

from training.recipe import Recipe

# Published character guides, converted to views: 12 (a tutorial's 228 steps at batch 4 on
# 76 pictures), 18 to 25 (the usual "20 to 25 repeats"), 63 to 90 (those of 1,750 steps and more).
# They disagree, so train to the largest and score a checkpoint at each.
ADVISED_VIEWS = (12, 25, 60, 90)


def samples_per_step(recipe: Recipe, workers: int) -> int:
    """How many samples one optimiser step sees, over all micro-steps and workers."""
    return recipe.batch_size * recipe.accumulation * workers


def views_per_image(
    step: int,
    recipe: Recipe,
    pictures: int,
    workers: int = 1,
    step_samples: int | None = None,
) -> float:
    """How often each of `pictures` training pictures was seen, on average, after `step` steps.

    `step_samples` are those that a trial began with, if its checkpoints say so. Raises
    ValueError for no pictures.
    """
    return step * (step_samples or samples_per_step(recipe, workers)) / _some(pictures)


def steps_for_views(views: float, recipe: Recipe, pictures: int, workers: int = 1) -> int:
    """The fewest steps after which each picture was seen `views` times on average."""
    return math.ceil(_some(pictures) * views / samples_per_step(recipe, workers))


def _some(pictures: int) -> int:
    if pictures < 1:
        raise ValueError(f"{pictures} pictures: views per image need at least one")
    return pictures
