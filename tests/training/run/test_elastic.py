"""A trial that goes on with another number of workers: the same steps, the same adapter."""

import multiprocessing
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from training.checkpoints import list_checkpoints, load_checkpoint, samples_per_step_at
from training.compiled import compile_blocks
from training.data.latents import LatentCache
from training.events import CompiledChecked, Event, StepTaken
from training.families import Base, load_base
from training.families.compiled_blocks import CompiledBlocks
from training.group import ALONE, Workers
from training.loop import Callbacks, train_pack
from training.pack.slot import Trial
from training.recipe import Recipe


def recipe(**changes: Any) -> Recipe:
    data: dict[str, Any] = {
        "network": {"rank": 2, "method": "dora"},
        # A larger eps than Adam's own: else a gradient of pure rounding moves a weight by an lr.
        "optimizer": {"lr": 1e-3, "eps": 1e-4},
        "steps": 6,
        "checkpoint_every": 2,
        "batch_size": 2,
    }
    return Recipe.model_validate({**data, **changes})


def with_class_pictures(batch_size: int) -> Recipe:
    named = {"class_pictures": "c0123456789ab", "prior_weight": 1.0}
    return recipe(batch_size=batch_size, steps=2, **named)


def train(
    base: Base,
    trial: Trial,
    workers: Workers = ALONE,
    until: int | None = None,
    on_event: Callable[[Event], None] = lambda event: None,
    compiled: CompiledBlocks | None = None,
) -> None:
    """Train the trial; `until`: stop after this step, as a kill would after its checkpoint."""
    steps: list[int] = []

    def hear(event: Event) -> None:
        on_event(event)
        if isinstance(event, StepTaken):
            steps.append(event.step)

    def fail(trial: Trial, error: Exception) -> None:
        raise error

    callbacks = Callbacks(
        fail, on_event=hear, stop=lambda: until is not None and len(steps) >= until - 1
    )
    train_pack(base, [trial], callbacks, workers, compiled=compiled)


def begin(rank: int, port: int, base_path: Path, cache: LatentCache, folder: Path) -> None:
    """One of two workers: a trial left after three steps, and one of three workers' batches."""
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    base = load_base(base_path)
    train(base, Trial(folder / "broken", recipe(), cache), Workers(rank, 2), until=3)
    uneven = recipe(batch_size=1, steps=3)
    train(base, Trial(folder / "uneven", uneven, cache), Workers(rank, 2, batch_workers=3))
    preserving = Trial(folder / "preserving", with_class_pictures(1), cache, cache)
    train(base, preserving, Workers(rank, 2))
    # The compiler follows the code and generates none, which takes seconds and not minutes.
    compiled = compile_blocks(base, backend="eager")
    events: list[Event] = []
    own = Trial(folder / "compiled", recipe(), cache)
    train(base, own, Workers(rank, 2), on_event=events.append, compiled=compiled)
    checked = [event.kept for event in events if isinstance(event, CompiledChecked)]
    assert checked == ([True, True] if rank == 0 else [])
    dist.destroy_process_group()


def assert_equal(found: Path, expected: Path) -> None:
    pairs = zip(list_checkpoints(found), list_checkpoints(expected), strict=True)
    for one, other in pairs:
        wanted = load_checkpoint(other.path).adapter
        for name, tensor in load_checkpoint(one.path).adapter.items():
            largest = float(wanted[name].abs().max())
            # Two workers add up in another order than one: 1.6e-5 was seen, and less on others.
            torch.testing.assert_close(tensor, wanted[name], rtol=0, atol=2e-5 * largest)


@pytest.mark.slow
def test_begun_by_two_workers_and_ended_by_one(
    tiny_base: Base, tiny_base_path: Path, tiny_cache: LatentCache, tmp_path: Path
) -> None:
    torch.set_num_threads(1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn = multiprocessing.get_context("spawn")
    arguments = (port, tiny_base_path, tiny_cache, tmp_path)
    processes = [spawn.Process(target=begin, args=(rank, *arguments)) for rank in range(2)]
    for process in processes:
        process.start()
    train(tiny_base, Trial(tmp_path / "unbroken", recipe(batch_size=4), tiny_cache))
    train(tiny_base, Trial(tmp_path / "three", recipe(batch_size=3, steps=3), tiny_cache))
    alone = Trial(tmp_path / "one", with_class_pictures(2), tiny_cache, tiny_cache)
    train(tiny_base, alone)
    for process in processes:
        process.join(timeout=300)
    assert [process.exitcode for process in processes] == [0, 0]

    broken = Trial(tmp_path / "broken", recipe(), tiny_cache)
    assert [checkpoint.step for checkpoint in list_checkpoints(broken.trial_dir)] == [2]
    assert samples_per_step_at(broken.trial_dir / "step-000002") == 4
    train(tiny_base, broken)
    assert_equal(broken.trial_dir, tmp_path / "unbroken")
    # Three micro-batches a step for two workers: one of them has none in the second round.
    assert_equal(tmp_path / "uneven", tmp_path / "three")
    assert_equal(tmp_path / "preserving", tmp_path / "one")
    assert_equal(tmp_path / "compiled", tmp_path / "unbroken")


def test_trials_with_other_steps_share_no_pack(
    tiny_base: Base, tiny_cache: LatentCache, tmp_path: Path
) -> None:
    begun = Trial(tmp_path / "begun", recipe(), tiny_cache)
    train(tiny_base, begun, Workers(batch_workers=2), until=3)
    with pytest.raises(ValueError, match="samples per step"):
        train_pack(
            tiny_base,
            [begun, Trial(tmp_path / "new", recipe(), tiny_cache)],
            Callbacks(lambda trial, error: None),
        )
