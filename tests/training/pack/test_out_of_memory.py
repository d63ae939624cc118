"""Memory that runs out in a step: smaller micro-batches, the same samples, the same adapter."""

from __future__ import annotations

import json
import multiprocessing
import resource
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from training.checkpoints import list_checkpoints, load_checkpoint
from training.data.latents import LatentCache
from training.events import Event, MemorySplit
from training.families import Base, load_base
from training.group import Workers
from training.loop import Callbacks, train, train_pack
from training.micro_batches import OutOfMemory
from training.pack.slot import Trial
from training.recipe import Recipe
from training.trial_files import EFFECTIVE_FILE

MakeCache = Callable[..., LatentCache]
TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def recipe(**changes: Any) -> Recipe:
    data: dict[str, Any] = {
        "network": {"rank": 4},
        # With Adam's usual 1e-8 a gradient of pure rounding noise would move a weight by a step.
        "optimizer": {"lr": 1e-3, "eps": 1e-4},
        "steps": 4,
        "checkpoint_every": 2,
        "batch_size": 4,
    }
    return Recipe.model_validate({**data, **changes})


def limit_samples(
    base: Base, most: int, monkeypatch: pytest.MonkeyPatch, error: type[Exception] | None = None
) -> list[int]:
    """Let the UNet's forward pass run out of memory above `most` samples; the sizes it sees."""
    sizes: list[int] = []
    predict = base.predict

    def limited(latents: torch.Tensor, *arguments: torch.Tensor) -> torch.Tensor:
        sizes.append(len(latents))
        output = predict(latents, *arguments)
        if len(latents) > most:
            raise (error or torch.OutOfMemoryError)("no room for it\nand more words")
        return output

    monkeypatch.setattr(base, "predict", limited)
    return sizes


def losses(trial_dir: Path) -> list[float]:
    text = (trial_dir / "metrics.jsonl").read_text()
    return [json.loads(line)["loss"] for line in text.splitlines()]


def effective(trial_dir: Path) -> tuple[int, int]:
    content = json.loads((trial_dir / EFFECTIVE_FILE).read_text())
    return content["effective_batch_size"], content["effective_accumulation"]


def assert_same_training(found: Path, wanted: Path) -> None:
    """Equal up to float rounding, which the other order of summation changes."""
    assert losses(found) == pytest.approx(losses(wanted), rel=TOLERANCE)
    for one, other in zip(list_checkpoints(found), list_checkpoints(wanted), strict=True):
        adapter, expected = load_checkpoint(one.path).adapter, load_checkpoint(other.path).adapter
        assert adapter.keys() == expected.keys()
        for name, tensor in expected.items():
            error = float((adapter[name] - tensor).abs().max())
            assert error <= TOLERANCE * float(tensor.abs().max()), name


@pytest.mark.parametrize(
    ("batch_size", "accumulation", "split"),
    [(4, 1, (2, 2)), (2, 3, (1, 6)), (3, 1, (1, 3))],
)
def test_smaller_micro_batches_give_the_same_adapters(
    tiny_base: Base,
    tiny_cache: LatentCache,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    batch_size: int,
    accumulation: int,
    split: tuple[int, int],
) -> None:
    batches = {"batch_size": batch_size, "accumulation": accumulation}
    recipes = [
        recipe(**batches),
        recipe(**batches, seed=1, network={"rank": 2, "method": "dora"}, caption_dropout=0.5),
    ]

    def pack(folder: Path) -> list[Trial]:
        return [Trial(folder / f"t{k}", recipes[k], tiny_cache) for k in range(2)]

    def fail(trial: Trial, error: Exception) -> None:
        raise AssertionError(trial.id) from error

    train_pack(tiny_base, pack(tmp_path / "whole"), Callbacks(fail))
    events: list[Event] = []
    sizes = limit_samples(tiny_base, 2 * split[0], monkeypatch)
    train_pack(tiny_base, pack(tmp_path / "split"), Callbacks(fail, on_event=events.append))
    assert sizes == [2 * batch_size, *[2 * split[0]] * (4 * split[1])]
    for k in range(2):
        assert_same_training(tmp_path / f"split/t{k}", tmp_path / f"whole/t{k}")
        assert effective(tmp_path / f"split/t{k}") == split
        assert not (tmp_path / f"whole/t{k}" / EFFECTIVE_FILE).exists()
    assert [event for event in events if isinstance(event, MemorySplit)] == [
        MemorySplit(
            trials=("t0", "t1"),
            effective_batch_size=split[0],
            effective_accumulation=split[1],
            found="no room for it",
        )
    ]


def test_memory_that_runs_out_later_and_a_resume_from_there(
    tiny_base: Base, tiny_cache: LatentCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tiny_base, tiny_cache, recipe(), tmp_path / "whole")
    train(tiny_base, tiny_cache, recipe(steps=2), tmp_path / "late")
    sizes = limit_samples(tiny_base, 2, monkeypatch)
    # It goes on from step 2, and stops after a third.
    train(tiny_base, tiny_cache, recipe(), tmp_path / "late", stop=lambda: len(sizes) >= 3)
    content = json.loads((tmp_path / "late" / EFFECTIVE_FILE).read_text())
    assert content["after_step"] == 2
    assert sizes == [4, 2, 2]
    sizes.clear()
    train(tiny_base, tiny_cache, recipe(), tmp_path / "late")
    assert sizes == [2, 2, 2, 2]  # it does not try the larger ones again
    assert_same_training(tmp_path / "late", tmp_path / "whole")


def test_a_second_lack_is_the_pack_s_own(
    tiny_base: Base, tiny_cache: LatentCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = limit_samples(tiny_base, 1, monkeypatch, error=MemoryError)
    with pytest.raises(OutOfMemory, match="no room for it") as caught:
        train(tiny_base, tiny_cache, recipe(), tmp_path / "t0")
    assert sizes == [4, 2]
    assert "trials t0" in caught.value.where
    assert not (tmp_path / "t0" / EFFECTIVE_FILE).exists()  # it never fitted
    with pytest.raises(OutOfMemory):
        limit_samples(tiny_base, 0, monkeypatch)
        train(tiny_base, tiny_cache, recipe(batch_size=1), tmp_path / "t1")


def test_other_errors_are_not_taken_for_a_lack_of_memory(
    tiny_base: Base, tiny_cache: LatentCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit_samples(tiny_base, 0, monkeypatch, error=RuntimeError)
    with pytest.raises(RuntimeError, match="no room"):
        train(tiny_base, tiny_cache, recipe(), tmp_path / "t0")


def train_within(base_path: Path, cache: LatentCache, folder: Path, result: Any) -> None:
    """In a process of its own: with little more address space than half the batch takes."""
    torch.set_num_threads(1)
    base = load_base(base_path)
    large = recipe(batch_size=256, steps=1)
    train(base, cache, recipe(batch_size=128, steps=1), folder / "half")
    status = Path("/proc/self/status").read_text()
    peak_kb = next(int(line.split()[1]) for line in status.splitlines() if "VmPeak" in line)
    before = resource.getrlimit(resource.RLIMIT_AS)
    # 128 more samples take some 120 MB.
    resource.setrlimit(resource.RLIMIT_AS, (peak_kb * 1024 + 80_000_000, before[1]))
    events: list[Event] = []
    train(base, cache, large, folder / "limited", on_event=events.append)
    resource.setrlimit(resource.RLIMIT_AS, before)
    train(base, cache, large, folder / "whole")
    result.put([event for event in events if isinstance(event, MemorySplit)])


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
def test_an_allocation_that_really_fails(
    tiny_base: Base, tiny_base_path: Path, make_cache: MakeCache, tmp_path: Path
) -> None:
    spawn = multiprocessing.get_context("spawn")
    result = spawn.Queue()
    cache = make_cache(tiny_base)
    process = spawn.Process(target=train_within, args=(tiny_base_path, cache, tmp_path, result))
    process.start()
    process.join(timeout=120)
    assert process.exitcode == 0
    (event,) = result.get(timeout=10)
    assert event.found
    assert effective(tmp_path / "limited") == (128, 2)
    assert_same_training(tmp_path / "limited", tmp_path / "whole")


def train_rank(rank: int, port: int, base_path: Path, cache: LatentCache, folder: Path) -> None:
    """One of two workers; only the second runs out of memory."""
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    base = load_base(base_path)
    predict = base.predict

    def limited(latents: torch.Tensor, *arguments: torch.Tensor) -> torch.Tensor:
        if rank == 1 and len(latents) > 1:
            raise torch.OutOfMemoryError("no room on the second")
        return predict(latents, *arguments)

    base.predict = limited  # type: ignore[method-assign]
    train(base, cache, recipe(batch_size=2), folder / "t0", Workers(rank, 2))
    dist.destroy_process_group()


@pytest.mark.slow
def test_all_workers_follow_the_one_that_ran_out(
    tiny_base: Base, tiny_base_path: Path, tiny_cache: LatentCache, tmp_path: Path
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn = multiprocessing.get_context("spawn")
    processes = [
        spawn.Process(target=train_rank, args=(rank, port, tiny_base_path, tiny_cache, tmp_path))
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    train(tiny_base, tiny_cache, recipe(), tmp_path / "one")  # one worker with the doubled batch
    for process in processes:
        process.join(timeout=120)
    assert [process.exitcode for process in processes] == [0, 0]
    assert effective(tmp_path / "t0") == (1, 2)
    assert_same_training(tmp_path / "t0", tmp_path / "one")


def test_who_takes_a_seat_later_is_told_to_be_split_too(
    tiny_base: Base, tiny_cache: LatentCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipes = [recipe(steps=1), recipe(steps=2, seed=1)]
    trials = [Trial(tmp_path / f"t{k}", one, tiny_cache) for k, one in enumerate(recipes)]
    limit_samples(tiny_base, 2, monkeypatch)
    events: list[Event] = []

    def fail(trial: Trial, error: Exception) -> None:
        raise AssertionError(trial.id) from error

    train_pack(tiny_base, trials, Callbacks(fail, on_event=events.append), trials_per_pack=1)
    told = [event.trials for event in events if isinstance(event, MemorySplit)]
    assert told == [("t0",), ("t1",)]
    assert effective(tmp_path / "t0") == effective(tmp_path / "t1") == (2, 2)
