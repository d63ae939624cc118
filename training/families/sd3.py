"""Stable Diffusion 3 and 3.5: two CLIP encoders and a T5, a multimodal transformer, a flow.

A model saved without its T5 works too: its part of the text is then zero, as in diffusers.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from training.families.base import Base, Conditions, flow_objective, vae_factor
from training.families.clip_text import penultimate_and_pooled
from training.families.files import language_model_dtype, load_network, load_part, read_json
from training.families.t5_text import load_t5, t5_states
from training.family_facts import SD3

# Tokens of the T5's part, the default of StableDiffusion3Pipeline.
T5_TOKENS = 256
CLIP_TOKENS = 77


class SD3Base(Base):
    """An SD3 or SD3.5 base; see `Base` for what the methods take and give."""

    family = SD3.family
    pipelines = ("StableDiffusion3Pipeline",)
    components = (
        "transformer",
        "vae",
        "text_encoder",
        "text_encoder_2",
        "text_encoder_3",
        "tokenizer",
        "tokenizer_2",
        "tokenizer_3",
        "scheduler",
    )
    optional = ("text_encoder_3", "tokenizer_3")
    denoiser_name = "transformer"
    # `attn2` is SD3.5-medium's second attention; the names of diffusers' DreamBooth script.
    attention_modules = (
        "to_q",
        "to_k",
        "to_v",
        "to_out.0",
        "add_q_proj",
        "add_k_proj",
        "add_v_proj",
        "to_add_out",
    )
    feed_forward_modules = ("net.0.proj", "net.2")
    half = SD3.half
    is_flow = SD3.is_flow
    defaults = SD3.defaults
    patch = 2

    def __init__(
        self, path_or_id: str, folder: Path, device: torch.device, dtype: torch.dtype
    ) -> None:
        from diffusers import SD3Transformer2DModel
        from transformers import CLIPTokenizer, T5TokenizerFast

        super().__init__(path_or_id, folder, device, dtype)
        self.objective = flow_objective(folder, self.patch)
        self.denoiser = load_network(SD3Transformer2DModel, folder, "transformer", dtype, device)
        for number in ("", "_2"):
            name = f"tokenizer{number}"
            self.tokenizers[name] = load_part(CLIPTokenizer, folder, name)
        self._has_t5 = (folder / "text_encoder_3").is_dir()
        if self._has_t5:
            self.tokenizers["tokenizer_3"] = load_part(T5TokenizerFast, folder, "tokenizer_3")

    @cached_property
    def text_encoders(self) -> dict[str, Any]:
        from transformers import CLIPTextModelWithProjection

        kind = CLIPTextModelWithProjection
        encoders = {
            name: load_network(kind, self.folder, name, torch.float32, self.device)
            for name in ("text_encoder", "text_encoder_2")
        }
        if self._has_t5:
            encoders["text_encoder_3"] = load_t5(self.folder, "text_encoder_3", self.device)
        return encoders

    @property
    def text_dtype(self) -> torch.dtype:
        return language_model_dtype(self.device) if self._has_t5 else torch.float32

    @classmethod
    def native_size(cls, folder: Path) -> int:
        sample = int(read_json(folder / "transformer" / "config.json")["sample_size"])
        return sample * vae_factor(folder)

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        """As StableDiffusion3Pipeline.encode_prompt."""
        states, pooled = [], []
        for number in ("", "_2"):
            hidden, own = penultimate_and_pooled(
                self.text_encoders[f"text_encoder{number}"],
                self.tokenizers[f"tokenizer{number}"],
                prompts,
            )
            states.append(hidden)
            pooled.append(own)
        width = self.denoiser.config.joint_attention_dim
        clip = torch.cat(states, dim=-1)
        clip = F.pad(clip, (0, width - clip.shape[-1]))  # (N, 77, C)
        if self._has_t5:
            encoder = self.text_encoders["text_encoder_3"]
            t5 = t5_states(encoder, self.tokenizers["tokenizer_3"], prompts, T5_TOKENS)
        else:
            t5 = torch.zeros(len(prompts), T5_TOKENS, width, device=clip.device)
        return {"text": torch.cat([clip, t5], dim=1), "pooled": torch.cat(pooled, dim=-1)}

    def condition_shapes(self) -> dict[str, tuple[int, ...]]:
        config = self.denoiser.config
        return {
            "text": (CLIP_TOKENS + T5_TOKENS, config.joint_attention_dim),
            "pooled": (config.pooled_projection_dim,),
        }

    def predict(self, latents: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        output = self.denoiser(
            hidden_states=latents.to(self.dtype),
            timestep=timesteps,
            encoder_hidden_states=conditions["text"].to(self.dtype),
            pooled_projections=conditions["pooled"].to(self.dtype),
        )
        return output.sample.float()  # (N, C, h, w)

    def sampler(self, steps: int, latents: Tensor) -> Any:
        from diffusers import FlowMatchEulerDiscreteScheduler

        scheduler = load_part(FlowMatchEulerDiscreteScheduler, self.folder, "scheduler")
        scheduler.set_timesteps(steps, device=self.device)
        return scheduler

    @property
    def kohya_version(self) -> str:
        return "sd3"

    @property
    def modelspec_architecture(self) -> str:
        return "stable-diffusion-3"
