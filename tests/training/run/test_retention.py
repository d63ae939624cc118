from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from scored_candidates import candidate

from training.checkpoints import drop_state, list_checkpoints, load_checkpoint
from training.data.latents import LatentCache
from training.families import Base
from training.loop import train
from training.recipe import Recipe
from training.run.retention import drop_other_states
from training.scoring.prompts import Limits, ScoringConfig
from training.scoring.scores import BaseScores

RECIPE = Recipe(steps=4, checkpoint_every=1, batch_size=1)


@pytest.fixture
def trial_dir(tiny_base: Base, tiny_cache: LatentCache, tmp_path: Path) -> Path:
    train(tiny_base, tiny_cache, RECIPE, tmp_path / "trial")
    return tmp_path / "trial"


def with_state(trial_dir: Path) -> list[int]:
    return [one.step for one in list_checkpoints(trial_dir) if one.has_state]


def test_a_dropped_state_leaves_the_adapter_whole(trial_dir: Path) -> None:
    first = list_checkpoints(trial_dir)[0]
    before = load_checkpoint(first.path)
    drop_state(first)
    drop_state(first)
    assert not (first.path / "state.safetensors").exists()
    after = load_checkpoint(first.path)
    assert after.state == {} and before.state
    assert all(torch.equal(after.adapter[name], t) for name, t in before.adapter.items())
    assert [one.step for one in list_checkpoints(trial_dir)] == [1, 2, 3, 4]
    # Damage still shows.
    (first.path / "adapter.safetensors").write_bytes(b"cut off")
    assert [one.step for one in list_checkpoints(trial_dir)] == [2, 3, 4]


def test_a_state_that_is_merely_lost_makes_the_checkpoint_torn(trial_dir: Path) -> None:
    (trial_dir / "step-000002/state.safetensors").unlink()
    assert [one.step for one in list_checkpoints(trial_dir)] == [1, 3, 4]


def test_training_goes_on_from_the_last_checkpoint_that_has_its_state(
    tiny_base: Base, tiny_cache: LatentCache, trial_dir: Path, tmp_path: Path
) -> None:
    wanted = load_checkpoint(trial_dir / "step-000004").adapter
    for checkpoint in list_checkpoints(trial_dir)[1:]:
        drop_state(checkpoint)
    assert train(tiny_base, tiny_cache, RECIPE, trial_dir) == 4
    found = load_checkpoint(trial_dir / "step-000004")
    assert found.state and all(torch.equal(found.adapter[name], t) for name, t in wanted.items())
    lines = (trial_dir / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]


def test_without_scores_only_the_last_is_kept(trial_dir: Path) -> None:
    drop_other_states(trial_dir, RECIPE)
    assert with_state(trial_dir) == [4]


def base_scores(key: str = "k") -> BaseScores:
    return BaseScores(**candidate(0.0, key=key).score.model_dump(), folder=Path())


def test_the_best_is_the_one_that_would_win(trial_dir: Path) -> None:
    copycat = {"memorisation": 0.9}  # beyond the limit of 0.5
    # Far from tied: 0.5, 0.7 and 0.9, and a copy of the training pictures above them all.
    scores = {1: candidate(0.7, 1), 2: candidate(0.9, 2, **copycat), 3: candidate(0.5, 3)}
    for step, scored in scores.items():
        scored.score.save(trial_dir / f"step-{step:06d}")
    drop_other_states(trial_dir, RECIPE, ScoringConfig(), base_scores())
    assert with_state(trial_dir) == [1, 4]


def test_a_limit_that_is_switched_off_rules_nobody_out(trial_dir: Path) -> None:
    candidate(0.7, 1).score.save(trial_dir / "step-000001")
    candidate(0.9, 2, memorisation=0.9).score.save(trial_dir / "step-000002")
    scoring = ScoringConfig(limits=Limits(memorisation_max=None))
    drop_other_states(trial_dir, RECIPE, scoring, base_scores())
    assert with_state(trial_dir) == [2, 4]


def test_only_scores_of_the_same_setup_are_compared(trial_dir: Path) -> None:
    candidate(0.9, 1, key="of another setup").score.save(trial_dir / "step-000001")
    candidate(0.5, 2).score.save(trial_dir / "step-000002")
    (trial_dir / "step-000003/scores.json").write_text("{}")
    drop_other_states(trial_dir, RECIPE, ScoringConfig(), base_scores())
    assert with_state(trial_dir) == [2, 4]


def test_of_those_that_have_lost_their_state_none_is_the_best(trial_dir: Path) -> None:
    for step, identity in ((1, 0.9), (2, 0.7), (3, 0.5)):
        candidate(identity, step).score.save(trial_dir / f"step-{step:06d}")
    drop_state(list_checkpoints(trial_dir)[0])
    drop_other_states(trial_dir, RECIPE, ScoringConfig(), base_scores())
    assert with_state(trial_dir) == [2, 4]
