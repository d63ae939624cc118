"""Exported adapters of text encoders: their names, and what diffusers' pipelines make of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from adapter_effects import random_adapter
from encoder_rig import base, encoded, family, loaded, small
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from training.checkpoints import save_checkpoint
from training.export import VerificationError, export_adapter
from training.export.verify import verify
from training.families import Base
from training.pack.adapters import detach, load_adapter
from training.recipe import Recipe
from training.scoring.sampling import initial_noise, sample

__all__ = ["base", "encoded", "family", "loaded"]
PROMPTS = ["zkw, person, red hat", "zkw, close-up"]
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora", "alpha": 2.0, "targets": "attention+ff"},
    "dora-output": {"method": "dora", "dora_axis": "output"},
    "dora-input": {"method": "dora", "dora_axis": "input", "targets": "attention+ff"},
    "pissa": {"init": "pissa"},
}


def exported(base: Base, recipe: Recipe, folder: Path, form: Any) -> Any:
    state = random_adapter(base, recipe)
    checkpoint = save_checkpoint(folder / "trial", 4, recipe, state, {}).path
    report = export_adapter(
        checkpoint, base, folder / "zara.safetensors", form, dtype=torch.float32
    )
    assert report.max_error < 1e-3 * report.effect
    assert not base.text_is_adapted
    return state, report


def pipeline_of(base: Base) -> Any:
    kind = getattr(diffusers, base.pipelines[0])
    # Not those of the base, which loaders change in place.
    pipeline = kind.from_pretrained(base.folder, use_safetensors=True)
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(
        pipeline.scheduler.config,
        clip_sample=False,
        **({"set_alpha_to_one": True} if base.family == "sdxl" else {}),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize(
    ("family", "method", "form"),
    [
        ("sd15", "dora-input", "diffusers"),
        ("sd15", "dora-output", "diffusers"),
        ("sdxl", "lora", "diffusers"),
        ("sdxl", "pissa", "kohya"),
    ],
    indirect=["family"],
)
def test_the_pipeline_paints_what_was_sampled_here(
    base: Base, method: str, form: str, tmp_path: Path
) -> None:
    recipe = small(METHODS[method])
    plain = sample(base, PROMPTS, [3, 1], steps=2, guidance=3.0, size_px=64)
    state, report = exported(base, recipe, tmp_path, form)
    load_adapter(base, state, recipe.network)
    wanted = sample(base, PROMPTS, [3, 1], steps=2, guidance=3.0, size_px=64)
    unet = {name: tensor for name, tensor in state.items() if name.startswith("unet.")}
    load_adapter(base, unet, recipe.network.model_copy(update={"text_encoder": None}))
    without = sample(base, PROMPTS, [3, 1], steps=2, guidance=3.0, size_px=64)
    detach(base)
    again = sample(base, PROMPTS, [3, 1], steps=2, guidance=3.0, size_px=64)
    assert np.array_equal(again, plain)
    pipeline = pipeline_of(base)
    pipeline.load_lora_weights(str(tmp_path), weight_name=report.path.name)
    found = pipeline(
        prompt=PROMPTS,
        negative_prompt=["", ""],
        num_inference_steps=2,
        guidance_scale=3.0,
        height=64,
        width=64,
        latents=initial_noise(base, [3, 1], 64),
        output_type="np",
    ).images
    error = np.abs(found * 255 - wanted).max()
    assert error <= 1, error
    assert np.abs(wanted.astype(int) - without.astype(int)).max() > 3


@pytest.mark.parametrize(
    ("family", "method"),
    [("sd15", "lora"), ("sd15", "dora-output"), ("sdxl", "dora-input")],
    indirect=["family"],
)
def test_kohya_files_have_the_names_that_tools_know(
    base: Base, method: str, tmp_path: Path
) -> None:
    recipe = small(METHODS[method])
    _, report = exported(base, recipe, tmp_path, "kohya")
    names = {name.partition(".")[0] for name in load_file(report.path)}
    first, second = ("lora_te1_", "lora_te2_") if base.family == "sdxl" else ("lora_te_", "-")
    encoders = {name for name in names if not name.startswith("lora_unet_")}
    assert all(name.startswith((first, second)) for name in encoders)
    assert f"{first}text_model_encoder_layers_0_self_attn_q_proj" in encoders
    assert f"{second}text_model_encoder_layers_1_self_attn_out_proj" in encoders or second == "-"
    assert (f"{first}text_model_encoder_layers_0_mlp_fc1" in encoders) == (method != "dora-output")
    assert report.modules == len(names)
    with safe_open(report.path, "pt") as file:
        header = file.metadata()
    assert header["ss_text_encoder_lr"] == "0.003" and header["lorafarm.text_encoder_rank"] == "3"


@pytest.mark.parametrize("family", ["sd15"], indirect=True)
def test_a_file_with_another_encoder_is_found_out(base: Base, tmp_path: Path) -> None:
    recipe = small(METHODS["lora"])
    state, report = exported(base, recipe, tmp_path, "diffusers")
    tensors = load_file(report.path)
    key = next(name for name in tensors if "fc2.lora_B" in name)
    with safe_open(report.path, "pt") as file:
        header = file.metadata()
    save_file({**tensors, key: 1.5 * tensors[key]}, tmp_path / "spoilt.safetensors", header)
    with pytest.raises(VerificationError, match="differ by"):
        verify(tmp_path / "spoilt.safetensors", base, state, recipe.network, "peft")
    del tensors[key]
    save_file(tensors, tmp_path / "torn.safetensors", header)
    with pytest.raises(VerificationError):
        verify(tmp_path / "torn.safetensors", base, state, recipe.network, "peft")
