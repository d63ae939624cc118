"""What MLflow keeps of a trial: its facts, its curves, its params, as plain values.

A trial's folder and scores in, points, params and tags out. Pure but for reading `metrics.jsonl`;
knows nothing of MLflow.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath

from services.farm.states import State
from training import Interval, Measures, read_metrics


@dataclass(frozen=True)
class DatasetReference:
    """The dataset version a trial was trained on."""

    character: str
    version: str  # vNNNN-hash8
    manifest: Path
    manifest_sha256: str


@dataclass(frozen=True)
class TrialFacts:
    """Everything about a trial that its run shows."""

    trial: str
    recipe: Mapping[str, object]  # nested as in recipe.yaml; becomes dotted params
    dataset: DatasetReference
    trial_dir: Path
    scores: Mapping[int, Measures]  # by checkpoint step
    state: State
    tags: Mapping[str, str] = field(default_factory=dict)  # base, family, embedder, ...


@dataclass(frozen=True)
class Point:
    key: str
    step: int
    value: float
    timestamp: int  # milliseconds since 1970


def trial_points(trial: TrialFacts, start_ms: int) -> Iterator[Point]:
    """The trial's curves. A point's time is the run's start plus the training time up to its step.

    That makes points a function of the folder alone, so that a repeated batch adds no row.
    """
    elapsed_ms = 0.0
    times: list[tuple[int, int]] = [(0, start_ms)]
    for row in read_metrics(trial.trial_dir):
        elapsed_ms += row.values.get("step_ms", 0.0)
        timestamp = start_ms + round(elapsed_ms)
        times.append((row.step, timestamp))
        for key, value in row.values.items():
            yield Point(f"train/{key}", row.step, value, timestamp)
    for step, measures in sorted(trial.scores.items()):
        timestamp = max(time for at, time in times if at <= step)
        for name, interval in measures.items():
            yield from _interval_points(name, interval, step, timestamp)


def _interval_points(name: str, interval: Interval, step: int, timestamp: int) -> Iterator[Point]:
    yield Point(f"score/{name}", step, interval.value, timestamp)
    yield Point(f"score/{name}.low", step, interval.low, timestamp)
    yield Point(f"score/{name}.high", step, interval.high, timestamp)


def dotted_params(value: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, str]]:
    """A nested recipe as params: {"network": {"rank": 8}} gives ("network.rank", "8")."""
    for key, inner in value.items():
        if isinstance(inner, Mapping):
            yield from dotted_params(inner, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", public_value(str(inner))


def public_tags(tags: Mapping[str, str]) -> dict[str, str]:
    """The tags with every value as `public_value` gives it."""
    return {key: public_value(value) for key, value in tags.items()}


def public_value(value: str) -> str:
    """`value`, but of an absolute path only its last part: a person's folders are nobody's data.

    A content hash beside it says which model or file was meant.
    """
    file, at, config = value.partition(".safetensors@")  # a checkpoint and what completes it
    if at:
        return public_value(file + at[:-1]) + "@" + public_value(config)
    if PurePosixPath(value).is_absolute() or PureWindowsPath(value).is_absolute():
        return PureWindowsPath(value).name or value
    return value
