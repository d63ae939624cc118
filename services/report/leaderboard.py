"""The rows of the report's leaderboard, in the order of the sweep's own ranking.

Results in, rows out. `training.choose_winner` ranks; nothing is ranked again here.
"""

from __future__ import annotations

from dataclasses import dataclass

from services.report.data import CharacterReport, CheckpointResult, TrialResult


@dataclass(frozen=True)
class LeaderboardRow:
    """A checkpoint at its place; `place` is None when it was not scored."""

    place: int | None
    trial: TrialResult
    checkpoint: CheckpointResult
    winner: bool


def leaderboard_rows(character: CharacterReport) -> list[LeaderboardRow]:
    """All checkpoints by their place, and after them those that were not scored, by step."""
    winner = character.winning_checkpoint
    rows = [
        LeaderboardRow(checkpoint.place, trial, checkpoint, checkpoint is winner)
        for trial in character.trials
        for checkpoint in trial.checkpoints
    ]
    ranked = sorted((row for row in rows if row.place is not None), key=lambda row: row.place or 0)
    unscored = (row for row in rows if row.place is None)
    return ranked + sorted(unscored, key=lambda row: (row.checkpoint.step, row.trial.rank))
