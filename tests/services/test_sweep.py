"""A sweep's plan: which trials, under which ids."""

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from captioning import DatasetVersion, UserError, load_config, parse_config
from services.recipe_text import EXAMPLE_SEARCH, commented_sweep
from services.sweep import SweepConfig, plan_sweep

DATASET = DatasetVersion("v0001-00000000", Path(), "aya", "ayachar", "person", (), (), "0" * 64)


def plan(search, recipe=None, base="b" * 64):
    config = parse_config(SweepConfig, {"recipe": recipe or {}, "search": search}, "test")
    return plan_sweep(config, DATASET, base, "sd15", "test")


@given(
    ranks=st.lists(st.integers(1, 256), min_size=1, max_size=6),
    methods=st.lists(st.sampled_from(["lora", "dora"]), min_size=1, max_size=3),
)
def test_every_combination_once_and_equal_ones_share_an_id(ranks, methods):
    trials = plan({"network.rank": ranks, "network.method": methods}).trials
    found = [(trial.recipe.network.rank, trial.recipe.network.method) for trial in trials]
    assert set(found) == {(rank, method) for rank in ranks for method in methods}
    assert len(found) == len(set(found)) == len({trial.trial for trial in trials})


def test_the_same_sweep_has_the_same_ids_and_another_base_has_others():
    search = {"network.rank": [4, 16]}
    assert plan(search) == plan(search)
    assert plan(search).sweep != plan(search, base="c" * 64).sweep


def test_without_a_search_the_recipe_is_the_one_trial():
    (trial,) = plan({}, {"network": {"rank": 7}}).trials
    assert trial.recipe.network.rank == 7


def test_a_rank_sweep_with_fixed_alpha_is_noted():
    notes = plan({"network.rank": [4, 16]}, {"network": {"alpha": 8}}).warnings
    assert any("learning-rate" in note for note in notes)
    assert not plan({"network.rank": [4, 16]}).warnings


def test_steps_as_a_search_field_is_noted():
    assert any("checkpoint_every" in note for note in plan({"steps": [100, 200]}).warnings)


def test_every_optimiser_of_a_search_has_its_own_defaults():
    planned = plan({"optimizer.type": ["adamw", "prodigy"]})
    assert [trial.recipe.optimizer.lr for trial in planned.trials] == [1e-4, 1.0]
    assert not planned.warnings
    notes = plan({"optimizer.type": ["adamw", "lion"]}, {"optimizer": {"lr": 1e-3}}).warnings
    assert any("optimizer.lr is fixed" in note for note in notes)
    mappings = [{"lr": 1e-3}, {"type": "adafactor", "clip_threshold": 2.0}]
    adamw, adafactor = (trial.recipe for trial in plan({"optimizer": mappings}).trials)
    assert (adamw.optimizer.type, adamw.optimizer.lr) == ("adamw", 1e-3)
    assert adafactor.optimizer.clip_threshold == 2.0


def test_too_many_trials_are_refused():
    with pytest.raises(UserError, match="combinations"):
        plan({"network.rank": list(range(1, 257)), "network.method": ["lora", "dora"]})


def test_the_printed_sweep_file_is_the_default_sweep(tmp_path: Path):
    file = tmp_path / "sweep.yaml"
    file.write_text(commented_sweep())
    assert load_config(SweepConfig, file) == SweepConfig(search=EXAMPLE_SEARCH)
    assert set(yaml.safe_load(commented_sweep())) == set(SweepConfig.model_fields)
