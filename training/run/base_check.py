"""Refuses, before training, what a recipe asks for and the base or this machine does not have.

Recipes and a base's name in, nothing or a UserError out. Reads the base's configs and never its
weights; the rules are the very functions that training itself calls later.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from captioning import UserError
from training.data.buckets import BucketLimits, crop_sizes, refuse_other_size
from training.families import Base, family_of, load_base, native_size_px, size_multiple_px
from training.frozen.quantised import refuse_missing_package
from training.pack.adapters import check_layers
from training.pack.optimizer import library_class
from training.recipe import Network, Recipe


def check_on_base(
    recipes: Iterable[Recipe],
    base: str | Path,
    scored_px: int | None = None,
    trains_here: bool = True,
) -> None:
    """Raise UserError, naming field, reason and fix, for the first that cannot train on `base`.

    Checked are the precision, the sizes of pictures (`scored_px` is the size of the scores'; None
    is the base's own), the layers that `network.targets` names and the ranks that PiSSA finds in
    them. Where it `trains_here`, with the packages of this Python, the packages that an optimiser
    or a quantised base needs are checked too. Raises UserError like `load_base`.
    """
    recipes, kind = list(recipes), family_of(base)
    for recipe in recipes:
        _check_precision(recipe, kind)
        if trains_here:
            library_class(recipe.optimizer)
            refuse_missing_package(recipe.base_precision)
    if any(recipe.resolution is not None or recipe.aspect_buckets for recipe in recipes):
        native, multiple = native_size_px(base), size_multiple_px(base)
        for recipe in recipes:
            crop_sizes(recipe.resolution or native, multiple, BucketLimits.of(recipe))
    if scored_px is not None:
        refuse_other_size("scoring: size_px", scored_px, size_multiple_px(base))
    networks = [recipe.network for recipe in recipes if _asks_of_layers(recipe.network)]
    if networks:
        hollow = load_base(base, "meta")
        for network in dict.fromkeys(networks):
            check_layers(hollow, network)


def _check_precision(recipe: Recipe, kind: type[Base]) -> None:
    if recipe.precision == "fp16" and kind.overflows_fp16:
        raise UserError(
            "recipe: precision",
            f"is fp16, whose largest number is 65504, and activations of {kind.family} surpass it: "
            "losses would be no numbers",
            f"use {kind.half}, which has the range of fp32, or leave it out",
        )


def _asks_of_layers(network: Network) -> bool:
    """Whether layers have to be looked at: every base has the layers that presets name.

    Making a network, even from its config alone, takes seconds of imports.
    """
    return network.target_pattern is not None or network.init == "pissa"
