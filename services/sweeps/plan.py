"""A sweep's config, and the trials that it asks for.

A YAML file in, a list of trials with ids out. Pure: nothing is trained or stored here.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from captioning import DatasetVersion, UserError, load_config, parse_config
from services.sweeps.variants import variant_words
from training import Recipe, ScoringConfig, cut_recipes, fit_recipe, trial_id

# A person who asks for more than this in one grid most likely mistyped it; a bigger search belongs
# in several sweeps, whose trials are shared when they are equal.
MAX_TRIALS = 256


class SweepConfig(BaseModel):
    """What `lorafarm sweep --config` reads."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    base: str | None = Field(
        None,
        description="Path or hub id of a model in diffusers' layout (docs/real-models.md lists "
        "the families), or a .safetensors checkpoint; none: the starter.",
    )
    recipe: Recipe = Field(default_factory=Recipe, description="What all trials share.")
    search: dict[str, list[Any]] = Field(
        default_factory=dict,
        description="Recipe fields (dotted) and the values to try; every combination is a trial. "
        "A part of the recipe can be a value too: `optimizer: [{lr: 1.0e-4}, {type: prodigy}]`.",
    )
    scoring: ScoringConfig = Field(
        default_factory=ScoringConfig, description="How checkpoints are scored."
    )


def load_sweep(file: Path | None) -> tuple[SweepConfig, str]:
    """The config in a file, or the default sweep, and what errors are to call it."""
    if file is None:
        return SweepConfig(), "the default sweep"
    return load_config(SweepConfig, file), str(file)


@dataclass(frozen=True)
class PlannedTrial:
    """One combination of the search: its id and its whole recipe."""

    trial: str
    recipe: Recipe
    cut_of: str | None = (
        None  # the trial with nested ranks from which this one's checkpoints are cut
    )
    variant: str = ""  # what tells it from other trials of its method and rank, in words

    @property
    def title(self) -> str:
        """Method, rank and variant in words: `lora r16 (lr 0.0003)`."""
        network = self.recipe.network
        title = f"{network.title}{' of nested ranks' if network.nested_ranks else ''}"
        return f"{title} ({self.variant})" if self.variant else title


@dataclass(frozen=True)
class SweepPlan:
    """The trials of a sweep, in the order of the search space, and what the person should know.

    A trial with nested ranks is followed by its cuts, which are scored and not trained.
    """

    sweep: str
    trials: tuple[PlannedTrial, ...]
    warnings: tuple[str, ...]

    @property
    def trained(self) -> tuple[PlannedTrial, ...]:
        return tuple(planned for planned in self.trials if planned.cut_of is None)

    def cuts_of(self, trial: str) -> tuple[PlannedTrial, ...]:
        return tuple(planned for planned in self.trials if planned.cut_of == trial)


def plan_sweep(
    config: SweepConfig, dataset: DatasetVersion, base_hash: str, family: str, source: str
) -> SweepPlan:
    """Every combination of `config.search` on top of `config.recipe`, equal ones once.

    The same config, dataset version and base give the same ids: that is what lets a killed sweep
    go on. Raises UserError naming `source` for an unknown field, a bad value, an empty list, or
    what `family` cannot do.
    """
    for field, values in config.search.items():
        if not values:
            raise UserError(f"{source}: search.{field}", "an empty list", "name at least one value")
    trials: dict[str, PlannedTrial] = {}
    words: dict[str, tuple[str, ...]] = {}
    for overrides in _combinations(config.search):
        # Only what was written: the rest is the family's and the optimiser's to fill in.
        data = config.recipe.model_dump(mode="json", exclude_unset=True)
        for field, value in overrides.items():
            _set(data, field, value)
        asked = parse_config(Recipe, data, f"{source}: search")
        recipe = fit_recipe(asked, family, source)
        trial = trial_id(dataset, base_hash, recipe)
        trials[trial] = PlannedTrial(trial, recipe)
        for cut in cut_recipes(recipe):
            name = trial_id(dataset, base_hash, cut)
            trials[name] = PlannedTrial(name, cut, trial)
        # Combinations that are one trial differ in what has no effect on it.
        own = variant_words(config.search, overrides)
        words[trial] = tuple(word for word in words.get(trial, own) if word in own)
    trials = {
        name: replace(planned, variant=", ".join(words[planned.cut_of or name]))
        for name, planned in trials.items()
    }
    combinations = sum(planned.cut_of is None for planned in trials.values())
    if combinations > MAX_TRIALS:
        raise UserError(
            f"{source}: search",
            f"{combinations} combinations, more than {MAX_TRIALS}",
            "sweep fewer values at once",
        )
    content = [sorted(trials), config.scoring.model_dump(mode="json"), dataset.name, base_hash]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return SweepPlan("s" + digest[:12], tuple(trials.values()), tuple(_warnings(config)))


def _combinations(search: dict[str, list[Any]]) -> Iterator[dict[str, Any]]:
    for values in itertools.product(*search.values()):
        yield dict(zip(search, values, strict=True))


def _set(data: dict[str, Any], dotted: str, value: Any) -> None:
    """Set a dotted field; an unknown one is set as well, and refused when the recipe is parsed."""
    *parents, leaf = dotted.split(".")
    for parent in parents:
        inner = data.setdefault(parent, {})
        if not isinstance(inner, dict):
            inner = data[parent] = {}
        data = inner
    data[leaf] = value


def _warnings(config: SweepConfig) -> Iterator[str]:
    rank_varies = len(config.search.get("network.rank", [])) > 1
    alpha_varies = "network.alpha" in config.search
    if rank_varies and config.recipe.network.alpha is not None and not alpha_varies:
        yield (
            "network.rank varies while network.alpha is fixed: the update's scale alpha/rank "
            "changes with it, so this is a hidden learning-rate sweep. Leave alpha out to have "
            "alpha = rank."
        )
    if "optimizer.type" in config.search and "lr" in config.recipe.optimizer.model_fields_set:
        yield (
            "optimizer.type varies while optimizer.lr is fixed, but optimisers want learning rates "
            "of very different sizes. Leave lr out, or search `optimizer` with a mapping for each."
        )
    if "steps" in config.search:
        yield (
            "steps is swept as separate runs; one run to the largest step count with "
            "checkpoint_every scores every count on the way for the price of one."
        )
