"""Turns the workers' events into progress for the person, and into MLflow rows at every score.

Events of `training.run_trials` in, lines and bars out. Never decides anything about the sweep.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.markup import escape

from services.cli.progress import Display, Step
from services.sweeps.plan import PlannedTrial, SweepPlan

# Events after which a trial's MLflow run is brought up to date.
RECORDED_EVENTS = {"score": "running", "finished": "succeeded", "failed": "failed"}
MB = 1e6
# What `step` events tell of memory, in words; they have the one or the other.
MEMORY = {
    "peak_device_bytes": "peak memory of a step: {} of tensors on the first worker's GPU",
    "resident_bytes": "largest memory after a step: {} resident in the first worker",
}


class Watcher:
    """Called with every event of a sweep, in order."""

    def __init__(
        self,
        plan: SweepPlan,
        done: dict[str, int],
        record: Callable[[PlannedTrial, str], object],
        display: Display,
        step: Step,
    ) -> None:
        """`done`: the steps of each trial that an earlier run left."""
        self._trials = {planned.trial: planned for planned in plan.trials}
        # Cuts of nested ranks take no steps of their own.
        self._done = {planned.trial: done.get(planned.trial, 0) for planned in plan.trained}
        self._total = sum(planned.recipe.steps for planned in plan.trained)
        self._record, self._display, self._step = record, display, step
        self.scoring_seconds: list[float] = []  # of every checkpoint that was scored
        self._largest: dict[str, int] = {}  # of all steps, by the name in `MEMORY`
        step.advance_to(sum(self._done.values()), self._total)  # what was done has no pace

    def __call__(self, event: dict[str, Any]) -> None:
        kind = event["kind"]
        if kind == "encode":
            self._step.note(f"encoding pictures {event['done']}/{event['total']}")
        elif kind == "buckets":
            self._display.say(f"  {buckets_line(event)}")
        elif kind == "base":
            self._step.note(f"the bare base is being scored ({event['state']})")
        elif kind == "waiting":
            self._display.say(f"  [yellow]{event['found']}[/]")
        elif kind == "stopping":
            self._display.say("  stopping: the step, or the pictures at work, are ended first")
        elif kind == "pack":
            self._display.say(f"  {pack_line(event)}")
        elif kind == "out_of_memory":
            self._display.say(f"  [yellow]{split_line(event)}[/]")
        elif kind == "compiled":
            self._display.say(f"  {compiled_line(event)}")
        if "trial" not in event:
            return
        planned = self._trials[event["trial"]]
        if "step" in event and planned.trial in self._done:
            self._done[planned.trial] = event["step"]
            self._step.advance_to(sum(self._done.values()), self._total)
        self._tell(kind, event, planned)
        if kind in RECORDED_EVENTS:
            self._record(planned, RECORDED_EVENTS[kind])

    def tell_memory(self) -> None:
        """Say once, when all is trained, how much memory the steps took at most."""
        for name, largest in self._largest.items():
            self._display.say(f"  {MEMORY[name].format(f'{largest / MB:.0f} MB')}")

    def _tell(self, kind: str, event: dict[str, Any], planned: PlannedTrial) -> None:
        network = planned.recipe.network
        title = f"{network.title}{' of nested ranks' if network.nested_ranks else ''}"
        title += f" ({planned.variant})" if planned.variant else ""
        if kind == "trial" and 0 < event["step"] < event["steps"]:
            self._display.say(escape(f"  {title} goes on from step {event['step']}"))
        elif kind == "step":
            speed = f"{event['pack_images_per_s']:.3g} images/s"
            self._step.note(f"{title} loss {event['loss']:.3f}, {speed}")
            for name in MEMORY.keys() & event.keys():
                self._largest[name] = max(self._largest.get(name, 0), event[name])
        elif kind == "score":
            self.scoring_seconds.append(event["seconds"])
            identity = event["score"]["identity"]
            self._display.say(
                escape(
                    f"  {title} step {event['step']}: identity {identity['value']:.2f} "
                    f"[{identity['low']:.2f}, {identity['high']:.2f}]"
                )
            )
        elif kind == "failed":
            self._display.say(f"  [red]{escape(title)} failed:[/] {escape(event['error'])}")


def pack_line(event: dict[str, Any]) -> str:
    """What a `pack` event says: how much memory each trial of the pack adds to the base."""
    sizes = sorted(count / MB for count in event["slot_bytes"])
    each = f"{sizes[0]:.1f}" if sizes[0] == sizes[-1] else f"{sizes[0]:.1f} to {sizes[-1]:.1f}"
    base = f"a base of {event['base_bytes'] / MB:.0f} MB"
    if event["text_encoder_bytes"]:
        base += f" and text encoders of {event['text_encoder_bytes'] / MB:.0f} MB"
    return f"pack of {len(sizes)}: {each} MB each on {base}"


def compiled_line(event: dict[str, Any]) -> str:
    """What a `compiled` event says: whether compiled blocks are to be trusted on this machine."""
    if event["error"]:
        return f"[yellow]compiling failed, going on without: {escape(event['error'])}[/]"
    difference = f"{event['difference']:.1e}"
    if event["kept"]:
        return f"compiled blocks checked: gradients differ by {difference} of themselves"
    return (
        f"[yellow]compiled blocks give other gradients here (by {difference} of themselves); "
        "going on without them, with the right ones[/]"
    )


def buckets_line(event: dict[str, Any]) -> str:
    """What a `buckets` event says: the sizes in pixels, each with how many pictures have it."""
    sizes = [f"{width} × {height}: {count}" for height, width, count in event["buckets"]]
    return f"pictures in buckets (width × height): {', '.join(sizes)}"


def split_line(event: dict[str, Any]) -> str:
    """What an `out_of_memory` event says: the pack goes on, with the same samples in each step."""
    return (
        f"memory ran out: pack of {len(event['trials'])} goes on with batches of "
        f"{event['effective_batch_size']}, {event['effective_accumulation']} in each step, which "
        "learns the same"
    )
