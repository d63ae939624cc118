"""Orders the checkpoints of a sweep for people: the winner first, then by identity.

Results in, rows out. The winner itself is chosen elsewhere and only shown here.
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
    """All checkpoints: the winner, then those that fail the fewest guards, at last the unscored.

    Among equals by higher identity, then fewer steps, then smaller rank.
    """
    winner = character.winning_checkpoint

    def order(entry: tuple[TrialResult, CheckpointResult]) -> tuple[float, ...]:
        trial, checkpoint = entry
        measures = checkpoint.measures
        return (
            checkpoint is not winner,
            measures is None,
            len(checkpoint.failed_guards),
            -measures["identity"].value if measures else 0.0,
            checkpoint.step,
            trial.rank,
        )

    entries = sorted(
        ((trial, checkpoint) for trial in character.trials for checkpoint in trial.checkpoints),
        key=order,
    )
    return [
        LeaderboardRow(
            place=index if checkpoint.measures else None,
            trial=trial,
            checkpoint=checkpoint,
            winner=checkpoint is winner,
        )
        for index, (trial, checkpoint) in enumerate(entries, start=1)
    ]
