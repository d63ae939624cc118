"""The words that tell the trials of a sweep apart."""

import pytest

from captioning import DatasetVersion, parse_config
from services.sweep import SweepConfig, plan_sweep
from services.variants import variant_words


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("network.rank", 8, ""),
        ("network.method", "dora", ""),
        ("network.dora_axis", "output", "dora_axis output"),
        ("network.nested_ranks", [4, 8], "nested_ranks 4/8"),
        ("network.text_encoder", None, "no text_encoder"),
        ("network.text_encoder", {}, "text_encoder"),
        ("network.text_encoder", {"lr": 2e-5}, "text_encoder.lr 2e-05"),
        ("network", {"rank": 8, "method": "dora", "alpha": 4}, "alpha 4"),
        ("optimizer.lr", 3e-4, "lr 0.0003"),
        ("optimizer", {"type": "prodigy", "d_coef": 0.5}, "prodigy, d_coef 0.5"),
        ("aspect_buckets", True, "aspect_buckets"),
        ("aspect_buckets", False, "no aspect_buckets"),
        ("min_snr_gamma", None, "no min_snr_gamma"),
        ("base_precision", "nf4", "base_precision nf4"),
        ("class_prompt", "", "class_prompt "),
    ],
)
def test_a_field_is_said_as_it_is_written(field, value, words):
    assert variant_words({field: [value, "another"]}, {field: value}) == words


def test_a_field_with_one_value_tells_nothing_apart():
    search = {"optimizer.lr": [1e-4], "seed": [0, 1]}
    assert variant_words(search, {"optimizer.lr": 1e-4, "seed": 1}) == "seed 1"


def test_every_trial_of_a_plan_has_its_words_and_cuts_their_run_s():
    dataset = DatasetVersion(
        "v0001-00000000",
        None,
        "aya",
        "ayachar",
        "person",
        (),
        (),
        "0" * 64,  # type: ignore
    )
    search = {"optimizer.lr": [1e-4, 3e-4], "network.rank": [8]}
    recipe = {"network": {"rank": 8, "nested_ranks": [4, 8]}}
    config = parse_config(SweepConfig, {"search": search, "recipe": recipe}, "test")
    plan = plan_sweep(config, dataset, "b" * 64, "sd15", "test")
    assert [trial.variant for trial in plan.trials] == ["lr 0.0001"] * 2 + ["lr 0.0003"] * 2
