"""A sweep with nested ranks: one trial is trained, and each of its ranks is a candidate."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import report_examples as examples
from registry_examples import CARD
from rich.console import Console
from score_examples import score

from captioning import DatasetVersion, UserError
from services.cli.leaderboard import print_leaderboard
from services.farm.settings import Home, Settings
from services.registry.bundle import card_json
from services.report.page import build_report
from services.sweeps.estimates import Estimator, checkpoints_left
from services.sweeps.files import newest_scored, record_sweep
from services.sweeps.plan import SweepConfig, plan_sweep
from services.sweeps.prepare import plan_config, steps_done
from training import Limits, approximation, choose_winner
from training.checkpoints import save_checkpoint

DATASET = DatasetVersion("v0001-00000000", Path(), "aya", "ayachar", "person", (), (), "0" * 64)


def config(search: dict | None = None, **network) -> SweepConfig:
    whole = {"rank": 16, "nested_ranks": [4, 8, 16], **network}
    recipe = {"steps": 20, "checkpoint_every": 10, "network": whole}
    return SweepConfig.model_validate({"recipe": recipe, "search": search or {}})


def test_one_run_replaces_a_sweep_over_ranks(home_path: Path, dataset: DatasetVersion):
    home = Home(home_path, Settings(cpus_per_worker=1, use_gpu=False))
    asked = config({"network.method": ["lora", "dora"]})
    base, plan, _ = plan_config(home, dataset, asked, "test")
    assert [trial.recipe.network.rank for trial in plan.trained] == [16, 16]
    ranks = [trial.recipe.network.rank for trial in plan.trials]
    assert ranks == [16, 4, 8, 16, 4, 8]
    assert len({trial.trial for trial in plan.trials}) == 6
    first = plan.trained[0]
    cuts = plan.cuts_of(first.trial)
    assert [(cut.recipe.network.rank, cut.recipe.network.alpha) for cut in cuts] == [(4, 4), (8, 8)]
    assert {cut.cut_of for cut in cuts} == {first.trial}
    # Trained are two trials, in one pack; scored are six.
    done = steps_done(home, plan)
    packs = Estimator(home, base).packs(plan.trained, done)
    assert [len(pack.trials) for pack in packs] == [2]
    assert checkpoints_left(plan.trials, done) == 12


def test_ranks_that_are_not_the_largest_are_not_trained():
    with pytest.raises(UserError, match="set it to 16"):
        plan_sweep(config(rank=8), DATASET, "b" * 64, "sd15", "test")


def test_the_registry_names_the_rank_and_that_it_is_approximate():
    said = approximation((4, 8, 16))
    assert said == "approximate, from one run of nested ranks 4, 8, 16"
    card = replace(CARD, rank=8, approximate=said)
    assert card.tags()["rank"] == "8" and card.tags()["approximate"] == said
    assert json.loads(card_json("aya.sd15", "r", card, ()))["approximate"] == said
    assert "approximate" not in CARD.tags()


def test_leaderboard_and_reason_say_rank_and_approximate(home_path: Path, dataset: DatasetVersion):
    home = Home(home_path, Settings(cpus_per_worker=1, use_gpu=False))
    base, plan, resolved = plan_config(home, dataset, config(), "test")
    record_sweep(home.store, dataset, plan, resolved, base)
    for planned, identity in zip(plan.trials, (0.5, 0.4, 0.8), strict=True):
        folder = home.store.runs / planned.trial
        score(identity).save(save_checkpoint(folder, 20, planned.recipe, {}, {}).path)
    winner = choose_winner(newest_scored(home.store, "aya", 1).candidates, Limits())
    assert winner.candidate.trial == plan.cuts_of(plan.trained[0].trial)[1].trial
    assert winner.reason.startswith(
        "rank 8 LoRA at step 20 (approximate, from one run of nested ranks 4, 8, 16): highest"
    )
    out = io.StringIO()
    print_leaderboard(winner, Console(file=out, width=200))
    assert "lora r8≈" in out.getvalue() and "≈ approximate, from one run of" in out.getvalue()


def test_the_report_says_it_too(tmp_path: Path):
    whole = examples.character()
    first = replace(whole.trials[0], losses=(), note=approximation((4, 8)))
    data = examples.report(replace(whole, trials=(first, *whole.trials[1:])))
    page = build_report(data, tmp_path / "report.html").read_text("utf-8")
    assert page.count("approximate, from one run of nested ranks 4, 8") == 1
