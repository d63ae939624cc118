"""Candidates with whole scores that rest on nothing, for tests of what is made of scores."""

from __future__ import annotations

import numpy as np

from training.scoring.measures import Interval
from training.scoring.prompts import ScoringConfig
from training.scoring.scores import Score
from training.scoring.selection import Candidate

PICTURES = 24


def interval(value: float, width: float = 0.02) -> Interval:
    return Interval(value=value, low=value - width, high=value + width)


def candidate(
    identity: float,
    step: int = 200,
    rank: int = 4,
    *,
    width: float = 0.02,
    method: str = "lora",
    trial: str = "",
    key: str = "k",
    normalised: bool = True,
    luck: int | None = None,
    fidelity: float = 0.9,
    drift: float = 0.1,
    memorisation: float = 0.0,
) -> Candidate:
    # Pictures as far apart as gives the mean an interval of about `width`; with the same `luck`
    # the same prompts go well and badly.
    named = f"{trial} {method} {rank} {step}".encode()
    rng = np.random.default_rng(list(named) if luck is None else luck)
    around = rng.normal(size=PICTURES)
    around *= width / 1.96 * PICTURES**0.5 / around.std()
    score = Score(
        base_key=key,
        identity=interval(identity, width),
        identities=tuple(identity + around - around.mean()),
        prompt_fidelity=interval(fidelity),
        drift=interval(drift),
        leak=interval(0),
        memorisation=interval(memorisation),
        diversity=interval(0.3),
        identity_raw=interval(0.7),
        prompt_cosine=interval(0.3),
        base_identity=interval(0.0, 0.05),
        floor=0.5,
        ceiling=0.8,
        identity_normalised=normalised,
        prompt_fidelity_normalised=True,
        references="holdout",
        reference_count=5,
        embedder="clip",
        embedder_revision="1",
        config=ScoringConfig(),
        pictures=(),
    )
    return Candidate(trial or f"t{method}{rank}", step, rank, method, score)
