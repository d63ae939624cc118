"""SDXL and models trained from it (Illustrious, Pony, NoobAI): two CLIP encoders, a 2D UNet.

The UNet is also given each picture's size before scaling, where it was cut and how large it is.
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
    ddim_sampler,
    diffusion_objective,
    refuse_other_inputs,
    vae_factor,
)
from training.families.clip_text import (
    CLIP_ATTENTION,
    CLIP_FEED_FORWARD,
    penultimate_and_pooled,
)
from training.families.files import load_network, load_part, read_json
from training.families.stable_diffusion import (
    UNET_ATTENTION,
    UNET_CONVOLUTIONS,
    UNET_FEED_FORWARD,
)
from training.family_facts import SDXL

# (height, width) of the file, (top, left) of the crop, (height, width) of the crop.
SIZE_NUMBERS = 6


class SDXLBase(Base):
    """An SDXL base; see `Base` for what the methods take and give."""

    family = SDXL.family
    pipelines = ("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline")
    components = (
        "unet",
        "vae",
        "text_encoder",
        "text_encoder_2",
        "tokenizer",
        "tokenizer_2",
        "scheduler",
    )
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
        self.tokenizers = {
            name: load_part(CLIPTokenizer, folder, name) for name in ("tokenizer", "tokenizer_2")
        }

    @cached_property
    def text_encoders(self) -> dict[str, Any]:
        from transformers import CLIPTextModel, CLIPTextModelWithProjection

        kinds = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
        return {
            name: load_network(kind, self.folder, name, torch.float32, self.device)
            for name, kind in kinds.items()
        }

    def is_read(self, encoder: str, module: str) -> bool:
        """True but for the first encoder's last layer: its hidden states are read before that."""
        last = self.text_encoders[encoder].config.num_hidden_layers - 1
        return encoder != "text_encoder" or f"encoder.layers.{last}." not in module

    @classmethod
    def native_size(cls, folder: Path) -> int:
        return int(read_json(folder / "unet" / "config.json")["sample_size"]) * vae_factor(folder)

    def encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        """As StableDiffusionXLPipeline.encode_prompt; the pooled one is the second encoder's."""
        first, _ = penultimate_and_pooled(
            self.text_encoders["text_encoder"], self.tokenizers["tokenizer"], prompts
        )
        second, pooled = penultimate_and_pooled(
            self.text_encoders["text_encoder_2"], self.tokenizers["tokenizer_2"], prompts
        )
        return {"text": torch.cat([first, second], dim=-1), "pooled": pooled}  # (N, T, C), (N, P)

    def picture_conditions(
        self, original: tuple[int, int], corner: tuple[int, int], size: tuple[int, int]
    ) -> dict[str, Tensor]:
        """Podell et al. 2023, section 2.2, in the order of diffusers' `_get_add_time_ids`."""
        numbers = (*original, *corner, *size)
        return {"time_ids": torch.tensor(numbers, dtype=torch.float32)}

    def condition_shapes(self) -> dict[str, tuple[int, ...]]:
        length = self.tokenizers["tokenizer"].model_max_length
        config = self.denoiser.config
        pooled = config.projection_class_embeddings_input_dim
        pooled -= SIZE_NUMBERS * config.addition_time_embed_dim
        return {
            "text": (length, config.cross_attention_dim),
            "pooled": (pooled,),
            "time_ids": (SIZE_NUMBERS,),
        }

    def predict(self, latents: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        output = self.denoiser(
            latents.to(self.dtype),
            timesteps,
            encoder_hidden_states=conditions["text"].to(self.dtype),
            added_cond_kwargs={
                "text_embeds": conditions["pooled"].to(self.dtype),
                "time_ids": conditions["time_ids"],
            },
        )
        return output.sample.float()  # (N, C, h, w)

    def sampler(self, steps: int, latents: Tensor) -> Any:
        return ddim_sampler(self.folder, steps, self.device)

    @property
    def kohya_prefixes(self) -> dict[str, str]:
        own = {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
        return {**super().kohya_prefixes, **own}

    @property
    def kohya_version(self) -> str:
        v_prediction = self.objective.prediction_type == "v_prediction"
        return "sdxl_base_v1-0" + ("-v" if v_prediction else "")

    @property
    def modelspec_architecture(self) -> str:
        return "stable-diffusion-xl-v1-base"
