"""A base spread over two workers: the same adapters, scores and pictures as one worker alone."""

import gc
import json
import multiprocessing
import os
import socket
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_families
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor

from captioning import ClassPictures, DatasetVersion, Store, UserError
from training.checkpoints import list_checkpoints, load_checkpoint
from training.events import (
    CheckpointScored,
    Event,
    PackMeasured,
    StepTaken,
    TrialStopped,
    TrialSucceeded,
    from_json_line,
    to_json_line,
)
from training.families import Base, load_base
from training.frozen.sharding import (
    held_bytes,
    is_sharded,
    load_sharded,
    refuse_offloading_to_itself,
    whole,
    worker_mesh,
)
from training.frozen.zero import load_with_zero, release_engine
from training.group import Group, Workers
from training.loop import train
from training.recipe import Recipe
from training.run.job import SweepJob, TrialSpec
from training.run.lockstep import _Result, in_step
from training.run.probe import random_cache
from training.run.worker import Worker
from training.scoring.prompts import ScoringConfig
from training.scoring.scores import Score

# A larger eps than Adam's own: else a gradient of pure rounding moves a weight by a whole lr.
NETWORKS: tuple[dict[str, Any], ...] = (
    {"rank": 4, "nested_ranks": [2, 4]},
    {"rank": 2, "method": "dora", "dora_axis": "input"},
    {"rank": 3, "method": "dora", "dora_axis": "output"},
    {"rank": 2, "method": "dora", "init": "pissa"},
)


def recipe(network: dict[str, Any], **changes: Any) -> Recipe:
    data: dict[str, Any] = {
        "network": network,
        "optimizer": {"lr": 1e-3, "eps": 1e-4},
        "steps": 4,
        "checkpoint_every": 2,
        "batch_size": 2,
        "resolution": 64,
        "min_snr_gamma": None,  # of diffusions only
    }
    return Recipe.model_validate({**data, **changes})


def make_job(
    base: Path,
    dataset: DatasetVersion,
    clip: Path,
    folder: Path,
    network: dict[str, Any],
    batch_size: int,
    **changes: Any,
) -> SweepJob:
    """A LoRA of nested ranks, both DoRAs and a PiSSA for two slots, scored at every checkpoint."""
    scoring = ScoringConfig(
        prompts=("{subject}, smile", "{subject}, hat"),
        unrelated=("a house",),
        seeds=1,
        steps=2,
        guidance=2.0,
        size_px=64,
        bootstrap=100,
        embedder=str(clip),
    )
    return SweepJob(
        base=str(base),
        dataset_path=str(dataset.path),
        latents_dir=str(folder / "latents"),
        trials=tuple(
            TrialSpec(
                f"t{i}",
                recipe({**own, **network}, batch_size=batch_size, **changes),
                folder / f"runs/t{i}",
            )
            for i, own in enumerate(NETWORKS)
        ),
        trials_per_pack=2,
        scoring=scoring,
        score_dir=str(folder / "base"),
    )


def run_ranks(act: Callable[..., None], *arguments: Any) -> None:
    """`act(rank, *arguments)` in two processes with a process group between them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn = multiprocessing.get_context("spawn")
    processes = [spawn.Process(target=_rank, args=(r, port, act, arguments)) for r in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=300)
    assert [process.exitcode for process in processes] == [0, 0]


def _rank(rank: int, port: int, act: Callable[..., None], arguments: Any) -> None:
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    act(rank, *arguments)
    dist.destroy_process_group()


def work(job: SweepJob, group: Group, stop_after: int | None = None) -> list[Event]:
    """Run the job and return the events; `stop_after` so many steps of the first trial."""
    events: list[Event] = []

    def stopped() -> bool:
        steps = [e for e in events if isinstance(e, StepTaken) and e.trial == "t0"]
        return stop_after is not None and len(steps) >= stop_after

    worker = Worker(job, group, torch.device("cpu"), events.append, stopped, None, max_deaths=2)
    problem = worker.run()
    assert problem is None, problem
    return events


def train_sharded(rank: int, jobs: list[SweepJob], folder: Path) -> None:
    """Each stopped in the third step and gone on with; rank 0 writes down the events."""
    group = Group(rank, 2)
    for number, job in enumerate(jobs):
        before = work(job, group, stop_after=2)
        # As if a kill had left the first checkpoint unscored: it is then scored after training.
        if rank == 0 and job.scoring is not None:
            (job.trials[1].trial_dir / "step-000002/scores.json").unlink()
        after = work(job, group)
        if rank == 0:
            lines = [[to_json_line(event) for event in events] for events in (before, after)]
            (folder / f"events-{number}.json").write_text(json.dumps(lines))


@pytest.mark.slow
def test_half_the_base_on_each_worker_trains_and_scores_as_one_worker(
    frozen_dataset: DatasetVersion,
    frozen_wide_dataset: DatasetVersion,
    tiny_base_path: Path,
    tiny_clip_path: Path,
    class_set: tuple[Store, ClassPictures],
    tmp_path: Path,
) -> None:
    torch.set_num_threads(1)
    store, pictures = class_set
    sdxl = tiny_families.build("sdxl", tmp_path / "sdxl"), frozen_dataset, tiny_clip_path
    flux = tiny_families.build("flux-dev", tmp_path / "flux"), frozen_wide_dataset, tiny_clip_path
    with_all = {"targets": "attention+ff+conv", "text_encoder": {"lr": 1e-4}}
    buckets = {"aspect_buckets": True, "bucket_step_px": 16}
    preserving = {"class_pictures": pictures.name, "class_prompt": "person", "prior_weight": 0.5}

    def of_sdxl(name: str, batch_size: int) -> SweepJob:
        return make_job(*sdxl, tmp_path / name, with_all, batch_size)

    def of_flux(name: str, batch_size: int) -> SweepJob:
        # Without scores, to be quick: its forward pass is the same in training.
        job = make_job(*flux, tmp_path / name, {}, batch_size, **buckets)
        return replace(job, scoring=None)

    def of_classes(name: str, batch_size: int) -> SweepJob:
        base = tiny_base_path, frozen_dataset, tiny_clip_path
        job = make_job(*base, tmp_path / name, {}, batch_size, **preserving)
        return replace(first_two(job), scoring=None, store=str(store.root))

    def first_two(job: SweepJob) -> SweepJob:
        """To be quick where the other two learn the same way."""
        return replace(job, trials=job.trials[:2])

    shared = [
        replace(of_sdxl("sdxl-fsdp", 2), strategy="fsdp"),
        replace(first_two(of_sdxl("sdxl-zero", 2)), strategy="deepspeed"),
        replace(of_flux("flux-fsdp", 2), strategy="fsdp"),
        replace(of_classes("classes-fsdp", 2), strategy="fsdp"),
        replace(of_classes("classes-zero", 2), strategy="deepspeed", share_optimizers=True),
    ]
    run_ranks(train_sharded, shared, tmp_path)
    alone = of_sdxl("sdxl-one", 4), of_flux("flux-one", 4), of_classes("classes-one", 4)
    packs = [
        next(event for event in work(job, Group(0, 1)) if isinstance(event, PackMeasured))
        for job in alone
    ]
    for number, (job, which) in enumerate(zip(shared, (0, 0, 1, 2, 2), strict=True)):
        lines = json.loads((tmp_path / f"events-{number}.json").read_text())
        before, after = ([from_json_line(line) for line in events] for events in lines)
        assert isinstance(before[-1], TrialStopped)
        resumed = [e.step for e in after if isinstance(e, StepTaken) and e.trial == "t0"]
        assert resumed == [3, 4]
        finished = sorted(e.trial for e in after if isinstance(e, TrialSucceeded))
        assert finished == [spec.trial for spec in job.trials]
        if job.scoring is not None:
            assert ("t1", 2) in [
                (e.trial, e.step) for e in after if isinstance(e, CheckpointScored)
            ]
        # What each worker holds of the frozen base.
        full = packs[which].base_bytes
        (share,) = [e.base_bytes for e in before if isinstance(e, PackMeasured)]
        assert 0.49 * full <= share <= 0.52 * full
        assert_same(job, alone[which])


def assert_same(found: SweepJob, expected: SweepJob) -> None:
    """Every checkpoint: the adapter, the measured identity, the scored pictures."""
    for one, other in zip(found.trials, expected.trials[: len(found.trials)], strict=True):
        pairs = zip(list_checkpoints(one.trial_dir), list_checkpoints(other.trial_dir), strict=True)
        for shared, single in pairs:
            wanted = load_checkpoint(single.path).adapter
            for name, tensor in load_checkpoint(shared.path).adapter.items():
                largest = float(wanted[name].abs().max())
                torch.testing.assert_close(tensor, wanted[name], rtol=0, atol=3e-5 * largest)
            if found.scoring is None:
                continue
            score, alone = Score.load(shared.path), Score.load(single.path)
            assert score.identity_raw.value == pytest.approx(alone.identity_raw.value, abs=1e-4)
            for picture in alone.pictures:
                pixels, drawn = (
                    np.asarray(Image.open(path / picture.file), dtype=int)
                    for path in (shared.path, single.path)
                )
                assert np.abs(pixels - drawn).max() <= 1


def run_out(rank: int, shared: Base, folder: Path) -> None:
    """No second try in smaller micro-batches: the other workers would wait in the first one."""

    def no_room(*_: object) -> Tensor:
        raise torch.OutOfMemoryError("no room")

    shared.predict = no_room  # type: ignore[method-assign]
    wanted = recipe({"rank": 2})
    with pytest.raises(torch.OutOfMemoryError):
        train(shared, random_cache(shared, wanted), wanted, folder / "trial", Workers(rank, 2))


def look_at_weights(rank: int, folder: Path) -> None:
    base = load_base(folder)
    cpu = torch.device("cpu")
    shared = load_sharded(str(folder), cpu, torch.float32, worker_mesh(cpu, 2), offload=False)
    assert is_sharded(shared)
    assert not is_sharded(base)
    pairs = zip(base.denoiser.parameters(), shared.denoiser.parameters(), strict=True)
    held = 0
    for weight, share in pairs:
        assert torch.equal(whole(share), weight)
        held += held_bytes(share)
    total = sum(held_bytes(weight) for weight in base.denoiser.parameters())
    assert held <= 0.52 * total
    go_along(Group(rank, 2), shared, base)
    run_out(rank, shared, folder)
    from deepspeed.accelerator import get_accelerator

    compiled = folder / "compiled"
    os.environ["TORCH_EXTENSIONS_DIR"] = str(compiled)
    # It asks whether the processor computes in fp16 by itself; PyTorch has it on all, if slowly.
    get_accelerator().is_fp16_supported = lambda: True
    for dtype, offload in (
        (torch.bfloat16, False),
        (torch.float16, False),
        (torch.float16, True),
    ):
        look_at_half_type(rank, folder, dtype, offload)
    offloaded = load_sharded(str(folder), cpu, torch.float32, worker_mesh(cpu, 2), offload=True)
    with torch.no_grad():
        assert torch.equal(predicted(offloaded), predicted(base))
    assert not compiled.exists()  # DeepSpeed compiles nothing: it would take a minute


@torch.no_grad()
def look_at_half_type(rank: int, folder: Path, dtype: torch.dtype, offload: bool) -> None:
    """DeepSpeed has a mode of its own for each.

    Offloaded, the shares lie in the host's memory, which is not another one here: but DeepSpeed
    goes the way there and back.
    """
    base = load_base(folder, dtype=dtype)
    shared, engine = load_with_zero(str(folder), torch.device("cpu"), dtype, offload)
    assert is_sharded(shared)
    assert torch.equal(predicted(shared), predicted(base))
    for weight, share in zip(base.denoiser.parameters(), shared.denoiser.parameters(), strict=True):
        assert share.dtype == dtype
        assert torch.equal(whole(share), weight)
    if dtype == torch.float16:
        train_in_fp16(rank, shared, base, folder / f"offload-{offload}")
    # Nothing but this function may hold on to it, or the next base would find no room.
    release_engine(engine)
    gone = weakref.ref(shared.denoiser)
    del shared, share, engine
    gc.collect()
    assert gone() is None


def predicted(base: Base) -> Tensor:
    conditions = {name: torch.ones(1, *shape) for name, shape in base.condition_shapes().items()}
    return base.predict(torch.ones(1, 16, 8, 8), torch.ones(1), conditions)


@torch.enable_grad()
def train_in_fp16(rank: int, shared: Base, base: Base, folder: Path) -> None:
    wanted = recipe({"rank": 2, "method": "dora"}, precision="fp16")
    adapters = []
    for name, one in (("shared", shared), ("whole", base)):
        train(one, random_cache(one, wanted), wanted, folder / f"fp16-{name}", Workers(rank, 2))
        dist.barrier()  # rank 0 writes
        last = list_checkpoints(folder / f"fp16-{name}")[-1].path
        adapters.append(load_checkpoint(last).adapter)
    assert any(tensor.any() for name, tensor in adapters[0].items() if "lora_B" in name)
    for name, tensor in adapters[1].items():
        torch.testing.assert_close(adapters[0][name], tensor, rtol=0, atol=0)


def go_along(group: Group, shared: Base, base: Base) -> None:
    conditions = {name: torch.ones(1, *shape) for name, shape in base.condition_shapes().items()}
    inputs = torch.ones(1, 16, 8, 8), torch.ones(1), conditions

    @torch.no_grad()
    def act() -> Tensor:
        assert group.rank == 0  # the other one is not asked
        for _ in range(2):
            found = shared.predict(*inputs)
        return found

    torch.testing.assert_close(in_step(group, shared, act), base.predict(*inputs).detach())

    def breaks_off() -> str:
        def no_room(*_: object) -> None:
            raise MemoryError("no room")

        shared.denoiser.proj_out.register_forward_hook(no_room)
        try:
            return str(act())
        except MemoryError as error:
            return str(error)

    # The other worker has been through the pass and waits for the next: this one has to end.
    if group.rank == 0:
        with pytest.raises(RuntimeError, match="broke off on rank 0"):
            in_step(group, shared, breaks_off)
        group.rank_0_says(lambda: _Result(None))  # so that the other one of this test can end
    else:
        in_step(group, shared, breaks_off)


@pytest.mark.slow
def test_weights_are_gathered_whole_and_held_by_half(tmp_path: Path) -> None:
    run_ranks(look_at_weights, tiny_families.build("sd3-no-t5", tmp_path / "model"))


def test_offloading_needs_a_device_to_offload_from() -> None:
    with pytest.raises(UserError, match="offload_base"):
        refuse_offloading_to_itself(torch.device("cpu"))
