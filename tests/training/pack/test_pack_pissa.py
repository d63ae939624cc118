"""PiSSA against PEFT's: outputs, gradients, ten steps, the file that every tool reads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from test_loop import last_adapter, losses, run_with_interruptions
from test_pack import assert_same_training, fail, trials
from test_pack_bank import assert_near, backward, inputs, peft_parts
from torch import Tensor

from captioning import UserError
from training.checkpoints import list_checkpoints, load_checkpoint
from training.data.latents import LatentCache
from training.export import export_adapter
from training.export.updates import read_updates
from training.families import Base, load_base
from training.loop import Callbacks, train, train_pack
from training.pack.adapters import (
    adapter_state,
    attach,
    attach_pack,
    detach,
    initial_adapter,
    target_layers,
)
from training.recipe import Network, Recipe

MakeCache = Callable[..., LatentCache]
RANK, ALPHA = 4, 2.0


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def pissa(method: str = "lora", **more: Any) -> Network:
    data = {"method": method, "rank": RANK, "alpha": ALPHA, "init": "pissa"}
    return Network.model_validate({**data, "dora_axis": "output", **more})


def small(**changes: Any) -> Recipe:
    data: dict[str, Any] = {
        "network": pissa().model_dump(),
        "optimizer": {"lr": 1e-3, "eps": 1e-4},
        "steps": 4,
        "checkpoint_every": 2,
        "batch_size": 2,
    }
    return Recipe.model_validate({**data, **changes})


def peft_pissa(folder: Path, config: Network) -> Any:
    unet = load_base(folder).denoiser
    unet.add_adapter(
        LoraConfig(
            r=config.rank,
            lora_alpha=config.effective_alpha,
            target_modules=["to_q", "to_k", "to_v", "to_out.0"],
            use_dora=config.method == "dora",
            use_rslora=config.rank_stabilised,
            init_lora_weights="pissa",
        )
    )
    return unet


def signed_as(
    parts: dict[tuple[str, str], Tensor], signs: dict[str, Tensor]
) -> dict[tuple[str, str], Tensor]:
    """PEFT's factors with the signs of their singular vectors chosen as `signs`, by module."""
    turned = dict(parts)
    for module, sign in signs.items():
        turned[module, "lora_A"] = parts[module, "lora_A"] * sign[:, None]
        turned[module, "lora_B"] = parts[module, "lora_B"] * sign
    return turned


def signs_of(found: dict[tuple[str, str], Tensor], wanted: dict[tuple[str, str], Tensor]) -> Any:
    return {
        module: (tensor * wanted[module, part]).sum(1).sign()
        for (module, part), tensor in found.items()
        if part == "lora_A"
    }


@pytest.mark.parametrize("rank_stabilised", [False, True])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_it_equals_peft_in_outputs_gradients_and_after_ten_steps(
    tiny_base: Base, tiny_base_path: Path, method: str, rank_stabilised: bool
) -> None:
    config = pissa(method, rank_stabilised=rank_stabilised)
    unet = peft_pissa(tiny_base_path, config)
    bank = attach(tiny_base, config, seed=0)
    first, found = peft_parts(unet, "data"), bank.split(0, bank.weights[0])
    signs = signs_of(found, first)
    for key, tensor in signed_as(first, signs).items():
        assert_near(found[key], tensor, str(key))

    options = {"lr": 1e-3, "eps": 1e-4, "weight_decay": 0.01}
    plain = torch.optim.AdamW([p for p in unet.parameters() if p.requires_grad], **options)
    row = torch.nn.Parameter(bank.weights[0])
    row.grad = bank.grads[0]
    packed = torch.optim.AdamW([row], fused=True, **options)
    for step in range(10):
        latents, timesteps, text, target = inputs(tiny_base, step)
        output = unet(latents, timesteps, encoder_hidden_states=text).sample
        (output - target).square().mean().backward()
        bank.zero_grad()
        assert_near(backward(tiny_base, [step]), output.detach(), f"output {step}", 2e-5)
        bank.collect_gradients()
        gradients = signed_as(peft_parts(unet, "grad"), signs)
        for key, gradient in bank.split(0, bank.grads[0]).items():
            assert_near(gradient, gradients[key], f"{key} {step}", 1e-4)
        plain.step()
        plain.zero_grad()
        packed.step()
        bank.changed()
    for key, tensor in signed_as(peft_parts(unet, "data"), signs).items():
        assert_near(bank.split(0, bank.weights[0])[key], tensor, str(key), 2e-5)
        assert (tensor - signed_as(first, signs)[key]).abs().max() > 1e-4  # it did train


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_it_starts_from_the_base_and_leaves_it_as_it_was(tiny_base: Base, method: str) -> None:
    weights = {name: p.detach().clone() for name, p in tiny_base.denoiser.named_parameters()}
    latents, timesteps, text, _ = inputs(tiny_base, 0)
    with torch.no_grad():
        bare = tiny_base.predict(latents, timesteps, {"text": text})
        attach(tiny_base, pissa(method), seed=0)
        assert_near(tiny_base.predict(latents, timesteps, {"text": text}), bare, "output")
    detach(tiny_base)
    assert all(torch.equal(p, weights[name]) for name, p in tiny_base.denoiser.named_parameters())


def test_the_factors_are_the_largest_of_the_weight_with_signs_of_their_own(
    tiny_base: Base,
) -> None:
    state = initial_adapter(tiny_base, pissa(), seed=0)
    for name, layer in target_layers(tiny_base, pissa()).items():
        down, up = state[f"unet.{name}.lora_A.weight"], state[f"unet.{name}.lora_B.weight"]
        assert down.shape[0] == up.shape[1] == 2 * RANK
        assert torch.equal(down[:RANK], down[RANK:]) and torch.equal(up[:, :RANK], -up[:, RANK:])
        product = ALPHA / RANK * (up[:, :RANK] @ down[:RANK])
        left, values, right = torch.linalg.svd(layer.weight.detach().double())
        wanted = left[:, :RANK] * values[:RANK] @ right[:RANK]
        # Singular vectors of near values are not certain in fp32.
        assert_near(product.double(), wanted, name, 1e-3)
        largest = down.gather(1, down.abs().argmax(1, keepdim=True))
        assert (largest > 0).all()


def test_slots_with_and_without_it_equal_their_solo_runs(
    tiny_v_base: Base, tiny_v_cache: LatentCache, tmp_path: Path
) -> None:
    recipes = [
        small(),
        small(network={"rank": 3}, seed=1),
        small(network=pissa("dora", rank=2, dora_axis="input").model_dump(), seed=2, steps=6),
        # Optimisers that decay weights, that look at shapes, and an average.
        small(optimizer={"type": "adafactor", "weight_decay": 0.1}, seed=3),
        small(optimizer={"type": "schedulefree", "lr": 1e-3, "eps": 1e-4}, seed=4),
        small(optimizer={"type": "lion", "lr": 1e-4}, seed=5, ema_decay=0.5),
    ]
    packed = trials(tmp_path / "packed", recipes, [tiny_v_cache] * len(recipes))
    train_pack(tiny_v_base, packed, Callbacks(fail))
    for trial in packed:
        train(tiny_v_base, tiny_v_cache, trial.recipe, tmp_path / "solo" / trial.id)
        assert_same_training(trial.trial_dir, tmp_path / "solo" / trial.id)
        if trial.recipe.network.init == "pissa":
            rank = trial.recipe.network.rank
            first = initial_adapter(tiny_v_base, trial.recipe.network, 0)
            for name, tensor in last_adapter(trial.trial_dir).items():
                if "magnitude" not in name:
                    axis = 0 if "lora_A" in name else 1
                    trained, kept = tensor.split(rank, axis)
                    assert torch.equal(kept, first[name].split(rank, axis)[1])
                    assert not torch.equal(trained, first[name].split(rank, axis)[0])


@pytest.mark.parametrize("type", ["adamw", "schedulefree"])
def test_an_interrupted_run_equals_an_unbroken_one_bit_for_bit(
    tiny_base: Base, tiny_cache: LatentCache, tmp_path: Path, type: str
) -> None:
    recipe = small(steps=6, optimizer={"type": type, "lr": 1e-3})
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(tiny_base, tiny_cache, recipe, whole)
    run_with_interruptions(tiny_base, tiny_cache, recipe, broken, [3, 2])
    assert losses(broken) == losses(whole)
    for step in (2, 4, 6):
        for name in ("adapter.safetensors", "state.safetensors"):
            file = f"step-{step:06d}/{name}"
            assert (broken / file).read_bytes() == (whole / file).read_bytes(), file


@pytest.mark.parametrize("format", ["kohya", "diffusers"])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_the_export_is_an_ordinary_adapter_of_twice_the_rank(
    tiny_base: Base, tiny_cache: LatentCache, tmp_path: Path, method: str, format: str
) -> None:
    axis = "input" if format == "kohya" else "output"
    config = pissa(method, dora_axis=axis).model_dump()
    train(tiny_base, tiny_cache, small(network=config, optimizer={"lr": 1e-2}), tmp_path / "t")
    checkpoint = list_checkpoints(tmp_path / "t")[-1].path
    path = tmp_path / "zara.safetensors"
    report = export_adapter(checkpoint, tiny_base, path, format)  # type: ignore[arg-type]
    assert report.form in ("lora", "dora", "peft")
    assert report.effect > 0.01
    downs = [t for name, t in load_file(path).items() if "lora_A" in name or "lora_down" in name]
    assert downs and {len(tensor) for tensor in downs} == {2 * RANK}
    assert len(load_checkpoint(checkpoint).adapter) == (3 if method == "dora" else 2) * len(downs)


def test_a_small_change_survives_the_rounding_to_half_precision(tiny_base: Base) -> None:
    generator = torch.Generator().manual_seed(0)
    state = initial_adapter(tiny_base, pissa(), seed=0)
    for name, tensor in state.items():
        trained = tensor.split(RANK, 0 if "lora_A" in name else 1)[0]
        trained += 1e-4 * torch.randn(trained.shape, generator=generator)  # some steps of training
    for update in read_updates(state, pissa()):
        name = f"unet.{update.module}"
        down, up = (state[f"{name}.{part}.weight"] for part in ("lora_A", "lora_B"))
        wanted = ALPHA / RANK * (up.double() @ down.double())
        rounded = update.up.half().double() @ update.down.half().double()
        assert_near(rounded, wanted, name, 2e-3)
        # As the factors lie in the checkpoint they would not.
        naive = ALPHA / RANK * (up.half().double() @ down.half().double())
        assert (naive - wanted).norm() > 0.1 * wanted.norm()


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_half_precision_stays_near_fp32(
    tiny_base: Base, tiny_cache: LatentCache, tmp_path: Path, method: str
) -> None:
    for precision in ("fp32", "fp16"):
        recipe = small(network=pissa(method).model_dump(), precision=precision)
        train(tiny_base, tiny_cache, recipe, tmp_path / precision)
    assert losses(tmp_path / "fp16") == pytest.approx(losses(tmp_path / "fp32"), rel=0.02)


def test_what_is_known_of_a_layer_serves_every_rank_and_not_another_weight(
    tiny_base: Base,
) -> None:
    large = initial_adapter(tiny_base, pissa(rank=6), seed=0)
    small_rank = initial_adapter(tiny_base, pissa(rank=2), seed=1)
    again = initial_adapter(tiny_base, pissa(rank=6), seed=2)
    name, layer = next(iter(target_layers(tiny_base, pissa()).items()))
    key = f"unet.{name}.lora_A.weight"
    assert all(torch.equal(again[other], tensor) for other, tensor in large.items())
    # The scale alpha/rank differs: √(S/s) has another s.
    assert_near(small_rank[key][:2] * (6 / 2) ** 0.5, large[key][:2], name)
    with torch.no_grad():
        layer.weight.mul_(4)
    assert_near(initial_adapter(tiny_base, pissa(rank=6), seed=0)[key], 2 * large[key], name)


def test_a_rank_that_a_layer_has_not_is_refused(tiny_base: Base) -> None:
    with pytest.raises(UserError, match="singular values"):
        initial_adapter(tiny_base, pissa(rank=17), seed=0)


def test_without_it_nothing_is_kept_or_added(tiny_base: Base) -> None:
    config = Network(rank=RANK)
    bank = attach_pack(tiny_base, [(config, initial_adapter(tiny_base, config, 0))] * 2)
    # No wider than what a checkpoint holds.
    assert bank.weights.shape[1] == sum(tensor.numel() for tensor in adapter_state(bank).values())
