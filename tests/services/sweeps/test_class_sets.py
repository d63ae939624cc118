"""Class pictures of a sweep: a folder becomes a set, and a trial's id stands for its content."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from captioning import DatasetVersion, UserError
from services.farm.settings import Home, Settings
from services.sweeps.estimates import Estimator
from services.sweeps.files import sweeps
from services.sweeps.plan import SweepConfig, plan_sweep
from services.sweeps.prepare import plan_config, prepare_sweep


@pytest.fixture
def people(tmp_path: Path) -> Path:
    """A folder of four pictures of others."""
    folder = tmp_path / "people"
    folder.mkdir()
    generator = np.random.default_rng(5)
    for number in range(4):
        pixels = generator.integers(0, 255, (64, 64, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


@pytest.fixture
def home(home_path: Path) -> Home:
    return Home(home_path, Settings(cpus_per_worker=1, use_gpu=False))


def config(folder: object, search: dict[str, list[Any]] | None = None, **more: Any) -> SweepConfig:
    small = {"steps": 4, "checkpoint_every": 4, "resolution": 32, "prior_weight": 1.0}
    recipe = {**small, "class_pictures": str(folder), "class_prompt": "person", **more}
    return SweepConfig.model_validate({"recipe": recipe, "search": search or {}})


def test_a_trial_stands_for_what_the_folder_holds(
    home: Home, dataset: DatasetVersion, people: Path
):
    _, first, resolved = plan_config(home, dataset, config(people), "test")
    name = resolved.recipe.class_pictures
    assert name is not None and first.trials[0].recipe.class_pictures == name
    assert plan_config(home, dataset, config(people), "test")[1] == first
    assert plan_config(home, dataset, config(name), "test")[1] == first  # the set by its name

    # A sweep's record names the set: it plans the same trials, whatever becomes of the folder.
    prepare_sweep(home, dataset, config(people), "test")
    (people / "0.png").unlink()
    (record,) = sweeps(home.store, "aya")
    again = plan_sweep(record.config, dataset, record.base_hash, record.family, record.sweep)
    assert again == first
    changed = plan_config(home, dataset, config(people), "test")[1]
    assert changed.trials[0].trial != first.trials[0].trial

    searched = config(people, {"class_pictures": [str(people), name]})
    _, plan, _ = plan_config(home, dataset, searched, "test")
    assert [trial.recipe.class_pictures for trial in plan.trials][1] == name


def test_an_estimate_is_not_that_of_a_pack_without(
    home: Home, dataset: DatasetVersion, people: Path
):
    base, plan, _ = plan_config(home, dataset, config(people), "test")
    plain = SweepConfig.model_validate(
        {"recipe": {"steps": 4, "checkpoint_every": 4, "resolution": 32, "prior_weight": 1.0}}
    )
    teacher = plan_config(home, dataset, plain, "test")[1]
    estimator = Estimator(home, base)
    facts = [estimator.facts(estimator.packs(p.trials, {})[0].request) for p in (plan, teacher)]
    assert facts[0] != facts[1]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"class_prompt": None}, "4 of 4 pictures have no caption"),
        ({"class_prompt": "ayachar"}, "has the trigger ayachar"),
        ({"class_pictures": "nowhere"}, "no folder or ZIP file nowhere"),
        ({"class_pictures": "c0123456789ab"}, "no such set"),
    ],
)
def test_bad_class_pictures_are_refused_before_anything_starts(
    home: Home, dataset: DatasetVersion, people: Path, changes: dict[str, Any], said: str
):
    with pytest.raises(UserError, match=said):
        plan_config(home, dataset, config(**{"folder": people, **changes}), "test")


def test_the_characters_own_pictures_are_refused(
    home: Home, dataset: DatasetVersion, pictures: Path
):
    with pytest.raises(UserError, match="12 of 12 pictures are pictures of aya too"):
        plan_config(home, dataset, config(pictures), "test")
