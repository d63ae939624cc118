"""A recipe for a base's family: its defaults filled in, and what it cannot do refused.

A recipe and a family in, the recipe as it will be trained out. Pure; loads no weights.
"""

from __future__ import annotations

from typing import Any

from captioning import UserError, parse_config
from training.family_facts import FAMILY_FACTS
from training.recipe import CONV_PRESET, Recipe

# Recipe fields that only flow models have, and fields that only diffusions have.
FLOW_FIELDS = ("timestep_shift",)
DIFFUSION_FIELDS = ("min_snr_gamma",)


def fit_recipe(recipe: Recipe, family: str, source: str) -> Recipe:
    """`recipe` with the family's defaults where it says nothing.

    Raises KeyError for an unknown family, and UserError naming `source` and the field when it asks
    for what the family does not have.
    """
    facts = FAMILY_FACTS[family]
    data = recipe.model_dump(mode="json", exclude_unset=True)
    for dotted, value in facts.defaults.items():
        # A family's learning rate is one of AdamW; other optimisers have their own.
        if dotted != "optimizer.lr" or recipe.optimizer.type == "adamw":
            _set_default(data, dotted, value)
    fitted = parse_config(Recipe, data, source)
    refused, reason = (
        (DIFFUSION_FIELDS, "belongs to diffusions; a flow has no signal-to-noise weighting")
        if facts.is_flow
        else (FLOW_FIELDS, "belongs to flow models (SD3, FLUX and later)")
    )
    for field in refused:
        if getattr(fitted, field) is not None:
            raise UserError(
                f"{source}: {field}",
                f"is {getattr(fitted, field)}, but {family} cannot use it: it {reason}",
                "leave it out",
            )
    if fitted.network.text_encoder is not None and not facts.trains_text_encoders:
        able = (name for name, other in FAMILY_FACTS.items() if other.trains_text_encoders)
        raise UserError(
            f"{source}: network.text_encoder",
            f"is set, but {family} has its captions read by a large language model, alone or "
            "beside CLIP, which adapters seldom change and which is not trained here; text "
            f"encoders are trained for {' and '.join(able)}",
            "leave it out",
        )
    nested = fitted.network.nested_ranks
    if nested is not None and fitted.network.rank != nested[-1]:
        raise UserError(
            f"{source}: network.rank",
            f"is {fitted.network.rank}, but the largest of network.nested_ranks is trained, which "
            f"is {nested[-1]}",
            f"set it to {nested[-1]}",
        )
    if fitted.network.targets == CONV_PRESET and not facts.has_convolutions:
        raise UserError(
            f"{source}: network.targets",
            f"is {CONV_PRESET}, but the denoiser of {family} is a transformer, whose blocks have "
            "no convolutions",
            "use attention+ff",
        )
    return fitted


def usual_recipes() -> dict[str, Recipe]:
    """For every family, the recipe that an empty recipe becomes on a base of it."""
    return {family: fit_recipe(Recipe(), family, "recipe") for family in FAMILY_FACTS}


def _set_default(data: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, leaf = dotted.split(".")
    for parent in parents:
        data = data.setdefault(parent, {})
    data.setdefault(leaf, value)
