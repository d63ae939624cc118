"""The recipe is strict, and a trial's id depends on all that decides the training and no more."""

import hashlib
from dataclasses import replace
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from captioning import DatasetVersion, UserError, parse_config
from training.recipe import Recipe, trial_id


def test_defaults_round_trip_through_yaml() -> None:
    recipe = Recipe()
    dumped = yaml.safe_dump(recipe.model_dump(mode="json"))
    assert parse_config(Recipe, yaml.safe_load(dumped), "recipe.yaml") == recipe


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"network": {"rank": 0}}, "recipe.yaml: network.rank"),
        ({"network": {"rank": 257}}, "network.rank"),
        ({"network": {"rank": True}}, "network.rank"),
        ({"network": {"rank": "16"}}, "network.rank"),
        ({"network": {"rnak": 8}}, "network.rnak"),
        ({"network": {"method": "loha"}}, "network.method"),
        ({"optimizer": {"lr": 0}}, "optimizer.lr"),
        ({"optimizer": {"lr": float("nan")}}, "optimizer.lr"),
        ({"optimizer": {"betas": [0.9, 1.0]}}, "betas"),
        ({"steps": 0}, "steps"),
        ({"seed": -1}, "seed"),
        ({"caption_dropout": 1.5}, "caption_dropout"),
        ({"steps": 10, "schedule": {"warmup_steps": 11}}, "warmup_steps"),
        ({"stepps": 10}, "stepps"),
        ({"optimizer": {"type": "sgd"}}, "adamw, adamw8bit, adafactor, lion, prodigy, schedule"),
        ({"optimizer": {"type": ["lion"]}}, "optimizer: "),
        ({"optimizer": {"type": "adafactor", "betas": [0.9, 0.99]}}, "optimizer.betas: unknown"),
        ({"optimizer": {"type": "lion", "eps": 1e-8}}, "optimizer.eps: unknown"),
        ({"optimizer": {"type": "adamw", "d_coef": 2}}, "optimizer.d_coef: unknown"),
        ({"optimizer": {"type": "prodigy", "d_ceof": 2}}, "did you mean 'd_coef'"),
        ({"optimizer": {"type": "prodigy", "lora_plus_ratio": 16}}, "one step size"),
        ({"optimizer": {"type": "schedulefree", "lora_plus_ratio": 16}}, "lora_plus_ratio"),
        ({"optimizer": {"type": "schedulefree", "betas": [0, 0.9]}}, "betas"),
        ({"ema_decay": 1.0}, "ema_decay"),
        ({"optimizer": {"type": "schedulefree"}, "ema_decay": 0.9}, "ema_decay 0.9"),
        ({"optimizer": {"type": "schedulefree"}, "schedule": {"type": "wsd"}}, "schedule.type wsd"),
    ],
)
def test_bad_values_are_refused_by_name(data: dict[str, object], said: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_config(Recipe, data, "recipe.yaml")
    assert said in str(caught.value)


def test_a_misspelt_key_gets_a_suggestion() -> None:
    with pytest.raises(UserError, match="rank"):
        parse_config(Recipe, {"network": {"rnak": 8}}, "recipe.yaml")


def test_yaml_scientific_notation_without_a_dot_is_a_number() -> None:
    data = yaml.safe_load("optimizer: {lr: 1e-4}")  # PyYAML reads it as the text "1e-4"
    assert parse_config(Recipe, data, "recipe.yaml").optimizer.lr == 1e-4


@given(steps=st.integers(1, 5000), every=st.integers(1, 6000))
def test_checkpoints_come_at_multiples_and_always_at_the_last_step(steps: int, every: int) -> None:
    found = Recipe(steps=steps, checkpoint_every=every).checkpoint_steps()
    assert found[-1] == steps
    assert list(found) == sorted(set(found))
    assert all(step % every == 0 for step in found[:-1])
    assert len(found) == -(-steps // every)


def test_trial_id_is_that_of_the_content(tiny_dataset: DatasetVersion) -> None:
    recipe = Recipe()
    known = trial_id(tiny_dataset, "base", recipe)
    assert known == trial_id(tiny_dataset, "base", Recipe.model_validate(recipe.model_dump()))
    assert known.startswith("t")
    assert len(known) == 13
    others = {
        trial_id(tiny_dataset, "other", recipe),
        trial_id(replace(tiny_dataset, manifest_sha256="0" * 64), "base", recipe),
        trial_id(tiny_dataset, "base", Recipe(seed=1)),
        trial_id(tiny_dataset, "base", Recipe(steps=801)),
    }
    assert len(others | {known}) == 5


def test_alpha_written_out_or_left_out_is_the_same_trial(tiny_dataset: DatasetVersion) -> None:
    left_out = Recipe.model_validate({"network": {"rank": 8}})
    written = Recipe.model_validate({"network": {"rank": 8, "alpha": 8}})
    assert trial_id(tiny_dataset, "b", left_out) == trial_id(tiny_dataset, "b", written)


@pytest.mark.parametrize(
    ("data", "known"),
    [
        ({}, "c9540cafaa8aa5a3"),
        ({"optimizer": {"lr": 2e-4}}, "d32e8d1dafd10d76"),
        (
            {
                "optimizer": {
                    "type": "adamw",
                    "lr": 1e-3,
                    "betas": [0.8, 0.95],
                    "eps": 1e-6,
                    "weight_decay": 0.1,
                    "lora_plus_ratio": 4.0,
                },
                "network": {"method": "dora", "rank": 8},
            },
            "68c470d208155a73",
        ),
    ],
)
def test_trials_from_before_there_was_a_choice_of_optimiser_keep_their_names(
    data: dict[str, object], known: str
) -> None:
    text = Recipe.model_validate(data).canonical()
    assert hashlib.sha256(text.encode()).hexdigest().startswith(known)


@pytest.mark.parametrize(
    "type", ["adamw", "adamw8bit", "adafactor", "lion", "prodigy", "schedulefree"]
)
def test_every_optimiser_round_trips_with_defaults_of_its_own(type: str) -> None:
    recipe = Recipe.model_validate({"optimizer": {"type": type}})
    assert recipe.optimizer.type == type
    assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe
    assert (recipe.canonical() == Recipe().canonical()) == (type == "adamw")


def test_settings_that_came_later_name_other_trials_only_when_they_are_used(
    tiny_dataset: DatasetVersion,
) -> None:
    used = [
        {"network": {"rank_stabilised": True}},
        {"network": {"init": "pissa"}},
        {"optimizer": {"lora_plus_ratio": 16}},
        {"huber_c": 0.1},
        {"noise_offset": 0.1},
        {"ema_decay": 0.99},
        {"aspect_buckets": True},
        {"aspect_buckets": True, "bucket_step_px": 32},
        {"aspect_buckets": True, "bucket_max_ratio": 2.0},
        {"network": {"text_encoder": {}}},
    ]
    recipes = [Recipe(), *map(Recipe.model_validate, used)]
    assert len({trial_id(tiny_dataset, "b", recipe) for recipe in recipes}) == 11
    unused = Recipe(bucket_step_px=32, bucket_max_ratio=2.0)
    assert trial_id(tiny_dataset, "b", unused) == trial_id(tiny_dataset, "b", Recipe())
    later = ("rank_stabilised", "init", "lora_plus_ratio", "huber_c", "noise_offset", "ema_decay")
    for name in (*later, "bucket", "text_encoder"):
        assert name not in Recipe().canonical()


def test_an_adapter_on_text_encoders_is_named_by_what_it_comes_to() -> None:
    def named(own: dict[str, Any], **network: Any) -> str:
        data = {"network": {"rank": 8, "text_encoder": own, **network}, "optimizer": {"lr": 2e-4}}
        return Recipe.model_validate(data).canonical()

    assert named({}) == named({"rank": 8}) == named({"alpha": 8.0, "lr": 2e-4})
    assert named({"rank": 4}) == named({"rank": 4, "alpha": 4.0})
    # As with convolutions: an alpha that is said is that of all layers.
    assert named({"rank": 4}, alpha=2.0) == named({"rank": 4, "alpha": 2.0}, alpha=2.0)
    assert len({named({}), named({"rank": 4}), named({"alpha": 4.0}), named({"lr": 1e-4})}) == 4


@pytest.mark.parametrize("type", ["prodigy", "schedulefree"])
def test_optimisers_of_one_learning_rate_take_none_for_text_encoders(type: str) -> None:
    data: dict[str, Any] = {"optimizer": {"type": type}, "network": {"text_encoder": {}}}
    assert Recipe.model_validate(data).encoder_lr == Recipe.model_validate(data).optimizer.lr
    data["network"]["text_encoder"] = {"lr": 1e-4}
    with pytest.raises(ValidationError, match=r"network.text_encoder.lr cannot be set"):
        Recipe.model_validate(data)


def test_the_axis_of_a_dora_names_another_trial_and_that_of_a_lora_does_not(
    tiny_dataset: DatasetVersion,
) -> None:
    def named(method: str, axis: str) -> str:
        recipe = Recipe.model_validate({"network": {"method": method, "dora_axis": axis}})
        return trial_id(tiny_dataset, "b", recipe)

    assert named("lora", "input") == named("lora", "output")
    assert named("dora", "input") != named("dora", "output")
