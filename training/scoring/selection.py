"""Chooses the winner among scored checkpoints, and says why.

Candidates and limits in, the winner with a sentence and a ranked table out. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from captioning import UserError
from training.scoring import measures
from training.scoring.prompts import Limits
from training.scoring.scores import Score

METHOD_NAMES = {"lora": "LoRA", "dora": "DoRA"}
# A sentence names this many tied checkpoints and counts the rest.
NAMED_TIES = 2


def approximation(nested_ranks: Sequence[int]) -> str:
    """What is said of every candidate of a run with nested ranks."""
    return f"approximate, from one run of nested ranks {', '.join(map(str, nested_ranks))}"


@dataclass(frozen=True)
class Candidate:
    """A trial's checkpoint with its score."""

    trial: str
    step: int
    rank: int
    method: str  # "lora" | "dora"
    score: Score
    views: float | None = None  # of each training picture, on average, up to this step
    nested_ranks: tuple[int, ...] = ()  # of the run that its rank was cut from, or is the whole of
    variant: str = ""  # what tells its trial from others of its method and rank, in words

    @property
    def title(self) -> str:
        title = f"rank {self.rank} {METHOD_NAMES.get(self.method, self.method)}"
        if self.variant:
            title += f" ({self.variant})"
        title += f" at step {self.step}"
        if self.nested_ranks:
            title += f" ({approximation(self.nested_ranks)})"
        return title


@dataclass(frozen=True)
class Standing:
    """A candidate's place."""

    candidate: Candidate
    place: int  # 1 is the winner
    tied: bool  # its identity cannot be told from the highest one
    failed_guards: tuple[str, ...]  # in words, such as "drift 0.31 is above 0.25"


@dataclass(frozen=True)
class Winner:
    """The chosen checkpoint."""

    candidate: Candidate
    reason: str
    table: tuple[Standing, ...]  # all candidates, the winner first
    passed_guards: bool  # False: none passed, and this is the best of the rest
    above_base: bool  # its identity interval lies wholly above the bare base's


def choose_winner(candidates: Sequence[Candidate], limits: Limits) -> Winner:
    """The highest identity among the candidates that pass the guards.

    Candidates that a paired bootstrap over pictures cannot tell from the highest are tied with it;
    among them the fewest steps win, then the smaller rank, then the higher identity. If none
    passes, those that fail the fewest guards are chosen from, and `passed_guards` is False. Raises
    ValueError without candidates, UserError when their scores are not comparable (another base,
    dataset, config or embedder).
    """
    if not candidates:
        raise ValueError("no scored checkpoint to choose from")
    keys = {candidate.score.base_key for candidate in candidates}
    if len(keys) > 1:
        raise UserError(
            "scores",
            f"they rest on {len(keys)} different setups (base, dataset, prompts or embedder) and "
            "cannot be compared",
            "run the sweep again: it scores every checkpoint in the same way",
        )
    failed = [failed_guards(candidate.score, limits) for candidate in candidates]
    fewest = min(len(guards) for guards in failed)
    eligible = [c for c, guards in zip(candidates, failed, strict=True) if len(guards) == fewest]
    best = min(eligible, key=_by_identity)
    of_best, config = np.array(best.score.identities), best.score.config  # (N,)
    counts = measures.resample_counts(len(of_best), config.bootstrap, config.bootstrap_seed)
    tied = [
        c
        for c in eligible
        if c is best or not measures.tells_apart(of_best, np.array(c.score.identities), counts)
    ]
    chosen = min(tied, key=_cost)
    table = _table(candidates, failed, chosen, tied)
    above_base = chosen.score.identity.low > chosen.score.base_identity.high
    guards = table[0].failed_guards
    return Winner(
        candidate=chosen,
        reason=_reason(chosen, best, tied, eligible, guards, len(candidates), above_base),
        table=table,
        passed_guards=fewest == 0,
        above_base=above_base,
    )


def failed_guards(score: Score, limits: Limits) -> tuple[str, ...]:
    """The limits that a score breaks, in words; empty when it passes."""
    guards = (
        ("prompt fidelity", score.prompt_fidelity.value, limits.prompt_fidelity_min, "below"),
        ("drift", score.drift.value, limits.drift_max, "above"),
        ("memorisation", score.memorisation.value, limits.memorisation_max, "above"),
    )
    return tuple(
        f"{name} {value:.2f} is {side} {limit:g}"
        for name, value, limit, side in guards
        if limit is not None and (value < limit if side == "below" else value > limit)
    )


def _cost(candidate: Candidate) -> tuple[float | str, ...]:
    identity = candidate.score.identity.value
    return candidate.step, candidate.rank, -identity, candidate.method, candidate.trial


def _by_identity(candidate: Candidate) -> tuple[float | str, ...]:
    return -candidate.score.identity.value, *_cost(candidate)


def _table(
    candidates: Sequence[Candidate],
    failed: Sequence[tuple[str, ...]],
    chosen: Candidate,
    tied: Sequence[Candidate],
) -> tuple[Standing, ...]:
    """The winner, then those that fail the fewest guards by falling identity."""
    rows = sorted(
        zip(candidates, failed, strict=True),
        key=lambda row: (
            row[0] is not chosen,
            len(row[1]),
            *_by_identity(row[0]),
        ),
    )
    tied_ids = {id(candidate) for candidate in tied}
    return tuple(
        Standing(candidate, place, id(candidate) in tied_ids, guards)
        for place, (candidate, guards) in enumerate(rows, start=1)
    )


def _reason(
    chosen: Candidate,
    best: Candidate,
    tied: Sequence[Candidate],
    eligible: Sequence[Candidate],
    failed: tuple[str, ...],
    total: int,
    above_base: bool,
) -> str:
    identity = chosen.score.identity
    others = sorted((c for c in tied if c is not chosen), key=_by_identity)
    if chosen is best:
        text = f"{chosen.title}: highest identity {identity}"
        if others:
            text += f"; tied with {_named(others)}, and preferred for {_advantage(chosen, others)}"
        else:
            text += _runner_up(chosen, eligible)
    else:
        text = (
            f"{chosen.title}: identity {identity}, tied with the highest "
            f"({best.title}: {best.score.identity}) and preferred for "
            f"{_advantage(chosen, [best])}"
        )
        more = len(others) - 1
        if more:
            text += f"; {more} more checkpoint{'s are' if more > 1 else ' is'} tied"
    if failed:
        text = f"No checkpoint passes the guards; the nearest is {text}. It fails: "
        text += ", ".join(failed)
    elif len(eligible) < total:
        lost = total - len(eligible)
        text += f"; {lost} of {total} checkpoints fail{'s' if lost == 1 else ''} the guards"
    text += "."
    if not above_base:
        text += (
            f" Its interval is not above the bare base's {chosen.score.base_identity}: "
            "the likeness is not shown."
        )
    if not chosen.score.identity_normalised:
        text += " Identity is not normalised: this embedder hardly tells the character apart."
    return text


def _named(others: Sequence[Candidate]) -> str:
    names = [f"{c.title} ({c.score.identity.value:.2f})" for c in others[:NAMED_TIES]]
    more = len(others) - len(names)
    if more:
        return f"{', '.join(names)} and {more} more"
    return " and ".join(names)


def _advantage(chosen: Candidate, others: Sequence[Candidate]) -> str:
    """What the tie went by: the first of steps, rank and identity in which `chosen` is ahead."""
    if all(chosen.step < other.step for other in others):
        return "fewer steps"
    level = [other for other in others if other.step == chosen.step]
    if all(chosen.rank < other.rank for other in level):
        return "smaller rank" if len(level) == len(others) else "fewer steps or smaller rank"
    return "the higher identity at equal steps and rank"


def _runner_up(chosen: Candidate, eligible: Sequence[Candidate]) -> str:
    rest = [c for c in eligible if c is not chosen]
    if not rest:
        return ""
    following = min(rest, key=_by_identity)
    return f", clear of the next ({following.title}: {following.score.identity})"
