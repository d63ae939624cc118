"""The newest scored sweep of a character, with its checkpoints ranked.

A home in, the sweep as it stands on disk out, finished or not. `Winner.table` is the ranking.
"""

from __future__ import annotations

from dataclasses import dataclass

from captioning import load_character
from services.farm.settings import Home
from services.sweeps.files import ScoredSweep, newest_scored
from training import Winner, choose_winner


@dataclass(frozen=True)
class Leaderboard:
    """A sweep, and the winner so far among its checkpoints."""

    sweep: ScoredSweep
    winner: Winner


def leaderboard(home: Home, character: str) -> Leaderboard:
    """Rank every scored checkpoint of the newest scored sweep.

    Raises UserError for an unknown character, and when no checkpoint of its sweeps is scored.
    """
    load_character(home.store, character)
    sweep = newest_scored(home.store, character, home.settings.workers)
    return Leaderboard(sweep, choose_winner(sweep.candidates, sweep.asked.config.scoring.limits))
