"""What a sweep will take: per pack steps, seconds and memory, from short measured probes.

A sweep's plan in, estimates out, with the change that would make a pack fit where it does not.
Measures only what no earlier probe on this machine has; never trains anything for good.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from services.farm.machine import machine_facts, uses_gpu
from services.farm.settings import Home
from services.sweeps.measurements import MeasurementStore
from services.sweeps.plan import PlannedTrial
from training import (
    BaseFacts,
    Measurement,
    ProbeRequest,
    Recipe,
    ScoringConfig,
    family_of,
    native_size_px,
    plan_packs,
    probe_pack,
    resolve_precision,
)

Measure = Callable[[ProbeRequest], Measurement | None]
BasePrecision = Literal["int8", "nf4"]


@dataclass(frozen=True)
class PackEstimate:
    """A planned pack and what it takes; `measured` is None where it is not known."""

    trials: tuple[PlannedTrial, ...]
    request: ProbeRequest
    measured: Measurement | None
    steps: int  # that its longest trial has left

    @property
    def seconds(self) -> float | None:
        """Seconds of training at most: a pack gets faster when its shorter trials have left it."""
        return self.measured.step_s * self.steps if self.measured else None


@dataclass(frozen=True)
class Change:
    """What would make a pack fit: the settings to write, and what it takes with them."""

    text: str
    measured: Measurement


class Estimator:
    """Estimates the packs of sweeps on one base, with this home's settings and measurements."""

    def __init__(self, home: Home, base: BaseFacts, memory_bytes: int | None = None) -> None:
        """`memory_bytes`: that of an accelerator to be estimated for; None: all of this one's."""
        self._settings = home.settings
        self._memory_bytes = memory_bytes
        self._base = base
        self._store = MeasurementStore(home)
        self._machine = machine_facts(home.settings)

    def packs(self, trials: Sequence[PlannedTrial], done: Mapping[str, int]) -> list[PackEstimate]:
        """Every pack that the sweep will train, with what is known of it; nothing is measured.

        `done`: the steps that each trial has already.
        """
        estimates = []
        for indices in plan_packs([t.recipe for t in trials], self._settings.trials_per_pack):
            pack = tuple(trials[index] for index in indices)
            left = max(t.recipe.steps - done.get(t.trial, 0) for t in pack)
            request = self._request(tuple(t.recipe for t in pack))
            known = self._store.pack(self.facts(request))
            estimates.append(PackEstimate(pack, request, known, max(0, left)))
        return estimates

    def measure(self, request: ProbeRequest, again: bool = False) -> Measurement | None:
        """What the store holds of the pack, or else a probe's measurement, which is then kept.

        `again`: a probe's in any case.
        None if the probe ran out of memory; that is not kept, since memory may be free tomorrow.
        """
        facts = self.facts(request)
        measured = None if again else self._store.pack(facts)
        if measured is None:
            measured = probe_pack(request)
            if measured is not None:
                self._store.keep_pack(facts, measured)
        return measured

    def scoring_seconds(self, scoring: ScoringConfig) -> float | None:
        """Seconds that scoring a checkpoint took on this machine; None if it was never measured."""
        return self._store.scoring(self._scoring_facts(scoring))

    def keep_scoring_seconds(self, scoring: ScoringConfig, seconds: float) -> None:
        self._store.keep_scoring(self._scoring_facts(scoring), seconds)

    def _request(self, recipes: tuple[Recipe, ...]) -> ProbeRequest:
        return ProbeRequest(
            base=self._base.source,
            recipes=recipes,
            use_gpu=uses_gpu(self._settings),
            threads=self._settings.cpus_per_worker,
            gradient_checkpointing=self._settings.gradient_checkpointing,
            compile=self._settings.compile,
            memory_bytes=self._memory_bytes,
        )

    def facts(self, request: ProbeRequest) -> dict[str, Any]:
        """All that the time and the memory of a pack's step depend on."""
        import torch

        shared = request.recipes[0]
        device = torch.device("cuda" if request.use_gpu else "cpu")
        form = shared.base_precision
        return {
            "machine": self._machine,
            "base": self._base.content_hash,
            "resolution": shared.resolution or native_size_px(self._base.source),
            "precision": resolve_precision(shared, device, family_of(self._base.source).half),
            "batch_size": shared.batch_size,
            "accumulation": shared.accumulation,
            "pack": [_slot_facts(recipe) for recipe in request.recipes],
            "gradient_checkpointing": request.gradient_checkpointing,
            "torch": torch.__version__,
            **_bucket_facts(shared),
            # Older measurements, of whole bases, are named as they were.
            **({} if form == "auto" else {"base_precision": form}),
            **({"compile": True} if request.compile else {}),
        }

    def _scoring_facts(self, scoring: ScoringConfig) -> dict[str, Any]:
        return {
            "machine": self._machine,
            "base": self._base.content_hash,
            "scoring": scoring.model_dump(mode="json", exclude={"limits"}),
        }


def _bucket_facts(recipe: Recipe) -> dict[str, Any]:
    """What decides the largest bucket, of which a probe is; nothing without buckets."""
    if not recipe.aspect_buckets:
        return {}
    return {"buckets": [recipe.bucket_step_px, recipe.bucket_max_ratio]}


def _slot_facts(recipe: Recipe) -> list[Any]:
    network = recipe.network
    axis = network.dora_axis if network.method == "dora" else None
    return [
        network.method,
        network.stored_rank,
        axis,
        network.targets,
        recipe.optimizer.type,
        recipe.prior_weight > 0,
        recipe.ema_decay is not None,
        *([network.of_kernels().stored_rank] if network.conv_rank is not None else []),
        *(["text", network.of_encoders().stored_rank] if network.text_encoder is not None else []),
        *(["nested ranks"] if network.nested_ranks is not None else []),
        *(["class pictures"] if recipe.class_pictures is not None else []),
    ]


def fits(measured: Measurement | None, memory_bytes: int) -> bool:
    return measured is not None and measured.peak_bytes <= memory_bytes


def change_that_fits(
    request: ProbeRequest,
    memory_bytes: int,
    measure: Measure,
    base_precisions: Sequence[BasePrecision] = (),
) -> Change | None:
    """The first change with which the pack fits; None if none of them is enough.

    Tried in this order, each on top of the one before, by probing: smaller micro-batches (the same
    samples per step), gradient checkpointing (the same results, slower), the base in each of
    `base_precisions` if it is whole, a lower rank.
    """
    for text, changed in _changes(request, base_precisions):
        measured = measure(changed)
        if measured is not None and fits(measured, memory_bytes):
            return Change(text, measured)
    return None


def _changes(
    request: ProbeRequest, base_precisions: Sequence[BasePrecision]
) -> Iterator[tuple[str, ProbeRequest]]:
    said: list[str] = []
    shared = request.recipes[0]
    samples = shared.batch_size * shared.accumulation
    for size in _halves(shared.batch_size):
        if samples % size:
            continue
        batches = {"batch_size": size, "accumulation": samples // size}
        recipes = tuple(recipe.model_copy(update=batches) for recipe in request.recipes)
        request = replace(request, recipes=recipes)
        said = [f"batch_size: {size}, accumulation: {samples // size} in the recipe"]
        yield "; ".join(said), request
    if not request.gradient_checkpointing:
        request = replace(request, gradient_checkpointing=True)
        said.append("gradient_checkpointing: true in settings.yaml")
        yield "; ".join(said), request
    said_before = list(said)
    for form in base_precisions if shared.base_precision == "auto" else ():
        recipes = tuple(r.model_copy(update={"base_precision": form}) for r in request.recipes)
        request = replace(request, recipes=recipes)
        said = [*said_before, f"base_precision: {form} in the recipe"]
        yield "; ".join(said), request
    networks = [recipe.network for recipe in request.recipes]
    fields = ["rank"]
    if any(network.conv_rank is not None for network in networks):
        fields.append("conv_rank")
    if any(network.text_encoder and network.text_encoder.rank for network in networks):
        fields.append("text_encoder.rank")
    kinds = [each for own in networks for each in (own, own.of_kernels(), own.of_encoders())]
    for rank in _halves(max(each.rank for each in kinds)):
        recipes = tuple(_with_rank(recipe, rank) for recipe in request.recipes)
        said_of_rank = f"network.{' and '.join(fields)}: {rank} at most"
        yield "; ".join([*said, said_of_rank]), replace(request, recipes=recipes)


def _halves(number: int) -> Iterator[int]:
    while number > 1:
        number //= 2
        yield number


def _with_rank(recipe: Recipe, most: int) -> Recipe:
    network = recipe.network
    ranks = {"rank": network.rank, "conv_rank": network.conv_rank}
    less: dict[str, Any] = {
        field: min(rank, most) for field, rank in ranks.items() if rank is not None
    }
    own = network.text_encoder
    if own is not None and own.rank is not None:
        less["text_encoder"] = own.model_copy(update={"rank": min(own.rank, most)})
    return recipe.model_copy(update={"network": network.model_copy(update=less)})


def checkpoints_left(trials: Sequence[PlannedTrial], done: Mapping[str, int]) -> int:
    """How many checkpoints the trials will still be scored at."""
    return sum(
        step > done.get(planned.trial, 0)
        for planned in trials
        for step in planned.recipe.checkpoint_steps()
    )
