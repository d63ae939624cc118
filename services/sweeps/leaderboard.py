"""The newest scored sweep of a character, with its checkpoints ranked.

A home in, the sweep as it stands on disk out, finished or not. `Winner.table` is the ranking, the
same one by which the sweep's winner is exported.
"""

from __future__ import annotations

from dataclasses import dataclass

from captioning import UserError, load_character
from services.farm.settings import Home
from services.sweeps.files import ScoredSweep, choose_whole, newest_scored
from training import Winner


@dataclass(frozen=True)
class Leaderboard:
    """A sweep, and the winner so far among its checkpoints."""

    sweep: ScoredSweep
    winner: Winner


def leaderboard(home: Home, character: str) -> Leaderboard:
    """Rank the scored checkpoints of the newest scored sweep; a damaged one does not win.

    Raises UserError for an unknown character, when no checkpoint of its sweeps is scored, and when
    all that are scored are damaged.
    """
    load_character(home.store, character)
    sweep = newest_scored(home.store, character, home.settings.workers)
    winner = choose_whole(home.store, sweep.candidates, sweep.asked.config.scoring.limits)
    if winner is None:
        raise UserError(
            f"sweep {sweep.asked.sweep}",
            "every scored checkpoint is damaged",
            f"run the same `lorafarm sweep {character} --config ...` again; it trains what is "
            "not whole",
        )
    return Leaderboard(sweep, winner)
