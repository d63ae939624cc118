"""Exports of adapters on convolutions: what is in the files, and what diffusers' loader gets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from adapter_effects import as_comfyui_does, assert_same_effect, random_adapter
from peft_rig import CONV, built_weight
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_families import build
from torch import Tensor

from captioning import UserError
from training.checkpoints import save_checkpoint
from training.export import export_adapter
from training.families import Base, load_base
from training.pack.adapters import detach, load_adapter, target_layers
from training.recipe import Recipe

KERNEL = "lora_unet_down_blocks_0_resnets_0_conv1"
SAMPLER = "lora_unet_down_blocks_0_downsamplers_0_conv"


def recipe_of(method: str) -> Recipe:
    """`method` is lora, dora-output or dora-input."""
    name, _, axis = method.partition("-")
    network = {"method": name, "rank": 4, "alpha": 2.0, "conv_rank": 3, "targets": CONV}
    if axis:
        network["dora_axis"] = axis
    return Recipe.model_validate({"network": network, "steps": 10})


@pytest.fixture(params=["sd15", "sdxl"])
def base(
    request: pytest.FixtureRequest, tiny_base_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Base:
    if request.param == "sd15":
        return load_base(tiny_base_path)
    return load_base(build("sdxl", tmp_path_factory.mktemp("sdxl")))


def checkpoint_of(base: Base, recipe: Recipe, folder: Path) -> tuple[Path, dict[str, Tensor]]:
    state = random_adapter(base, recipe, size=0.05)
    return save_checkpoint(folder, 10, recipe, state, {}).path, state


def outputs(base: Base) -> Tensor:
    generator = torch.Generator().manual_seed(9)
    latents = torch.randn(2, base.latent_channels, 8, 8, generator=generator)
    conditions = {
        name: torch.randn(2, *shape, generator=generator)
        for name, shape in base.condition_shapes().items()
    }
    with torch.no_grad():
        return base.predict(latents, torch.tensor([200, 900]), conditions)


@pytest.mark.parametrize(
    ("format", "method", "form"),
    [
        ("diffusers", "lora", "peft"),
        ("diffusers", "dora-output", "peft"),
        ("diffusers", "dora-input", "full"),
        ("kohya", "lora", "lora"),
    ],
)
def test_diffusers_pipeline_gets_the_trained_adapter(
    base: Base, format: Any, method: str, form: str, tmp_path: Path
) -> None:
    recipe = recipe_of(method)
    checkpoint, state = checkpoint_of(base, recipe, tmp_path / "trial")
    report = export_adapter(checkpoint, base, tmp_path / "zara.safetensors", format)
    assert report.form == form and report.modules == len(target_layers(base, recipe.network))
    assert report.max_error < 0.01 * report.effect
    plain = outputs(base)
    load_adapter(base, state, recipe.network)
    wanted = outputs(base)
    detach(base)
    kind = getattr(diffusers, base.pipelines[0])
    pipeline = kind.from_pretrained(base.folder, use_safetensors=True)
    pipeline.load_lora_weights(str(report.path))
    base.denoiser = pipeline.unet
    assert_same_effect(outputs(base), wanted, plain, 0.01)


@pytest.mark.parametrize("method", ["lora", "dora-input", "dora-output"])
def test_kohya_entries_are_the_change_of_the_weights(
    tiny_base: Base, method: str, tmp_path: Path
) -> None:
    recipe = recipe_of(method)
    checkpoint, state = checkpoint_of(tiny_base, recipe, tmp_path / "trial")
    path = tmp_path / "zara.safetensors"
    export_adapter(checkpoint, tiny_base, path, "kohya", dtype=torch.float32)
    entries = load_file(path)
    layers = target_layers(tiny_base, recipe.network)
    assert {name.partition(".")[0] for name in entries} == {
        "lora_unet_" + name.replace(".", "_") for name in layers
    }
    for name, layer in layers.items():
        weight, start = layer.weight.detach(), f"unet.{name}."
        own = {
            key.removeprefix(start).removesuffix(".weight"): tensor
            for key, tensor in state.items()
            if key.startswith(start)
        }
        is_kernel = weight.shape[2:].numel() > 1
        network = recipe.network.of_kernels() if is_kernel else recipe.network
        wanted = built_weight(weight, own, network) - weight
        module = "lora_unet_" + name.replace(".", "_")
        if method == "dora-output":
            found = entries[f"{module}.diff"]
            assert found.shape == weight.shape
        else:
            down, up = (entries[f"{module}.lora_{part}.weight"] for part in ("down", "up"))
            scale = float(entries[f"{module}.alpha"]) / len(down)
            found = scale * (up.flatten(1) @ down.flatten(1)).view(weight.shape)
        if method == "dora-input":
            dora_scale = entries[f"{module}.dora_scale"]
            change = as_comfyui_does(weight.numpy(), found.numpy(), dora_scale.numpy())
            found = torch.from_numpy(change)
        assert (found - wanted).abs().max() < 1e-5, name


def test_kohya_files_have_the_shapes_of_locon(tiny_base: Base, tmp_path: Path) -> None:
    checkpoint, _ = checkpoint_of(tiny_base, recipe_of("dora-input"), tmp_path / "trial")
    path = tmp_path / "zara.safetensors"
    export_adapter(checkpoint, tiny_base, path, "kohya")
    tensors = load_file(path)
    for module, channels in ((KERNEL, 16), (SAMPLER, 16)):
        assert tensors[f"{module}.lora_down.weight"].shape == (3, channels, 3, 3)
        assert tensors[f"{module}.lora_up.weight"].shape == (16, 3, 1, 1)
        assert float(tensors[f"{module}.alpha"]) == 3
        assert tensors[f"{module}.dora_scale"].shape == (1, channels, 1, 1)
    cell = "lora_unet_mid_block_attentions_0_proj_in"
    assert tensors[f"{cell}.lora_down.weight"].shape == (4, 32, 1, 1)
    with safe_open(path, "pt") as file:
        arguments = json.loads(file.metadata()["ss_network_args"])
    assert (arguments["conv_dim"], arguments["conv_alpha"]) == ("3", "3.0")


def test_shapes_that_are_of_no_convolution_are_refused(tiny_base: Base, tmp_path: Path) -> None:
    recipe = recipe_of("lora")
    _, state = checkpoint_of(tiny_base, recipe, tmp_path / "trial")
    key = next(key for key in state if key.endswith("conv1.lora_B.weight"))
    state[key] = state[key][..., 0]
    path = save_checkpoint(tmp_path / "other", 10, recipe, state, {}).path
    with pytest.raises(UserError, match="no update of a linear layer or a convolution"):
        export_adapter(path, tiny_base, tmp_path / "a.safetensors", "kohya")
