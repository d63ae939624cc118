"""A home of an earlier version opens and goes on: what it holds is read as it was read then."""

from __future__ import annotations

from pathlib import Path

import pytest
from home_before import EXPECTED, WHOLE, copy_home, make_whole

from services.farm.settings import Home, open_home
from services.registry.mlflow_runs import STATE_TAG, SWEEP_TAG, TRIAL_TAG, MlflowRuns
from services.registry.registry import Registry
from services.report.farm_status import farm_status
from services.report.sweep_report import write_report
from services.sweeps.files import dataset_of, is_intact, sweeps
from services.sweeps.leaderboard import leaderboard
from services.sweeps.plan import plan_sweep
from training import check_checkpoints, list_checkpoints, load_checkpoint


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return open_home(copy_home(tmp_path / "home"))


@pytest.fixture
def home_with_winner(home: Home) -> Home:
    """The home with the weights of its winner, as far as the farm can tell."""
    winner = EXPECTED["standings"][0]
    make_whole(home.path, winner["trial"], winner["step"])
    return home


def test_its_settings_and_characters_are_read(home: Home) -> None:
    assert home.settings.trials_per_pack == 4
    [aya] = farm_status(home).characters
    assert (aya.name, aya.pictures) == ("aya", 24)
    assert aya.newest is not None and aya.newest.name == "v0001-bf6fd106"


def test_a_sweep_that_is_asked_for_again_has_the_same_ids(home: Home) -> None:
    """The ids are hashes of recipes, dataset and base: with the same ids the sweep goes on."""
    [asked] = sweeps(home.store, "aya")
    dataset = dataset_of(home.store, asked)
    plan = plan_sweep(asked.config, dataset, asked.base_hash, asked.family, "test")
    assert plan.sweep == asked.sweep == EXPECTED["sweep"]
    assert [planned.trial for planned in plan.trials] == EXPECTED["trials"]


def test_its_leaderboard_is_the_one_of_then_to_the_last_digit(
    home_with_winner: Home,
) -> None:
    winner = leaderboard(home_with_winner, "aya").winner
    found = [
        {
            "place": standing.place,
            "trial": standing.candidate.trial,
            "step": standing.candidate.step,
            "method": standing.candidate.method,
            "rank": standing.candidate.rank,
            "views": standing.candidate.views,
            "tied": standing.tied,
            "failed_guards": list(standing.failed_guards),
            "base_key": standing.candidate.score.base_key,
            "measures": {
                name: [measure.value, measure.low, measure.high]
                for name, measure in standing.candidate.score.measures().items()
            },
        }
        for standing in winner.table
    ]
    assert found == EXPECTED["standings"]
    facts = {"reason": winner.reason, "passed_guards": winner.passed_guards}
    assert facts | {"above_base": winner.above_base} == {
        key: EXPECTED[key] for key in ("reason", "passed_guards", "above_base")
    }


def test_its_checkpoints_are_listed_and_the_whole_one_is_loaded(home: Home) -> None:
    trial, step = WHOLE
    listed = list_checkpoints(home.store.runs / trial)
    assert [(one.step, one.has_state) for one in listed] == [(80, False), (160, True)]
    contents = load_checkpoint(listed[0].path)
    assert (contents.step, contents.recipe.network.rank, contents.state) == (step, 4, {})
    # The weights of the other one were left out of the fixture: its hash says so.
    whole, torn = check_checkpoints(home.store.runs / trial)
    assert [one.step for one in whole] == [80] and [one.path.name for one in torn] == [
        "step-000160"
    ]
    intact = [c for c in leaderboard(home, "aya").sweep.candidates if is_intact(home.store, c)]
    assert [(c.trial, c.step) for c in intact] == [WHOLE]


def test_its_report_is_written(home_with_winner: Home, tmp_path: Path) -> None:
    page = write_report(home_with_winner, ["aya"], tmp_path / "report.html").read_text()
    assert "rank 16 LoRA at step 80: identity 0.57" in page
    assert "aya.sd15/1" in page  # its registered version
    assert page.count("✓ passed") == len(EXPECTED["standings"])


def test_its_report_ranks_what_the_leaderboard_ranks(home: Home, tmp_path: Path) -> None:
    """The weights of the best checkpoints are missing here, so that the best whole one wins."""
    winner = leaderboard(home, "aya").winner
    assert (winner.candidate.trial, winner.candidate.step) == WHOLE
    assert len(winner.table) < len(EXPECTED["standings"])
    page = write_report(home, ["aya"], tmp_path / "report.html").read_text()
    assert "rank 4 LoRA at step 80: identity" in page
    assert page.count("✓ passed") == len(winner.table)


def test_its_registry_and_its_runs_are_read(home: Home) -> None:
    adapters = farm_status(home).adapters
    assert adapters == Registry(home.tracking_uri, home.artifacts).list()
    assert [(one.name, one.version, one.aliases) for one in adapters or ()] == [
        ("aya.sd15", 1, ("candidate", "production")),
        ("bruno.sd15", 1, ("candidate", "production")),
    ]
    winner = EXPECTED["standings"][0]
    assert (adapters[0].trial, adapters[0].step) == (winner["trial"], winner["step"])


def test_its_runs_are_gone_on_with_and_get_their_state(home: Home) -> None:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(home.tracking_uri)
    experiment = client.get_experiment_by_name("aya")
    assert experiment is not None

    def runs() -> dict[str, str]:
        found = client.search_runs([experiment.experiment_id])
        return {run.data.tags.get(TRIAL_TAG, ""): run.info.run_id for run in found}

    before = runs()
    assert before.keys() == {"", *EXPECTED["trials"]}
    mlflow_runs = MlflowRuns(client, home.artifacts)
    sweep = mlflow_runs.open_sweep("aya", EXPECTED["sweep"])
    assert sweep == before[""], "the run of then, and no second one"
    mlflow_runs.set_state(sweep, "succeeded")
    assert runs() == before
    tags = client.get_run(sweep).data.tags
    assert (tags[SWEEP_TAG], tags[STATE_TAG]) == (EXPECTED["sweep"], "succeeded")
