"""The events of training: every kind travels as a line of JSON, and nothing else is read as one."""

from __future__ import annotations

import json
import math
from typing import Any, get_args

import pytest
from pydantic import ValidationError
from scored_candidates import candidate

from training.events import (
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
    from_json_line,
    to_json_line,
)

STEP = StepTaken(
    trial="t0",
    step=2,
    steps=5,
    loss=0.25,
    lr=1e-4,
    grad_norm=None,
    step_ms=12.5,
    pack=2,
    images_per_s=80.0,
    pack_images_per_s=160.0,
    resident_bytes=10**12,
)
EXAMPLES: list[Event] = [
    Waiting("waiting for 2 × 1 CPU; free: 0 CPU, 0 GPU"),
    Encoding(3, 12),
    Buckets(((832, 1216, 3), (1024, 1024, 12))),
    BaseScoring("running"),
    TrialStarted("t0", 0, 5),
    STEP,
    PackMeasured(("t0", "t1"), (1000, 2000), 10**9, 0),
    CompiledChecked(difference=2.5e-7, kept=True, error=None),
    MemorySplit(("t0", "t1"), 2, 4, "no room\nfor it"),
    CheckpointSaved("t0", 2, "/runs/t0/step-000002"),
    CheckpointScored("t0", 2, candidate(0.5).score, 3.5),
    TrialSucceeded("t0", 5),
    TrialFailed("t0", "no space left"),
    TrialStopped("t0"),
    Stopping(),
]


def of_kind(kind: type) -> Event:
    return next(event for event in EXAMPLES if type(event) is kind)


@pytest.mark.parametrize("kind", get_args(Event))
def test_every_kind_round_trips_through_a_line_of_json(kind: type) -> None:
    event = of_kind(kind)
    line = to_json_line(event)
    assert "\n" not in line
    assert json.loads(line)["kind"] == event.kind
    assert from_json_line(line) == event
    assert from_json_line(line.encode()) == event


def test_every_kind_has_a_name_of_its_own() -> None:
    kinds = [event.kind for event in map(of_kind, get_args(Event))]
    assert len(set(kinds)) == len(kinds)


def test_a_difference_may_be_infinite() -> None:
    event = CompiledChecked(difference=math.inf, kept=False, error=None)
    assert from_json_line(to_json_line(event)) == event


@pytest.mark.parametrize("kind", get_args(Event))
def test_fields_that_a_kind_does_not_have_are_refused(kind: type) -> None:
    content = json.loads(to_json_line(of_kind(kind)))
    with pytest.raises(ValidationError, match="colour"):
        from_json_line(json.dumps({**content, "colour": "red"}))


@pytest.mark.parametrize("content", [{"kind": "trial_paused"}, {}, {"trial": "t0"}, []])
def test_unknown_kinds_are_refused(content: Any) -> None:
    with pytest.raises(ValidationError):
        from_json_line(json.dumps(content))


def test_the_row_of_a_step_has_the_keys_and_the_order_that_its_file_always_had() -> None:
    head = '{"step": 2, "loss": 0.25, "lr": 0.0001, "grad_norm": null, "step_ms": 12.5, "pack": 2, '
    speed = '"images_per_s": 80.0, "pack_images_per_s": 160.0, '
    assert json.dumps(STEP.row()) == head + speed + '"resident_bytes": 1000000000000}'
