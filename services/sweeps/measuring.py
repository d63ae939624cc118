"""Measures what a sweep would take on this machine, before it is started.

A sweep's config in; the estimate of every pack out, and the change that would make a pack fit where
it does not. Only what no earlier measurement tells is measured, in a few steps of each pack.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec

from captioning import DatasetVersion, UserError
from services.farm.machine import GIB, memory_bytes, uses_gpu
from services.farm.progress import UNWATCHED, Progress
from services.farm.settings import Home, Settings
from services.sweeps.estimates import (
    BasePrecision,
    Change,
    Estimator,
    PackEstimate,
    change_that_fits,
    checkpoints_left,
    fits,
)
from services.sweeps.plan import SweepConfig
from services.sweeps.prepare import plan_config, steps_done


@dataclass(frozen=True)
class TooLarge:
    """A pack that does not fit, and what would make it fit; None: no change that was tried does."""

    pack: PackEstimate
    change: Change | None


@dataclass(frozen=True)
class MeasuredSweep:
    """What a sweep takes, pack by pack."""

    packs: tuple[PackEstimate, ...]
    pictures: int  # that are trained on
    workers: int
    checkpoints: int  # that are still to be scored
    scoring_s: float | None  # that one of them takes; None if no sweep has measured it yet
    limit_bytes: int  # the memory of one worker that the packs were judged by
    too_large: tuple[TooLarge, ...]
    not_counted: tuple[str, ...]  # what the figures leave out, in sentences

    @property
    def fits(self) -> bool:
        return not self.too_large


def measure_sweep(
    home: Home,
    dataset: DatasetVersion,
    config: SweepConfig,
    source: str,
    *,
    memory_gib: float | None = None,
    again: bool = False,
    progress: Progress = UNWATCHED,
) -> MeasuredSweep:
    """Estimate every pack of a sweep; nothing is trained for good.

    `memory_gib`: judge by this much memory of a worker in place of this machine's. `again`: measure
    also what is known. Raises UserError for a config that asks for the impossible, and where
    training is to run on a GPU that is not in this machine.
    """
    base, plan, config = plan_config(home, dataset, config, source)
    given = None if memory_gib is None else round(memory_gib * GIB)
    here = memory_bytes(home.settings)
    if here is None:
        raise UserError(
            "settings.yaml: use_gpu",
            "is true, and there is no CUDA device in this machine to measure on",
            "run the command on a machine of the cluster that has one",
        )
    limit = here if given is None else given
    estimator = Estimator(home, base, given)
    done = steps_done(home, plan)
    packs = _measured(estimator, estimator.packs(plan.trained, done), again, progress)
    lacking = [pack for pack in packs if not fits(pack.measured, limit)]
    return MeasuredSweep(
        packs=tuple(packs),
        pictures=len(dataset.train),
        workers=home.settings.workers,
        checkpoints=checkpoints_left(plan.trials, done),
        scoring_s=estimator.scoring_seconds(config.scoring),
        limit_bytes=limit,
        too_large=tuple(_advised(estimator, lacking, limit, home.settings, progress)),
        not_counted=_not_counted(home.settings),
    )


def _measured(
    estimator: Estimator, packs: list[PackEstimate], again: bool, progress: Progress
) -> list[PackEstimate]:
    """The packs with a measurement each, except those that ran out of memory."""
    unknown = [pack for pack in packs if again or pack.measured is None]
    if not unknown:
        return packs
    measured = {}
    with progress.step("a few steps of each pack measured") as step:
        for number, pack in enumerate(unknown, start=1):
            measured[pack.request] = estimator.measure(pack.request, again)
            step.advance_to(number, len(unknown))
    return [replace(pack, measured=measured.get(pack.request, pack.measured)) for pack in packs]


def quantised_forms(settings: Settings) -> tuple[BasePrecision, ...]:
    """The forms of the base that would take less of an accelerator's memory, the larger first.

    There are none on a CPU, where the base is whole in the same memory while it is read.
    """
    if not uses_gpu(settings) or settings.strategy != "ddp" or find_spec("bitsandbytes") is None:
        return ()
    return "int8", "nf4"


def _advised(
    estimator: Estimator,
    packs: Sequence[PackEstimate],
    limit: int,
    settings: Settings,
    progress: Progress,
) -> list[TooLarge]:
    """The packs, each with the first change with which it fits."""
    if not packs:
        return []
    advised = []
    with progress.step("changes tried") as step:
        for number, pack in enumerate(packs, start=1):
            forms = quantised_forms(settings)
            change = change_that_fits(pack.request, limit, estimator.measure, forms)
            advised.append(TooLarge(pack, change))
            step.advance_to(number, len(packs))
    return advised


def _not_counted(settings: Settings) -> tuple[str, ...]:
    said = []
    workers = settings.workers
    if workers > 1:
        said.append(f"one worker was measured: what {workers} exchange at a step is not in it")
    if settings.compile:
        said.append("what compiling takes, a minute or more per pack, is not in it")
    if settings.strategy != "ddp":
        said.append(
            f"the whole base was measured, of which each worker holds 1/{workers}: it takes less"
        )
    if settings.share_optimizers:
        said.append(
            "all optimiser states were measured, of which each worker keeps those of its part of "
            "a pack's trials: it takes less"
        )
    return tuple(said)
