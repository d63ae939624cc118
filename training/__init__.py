"""A dataset version and recipes in, checkpoints, scores and adapter files out."""

from training.checkpoints import (
    Checkpoint,
    Contents,
    begun_with,
    check_checkpoints,
    list_checkpoints,
    load_checkpoint,
    samples_per_step_at,
)
from training.data.class_pictures import class_samples
from training.data.latents import LatentCache, encode_dataset
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
from training.export import ExportReport, VerificationError, export_adapter
from training.families import (
    FAMILIES,
    STARTER_BASE,
    Base,
    BaseFacts,
    base_facts,
    base_hash,
    family_of,
    load_base,
    native_size_px,
)
from training.fitting import fit_recipe, usual_recipes
from training.frozen.sharding import refuse_quantised_shares
from training.loop import TrainingDiverged, train
from training.nested import cut_recipes
from training.optimizer import Optimizer
from training.pack.plan import plan_packs
from training.precision import resolve_precision
from training.recipe import Network, Recipe, Schedule, trial_id
from training.run.base_check import check_on_base
from training.run.job import SweepJob, TrialSpec
from training.run.launch import run_trials
from training.run.probe import Measurement, ProbeRequest, probe_pack
from training.run.worker import FAILED_FILE
from training.scoring.measures import Interval
from training.scoring.prompts import SUBJECT_SLOT, Limits, ScoringConfig
from training.scoring.sampling import sample
from training.scoring.scorer import score_base, score_checkpoint
from training.scoring.scores import BaseScores, Score
from training.scoring.selection import (
    METHOD_NAMES,
    Candidate,
    Winner,
    approximation,
    choose_winner,
)

__all__ = [
    "ADVISED_VIEWS",
    "FAILED_FILE",
    "FAMILIES",
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
    "MemorySplit",
    "Network",
    "OnEvent",
    "Optimizer",
    "PackMeasured",
    "ProbeRequest",
    "Recipe",
    "Schedule",
    "Score",
    "ScoringConfig",
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
    "choose_winner",
    "class_samples",
    "cut_recipes",
    "encode_dataset",
    "export_adapter",
    "family_of",
    "fit_recipe",
    "from_json_line",
    "list_checkpoints",
    "load_base",
    "load_checkpoint",
    "native_size_px",
    "plan_packs",
    "probe_pack",
    "refuse_quantised_shares",
    "resolve_precision",
    "run_trials",
    "sample",
    "samples_per_step_at",
    "score_base",
    "score_checkpoint",
    "steps_for_views",
    "to_json_line",
    "train",
    "trial_id",
    "usual_recipes",
    "views_per_image",
]
