"""Decides which optimiser states of a trial are kept: of its best and of its last checkpoint.

A trial's folder in, fewer bytes in it. Adapters, scores and pictures of all checkpoints stay, since
any of them may win; only what training would go on from is deleted.
"""

from __future__ import annotations

from pathlib import Path

from training.checkpoint_files import Checkpoint, last_with_state, list_checkpoints
from training.checkpoints import drop_state
from training.recipe import Recipe
from training.scoring.prompts import Limits, ScoringConfig
from training.scoring.scores import BaseScores
from training.scoring.selection import Candidate, choose_winner


def drop_other_states(
    trial_dir: Path,
    recipe: Recipe,
    scoring: ScoringConfig | None = None,
    base_scores: BaseScores | None = None,
) -> None:
    """Delete the states of all checkpoints but the last whole one and the best one.

    Both are chosen among the checkpoints that have their states. The best is the one that
    `choose_winner` would choose by the limits of `scoring`, where scores are comparable to
    `base_scores`; without scores only the last is kept. A whole sweep may choose another one of the
    trial, since ties depend on the highest identity of all trials.
    """
    with_state = [checkpoint for checkpoint in list_checkpoints(trial_dir) if checkpoint.has_state]
    # Its bytes are verified: were it damaged, another one would be what training goes on from.
    last = last_with_state(trial_dir)
    if last is None:
        return
    best = None
    if scoring is not None and base_scores is not None:
        best = _best_step(with_state, recipe, scoring.limits, base_scores)
    for checkpoint in with_state:
        if checkpoint.step not in (best, last.step):
            drop_state(checkpoint)


def _best_step(
    checkpoints: list[Checkpoint], recipe: Recipe, limits: Limits, base_scores: BaseScores
) -> int | None:
    """The step that would win; None if no checkpoint has a comparable score."""
    from training.scoring.scorer import existing_score

    network = recipe.network
    scored = [(one.step, existing_score(one.path, base_scores)) for one in checkpoints]
    candidates = [
        Candidate("", step, network.rank, network.method, score)
        for step, score in scored
        if score is not None
    ]
    return choose_winner(candidates, limits).candidate.step if candidates else None
