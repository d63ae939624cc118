"""Stable Diffusion 1.x and 2.x layout: one CLIP text encoder, an AutoencoderKL, a 2D UNet.

A diffusers folder in, a frozen base out. Reads safetensors only, never a pickle.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from captioning import UserError, no_progress_bars
from training.families.base import Base, read_json

PIPELINE_CLASSES = frozenset({"StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline"})
COMPONENTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
_CONFIG_FILES = {
    "unet": "config.json",
    "vae": "config.json",
    "text_encoder": "config.json",
    "scheduler": "scheduler_config.json",
}
# Component -> stem of its weight file; `<stem>.fp16.safetensors` and shards are taken as well.
_WEIGHT_STEMS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
}
PREDICTION_TYPES = ("epsilon", "v_prediction")


class StableDiffusionBase(Base):
    """An SD1.5-family base; see `Base` for what the methods take and give."""

    family = "sd15"
    components = COMPONENTS

    def __init__(
        self, path_or_id: str, folder: Path, device: torch.device, dtype: torch.dtype
    ) -> None:
        from diffusers import DDPMScheduler, UNet2DConditionModel
        from transformers import CLIPTokenizer

        self.id = path_or_id
        self.folder = folder
        self.device = device
        self.dtype = dtype
        self.prediction_type = _prediction_type(folder)
        self.unet = _frozen(_load(UNet2DConditionModel, folder, "unet", dtype)).to(device)
        with _naming(folder / "tokenizer"):
            self.tokenizer = CLIPTokenizer.from_pretrained(
                folder, subfolder="tokenizer", local_files_only=True
            )
        with _naming(folder / "scheduler"):
            self.scheduler = DDPMScheduler.from_pretrained(
                folder, subfolder="scheduler", local_files_only=True
            )
        _ = self.text_encoder  # now, so that a damaged one is found when the base is loaded
        self.latent_channels = int(self.vae.config.latent_channels)
        self.vae_factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        self.native_size_px = int(self.unet.config.sample_size) * self.vae_factor
        self._shift = float(getattr(self.vae.config, "shift_factor", None) or 0.0)
        self._scale = float(self.vae.config.scaling_factor)
        if self.unet.config.in_channels != self.latent_channels:
            raise UserError(
                str(folder / "unet" / "config.json"),
                f"in_channels is {self.unet.config.in_channels}, but the VAE has "
                f"{self.latent_channels} latent channels (an inpainting or depth model?)",
                "use the text-to-image model of the family",
            )

    @cached_property
    def vae(self) -> Any:
        from diffusers import AutoencoderKL

        return _frozen(_load(AutoencoderKL, self.folder, "vae", torch.float32)).to(self.device)

    @cached_property
    def text_encoder(self) -> Any:
        from transformers import CLIPTextModel

        encoder = _load(CLIPTextModel, self.folder, "text_encoder", torch.float32)
        return _frozen(encoder).to(self.device)

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> Tensor:
        tokens = self.tokenizer(
            prompts,
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        # Like StableDiffusionPipeline.encode_prompt: a mask only where the encoder's config asks.
        mask = None
        if getattr(self.text_encoder.config, "use_attention_mask", False):
            mask = tokens.attention_mask.to(self.device)
        output = self.text_encoder(tokens.input_ids.to(self.device), attention_mask=mask)
        return output[0].float()  # (N, T, C)

    @torch.no_grad()
    def encode_pixels(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        posterior = self.vae.encode(pixels.to(self.device, torch.float32)).latent_dist
        return posterior.mean, posterior.logvar  # 2 x (N, C, h, w)

    def to_latents(self, posterior_sample: Tensor) -> Tensor:
        return (posterior_sample - self._shift) * self._scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        latents = latents.to(self.device, torch.float32) / self._scale + self._shift
        return self.vae.decode(latents).sample  # (N, 3, H, W)

    def predict(self, latents: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
        output = self.unet(
            latents.to(self.dtype), timesteps, encoder_hidden_states=text.to(self.dtype)
        )
        return output.sample.float()  # (N, C, h, w)


def _prediction_type(folder: Path) -> str:
    file = folder / "scheduler" / "scheduler_config.json"
    # diffusers' schedulers predict epsilon when the config does not say.
    kind = str(read_json(file).get("prediction_type", "epsilon"))
    if kind not in PREDICTION_TYPES:
        raise UserError(
            f"{file}: prediction_type",
            f"{kind!r} is not one of {', '.join(PREDICTION_TYPES)}",
            "use a base trained to predict noise or v",
        )
    return kind


def check_files(folder: Path) -> None:
    """Raise UserError for the first component whose config or safetensors file is missing."""
    for component, config_file in _CONFIG_FILES.items():
        read_json(folder / component / config_file)
    for component, stem in _WEIGHT_STEMS.items():
        if _weight_variant(folder / component, stem) is None:
            pickles = sorted((folder / component).glob("*.bin"))
            found = f"only {pickles[0].name}, a pickle, is there" if pickles else "is missing"
            raise UserError(
                str(folder / component / f"{stem}.safetensors"),
                found,
                "save the model as safetensors (save_pretrained(..., safe_serialization=True)); "
                "pickles can run code and are never loaded"
                if pickles
                else "complete the model's folder; its download may have been cut off",
            )
    if not any((folder / "tokenizer").glob("*.json")):
        raise UserError(
            str(folder / "tokenizer"),
            "holds no vocabulary",
            "complete the model's folder with tokenizer/vocab.json and merges.txt",
        )


def _weight_variant(folder: Path, stem: str) -> str | None:
    """'' for plain weights, 'fp16' if only those are there, None if there are none."""
    for variant in ("", "fp16"):
        dotted = f"{stem}.{variant}" if variant else stem
        index = f"{stem}.safetensors.index.{variant}" if variant else f"{stem}.safetensors.index"
        if (folder / f"{dotted}.safetensors").is_file() or (folder / f"{index}.json").is_file():
            return variant
    return None


def _frozen(network: Any) -> Any:
    return network.requires_grad_(False).eval()


def _load(kind: Any, folder: Path, component: str, dtype: torch.dtype) -> Any:
    """One network from its subfolder; UserError naming the folder when it cannot be read."""
    with _naming(folder / component), no_progress_bars():
        return kind.from_pretrained(
            folder,
            subfolder=component,
            torch_dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            variant=_weight_variant(folder / component, _WEIGHT_STEMS[component]) or None,
        )


@contextmanager
def _naming(folder: Path) -> Iterator[None]:
    """Turn what the model libraries raise on broken files into a UserError that names them."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            str(folder),
            f"could not be loaded ({lines[0]})",
            "download or save the model again; its files may be cut off or of another family",
        ) from error
