"""Which optimiser states of a trial are kept: those of its best and of its last checkpoint.

A trial's folder in, fewer bytes in it. Adapters, scores and pictures of all checkpoints stay, since
any of them may win; only what training would go on from is deleted.
"""

from __future__ import annotations

from pathlib import Path

from training.checkpoints import drop_state, list_checkpoints
from training.scores import SCORES_FILE, Score


def drop_other_states(trial_dir: Path) -> None:
    """Delete the states of all checkpoints but the last and the one of the highest identity.

    Of equal ones the earlier is the best; without scores only the last is kept.
    """
    checkpoints = list_checkpoints(trial_dir)
    scored = [one for one in checkpoints if (one.path / SCORES_FILE).exists()]
    best = max(scored, key=lambda one: Score.load(one.path).identity.value, default=None)
    for checkpoint in checkpoints[:-1]:
        if checkpoint.has_state and checkpoint != best:
            drop_state(checkpoint)
