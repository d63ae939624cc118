"""Times packs of K adapters against the plain diffusers + PEFT loop, in one process, interleaved.

usage: PYTHONPATH=. python tests/benchmarks/pack_speed.py [--rounds 15] [--latents 8 16]
           [--slots 1 2 4 8] [--rank 16] [--threads 2] [--device cpu] [--targets attention]
           [--compile] [--profile]

The UNet has SDXL's structure with random weights: channels 32, 64, 128 and 1, 2, 4 transformer
layers. Batch 1 per adapter, fp32; a step is forward, backward, clipping and AdamW. The variants
take turns, each once in a round, and a ratio is the median of the rounds' ratios: what else the
machine does hits all of them. Before anything is timed, a pack of one must have PEFT's gradients.
`--targets attention+ff+conv` adapts the convolutions too, in both. `--compile` adds the largest
packs with compiled blocks; compiling, a minute or so each, is not counted. `--profile` prints what
operations the largest DoRA pack's step consists of. "base alone" is the base's own forward and
backward pass: what no way of adapting can do without.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from torch import Tensor

from training.checkpoints import Contents
from training.compiled import compile_blocks
from training.families.stable_diffusion import (
    UNET_ATTENTION,
    UNET_CONVOLUTIONS,
    UNET_FEED_FORWARD,
)
from training.pack.adapters import attach_pack, initial_adapter, target_layers
from training.pack.slot import Slot, Trial
from training.recipe import PRESETS, Network, Recipe

TEXT_WIDTH, TOKENS, POOLED_WIDTH, TIME_WIDTH, TIME_IDS = 64, 77, 32, 8, 6
LR, CLIP_NORM = 1e-4, 1.0
# A share of a tensor's largest value: fp32 in another order through the UNet rounds by that much.
GRADIENT_TOLERANCE = 2e-5
MIXED_RANKS = (2, 4, 8, 16)
METHOD_NAMES = {"lora": "LoRA", "dora": "DoRA"}
BARE, COMPILED = "base alone", "compiled"
WARMUP_ROUNDS = 2
PROFILED_STEPS = 5
Step = Callable[[], None]


def build_unet(latent_side: int, device: torch.device) -> Any:
    """The same random weights at every call, frozen."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=latent_side,
        block_out_channels=(32, 64, 128),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 4),
        attention_head_dim=(4, 8, 16),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_WIDTH,
        projection_class_embeddings_input_dim=TIME_IDS * TIME_WIDTH + POOLED_WIDTH,
        cross_attention_dim=TEXT_WIDTH,
        norm_num_groups=8,
    )
    unet.requires_grad_(False)
    return unet.to(device)


def losses(
    unet: Any, side: int, count: int, device: torch.device, requires_grad: bool = False
) -> Callable[[], Tensor]:
    """A function that gives the loss of each of `count` fixed samples."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    latents, noise = draw(count, 4, side, side), draw(count, 4, side, side)
    text, pooled = draw(count, TOKENS, TEXT_WIDTH), draw(count, POOLED_WIDTH)
    timesteps = torch.randint(1000, (count,), generator=generator).to(device)
    latents.requires_grad_(requires_grad)
    conditions = {
        "text_embeds": pooled,
        "time_ids": torch.zeros(count, TIME_IDS, device=device),
    }

    def compute() -> Tensor:
        output = unet(
            latents, timesteps, encoder_hidden_states=text, added_cond_kwargs=conditions
        ).sample
        return (output - noise).square().mean(dim=(1, 2, 3))  # (count,)

    return compute


def random_base(side: int, device: torch.device) -> Any:
    """The UNet with what `training.pack.adapters` asks of a base."""
    return SimpleNamespace(
        denoiser=build_unet(side, device),
        denoiser_name="unet",
        id="random",
        device=device,
        attention_modules=UNET_ATTENTION,
        feed_forward_modules=UNET_FEED_FORWARD,
        convolution_modules=UNET_CONVOLUTIONS,
        unbatched_modules=(),
    )


def peft_step(side: int, network: dict[str, Any], device: torch.device) -> tuple[Step, Any]:
    """What diffusers' LoRA scripts do in a step, and the UNet."""
    base = random_base(side, device)
    config, unet = Network.model_validate(network), base.denoiser
    layers = list(target_layers(base, config))
    torch.manual_seed(0)
    unet.add_adapter(
        LoraConfig(
            r=config.rank,
            lora_alpha=config.rank,
            target_modules=layers,
            use_dora=config.method == "dora",
        )
    )
    parameters = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LR)
    compute = losses(unet, side, 1, device)

    def step() -> None:
        compute().mean().backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step, unet


def pack_step(
    side: int, networks: list[dict[str, Any]], device: torch.device, compiled: bool = False
) -> tuple[Step, Any]:
    """A step of `training.loop` with one sample per slot, and the bank."""
    base = random_base(side, device)
    if compiled:
        compile_blocks(base)
    recipes = [
        Recipe.model_validate({"network": network, "optimizer": {"lr": LR}}) for network in networks
    ]
    states = [initial_adapter(base, recipe.network, seed) for seed, recipe in enumerate(recipes)]
    bank = attach_pack(
        base, [(recipe.network, state) for recipe, state in zip(recipes, states, strict=True)]
    )
    slots = [
        Slot(bank, k, Trial(Path("t"), recipe, None), Contents(0, recipe, state, {}), False)  # type: ignore[arg-type]
        for k, (recipe, state) in enumerate(zip(recipes, states, strict=True))
    ]
    compute = losses(base.denoiser, side, len(slots), device)

    def step() -> None:
        bank.zero_grad()
        compute().sum().backward()
        bank.collect_gradients()
        bank.clip([CLIP_NORM] * len(slots))
        for slot in slots:
            slot.optimizer.step()
        bank.changed()

    return step, bank


def bare_step(side: int, count: int, device: torch.device) -> Step:
    """The base's own passes, without any adapter: what no way of adapting it can do without."""
    unet = build_unet(side, device)
    compute = losses(unet, side, count, device, requires_grad=True)
    return lambda: compute().sum().backward()


def check_gradients(side: int, usual: dict[str, Any], device: torch.device) -> None:
    """Raise SystemExit unless the first gradients of packs of one are PEFT's."""
    for network in (usual, {**usual, "method": "dora", "dora_axis": "output"}):
        _, unet = peft_step(side, network, device)
        losses(unet, side, 1, device)().mean().backward()
        base = random_base(side, device)
        recipe = Recipe.model_validate({"network": network})
        bank = attach_pack(base, [(recipe.network, initial_adapter(base, recipe.network, 0))])
        losses(base.denoiser, side, 1, device)().sum().backward()
        bank.collect_gradients()
        found = bank.split(0, bank.grads[0])
        for name, parameter in unet.named_parameters():
            if parameter.requires_grad:
                module, part = name.removesuffix(".default.weight").rsplit(".", 1)
                error = float((found[module, part] - parameter.grad).abs().max())
                if error > GRADIENT_TOLERANCE * float(parameter.grad.abs().max()):
                    raise SystemExit(f"the gradient of {name} differs from PEFT's by {error:.2g}")


def measure(steps: dict[str, Step], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Milliseconds of every variant in every round."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(WARMUP_ROUNDS + rounds):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if number >= WARMUP_ROUNDS:
                times[name].append((time.perf_counter() - started) * 1000)
    return times


def ratio(above: list[float], below: list[float], factor: float = 1.0) -> float:
    return statistics.median(factor * a / b for a, b in zip(above, below, strict=True))


def report(side: int, slots: list[int], times: dict[str, list[float]]) -> None:
    print(f"\nlatents {side} × {side}")
    print("| variant | step, ms | per adapter, ms | adapters per second, × solo PEFT |")
    print("|---|---|---|---|")
    for name, taken in times.items():
        if name.startswith(BARE):
            print(f"| {name} | {statistics.median(taken):.0f} | | |")
            continue
        adapters = 1 if name.startswith("PEFT") else int(name.rsplit("=", 1)[1])
        solo = times["PEFT LoRA" if "LoRA" in name else "PEFT DoRA"]
        gain = f"{ratio(solo, taken, adapters):.2f}" if "mixed" not in name else ""
        median = statistics.median(taken)
        print(f"| {name} | {median:.0f} | {median / adapters:.1f} | {gain} |")
    print(
        f"\nDoRA step / LoRA step: PEFT {ratio(times['PEFT DoRA'], times['PEFT LoRA']):.2f}", end=""
    )
    for count in slots:
        lora = times[f"LoRA K={count}"]
        for axis in ("input", "output"):
            found = ratio(times[f"DoRA {axis} K={count}"], lora)
            print(f"; {axis} K={count} {found:.2f}", end="")
    for name, taken in times.items():
        if name.startswith(COMPILED):
            gain = ratio(times[name.removeprefix(f"{COMPILED} ")], taken)
            print(f"\n{name}: {gain:.2f} × as fast as uncompiled", end="")
    most = max(slots)
    mixed = times[f"mixed K={most}"]
    print(
        f"\nmixed pack / uniform pack, K={most}: "
        f"{ratio(mixed, times[f'DoRA input K={most}']):.2f} of all DoRA, "
        f"{ratio(mixed, times[f'LoRA K={most}']):.2f} of all LoRA"
    )


def print_profile(step: Step) -> None:
    from torch.profiler import profile

    with profile() as found:
        for _ in range(PROFILED_STEPS):
            step()
    print("\n", found.key_averages().table(sort_by="self_cpu_time_total", row_limit=16))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--latents", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--slots", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--targets", choices=PRESETS, default="attention")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    print(f"torch {torch.__version__}, {options.device}, {options.threads} threads, rank "
          f"{options.rank}, {options.targets}, {options.rounds} rounds")  # fmt: skip
    usual = {"rank": options.rank, "targets": options.targets}
    for side in options.latents:
        if device.type == "cpu":
            check_gradients(side, usual, device)
        steps: dict[str, Step] = {}
        for method in ("lora", "dora"):
            name = f"PEFT {METHOD_NAMES[method]}"
            steps[name], _ = peft_step(side, {**usual, "method": method}, device)
        uniform: dict[str, dict[str, Any]] = {
            "LoRA": usual,
            "DoRA input": {**usual, "method": "dora", "dora_axis": "input"},
            "DoRA output": {**usual, "method": "dora", "dora_axis": "output"},
        }
        for name, network in uniform.items():
            for count in options.slots:
                steps[f"{name} K={count}"], _ = pack_step(side, [network] * count, device)
        most = max(options.slots)
        for name, network in uniform.items() if options.compile else ():
            step, _ = pack_step(side, [network] * most, device, compiled=True)
            steps[f"{COMPILED} {name} K={most}"] = step
        steps[f"{BARE}, batch {most}"] = bare_step(side, most, device)
        mixed = [
            {
                **usual,
                "rank": MIXED_RANKS[k % len(MIXED_RANKS)],
                "method": ("lora", "dora")[k // 4 % 2],
            }
            for k in range(most)
        ]
        steps[f"mixed K={most}"], _ = pack_step(side, mixed, device)
        report(side, options.slots, measure(steps, options.rounds, device))
        if options.profile:
            print_profile(steps[f"DoRA output K={most}"])


if __name__ == "__main__":
    main()
