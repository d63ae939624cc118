"""Times packs on SDXL's and FLUX.1's full shapes with random weights: for a GPU.

usage: PYTHONPATH=. python tests/benchmarks/pack_full_size.py [--models sdxl flux] [--px 512 1024]
           [--slots 1 2 4 8 16] [--rank 16] [--steps 8] [--checkpointing] [--compile]
           [--device cuda] [--small]

Batch 1 per adapter, base and activations in bf16, adapters and AdamW in fp32; a step is forward,
backward, clipping and AdamW, as in training. The baseline is PEFT's LoRA and DoRA on the same
denoiser. Per row: median step, adapter steps per second against solo PEFT, the largest memory, and
what share of the rate of a large matrix product, measured in the same run, the step reaches (its
floating-point operations counted, recomputation included). --compile compiles the blocks, PEFT's
layers in them too. --small shrinks the networks, to try the script without a GPU: its numbers say
nothing.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from peft import LoraConfig
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from training.checkpoints import Contents
from training.compiled import compile_blocks
from training.families import Base
from training.families.flux import FluxBase
from training.families.sdxl import SDXLBase
from training.pack.adapters import attach_pack, detach, initial_adapter
from training.pack.slot import Slot, Trial
from training.recipe import Recipe

# The configs of stabilityai/stable-diffusion-xl-base-1.0 and black-forest-labs/FLUX.1-dev.
SDXL = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "cross_attention_dim": 2048,
}
FLUX = {
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
    "axes_dims_rope": (16, 56, 56),
}
SMALL_SDXL = {
    "block_out_channels": (16, 32, 64),
    "layers_per_block": 1,
    "transformer_layers_per_block": (1, 1, 2),
    "attention_head_dim": (2, 4, 8),
    "cross_attention_dim": 64,
    "norm_num_groups": 8,
}
SMALL_FLUX = {
    "num_layers": 1,
    "num_single_layers": 1,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "axes_dims_rope": (4, 4, 8),
    "joint_attention_dim": 64,
}
VAE_FACTOR = 8
CEILING_SIDE = 8192
LR, CLIP_NORM, WARM_UP_STEPS = 1e-4, 1.0, 2
DTYPE = torch.bfloat16
Step = Callable[[], None]


def _baddbmm(_: object, left: torch.Size, right: torch.Size, **__: object) -> int:
    return 2 * left.numel() * right[-1]


# PyTorch counts baddbmm, but not the one in place, by which a pack's layers add their updates.
IN_PLACE = {torch.ops.aten.baddbmm_: _baddbmm}


class _Random(Base):
    """A family's denoiser with random weights, and nothing else of a base."""

    def __init__(self, denoiser: Any, channels: int, device: torch.device) -> None:
        self.id, self.device, self.dtype = "random", device, DTYPE
        self.latent_channels = channels
        self.tokenizers = {"tokenizer": SimpleNamespace(model_max_length=77)}
        self.denoiser = denoiser.to(device, DTYPE).requires_grad_(False)


class RandomSDXL(_Random, SDXLBase):
    """SDXL's UNet."""


class RandomFlux(_Random, FluxBase):
    """FLUX.1-dev's transformer."""


def build(model: str, small: bool, device: torch.device) -> Base:
    """The same random weights at every call."""
    torch.manual_seed(0)
    with device:
        if model == "sdxl":
            config = {**SDXL, **(SMALL_SDXL if small else {})}
            return RandomSDXL(UNet2DConditionModel(**config), 4, device)
        config = {**FLUX, **(SMALL_FLUX if small else {})}
        return RandomFlux(FluxTransformer2DModel(**config), 16, device)


def losses(base: Base, px: int, count: int) -> Callable[[], Tensor]:
    """A function that gives the loss of each of `count` fixed samples."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(base.device)

    side = px // VAE_FACTOR
    latents = draw(count, base.latent_channels, side, side)
    target = draw(*latents.shape)
    conditions = {name: draw(count, *shape) for name, shape in base.condition_shapes().items()}
    timesteps = torch.randint(1000, (count,), generator=generator).to(base.device)

    def compute() -> Tensor:
        with torch.autocast(base.device.type, dtype=DTYPE):
            output = base.predict(latents, timesteps, conditions)
        return (output - target).square().mean(dim=(1, 2, 3))  # (count,)

    return compute


def peft_step(base: Base, px: int, rank: int, dora: bool) -> Step:
    """What diffusers' LoRA scripts do in a step."""
    torch.manual_seed(0)
    base.denoiser.add_adapter(
        LoraConfig(
            r=rank, lora_alpha=rank, target_modules=list(base.attention_modules), use_dora=dora
        )
    )
    parameters = [p for p in base.denoiser.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.data = parameter.data.float()
    optimizer = torch.optim.AdamW(parameters, lr=LR)
    compute = losses(base, px, 1)

    def step() -> None:
        compute().mean().backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def pack_step(base: Base, px: int, network: dict[str, Any], count: int) -> Step:
    """A step of `training.loop` with one sample per slot."""
    recipe = Recipe.model_validate({"network": network, "optimizer": {"lr": LR}})
    state = initial_adapter(base, recipe.network, 0)
    bank = attach_pack(base, [(recipe.network, state)] * count)
    trial = Trial(Path("t"), recipe, None)  # type: ignore[arg-type]
    slots = [Slot(bank, k, trial, Contents(0, recipe, state, {}), False) for k in range(count)]
    compute = losses(base, px, count)

    def step() -> None:
        bank.zero_grad()
        compute().sum().backward()
        bank.collect_gradients()
        bank.clip([CLIP_NORM] * count)
        for slot in slots:
            slot.take_step()
        bank.changed()

    return step


def count_operations(step: Step) -> int:
    """The floating-point operations of a step's matrix products, convolutions and attention."""
    with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
        step()
    return counter.get_total_flops()


def measure(step: Step, steps: int, device: torch.device) -> tuple[float, int, int]:
    """Median seconds of a step, its floating-point operations, and the peak of memory."""
    operations = count_operations(step)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    taken = []
    for number in range(WARM_UP_STEPS + steps):
        _wait(device)
        started = time.perf_counter()
        step()
        _wait(device)
        if number >= WARM_UP_STEPS:
            taken.append(time.perf_counter() - started)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    return statistics.median(taken), operations, peak


def ceiling(device: torch.device, side: int) -> float:
    """Floating-point operations per second of a product of two `side`² matrices."""
    left = torch.randn(side, side, device=device, dtype=DTYPE)
    taken = []
    for _ in range(10):
        _wait(device)
        started = time.perf_counter()
        left @ left
        _wait(device)
        taken.append(time.perf_counter() - started)
    return 2 * side**3 / min(taken)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def variants(base: Base, px: int, rank: int, slots: list[int]) -> Iterator[tuple[str, int, Step]]:
    """Every row of a table: its name, its adapters, and a function that makes its step."""
    for name, dora in (("LoRA", False), ("DoRA", True)):
        yield f"PEFT {name}", 1, lambda dora=dora: peft_step(base, px, rank, dora)
    networks = {
        "LoRA": {"rank": rank},
        "DoRA input": {"rank": rank, "method": "dora", "dora_axis": "input"},
    }
    for name, network in networks.items():
        for count in slots:
            yield (
                f"{name} K={count}",
                count,
                lambda network=network, count=count: pack_step(base, px, network, count),
            )


def table(base: Base, px: int, options: argparse.Namespace, limit: float) -> None:
    print(f"\n{base.family}, {px} px")
    print("| variant | step, ms | adapter steps/s, × solo PEFT | peak, GB | share of a matmul |")
    print("|---|---|---|---|---|")
    solo: dict[bool, float] = {}
    for name, count, make in variants(base, px, options.rank, options.slots):
        try:
            seconds, operations, peak = measure(make(), options.steps, base.device)
        except torch.OutOfMemoryError:
            print(f"| {name} | out of memory | | | |")
        else:
            solo.setdefault("DoRA" in name, seconds)
            gain = solo["DoRA" in name] * count / seconds
            memory = f"{peak / 1e9:.1f}" if peak else ""
            share = operations / seconds / limit
            print(f"| {name} | {1000 * seconds:.1f} | {gain:.2f} | {memory} | {share:.0%} |")
        detach(base)
        gc.collect()
        if base.device.type == "cuda":
            torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=("sdxl", "flux"), default=["sdxl", "flux"])
    parser.add_argument("--px", type=int, nargs="+", default=[512, 1024])
    parser.add_argument("--slots", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device; try --device cpu --small --px 64 --slots 1 2")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    limit = ceiling(device, 256 if options.small else CEILING_SIDE)
    print(f"torch {torch.__version__}, {name}, bf16, rank {options.rank}")
    print(f"checkpointing {options.checkpointing}, compiled {options.compile}")
    print(f"a matmul of {limit / 1e12:.1f} TFLOP/s")
    for model in options.models:
        base = build(model, options.small, device)
        if options.checkpointing:
            base.denoiser.enable_gradient_checkpointing()
        if options.compile:
            compile_blocks(base)
        base.denoiser.train()
        for px in options.px:
            table(base, px, options, limit)
        del base
        gc.collect()


if __name__ == "__main__":
    main()
