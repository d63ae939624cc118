"""The words that tell the trials of a sweep apart."""

import io
from pathlib import Path

import pytest
from rich.console import Console
from score_examples import score

from captioning import DatasetVersion, parse_config
from services.cli.leaderboard import print_leaderboard
from services.sweeps.plan import SweepConfig, SweepPlan, plan_sweep
from services.sweeps.variants import variant_words
from training import Candidate, Limits, choose_winner


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
    assert ", ".join(variant_words({field: [value, "another"]}, {field: value})) == words


def test_a_field_with_one_value_tells_nothing_apart():
    search = {"optimizer.lr": [1e-4], "seed": [0, 1]}
    assert variant_words(search, {"optimizer.lr": 1e-4, "seed": 1}) == ("seed 1",)


def plan(search: dict, **network) -> SweepPlan:
    dataset = DatasetVersion("v0001-00000000", Path(), "aya", "ayachar", "person", (), (), "0" * 64)
    data = {"search": search, "recipe": {"network": network}}
    config = parse_config(SweepConfig, data, "test")
    return plan_sweep(config, dataset, "b" * 64, "sd15", "test")


def test_every_trial_of_a_plan_has_its_words_and_cuts_their_run_s():
    planned = plan({"optimizer.lr": [1e-4, 3e-4]}, rank=8, nested_ranks=[4, 8])
    assert [trial.variant for trial in planned.trials] == ["lr 0.0001"] * 2 + ["lr 0.0003"] * 2


def test_a_field_without_effect_does_not_name_a_trial():
    search = {"network.method": ["lora", "dora"], "network.dora_axis": ["input", "output"]}
    planned = plan(search)
    names = {(trial.recipe.network.method, trial.variant) for trial in planned.trials}
    assert names == {("lora", ""), ("dora", "dora_axis input"), ("dora", "dora_axis output")}


def test_the_leaderboard_has_room_for_its_numbers_beside_long_words():
    targets = ["attention", "regex:(down|up)_blocks.*attn[12].to_[qkv]$|mid_block.*to_out"]
    planned = plan({"network.targets": targets, "network.rank": [4, 8]})
    found = [
        Candidate(trial.trial, 20, trial.recipe.network.rank, "lora", score(0.2 * number),
                  variant=trial.variant)
        for number, trial in enumerate(planned.trials, start=1)
    ]  # fmt: skip
    out = io.StringIO()
    print_leaderboard(choose_winner(found, Limits()), Console(file=out, width=80))
    lines = [" ".join(line.split()) for line in out.getvalue().splitlines()]
    assert "★ lora r8 #1 20 0.80 [0.79, 0.81] 0.90 0.00 0.00 0.00 0.00" in lines
    assert [line for line in lines if line.startswith("#")] == [
        f"#1: targets {targets[1]}",
        "#2: targets attention",
    ]
