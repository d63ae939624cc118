"""Stable Diffusion 1.x and 2.x: one CLIP text encoder, an AutoencoderKL, a 2D UNet."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from training.families.base import (
    Base,
    Conditions,
    ddim_sampler,
    diffusion_objective,
    refuse_other_inputs,
    vae_factor,
)
from training.families.clip_text import CLIP_ATTENTION, CLIP_FEED_FORWARD, clip_tokens
from training.families.files import load_network, load_part, read_json
from training.family_facts import SD15

# Module name endings in diffusers' UNet2DConditionModel; the same lists as its LoRA scripts.
UNET_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
UNET_FEED_FORWARD = ("ff.net.0.proj", "ff.net.2")
# With these they are the layers of kohya's LoCon: all linear layers and convolutions in the modules
# Transformer2DModel, ResnetBlock2D, Downsample2D and Upsample2D.
UNET_CONVOLUTIONS = (
    "conv1",
    "conv2",
    "conv_shortcut",
    "time_emb_proj",
    "downsamplers.0.conv",
    "upsamplers.0.conv",
    "proj_in",
    "proj_out",
)
# Width of the text embeddings that tells Stable Diffusion 2.x from 1.x.
SD2_TEXT_WIDTH = 1024


class StableDiffusionBase(Base):
    """An SD1.5-family base; see `Base` for what the methods take and give."""

    family = SD15.family
    pipelines = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline")
    components = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
    denoiser_name = "unet"
    attention_modules = UNET_ATTENTION
    feed_forward_modules = UNET_FEED_FORWARD
    convolution_modules = UNET_CONVOLUTIONS
    encoder_attention_modules = CLIP_ATTENTION
    encoder_feed_forward_modules = CLIP_FEED_FORWARD

    def __init__(
        self, path_or_id: str, folder: Path, device: torch.device, dtype: torch.dtype
    ) -> None:
        from diffusers import UNet2DConditionModel
        from transformers import CLIPTokenizer

        super().__init__(path_or_id, folder, device, dtype)
        self.objective = diffusion_objective(folder)
        self.denoiser = load_network(UNet2DConditionModel, folder, "unet", dtype, device)
        refuse_other_inputs(self, self.latent_channels)
        self.tokenizers = {"tokenizer": load_part(CLIPTokenizer, folder, "tokenizer")}

    @cached_property
    def text_encoders(self) -> dict[str, Any]:
        from transformers import CLIPTextModel

        place = self.folder, "text_encoder", torch.float32, self.device
        return {"text_encoder": load_network(CLIPTextModel, *place)}

    @classmethod
    def native_size(cls, folder: Path) -> int:
        return int(read_json(folder / "unet" / "config.json")["sample_size"]) * vae_factor(folder)

    def encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        encoder = self.text_encoders["text_encoder"]
        tokens = clip_tokens(self.tokenizers["tokenizer"], prompts)
        # Like StableDiffusionPipeline.encode_prompt: a mask only where the encoder's config asks.
        mask = None
        if getattr(encoder.config, "use_attention_mask", False):
            mask = tokens.attention_mask.to(self.device)
        output = encoder(tokens.input_ids.to(self.device), attention_mask=mask)
        return {"text": output[0].float()}  # (N, T, C)

    def condition_shapes(self) -> dict[str, tuple[int, ...]]:
        length = self.tokenizers["tokenizer"].model_max_length
        return {"text": (length, self.denoiser.config.cross_attention_dim)}

    def predict(self, latents: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        output = self.denoiser(
            latents.to(self.dtype),
            timesteps,
            encoder_hidden_states=conditions["text"].to(self.dtype),
        )
        return output.sample.float()  # (N, C, h, w)

    def sampler(self, steps: int, latents: Tensor) -> Any:
        return ddim_sampler(self.folder, steps, self.device)

    @property
    def kohya_version(self) -> str:
        """The same as sd-scripts' `get_model_version_str_for_sd1_sd2`."""
        v_prediction = self.objective.prediction_type == "v_prediction"
        return f"sd_{'v2' if self._is_sd2 else 'v1'}{'_v' if v_prediction else ''}"

    @property
    def modelspec_architecture(self) -> str:
        if not self._is_sd2:
            return "stable-diffusion-v1"
        v_prediction = self.objective.prediction_type == "v_prediction"
        return f"stable-diffusion-v2-{'768-v' if v_prediction else '512'}"

    @property
    def _is_sd2(self) -> bool:
        return bool(self.denoiser.config.cross_attention_dim == SD2_TEXT_WIDTH)
