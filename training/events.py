"""The events that tell what happens while trials are trained and scored.

They are frozen dataclasses, told apart by their literal `kind`. The workers send them, and the
driver hands them on in order. Each can be written as one line of JSON and read back, so that a
server can stream them. Sizes are in bytes, times in seconds unless a name says otherwise. Nothing
is decided here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, with_config

from training.scoring.scores import Score

_strict: Any = with_config(ConfigDict(extra="forbid"))


@_strict
@dataclass(frozen=True)
class Waiting:
    """No CPU or GPU is free for the worker group yet."""

    found: str  # what is wanted and what is free, in a sentence
    kind: Literal["waiting"] = "waiting"


@_strict
@dataclass(frozen=True)
class Encoding:
    """Pictures and captions are being encoded by the base's VAE and text encoders."""

    done: int  # pictures that are encoded
    total: int  # pictures that have to be encoded
    kind: Literal["encoding"] = "encoding"


@_strict
@dataclass(frozen=True)
class Buckets:
    """The aspect buckets into which the pictures fell."""

    buckets: tuple[tuple[int, int, int], ...]  # (height in px, width in px, pictures)
    kind: Literal["buckets"] = "buckets"


@_strict
@dataclass(frozen=True)
class BaseScoring:
    """The bare base, with which all checkpoints are compared, is being scored, or has been."""

    state: Literal["running", "succeeded"]  # "succeeded": its score is on disk
    kind: Literal["base_scoring"] = "base_scoring"


@_strict
@dataclass(frozen=True)
class TrialStarted:
    """A trial begins, or goes on from its last checkpoint."""

    trial: str  # its id
    step: int  # the step of that checkpoint; 0 at the beginning
    steps: int  # how many the trial takes in all
    kind: Literal["trial_started"] = "trial_started"


@_strict
@dataclass(frozen=True)
class StepTaken:
    """One trial has taken one optimiser step; see `row` for its line in metrics.jsonl."""

    trial: str  # its id
    step: int  # the number of steps taken, this one included
    steps: int  # how many the trial takes in all
    loss: float  # the mean over the step's samples of all workers
    lr: float  # the learning rate of this step
    grad_norm: float | None  # before clipping; None for an overflowed fp16 step, which is skipped
    step_ms: float  # of the whole pack
    pack: int  # trials in it
    images_per_s: float  # of this trial
    pack_images_per_s: float  # of all trials in the pack
    peak_device_bytes: int | None = None  # on CUDA: the peak of the step's tensors
    resident_bytes: int | None = None  # on a CPU, which keeps no such count
    kind: Literal["step_taken"] = "step_taken"

    def row(self) -> dict[str, int | float | None]:
        """The step's row in the trial's metrics.jsonl; memory that was not counted is left out."""
        left_out = {"trial", "steps", "kind"}
        if self.peak_device_bytes is None:
            left_out.add("peak_device_bytes")
        if self.resident_bytes is None:
            left_out.add("resident_bytes")
        values = ((field.name, getattr(self, field.name)) for field in fields(self))
        return {name: value for name, value in values if name not in left_out}


@_strict
@dataclass(frozen=True)
class PackMeasured:
    """What the trials of a pack and their base hold in memory; once for every pack."""

    trials: tuple[str, ...]  # their ids
    slot_bytes: tuple[int, ...]  # each trial's weights, gradients and optimiser state
    base_bytes: int  # the frozen denoiser in this worker
    text_encoder_bytes: int  # text encoders that stay in memory for adapters; else 0
    kind: Literal["pack_measured"] = "pack_measured"


@_strict
@dataclass(frozen=True)
class CompiledChecked:
    """A step of compiled blocks was computed again uncompiled, and the gradients compared."""

    difference: float | None  # the largest, as a share of a part's length
    kept: bool  # False: the base goes on uncompiled
    error: str | None  # why nothing could be compiled
    kind: Literal["compiled_checked"] = "compiled_checked"


@_strict
@dataclass(frozen=True)
class MemorySplit:
    """Memory ran out: these trials go on in smaller micro-batches, with the same samples a step."""

    trials: tuple[str, ...]  # their ids
    effective_batch_size: int  # samples of a trial in a micro-batch of one worker, from now on
    effective_accumulation: int  # micro-batches in a step, from now on
    found: str  # the first words of the error
    kind: Literal["memory_split"] = "memory_split"


@_strict
@dataclass(frozen=True)
class CheckpointSaved:
    """A checkpoint is whole on disk."""

    trial: str  # its id
    step: int  # at which it was saved
    path: str  # its folder, as the worker names it
    kind: Literal["checkpoint_saved"] = "checkpoint_saved"


@_strict
@dataclass(frozen=True)
class CheckpointScored:
    """A checkpoint has its score."""

    trial: str  # its id
    step: int  # of the checkpoint
    score: Score  # as it lies in scores.json
    seconds: float  # how long the scoring took
    kind: Literal["checkpoint_scored"] = "checkpoint_scored"


@_strict
@dataclass(frozen=True)
class TrialSucceeded:
    """All steps of a trial are taken, its checkpoints kept and scored."""

    trial: str  # its id
    step: int  # the last one
    kind: Literal["trial_succeeded"] = "trial_succeeded"


@_strict
@dataclass(frozen=True)
class TrialFailed:
    """A trial ended with an error; the others go on."""

    trial: str  # its id
    error: str  # what ended it, in a sentence
    kind: Literal["trial_failed"] = "trial_failed"


@_strict
@dataclass(frozen=True)
class TrialStopped:
    """A trial was stopped on request; it goes on from its last checkpoint the next time."""

    trial: str  # its id
    kind: Literal["trial_stopped"] = "trial_stopped"


@_strict
@dataclass(frozen=True)
class Stopping:
    """The driver was asked to stop; the workers finish the step or pictures at work."""

    kind: Literal["stopping"] = "stopping"


Event = (
    Waiting
    | Encoding
    | Buckets
    | BaseScoring
    | TrialStarted
    | StepTaken
    | PackMeasured
    | CompiledChecked
    | MemorySplit
    | CheckpointSaved
    | CheckpointScored
    | TrialSucceeded
    | TrialFailed
    | TrialStopped
    | Stopping
)
OnEvent = Callable[[Event], None]


@cache
def _lines() -> TypeAdapter[Event]:
    """What reads and writes events; it is made when it is first needed, since that takes time."""
    # JSON has no infinity, and a difference of gradients may be one.
    numbers = ConfigDict(ser_json_inf_nan="strings")
    return TypeAdapter(Annotated[Event, Field(discriminator="kind")], config=numbers)


def to_json_line(event: Event) -> str:
    """The event as one line of JSON, without its newline."""
    return _lines().dump_json(event).decode()


def from_json_line(line: str | bytes) -> Event:
    """The event that `to_json_line` wrote. Raises pydantic's ValidationError for anything else."""
    return _lines().validate_json(line)
