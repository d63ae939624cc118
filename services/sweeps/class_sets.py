"""Class pictures that a sweep names by folder, kept in the store before its trials are planned.

A sweep's config in, the same config out with the names of sets in place of folders: what a folder
holds may change, and a trial's id must stand for what it was trained on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from captioning import (
    DatasetVersion,
    Store,
    UserError,
    is_class_set,
    keep_class_pictures,
    load_class_pictures,
)
from services.sweeps.plan import SweepConfig, SweepPlan
from training import class_samples

FIELD = "class_pictures"


def with_class_sets(store: Store, config: SweepConfig) -> SweepConfig:
    """The config with every folder or ZIP file of class pictures kept in `store` and named.

    Raises UserError for what is neither one nor a set, and for pictures that cannot be read.
    """
    changes: dict[str, Any] = {}
    if config.recipe.class_pictures is not None:
        name = _set_name(store, config.recipe.class_pictures)
        changes["recipe"] = config.recipe.model_copy(update={FIELD: name})
    if FIELD in config.search:
        values = [
            _set_name(store, value) if isinstance(value, str) else value
            for value in config.search[FIELD]
        ]
        changes["search"] = config.search | {FIELD: values}
    return config.model_copy(update=changes)


def check_class_pictures(store: Store, plan: SweepPlan, dataset: DatasetVersion) -> None:
    """Raise UserError for class pictures that a trial cannot be trained with; see `class_samples`.

    This is known before the base is loaded and the character's pictures are encoded.
    """
    recipes = [planned.recipe for planned in plan.trials]
    for name in sorted({one.class_pictures for one in recipes if one.class_pictures is not None}):
        pictures = load_class_pictures(store, name)
        for prompt in {one.class_prompt for one in recipes if one.class_pictures == name}:
            class_samples(pictures, prompt, dataset)


def _set_name(store: Store, named: str) -> str:
    if is_class_set(named):
        return load_class_pictures(store, named).name
    path = Path(named).expanduser()
    if not path.exists():
        raise UserError(
            "recipe: class_pictures",
            f"there is no folder or ZIP file {named}",
            "name one that is there; a path begins in the folder where the command is run",
        )
    return keep_class_pictures(store, path).name
