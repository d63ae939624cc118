"""FLUX.2 [dev] and [klein]: a Mistral 3 or Qwen3 encoder, a transformer with shared modulation.

A flow; its VAE's latents are taken as 2 x 2 patches and normalised by running statistics. dev is
told the guidance, the distilled klein has it within: both make a picture in one pass per step,
without an unconditional half.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from training.families.base import Base, Conditions, flow_objective, refuse_other_inputs
from training.families.files import (
    INDEX_FILE,
    language_model_dtype,
    load_network,
    load_part,
    read_json,
)
from training.families.qwen_text import load_qwen, qwen_states
from training.families.vision_language import load_language_model, mistral_states
from training.family_facts import FLUX2
from training.objective import FLOW_TIMESTEPS

# Tokens of the text, the default of both pipelines.
TEXT_TOKENS = 512
# Hidden states that are read, the defaults of Flux2KleinPipeline and of Flux2Pipeline.
KLEIN_LAYERS = (9, 18, 27)
DEV_LAYERS = (10, 20, 30)
# The pipelines' default size; the transformer's config names none.
NATIVE_SIZE_PX = 1024
# The guidance that dev is given in training (diffusers' README_flux2.md).
TRAINING_GUIDANCE = 1.0
# How many of the VAE's cells, along one side, are one cell for the transformer.
VAE_PATCH = 2


class Flux2Base(Base):
    """A FLUX.2 base; see `Base` for what the methods take and give."""

    family = FLUX2.family
    pipelines = ("Flux2KleinPipeline", "Flux2Pipeline")
    components = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
    denoiser_name = "transformer"
    vae_class = "AutoencoderKLFlux2"
    # Double blocks have the names of FLUX.1; single blocks have q, k, v and the first half of their
    # feed-forward in one layer, and the rest in `to_out`.
    attention_modules = (
        "attn.to_q",
        "attn.to_k",
        "attn.to_v",
        "attn.to_out.0",
        "attn.add_q_proj",
        "attn.add_k_proj",
        "attn.add_v_proj",
        "attn.to_add_out",
        "attn.to_qkv_mlp_proj",
        "attn.to_out",
    )
    feed_forward_modules = (
        "ff.linear_in",
        "ff.linear_out",
        "ff_context.linear_in",
        "ff_context.linear_out",
    )
    half = FLUX2.half
    overflows_fp16 = True  # as FLUX.1
    is_flow = FLUX2.is_flow
    defaults = FLUX2.defaults

    def __init__(
        self, path_or_id: str, folder: Path, device: torch.device, dtype: torch.dtype
    ) -> None:
        from diffusers import Flux2Transformer2DModel
        from transformers import AutoTokenizer

        super().__init__(path_or_id, folder, device, dtype)
        # Outside of the VAE, a latent cell is a patch of the VAE's cells.
        self.latent_channels *= VAE_PATCH**2
        self.vae_factor *= VAE_PATCH
        self.objective = flow_objective(folder, self.patch)
        self.denoiser = load_network(Flux2Transformer2DModel, folder, "transformer", dtype, device)
        refuse_other_inputs(self, self.latent_channels)
        self.tokenizers = {"tokenizer": load_part(AutoTokenizer, folder, "tokenizer")}
        index = read_json(folder / INDEX_FILE)
        self._is_dev = index["_class_name"] == "Flux2Pipeline"
        self._is_distilled = bool(index.get("is_distilled", False))

    @cached_property
    def text_encoders(self) -> dict[str, Any]:
        from transformers import Mistral3ForConditionalGeneration

        if not self._is_dev:
            return {"text_encoder": load_qwen(self.folder, "text_encoder", self.device)}
        kind = Mistral3ForConditionalGeneration
        return {"text_encoder": load_language_model(kind, self.folder, "text_encoder", self.device)}

    @property
    def text_dtype(self) -> torch.dtype:
        return language_model_dtype(self.device)

    @classmethod
    def native_size(cls, folder: Path) -> int:
        return NATIVE_SIZE_PX

    @classmethod
    def size_multiple(cls, folder: Path) -> int:
        return super().size_multiple(folder) * VAE_PATCH

    @property
    def guidance_embedded(self) -> bool:
        """A distilled klein has guidance built in, so it takes none as input."""
        return self._is_dev or self._is_distilled

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        """As the pipelines' encode_prompt; the padding is not masked there either."""
        own = self.text_encoders["text_encoder"], self.tokenizers["tokenizer"], prompts, TEXT_TOKENS
        if self._is_dev:
            text = mistral_states(*own, DEV_LAYERS)
        else:
            text, _ = qwen_states(*own, KLEIN_LAYERS, thinking=False)
        return {"text": text}  # (N, T, C)

    def condition_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"text": (TEXT_TOKENS, self.denoiser.config.joint_attention_dim)}

    @torch.no_grad()
    def encode_pixels(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """The posterior's mean and log-variance, in patches.  # 2 x (N, 4C, h/2, w/2)"""
        mean, logvar = super().encode_pixels(pixels)
        return F.pixel_unshuffle(mean, VAE_PATCH), F.pixel_unshuffle(logvar, VAE_PATCH)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        shift, scale = self._latent_affine(latents)
        raw = latents.to(self.device, torch.float32) / scale + shift
        return self.vae.decode(F.pixel_shuffle(raw, VAE_PATCH)).sample

    def _latent_affine(self, like: Tensor) -> tuple[Tensor, Tensor]:
        shift, scale = self._statistics
        return shift.to(like.device), scale.to(like.device)

    @cached_property
    def _statistics(self) -> tuple[Tensor, Tensor]:
        """The VAE's running statistics of every channel of a patch, as in the pipelines.

        They are kept, since the loop asks for them when the VAE has long been released.
        """
        norm = self.vae.bn
        deviation = torch.sqrt(norm.running_var + self.vae.config.batch_norm_eps)
        return norm.running_mean.view(1, -1, 1, 1), 1 / deviation.view(1, -1, 1, 1)

    def predict(self, latents: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        """Dev is given `conditions["guidance"]`, (N,), or TRAINING_GUIDANCE without it."""
        count, _, height, width = latents.shape
        guidance = None
        if self._is_dev:
            usual = torch.full((count,), TRAINING_GUIDANCE, device=latents.device)
            guidance = conditions.get("guidance", usual)
        text = conditions["text"].to(self.dtype)
        output = self.denoiser(
            hidden_states=latents.flatten(2).mT.to(self.dtype),  # (N, h * w, C)
            timestep=timesteps / FLOW_TIMESTEPS,
            guidance=guidance,
            encoder_hidden_states=text,
            txt_ids=_positions(1, 1, text.shape[1], latents.device),
            img_ids=_positions(height, width, 1, latents.device),
        )
        return output.sample.float().mT.reshape(latents.shape)

    def sampler(self, steps: int, latents: Tensor) -> Any:
        """Even steps, moved by a shift that also depends on how many there are."""
        from diffusers import FlowMatchEulerDiscreteScheduler
        from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

        scheduler = load_part(FlowMatchEulerDiscreteScheduler, self.folder, "scheduler")
        mu = compute_empirical_mu(latents.shape[-2] * latents.shape[-1], steps)
        sigmas = np.linspace(1.0, 1 / steps, steps)
        scheduler.set_timesteps(sigmas=sigmas, device=self.device, mu=mu)
        return scheduler

    @property
    def kohya_version(self) -> str:
        return "flux2"

    @property
    def modelspec_architecture(self) -> str:
        """The name of dev that SwarmUI and musubi-tuner use."""
        return "Flux.2-dev" if self._is_dev else "flux-2-klein"


def _positions(rows: int, columns: int, tokens: int, device: torch.device) -> Tensor:
    """(0, row, column, token) of every token.  # (rows * columns * tokens, 4)"""
    axes = (torch.arange(count) for count in (1, rows, columns, tokens))
    return torch.cartesian_prod(*axes).to(device)
