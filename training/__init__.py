"""A dataset version and recipes in, checkpoints, scores and adapter files out.

Names that need torch are imported when they are asked for (PEP 562): to read recipes, checkpoints
and scores, as leaderboards and plans do, takes no torch and no seconds.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from training.checkpoint_files import (
    Checkpoint,
    begun_with,
    check_checkpoints,
    checkpoint_dir,
    is_whole,
    list_checkpoints,
    samples_per_step_at,
    saved_hashes,
    step_folders,
)
from training.cuts import cut_recipes
from training.data.views import ADVISED_VIEWS, steps_for_views, views_per_image
from training.events import (
    BaseScoring,
    Buckets,
    CheckpointSaved,
    CheckpointScored,
    CompiledChecked,
    Encoding,
    Event,
    MemorySplit,
    OnEvent,
    PackMeasured,
    StepTaken,
    Stopping,
    TrialFailed,
    TrialStarted,
    TrialStopped,
    TrialSucceeded,
    Waiting,
    from_json_line,
    to_json_line,
)
from training.export_report import ExportReport
from training.family_facts import FAMILY_FACTS, STARTER_BASE, BaseFacts
from training.fitting import fit_recipe, usual_recipes
from training.optimizer import Optimizer
from training.recipe import Network, Recipe, Schedule, trial_id
from training.scoring.measures import Interval
from training.scoring.prompts import SUBJECT_SLOT, Limits, ScoringConfig
from training.scoring.scores import MEASURES, BaseScores, Score
from training.scoring.selection import (
    METHOD_NAMES,
    Candidate,
    Standing,
    Winner,
    approximation,
    choose_winner,
)
from training.trial_files import (
    FAILED_FILE,
    Measures,
    MetricRow,
    read_effective_batch,
    read_failure,
    read_metrics,
    read_score,
)

if TYPE_CHECKING:
    from training.checkpoints import Contents, load_checkpoint
    from training.data.class_pictures import class_samples
    from training.data.latents import LatentCache, encode_dataset
    from training.export import VerificationError, export_adapter
    from training.families import Base, base_facts, base_hash, family_of, load_base, native_size_px
    from training.frozen.sharding import refuse_quantised_shares
    from training.loop import TrainingDiverged, train
    from training.pack.plan import plan_packs
    from training.precision import resolve_precision
    from training.run.base_check import check_on_base
    from training.run.job import SweepJob, TrialSpec
    from training.run.launch import run_trials
    from training.run.probe import Measurement, ProbeRequest, probe_pack
    from training.scoring.sampling import sample
    from training.scoring.scorer import score_base, score_checkpoint

# The module of every name above that is imported when it is asked for.
_ASKED_FOR = {
    "Base": "training.families",
    "Contents": "training.checkpoints",
    "LatentCache": "training.data.latents",
    "Measurement": "training.run.probe",
    "ProbeRequest": "training.run.probe",
    "SweepJob": "training.run.job",
    "TrainingDiverged": "training.loop",
    "TrialSpec": "training.run.job",
    "VerificationError": "training.export",
    "base_facts": "training.families",
    "base_hash": "training.families",
    "check_on_base": "training.run.base_check",
    "class_samples": "training.data.class_pictures",
    "encode_dataset": "training.data.latents",
    "export_adapter": "training.export",
    "family_of": "training.families",
    "load_base": "training.families",
    "load_checkpoint": "training.checkpoints",
    "native_size_px": "training.families",
    "plan_packs": "training.pack.plan",
    "probe_pack": "training.run.probe",
    "refuse_quantised_shares": "training.frozen.sharding",
    "resolve_precision": "training.precision",
    "run_trials": "training.run.launch",
    "sample": "training.scoring.sampling",
    "score_base": "training.scoring.scorer",
    "score_checkpoint": "training.scoring.scorer",
    "train": "training.loop",
}

__all__ = [
    "ADVISED_VIEWS",
    "FAILED_FILE",
    "FAMILY_FACTS",
    "MEASURES",
    "METHOD_NAMES",
    "STARTER_BASE",
    "SUBJECT_SLOT",
    "Base",
    "BaseFacts",
    "BaseScores",
    "BaseScoring",
    "Buckets",
    "Candidate",
    "Checkpoint",
    "CheckpointSaved",
    "CheckpointScored",
    "CompiledChecked",
    "Contents",
    "Encoding",
    "Event",
    "ExportReport",
    "Interval",
    "LatentCache",
    "Limits",
    "Measurement",
    "Measures",
    "MemorySplit",
    "MetricRow",
    "Network",
    "OnEvent",
    "Optimizer",
    "PackMeasured",
    "ProbeRequest",
    "Recipe",
    "Schedule",
    "Score",
    "ScoringConfig",
    "Standing",
    "StepTaken",
    "Stopping",
    "SweepJob",
    "TrainingDiverged",
    "TrialFailed",
    "TrialSpec",
    "TrialStarted",
    "TrialStopped",
    "TrialSucceeded",
    "VerificationError",
    "Waiting",
    "Winner",
    "approximation",
    "base_facts",
    "base_hash",
    "begun_with",
    "check_checkpoints",
    "check_on_base",
    "checkpoint_dir",
    "choose_winner",
    "class_samples",
    "cut_recipes",
    "encode_dataset",
    "export_adapter",
    "family_of",
    "fit_recipe",
    "from_json_line",
    "is_whole",
    "list_checkpoints",
    "load_base",
    "load_checkpoint",
    "native_size_px",
    "plan_packs",
    "probe_pack",
    "read_effective_batch",
    "read_failure",
    "read_metrics",
    "read_score",
    "refuse_quantised_shares",
    "resolve_precision",
    "run_trials",
    "sample",
    "samples_per_step_at",
    "saved_hashes",
    "score_base",
    "score_checkpoint",
    "step_folders",
    "steps_for_views",
    "to_json_line",
    "train",
    "trial_id",
    "usual_recipes",
    "views_per_image",
]


def __getattr__(name: str) -> object:
    if name not in _ASKED_FOR:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_ASKED_FOR[name]), name)
    globals()[name] = value  # the next time it is an ordinary name
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
