"""Optimisers shared out over the workers: bit for bit what each keeping all of them gives."""

import multiprocessing
import socket
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist

from training.checkpoints import list_checkpoints, load_checkpoint
from training.data.latents import LatentCache
from training.events import Event, StepTaken
from training.families import Base, load_base
from training.group import Group, Workers
from training.loop import Callbacks, TrainingDiverged, train_pack
from training.pack.adapters import adapter_state, bank_on, detach
from training.pack.keepers import Keeper, keepers_for
from training.pack.pack import TrialState, form_pack, last_contents
from training.pack.slot import Trial
from training.recipe import Recipe
from training.telemetry import pack_measured

WORKERS = 3
TRIALS_PER_PACK = 4
# Finished after different steps, so that others join; the last one's pictures are not finite.
TRIALS: tuple[dict[str, Any], ...] = (
    {"optimizer": {"lr": 1e-3, "lora_plus_ratio": 4}, "ema_decay": 0.9},
    {"optimizer": {"type": "schedulefree"}, "steps": 4, "network": {"rank": 3, "method": "dora"}},
    {"optimizer": {"type": "prodigy"}, "network": {"rank": 2, "init": "pissa"}},
    {"optimizer": {"type": "adafactor"}, "steps": 4},
    {"optimizer": {"type": "lion"}, "network": {"rank": 4, "nested_ranks": [2, 4]}},
    {"seed": 1},
)


def recipe(**own: Any) -> Recipe:
    shared = {"network": {"rank": 2}, "steps": 6, "checkpoint_every": 2, "batch_size": 1}
    return Recipe.model_validate({**shared, **own})


def trials(folder: Path, cache: LatentCache, precision: str) -> list[Trial]:
    recipes = [recipe(precision=precision, **own) for own in TRIALS]
    broken = [replace(bucket, mean=bucket.mean * torch.nan) for bucket in cache.buckets]
    caches = [cache] * (len(recipes) - 1) + [replace(cache, buckets=tuple(broken))]
    pairs = zip(recipes, caches, strict=True)
    return [Trial(folder / f"t{i}", own, its) for i, (own, its) in enumerate(pairs)]


def train(base: Base, packed: list[Trial], group: Group, until: int | None, share: bool) -> None:
    """To the end, or to step `until` of the first trial; every checkpoint is looked at."""
    events: list[Event] = []
    failed: list[str] = []

    def fail(trial: Trial, error: Exception) -> None:
        assert isinstance(error, TrainingDiverged)
        failed.append(trial.id)

    def look(trial: Trial, step: int, folder: Path) -> None:
        # What is scored is the same on all workers, also where another one has the average.
        bank = bank_on(base)
        assert bank is not None
        shown = adapter_state(bank, bank.acting_slots[0])
        group.wait_for_all()  # for rank 0, which writes it
        saved = load_checkpoint(folder).adapter
        assert all(torch.equal(shown[name], tensor) for name, tensor in saved.items())

    def stop() -> bool:
        steps = [event for event in events if isinstance(event, StepTaken) and event.trial == "t0"]
        return until is not None and len(steps) >= until - 1

    train_pack(
        base,
        packed,
        Callbacks(fail, on_event=events.append, on_checkpoint=look, stop=stop),
        Workers(group.rank, WORKERS, optimizers_shared_in=group if share else None),
        trials_per_pack=TRIALS_PER_PACK,
    )
    assert failed == ([] if until is not None else ["t5"])


def run(rank: int, port: int, base_path: Path, cache: LatentCache, folder: Path) -> None:
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=WORKERS)
    base, group = load_base(base_path), Group(rank, WORKERS)
    for precision in ("fp32", "fp16"):
        train(base, trials(folder / f"whole-{precision}", cache, precision), group, None, False)
        shared = trials(folder / f"shared-{precision}", cache, precision)
        # Stopped in the third step, and gone on with: in fp16 without sharing.
        train(base, shared, group, 3, True)
        train(base, shared, group, None, precision == "fp32")
    keep_only_ones_own(base, cache, group, folder)
    dist.destroy_process_group()


def keep_only_ones_own(base: Base, cache: LatentCache, group: Group, folder: Path) -> None:
    packed = trials(folder / "looked-at", cache, "fp32")[:TRIALS_PER_PACK]
    pack = form_pack(base, [TrialState(t, last_contents(base, t)) for t in packed], False, group)
    for _ in range(2):
        pack.bank.grads.fill_(1e-3)
        for slot in pack.slots:
            slot.take_step()
            slot.share_step()
        pack.bank.changed()
        kept = [slot.is_kept_here for slot in pack.slots]
        assert not all(kept)
        assert kept == [any(slot.optimizer.state.values()) for slot in pack.slots]
        left = pack.states_without(pack.slots[-1:])
        detach(base)
        pack = form_pack(base, left, False, group)
    detach(base)


@pytest.mark.slow
def test_each_worker_keeps_its_part_of_the_optimisers(
    tiny_base_path: Path, tiny_cache: LatentCache, tmp_path: Path
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn = multiprocessing.get_context("spawn")
    arguments = (port, tiny_base_path, tiny_cache, tmp_path)
    processes = [spawn.Process(target=run, args=(rank, *arguments)) for rank in range(WORKERS)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=300)
    assert [process.exitcode for process in processes] == [0] * WORKERS
    for precision in ("fp32", "fp16"):
        for number in range(len(TRIALS) - 1):
            whole = tmp_path / f"whole-{precision}/t{number}"
            shared = tmp_path / f"shared-{precision}/t{number}"
            assert_equal(shared, whole)


def keepers(recipes: list[Recipe], workers: int, taken: Sequence[Keeper] = ()) -> list[Keeper]:
    group = cast(Group, SimpleNamespace(rank=0, world_size=workers))
    return keepers_for(recipes, group, taken)


def test_the_shares_are_equal_in_bytes_not_in_trials() -> None:
    adamw, adafactor = recipe(), recipe(optimizer={"type": "adafactor"})
    chosen = keepers([adamw, adafactor, adamw, adafactor, recipe(ema_decay=0.9)], 2)
    assert [keeper.rank for keeper in chosen] == [1, 0, 0, 1, 1]
    # A worker whose trials have left takes those who join; rank 0 has more to do than the others.
    assert [keeper.rank for keeper in keepers([adamw] * 2, 2, chosen[:1])] == [0, 1]
    assert [keeper.rank for keeper in keepers([adamw], 3)] == [2]


@pytest.mark.parametrize("type", ["schedulefree", "prodigy", "adafactor", "lion"])
def test_what_an_optimiser_is_said_to_keep_is_what_it_keeps(
    type: str, tiny_base: Base, tiny_cache: LatentCache, tmp_path: Path
) -> None:
    recipes = [recipe(network={"rank": 8}), recipe(network={"rank": 8}, optimizer={"type": type})]
    packed = [Trial(tmp_path / str(i), own, tiny_cache) for i, own in enumerate(recipes)]
    states = [TrialState(trial, last_contents(tiny_base, trial)) for trial in packed]
    pack = form_pack(tiny_base, states, scaled=False)
    pack.bank.grads.fill_(1e-3)
    for slot in pack.slots:
        slot.take_step()
    adamw, other = pack_measured(pack).slot_bytes
    detach(tiny_base)
    size = recipes[1].optimizer.state_size
    assert other / adamw == pytest.approx((2 + size) / 4, abs=0.05)  # and small sums


def assert_equal(found: Path, expected: Path) -> None:
    """Every checkpoint with its state, bit for bit."""
    checkpoints = list_checkpoints(expected)
    assert len(checkpoints) >= 2
    for one, other in zip(list_checkpoints(found), checkpoints, strict=True):
        mine, wanted = load_checkpoint(one.path), load_checkpoint(other.path)
        assert wanted.state
        for tensors, others in ((mine.adapter, wanted.adapter), (mine.state, wanted.state)):
            assert tensors.keys() == others.keys()
            assert all(torch.equal(tensors[name], others[name]) for name in others)
