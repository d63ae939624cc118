"""A short measured run of a planned pack: its seconds per step and its peak memory.

Recipes and a base in, a `Measurement` out. The pack is trained for a few steps by the very loop
that trains for good, on random latents, so that nothing has to be encoded; nothing is kept.
"""

from __future__ import annotations

import multiprocessing
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import torch

from training.compiled import compile_blocks
from training.data.buckets import BucketLimits, crop_sizes, largest_size
from training.data.latents import Bucket, LatentCache
from training.events import Event, MemorySplit, StepTaken
from training.families import Base, family_of
from training.frozen.quantised import load_quantised
from training.loop import Callbacks, train_pack
from training.micro_batches import OutOfMemory
from training.pack.out_of_memory import is_out_of_memory
from training.pack.slot import Trial
from training.precision import base_dtype
from training.recipe import Recipe
from training.telemetry import peak_resident_bytes

# The first step allocates and compiles. The median of a few more is right within some per cent.
WARM_UP_STEPS = 1
MEASURED_STEPS = 7
# Steps that take long vary little: at least this many, and no more once they have taken so long.
FEWEST_STEPS = 2
LONG_ENOUGH_S = 4.0
# The raw posteriors of the usual VAEs have variances of about this.
LOG_VARIANCE = -4.0


@dataclass(frozen=True)
class ProbeRequest:
    """What to measure; plain values that travel to another process."""

    base: str  # path or hub id
    recipes: tuple[Recipe, ...]  # the recipes of the pack
    use_gpu: bool
    threads: int
    gradient_checkpointing: bool = False
    compile: bool = False
    memory_bytes: int | None = None  # how much of the accelerator's may be used; None: all


@dataclass(frozen=True)
class Measurement:
    """What a pack took. `peak_bytes`: tensors on CUDA, the whole process's memory on a CPU."""

    step_s: float
    peak_bytes: int


def probe_pack(request: ProbeRequest) -> Measurement | None:
    """Measure the pack in a process of its own; None if it ran out of memory.

    The process's peak is then the pack's, and if the kernel kills it, nothing else dies. Takes as
    long as loading the base and a few steps. Raises UserError like `load_quantised`.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(measure_pack, request).result()
        except BrokenProcessPool:
            return None  # killed: for memory, since nothing in it ends a process otherwise


def measure_pack(request: ProbeRequest) -> Measurement | None:
    """Measure the pack in this process, whose peak memory it must be; None: it ran out of it."""
    _be_the_first_to_go()
    torch.set_num_threads(request.threads)
    device = torch.device("cuda" if request.use_gpu else "cpu")
    if request.use_gpu and request.memory_bytes is not None:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, request.memory_bytes / total))
    try:
        return _measure(request, device)
    except (OutOfMemory, RuntimeError, MemoryError) as error:
        if isinstance(error, OutOfMemory) or is_out_of_memory(error):
            return None
        raise


def _measure(request: ProbeRequest, device: torch.device) -> Measurement | None:
    shared = request.recipes[0]
    half = family_of(request.base).half
    dtype = base_dtype(shared, device, half)
    base = load_quantised(request.base, device, dtype, shared.base_precision)
    if request.gradient_checkpointing:
        base.denoiser.enable_gradient_checkpointing()
    compiled = None
    if request.compile:
        compiled = compile_blocks(base)
    base.release_encoders()
    steps: list[StepTaken] = []
    lacks: list[MemorySplit] = []
    started = time.perf_counter()

    def listen(event: Event) -> None:
        if isinstance(event, MemorySplit):
            lacks.append(event)
        elif isinstance(event, StepTaken) and event.trial == "t0":
            steps.append(event)

    def enough() -> bool:
        done = len(steps) + 1 - WARM_UP_STEPS  # with the step that is being done
        is_long = time.perf_counter() - started > LONG_ENOUGH_S
        return bool(lacks) or done >= MEASURED_STEPS or (is_long and done >= FEWEST_STEPS)

    def fail(trial: Trial, error: Exception) -> None:
        raise error

    with tempfile.TemporaryDirectory() as folder:
        trials = [
            Trial(
                Path(folder) / f"t{number}",
                _long(recipe),
                random_cache(base, recipe),
                random_cache(base, recipe) if recipe.class_pictures else None,
            )
            for number, recipe in enumerate(request.recipes)
        ]
        callbacks = Callbacks(on_failure=fail, on_event=listen, stop=enough)
        train_pack(base, trials, callbacks, compiled=compiled)
    if lacks:  # it went on in smaller micro-batches, which is not what was asked
        return None
    peak = peak_resident_bytes()
    if device.type == "cuda":
        peak = max(step.peak_device_bytes or 0 for step in steps)
    times = [step.step_ms / 1000 for step in steps[WARM_UP_STEPS:]]
    return Measurement(statistics.median(times), peak)


def _long(recipe: Recipe) -> Recipe:
    """The recipe with so many steps that the probe meets neither its end nor a checkpoint."""
    steps = max(recipe.steps, 10 * (WARM_UP_STEPS + MEASURED_STEPS))
    return recipe.model_copy(update={"steps": steps, "checkpoint_every": steps})


def random_cache(base: Base, recipe: Recipe) -> LatentCache:
    """Random latents and text embeddings of one picture, as large as the recipe wants them.

    With buckets the picture has the size of the largest, for which memory has to suffice.
    """
    generator = torch.Generator().manual_seed(0)
    resolution = recipe.resolution or base.native_size_px
    sizes = crop_sizes(resolution, base.size_multiple_px, BucketLimits.of(recipe))
    size = largest_size(sizes)
    height, width = (side // base.vae_factor for side in size)
    views = 2 if recipe.flip else 1
    shape = (1, views, base.latent_channels, height, width)
    of_picture = base.picture_conditions(size, (0, 0), size)
    text = {
        name: torch.randn(shape, generator=generator)
        for name, shape in base.condition_shapes().items()
        if name not in of_picture
    }
    bucket = Bucket(
        images=(0,),
        mean=torch.randn(shape, generator=generator),
        logvar=torch.full(shape, LOG_VARIANCE),
        mask=torch.ones(1, views, 1, height, width),
    )
    return LatentCache(
        key="random",
        buckets=(bucket,),
        text={name: tensor[None, None] for name, tensor in text.items()},
        empty_text=text,
        prior_text={name: tensor[None] for name, tensor in text.items()},
        picture={name: tensor[None] for name, tensor in of_picture.items()},
        captions=(
            ("",),
        ),  # a caption of any length: text encoders are always given the same number of tokens
        prior_captions=("",),
    )


def _be_the_first_to_go() -> None:
    """Where the kernel ends processes for memory (Linux), let it choose this one."""
    score = Path("/proc/self/oom_score_adj")
    if score.exists():
        score.write_text("1000")
