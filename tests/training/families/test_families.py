"""Loading a base: any diffusers-layout SD1.5-family model, and clear words for everything else."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from captioning import UserError
from training.families import Base, base_hash, load_base
from training.family_facts import STARTER_BASE


@pytest.fixture
def copied_base(tiny_base_path: Path, tmp_path: Path) -> Path:
    """A copy of the tiny pipeline that a test may damage."""
    return Path(shutil.copytree(tiny_base_path, tmp_path / "base"))


def test_sizes_follow_from_the_configs(tiny_base: Base, tiny_v_base: Base) -> None:
    assert (tiny_base.native_size_px, tiny_base.vae_factor, tiny_base.latent_channels) == (64, 8, 4)
    assert tiny_base.objective.prediction_type == "epsilon"
    assert tiny_v_base.latent_channels == 16
    assert tiny_v_base.objective.prediction_type == "v_prediction"
    assert float(tiny_v_base.objective.alphas_cumprod[-1]) == 0.0  # zero terminal SNR is kept


def test_everything_is_frozen(tiny_base: Base) -> None:
    for module in (tiny_base.denoiser, tiny_base.vae, tiny_base.text_encoders["text_encoder"]):
        assert not module.training
        assert not any(parameter.requires_grad for parameter in module.parameters())


def test_text_and_pixels_are_those_of_the_diffusers_pipeline(
    tiny_base: Base, tiny_base_path: Path
) -> None:
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(tiny_base_path, use_safetensors=True)
    prompts = ["zkw, person, red hat", ""]
    expected, _ = pipeline.encode_prompt(prompts, "cpu", 1, False)
    found = tiny_base.encode_prompts(prompts)["text"]
    torch.testing.assert_close(found, expected, rtol=0, atol=0)

    pixels = torch.rand(2, 3, 64, 64) * 2 - 1
    mean, logvar = tiny_base.encode_pixels(pixels)
    posterior = pipeline.vae.encode(pixels).latent_dist
    torch.testing.assert_close(mean, posterior.mean)
    torch.testing.assert_close(logvar, posterior.logvar)
    latents = tiny_base.to_latents(mean)
    torch.testing.assert_close(latents, posterior.mean * 0.18215)
    expected_pixels = pipeline.vae.decode(latents / 0.18215).sample
    torch.testing.assert_close(tiny_base.decode(latents), expected_pixels)


def test_a_shift_factor_is_undone_by_decode(copied_base: Path) -> None:
    config = json.loads((copied_base / "vae/config.json").read_text())
    config["shift_factor"] = 0.25
    (copied_base / "vae/config.json").write_text(json.dumps(config))
    base = load_base(copied_base)
    sample = torch.randn(1, 4, 8, 8)
    torch.testing.assert_close(base.to_latents(sample), (sample - 0.25) * 0.18215)
    torch.testing.assert_close(base.decode(base.to_latents(sample)), base.vae.decode(sample).sample)


def test_half_precision_is_for_the_unet_only(tiny_base_path: Path) -> None:
    base = load_base(tiny_base_path, dtype=torch.bfloat16)
    assert base.denoiser.conv_in.weight.dtype == torch.bfloat16
    assert base.vae.post_quant_conv.weight.dtype == torch.float32
    text = base.encode_prompts(["a person"])
    output = base.predict(torch.randn(1, 4, 8, 8), torch.tensor([5]), text)
    assert output.dtype == torch.float32


def test_the_hash_is_of_the_content_not_of_the_place(
    tiny_base_path: Path, copied_base: Path
) -> None:
    assert (
        base_hash(tiny_base_path) == base_hash(copied_base) == load_base(copied_base).content_hash
    )
    (copied_base / "README.md").write_text("not part of the model")
    assert base_hash(copied_base) == base_hash(tiny_base_path)
    weights = copied_base / "unet/diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert base_hash(copied_base) != base_hash(tiny_base_path)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda p: (p / "model_index.json").unlink(), "model_index.json: is missing"),
        (lambda p: (p / "unet/config.json").unlink(), "unet/config.json: is missing"),
        (
            lambda p: (p / "unet/diffusion_pytorch_model.safetensors").unlink(),
            "unet/diffusion_pytorch_model.safetensors: is missing",
        ),
        (
            lambda p: (p / "text_encoder/model.safetensors").rename(
                p / "text_encoder/pytorch_model.bin"
            ),
            "only pytorch_model.bin, a pickle",
        ),
        (lambda p: (p / "vae/config.json").write_text("{"), "vae/config.json: is not readable"),
        (
            lambda p: (p / "vae/diffusion_pytorch_model.safetensors").write_bytes(b"cut off"),
            "vae: could not be loaded",
        ),
        (lambda p: shutil.rmtree(p / "tokenizer"), "tokenizer: holds no vocabulary"),
        (lambda p: shutil.rmtree(p / "scheduler"), "scheduler_config.json: is missing"),
    ],
)
def test_a_damaged_model_is_named_with_a_fix(copied_base: Path, damage: object, said: str) -> None:
    damage(copied_base)  # type: ignore[operator]
    with pytest.raises(UserError) as caught:
        _ = load_base(copied_base).vae  # encoders are loaded when they are asked for
    assert said in str(caught.value)
    assert "Fix: " in str(caught.value)


def test_other_pipelines_and_predictions_are_refused(copied_base: Path) -> None:
    scheduler = copied_base / "scheduler/scheduler_config.json"
    config = json.loads(scheduler.read_text())
    scheduler.write_text(json.dumps({**config, "prediction_type": "sample"}))
    with pytest.raises(UserError, match="prediction_type"):
        load_base(copied_base)
    index = copied_base / "model_index.json"
    content = {**json.loads(index.read_text()), "_class_name": "KandinskyPipeline"}
    index.write_text(json.dumps(content))
    with pytest.raises(UserError, match="KandinskyPipeline"):
        load_base(copied_base)


def test_not_a_model_at_all(tmp_path: Path) -> None:
    """Single-file checkpoints have tests of their own."""
    with pytest.raises(UserError, match="no such folder"):
        load_base(tmp_path / "nothing")
    with pytest.raises(UserError, match="no such folder"):
        load_base("../not a hub id")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="no readable safetensors file"):
        load_base(tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="no model in diffusers layout"):
        load_base(tmp_path)


def test_weights_of_another_shape_are_refused(copied_base: Path, tiny_v_base_path: Path) -> None:
    shutil.copy(tiny_v_base_path / "unet/diffusion_pytorch_model.safetensors", copied_base / "unet")
    with pytest.raises(UserError, match="unet: could not be loaded"):
        load_base(copied_base)


def test_only_fp16_files_are_taken_when_there_are_no_others(copied_base: Path) -> None:
    weights = copied_base / "unet/diffusion_pytorch_model.safetensors"
    expected = load_file(weights)["conv_in.weight"]
    weights.rename(weights.with_name("diffusion_pytorch_model.fp16.safetensors"))
    base = load_base(copied_base)
    torch.testing.assert_close(base.denoiser.conv_in.weight.data, expected)


def test_a_hub_id_is_had_from_the_hubs_cache(tiny_base_path: Path, tmp_path: Path) -> None:
    """A cached snapshot loads without network; an unknown id says what to do."""
    model = tmp_path / "hub/models--studio--tiny"
    shutil.copytree(tiny_base_path, model / "snapshots/0123456789abcdef0123456789abcdef01234567")
    (model / "refs").mkdir()
    (model / "refs/main").write_text("0123456789abcdef0123456789abcdef01234567")
    program = (
        "from training.families import load_base\n"
        "from captioning import UserError\n"
        "print(load_base('studio/tiny').native_size_px)\n"
        "try:\n    load_base('studio/other')\n"
        "except UserError as error:\n    print(error)\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "hub")}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True
    )
    size, problem = done.stdout.strip().split("\n", 1)
    assert size == "64"
    assert problem.startswith("studio/other: is no local folder")


def test_the_starter_base_loads() -> None:
    base = load_base(STARTER_BASE)
    assert base.native_size_px == 64
