"""Says in the terminal what happens while a sweep is trained: a sentence for each event worth one.

Events of the training in, lines out. Bars are the progress's; nothing is decided or recorded here.
"""

from __future__ import annotations

from typing import assert_never

from services.farm.progress import Progress
from services.sweeps.plan import SweepPlan
from training import (
    BaseScoring,
    Buckets,
    CheckpointSaved,
    CheckpointScored,
    CompiledChecked,
    Encoding,
    Event,
    MemorySplit,
    PackMeasured,
    StepTaken,
    Stopping,
    TrialFailed,
    TrialStarted,
    TrialStopped,
    TrialSucceeded,
    Waiting,
)

MB = 1e6


class Watcher:
    """Called with every event of a sweep, in order."""

    def __init__(self, plan: SweepPlan, progress: Progress) -> None:
        self._titles = {planned.trial: planned.title for planned in plan.trials}
        self._progress = progress

    def __call__(self, event: Event) -> None:
        say = self._progress.say
        match event:
            case Waiting():
                say(event.found, "warning")
            case Buckets():
                say(buckets_line(event))
            case PackMeasured():
                say(pack_line(event))
            case MemorySplit():
                say(split_line(event), "warning")
            case CompiledChecked():
                say(compiled_line(event), "plain" if event.kept else "warning")
            case TrialStarted():
                if 0 < event.step < event.steps:
                    say(f"{self._titles[event.trial]} goes on from step {event.step}")
            case CheckpointScored():
                identity = event.score.identity
                say(f"{self._titles[event.trial]} step {event.step}: identity {identity}")
            case TrialFailed():
                say(f"{self._titles[event.trial]} failed: {event.error}", "error")
            case Stopping():
                say("stopping: the step, or the pictures at work, are ended first")
            case (
                Encoding()
                | BaseScoring()
                | StepTaken()
                | CheckpointSaved()
                | TrialSucceeded()
                | TrialStopped()
            ):
                pass  # the bar and its note tell it
            case _:
                assert_never(event)


def pack_line(event: PackMeasured) -> str:
    """How much memory each trial of the pack adds to the base."""
    sizes = sorted(count / MB for count in event.slot_bytes)
    each = f"{sizes[0]:.1f}" if sizes[0] == sizes[-1] else f"{sizes[0]:.1f} to {sizes[-1]:.1f}"
    base = f"a base of {event.base_bytes / MB:.0f} MB"
    if event.text_encoder_bytes:
        base += f" and text encoders of {event.text_encoder_bytes / MB:.0f} MB"
    return f"pack of {len(sizes)}: {each} MB each on {base}"


def compiled_line(event: CompiledChecked) -> str:
    """Whether compiled blocks are to be trusted on this machine."""
    if event.error:
        return f"compiling failed, going on without: {event.error}"
    difference = f"{event.difference:.1e}"
    if event.kept:
        return f"compiled blocks checked: gradients differ by {difference} of themselves"
    return (
        f"compiled blocks give other gradients here (by {difference} of themselves); "
        "going on without them, with the right ones"
    )


def buckets_line(event: Buckets) -> str:
    """The sizes of the buckets in pixels, each with how many pictures have it."""
    sizes = [f"{width} × {height}: {count}" for height, width, count in event.buckets]
    return f"pictures in buckets (width × height): {', '.join(sizes)}"


def split_line(event: MemorySplit) -> str:
    """The pack goes on in smaller micro-batches, with the same samples in each step."""
    return (
        f"memory ran out: pack of {len(event.trials)} goes on with batches of "
        f"{event.effective_batch_size}, {event.effective_accumulation} in each step, which "
        "learns the same"
    )
