"""The job of a worker group: the trials of a sweep, on one base and one dataset.

Plain values that travel between machines.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from training.frozen.sharding import refuse_quantised_shares
from training.pack.plan import TRIALS_PER_PACK
from training.recipe import Recipe
from training.scoring.prompts import ScoringConfig

Strategy = Literal["ddp", "fsdp", "deepspeed"]


@dataclass(frozen=True)
class TrialSpec:
    """One trial to train: its id, its recipe and its folder."""

    trial: str
    recipe: Recipe
    trial_dir: Path
    cuts: tuple[TrialSpec, ...] = ()  # the cuts of a run with nested ranks, see `cut_recipes`


@dataclass(frozen=True)
class SweepJob:
    """All that a worker group needs to know; plain values that travel between machines."""

    base: str  # path or hub id
    dataset_path: str
    latents_dir: str
    trials: tuple[TrialSpec, ...]
    scoring: ScoringConfig | None  # None: train only
    score_dir: str  # the bare base's images and scores, shared by the trials
    trials_per_pack: int = TRIALS_PER_PACK  # the most that are trained together
    gradient_checkpointing: bool = False  # activations are computed again, not kept
    compile: bool = False  # whether the denoiser's blocks are compiled for training
    keep_all_states: bool = True  # False: only those of the best and the last checkpoint
    strategy: Strategy = "ddp"  # ddp: every worker holds the whole frozen base; else its share
    batch_workers: int | None = None  # the workers that batch_size counts for; None: the group's
    offload_base: bool = False  # with shares: keep them in the host's memory
    share_optimizers: bool = False  # each worker keeps the optimisers of some trials
    store: str | None = None  # the farm's store, with the sets of class pictures

    def __post_init__(self) -> None:
        """Raises UserError for a quantised base that is shared out, ValueError if compiled."""
        if self.is_shared_out:
            if self.compile:
                raise ValueError("a compiled block cannot gather its weights")
            refuse_quantised_shares(spec.recipe for spec in self.trials)

    @property
    def is_shared_out(self) -> bool:
        """Whether every worker holds its share of the frozen base."""
        return self.strategy != "ddp"
