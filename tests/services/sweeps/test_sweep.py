"""A sweep's plan: which trials, under which ids."""

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from captioning import DatasetVersion, UserError, load_config, parse_config
from services.cli import demo
from services.farm.settings import Settings
from services.sweeps.plan import SweepConfig, plan_sweep
from services.sweeps.recipe_text import EXAMPLE_SEARCH, commented_sweep
from services.sweeps.unused_settings import READERS, refuse_unused
from training import STARTER_BASE, Recipe, family_of, fit_recipe, plan_packs, usual_recipes

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


def test_the_demo_trains_a_character_s_trials_as_one_pack():
    config = load_config(SweepConfig, Path(demo.__file__).parent / "sweep.yaml")
    planned = plan_sweep(config, DATASET, "b" * 64, family_of(STARTER_BASE).family, "demo").trained
    networks = [(trial.recipe.network.rank, trial.recipe.network.method) for trial in planned]
    assert networks == [(4, "lora"), (4, "dora"), (16, "lora"), (16, "dora")]
    packs = plan_packs([trial.recipe for trial in planned], Settings().trials_per_pack)
    assert packs == [[0, 1, 2, 3]]


@pytest.mark.parametrize("family", usual_recipes())
def test_the_printed_sweep_file_leaves_to_each_family_what_is_its_own(family: str):
    config = parse_config(SweepConfig, yaml.safe_load(commented_sweep()), "test")
    usual = fit_recipe(Recipe(), family, "test")
    planned = plan_sweep(config, DATASET, "b" * 64, family, "test").trained
    refuse_unused(config, [trial.recipe for trial in planned], "test")
    for trial in planned:
        assert trial.recipe.model_copy(update={"network": usual.network}) == usual
    text = " ".join(line.strip(" #") for line in commented_sweep().splitlines())
    assert f"{usual.optimizer.lr} (" in text and "min_snr_gamma: 5.0" in text


@pytest.mark.parametrize(
    ("field", "value", "read_with"),
    [
        ("bucket_step_px", 32, {"aspect_buckets": [False, True]}),
        ("bucket_max_ratio", 2.0, {"aspect_buckets": [False, True]}),
        ("kept_tags", 1, {"tag_orders": [1, 4]}),
        ("schedule.decay_share", 0.3, {"schedule.type": ["cosine", "wsd"]}),
        ("network.dora_axis", "output", {"network.method": ["lora", "dora"]}),
    ],
)
def test_a_setting_that_no_trial_reads_is_refused(field: str, value, read_with):
    assert field in READERS

    def check(recipe, search):
        config = parse_config(SweepConfig, {"recipe": recipe, "search": search}, "test")
        planned = plan_sweep(config, DATASET, "b" * 64, "sd15", "test").trained
        refuse_unused(config, [trial.recipe for trial in planned], "sweep.yaml")

    part, _, leaf = field.rpartition(".")
    recipe = {part: {leaf: value}} if part else {leaf: value}
    usual = Recipe()
    usual = getattr(getattr(usual, part) if part else usual, leaf)
    for search in ({}, {field: [value, usual]}, {part: [{leaf: value}]} if part else {}):
        with pytest.raises(UserError, match=rf"sweep.yaml: {field}.*no trial here has"):
            check({} if search else recipe, search)
    check(recipe, read_with)
    check({}, {field: [value], **read_with})
    check({part: {leaf: usual}} if part else {leaf: usual}, {})
