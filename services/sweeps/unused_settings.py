"""Recipe settings that a sweep file gives, and that none of its trials reads: they are refused.

A sweep's config and its trials' recipes in, nothing or a UserError out. A setting that some of the
trials read stays: `dora_axis` in a search over `network.method`, say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import reduce
from typing import Any

from captioning import UserError
from services.sweeps.plan import SweepConfig
from training import Recipe

#: Field -> (whether a recipe reads it, under what condition it is read).
READERS: dict[str, tuple[Callable[[Recipe], bool], str]] = {
    "bucket_step_px": (lambda recipe: recipe.aspect_buckets, "with `aspect_buckets: true`"),
    "bucket_max_ratio": (lambda recipe: recipe.aspect_buckets, "with `aspect_buckets: true`"),
    "kept_tags": (lambda recipe: recipe.tag_orders > 1, "with `tag_orders` of 2 or more"),
    "schedule.decay_share": (
        lambda recipe: recipe.schedule.type == "wsd",
        "with `schedule.type: wsd`",
    ),
    "network.dora_axis": (
        lambda recipe: recipe.network.method == "dora",
        "with `network.method: dora`",
    ),
}


def refuse_unused(config: SweepConfig, recipes: Iterable[Recipe], source: str) -> None:
    """Raise UserError naming `source` for a setting that none of `recipes` reads.

    A default that is written out, as `lorafarm recipe` prints it, is no such setting.
    """
    recipes = list(recipes)
    usual = Recipe()
    for field, (reads, where) in READERS.items():
        given = [_value(config.recipe, field), *config.search.get(field, ())]
        given += [_value(recipe, field) for recipe in recipes]  # a search may set a whole part
        said = [value for value in given if value != _value(usual, field)]
        if said and not any(reads(recipe) for recipe in recipes):
            raise UserError(
                f"{source}: {field}",
                f"is {said[0]}, but it is read only {where}, which no trial here has",
                f"leave it out, or have a trial {where}",
            )


def _value(recipe: Recipe, dotted: str) -> Any:
    return reduce(getattr, dotted.split("."), recipe)
