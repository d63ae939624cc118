"""FLUX.1 (dev, schnell): a CLIP and a T5 encoder, a transformer on 2 x 2 patches, a flow.

dev is given the guidance and makes a picture in one pass per step; schnell is not given it.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from training.families.base import (
    Base,
    Conditions,
    even_flow_sampler,
    flow_objective,
    refuse_other_inputs,
)
from training.families.clip_text import clip_tokens
from training.families.files import language_model_dtype, load_network, load_part
from training.families.patches import from_tokens, to_tokens
from training.families.t5_text import load_t5, t5_states
from training.family_facts import FLUX

# Tokens of the T5, the default of FluxPipeline.
T5_TOKENS = 512
# FluxPipeline's default size; the transformer's config names none.
NATIVE_SIZE_PX = 1024
# The guidance that dev is given in training (as in diffusers' train_dreambooth_lora_flux.py and
# kohya's flux_train).
TRAINING_GUIDANCE = 1.0


class FluxBase(Base):
    """A FLUX.1 base; see `Base` for what the methods take and give."""

    family = FLUX.family
    pipelines = ("FluxPipeline",)
    components = (
        "transformer",
        "vae",
        "text_encoder",
        "text_encoder_2",
        "tokenizer",
        "tokenizer_2",
        "scheduler",
    )
    denoiser_name = "transformer"
    # The default targets of diffusers' DreamBooth script, for double and single blocks.
    attention_modules = (
        "attn.to_q",
        "attn.to_k",
        "attn.to_v",
        "attn.to_out.0",
        "attn.add_q_proj",
        "attn.add_k_proj",
        "attn.add_v_proj",
        "attn.to_add_out",
    )
    feed_forward_modules = (
        "ff.net.0.proj",
        "ff.net.2",
        "ff_context.net.0.proj",
        "ff_context.net.2",
        "proj_mlp",
        "proj_out",
    )
    half = FLUX.half
    overflows_fp16 = True  # kohya's trainer gets losses of nan; diffusers clips two of the sums
    is_flow = FLUX.is_flow
    defaults = FLUX.defaults
    patch = 2

    def __init__(
        self, path_or_id: str, folder: Path, device: torch.device, dtype: torch.dtype
    ) -> None:
        from diffusers import FluxTransformer2DModel
        from transformers import CLIPTokenizer, T5TokenizerFast

        super().__init__(path_or_id, folder, device, dtype)
        self.objective = flow_objective(folder, self.patch)
        self.denoiser = load_network(FluxTransformer2DModel, folder, "transformer", dtype, device)
        refuse_other_inputs(
            self, self.latent_channels * self.patch**2, "a Fill, Depth or Canny model"
        )
        self.tokenizers = {
            "tokenizer": load_part(CLIPTokenizer, folder, "tokenizer"),
            "tokenizer_2": load_part(T5TokenizerFast, folder, "tokenizer_2"),
        }

    @cached_property
    def text_encoders(self) -> dict[str, Any]:
        from transformers import CLIPTextModel

        place = self.folder, "text_encoder", torch.float32, self.device
        return {
            "text_encoder": load_network(CLIPTextModel, *place),
            "text_encoder_2": load_t5(self.folder, "text_encoder_2", self.device),
        }

    @property
    def text_dtype(self) -> torch.dtype:
        return language_model_dtype(self.device)

    @classmethod
    def native_size(cls, folder: Path) -> int:
        return NATIVE_SIZE_PX

    @property
    def guidance_embedded(self) -> bool:
        return bool(self.denoiser.config.guidance_embeds)

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        """As FluxPipeline.encode_prompt: CLIP's pooled state, T5's hidden states."""
        clip = self.text_encoders["text_encoder"]
        ids = clip_tokens(self.tokenizers["tokenizer"], prompts).input_ids
        pooled = clip(ids.to(clip.device)).pooler_output.float()  # (N, P)
        t5, tokenizer = self.text_encoders["text_encoder_2"], self.tokenizers["tokenizer_2"]
        return {"text": t5_states(t5, tokenizer, prompts, T5_TOKENS), "pooled": pooled}

    def condition_shapes(self) -> dict[str, tuple[int, ...]]:
        config = self.denoiser.config
        return {
            "text": (T5_TOKENS, config.joint_attention_dim),
            "pooled": (config.pooled_projection_dim,),
        }

    def predict(self, latents: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        """Dev is given `conditions["guidance"]`, (N,), or TRAINING_GUIDANCE without it."""
        count, _, height, width = latents.shape
        guidance = None
        if self.guidance_embedded:
            usual = torch.full((count,), TRAINING_GUIDANCE, device=latents.device)
            guidance = conditions.get("guidance", usual)
        text = conditions["text"].to(self.dtype)
        output = self.denoiser(
            hidden_states=to_tokens(latents, self.patch).to(self.dtype),
            timestep=timesteps / 1000,
            guidance=guidance,
            pooled_projections=conditions["pooled"].to(self.dtype),
            encoder_hidden_states=text,
            txt_ids=torch.zeros(text.shape[1], 3, device=latents.device),
            img_ids=_positions(height // self.patch, width // self.patch, latents.device),
        )
        return from_tokens(output.sample.float(), self.patch, height, width)

    def sampler(self, steps: int, latents: Tensor) -> Any:
        return even_flow_sampler(self, steps, latents)

    @property
    def kohya_version(self) -> str:
        return "flux1"

    @property
    def modelspec_architecture(self) -> str:
        return "flux-1-dev" if self.guidance_embedded else "flux-1-schnell"


def _positions(rows: int, columns: int, device: torch.device) -> Tensor:
    """(0, row, column) of every token.  # (rows * columns, 3)"""
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    places = torch.stack([torch.zeros_like(row), row, column], dim=-1)
    return places.flatten(0, 1).to(device, torch.float32)
