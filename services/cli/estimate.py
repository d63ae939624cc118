"""`lorafarm estimate`: what a sweep would take on this machine, before it is started.

A sweep file in; a table, and the change that makes a pack fit, out. Measures what is not known yet.
"""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console

from captioning import UserError, load_config
from services.cli.progress import Display
from services.coordinator.run import plan_config, steps_done
from services.datasets.versions import newest_dataset
from services.farm.durations import duration
from services.farm.machine import GIB, memory_bytes, uses_gpu
from services.farm.settings import Home, Settings
from services.sweeps.estimate_text import gigabytes, pack_table, scoring_text, titles
from services.sweeps.estimates import (
    BasePrecision,
    Estimator,
    PackEstimate,
    change_that_fits,
    checkpoints_left,
    fits,
)
from services.sweeps.plan import SweepConfig


def estimate_command(
    home: Home,
    character: str,
    config: Path | None,
    memory_gib: float | None,
    again: bool,
    console: Console,
) -> bool:
    """Print the estimate of every pack; False if one of them does not fit.

    `memory_gib`: judge by this much memory of a worker in place of this machine's. `again`: measure
    what is known too.
    """
    parsed = load_config(SweepConfig, config) if config else SweepConfig()
    dataset = newest_dataset(home, character, console)
    source = str(config) if config else "the default sweep"
    base, plan, parsed = plan_config(home, dataset, parsed, source)
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
    estimates = _measured(estimator, estimator.packs(plan.trained, done), again, console)
    workers = home.settings.workers
    console.print(pack_table(estimates, len(dataset.train), workers))
    known = [estimate.seconds for estimate in estimates if estimate.seconds is not None]
    scoring_s = estimator.scoring_seconds(parsed.scoring)
    scoring = scoring_text(checkpoints_left(plan.trials, done), scoring_s)
    if len(known) == len(estimates):
        console.print(f"training: {duration(sum(known), estimated=True)}; {scoring}")
    if workers > 1:
        console.print(f"one worker was measured: what {workers} exchange at a step is not in it")
    if home.settings.compile:
        console.print("what compiling takes, a minute or more per pack, is not in it")
    if home.settings.strategy != "ddp":
        console.print(
            f"the whole base was measured, of which each worker holds 1/{workers}: it takes less"
        )
    if home.settings.share_optimizers:
        console.print(
            "all optimiser states were measured, of which each worker keeps those of its part of "
            "a pack's trials: it takes less"
        )
    lacking = [estimate for estimate in estimates if not fits(estimate.measured, limit)]
    for estimate in lacking:
        _advise(estimator, estimate, limit, home.settings, console)
    return not lacking


def _measured(
    estimator: Estimator, estimates: list[PackEstimate], again: bool, console: Console
) -> list[PackEstimate]:
    """The estimates with a measurement each, but for packs that ran out of memory."""
    unknown = [estimate for estimate in estimates if again or estimate.measured is None]
    if not unknown:
        return estimates
    measured = {}
    with Display(console) as display, display.step("a few steps of each pack measured") as step:
        for number, estimate in enumerate(unknown, start=1):
            measured[estimate.request] = estimator.measure(estimate.request, again)
            step.advance_to(number, len(unknown))
    return [
        replace(estimate, measured=measured.get(estimate.request, estimate.measured))
        for estimate in estimates
    ]


def quantised_forms(settings: Settings) -> tuple[BasePrecision, ...]:
    """The forms of the base that would take less of an accelerator's memory, the larger first.

    On a CPU none: the base is whole in the very memory while it is read.
    """
    if not uses_gpu(settings) or settings.strategy != "ddp" or find_spec("bitsandbytes") is None:
        return ()
    return "int8", "nf4"


def _advise(
    estimator: Estimator,
    estimate: PackEstimate,
    limit: int,
    settings: Settings,
    console: Console,
) -> None:
    """Say by what change the pack would fit."""
    title = titles(estimate.trials)
    needs = gigabytes(estimate.measured.peak_bytes) if estimate.measured else "more"
    console.print(
        f"[red]{title}: does not fit:[/] it needs {needs}, and {gigabytes(limit)} are there"
    )
    with Display(console) as display, display.step("changes tried"):
        forms = quantised_forms(settings)
        change = change_that_fits(estimate.request, limit, estimator.measure, forms)
    if change is None:
        console.print(
            "  no smaller batch or rank fits, with gradient checkpointing either: lower "
            "`resolution`, or set a smaller `trials_per_pack` in settings.yaml"
        )
        return
    console.print(
        f"  it fits with {change.text}\n"
        f"  ({gigabytes(change.measured.peak_bytes)}, {change.measured.step_s:.2g} s per step)"
    )
