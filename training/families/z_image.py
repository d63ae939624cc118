"""Z-Image and Z-Image-Turbo: a Qwen3 encoder, one stream of text and 2 x 2 patches, a flow.

Text has its own length in every sample; it is padded to a fixed one, with a mask beside it.
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
from training.families.files import language_model_dtype, load_network, load_part
from training.families.qwen_text import load_qwen, qwen_states
from training.family_facts import Z_IMAGE
from training.objective import FLOW_TIMESTEPS

# Tokens of the text at most, the default of ZImagePipeline.
TEXT_TOKENS = 512
# ZImagePipeline's default size; the transformer's config names none.
NATIVE_SIZE_PX = 1024


class ZImageBase(Base):
    """A Z-Image base; see `Base` for what the methods take and give."""

    family = Z_IMAGE.family
    pipelines = ("ZImagePipeline",)
    components = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
    denoiser_name = "transformer"
    # The default targets of diffusers' train_dreambooth_lora_z_image.py.
    attention_modules = (
        "attention.to_q",
        "attention.to_k",
        "attention.to_v",
        "attention.to_out.0",
    )
    feed_forward_modules = ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3")
    unbatched_modules = (
        "cap_embedder",
    )  # they hold captions of several lengths, one after the other
    half = Z_IMAGE.half
    overflows_fp16 = True  # its pictures are black in fp16, as users told its authors
    is_flow = Z_IMAGE.is_flow
    defaults = Z_IMAGE.defaults
    patch = 2

    def __init__(
        self, path_or_id: str, folder: Path, device: torch.device, dtype: torch.dtype
    ) -> None:
        from diffusers import ZImageTransformer2DModel
        from transformers import AutoTokenizer

        super().__init__(path_or_id, folder, device, dtype)
        self.objective = flow_objective(folder, self.patch)
        self.denoiser = load_network(ZImageTransformer2DModel, folder, "transformer", dtype, device)
        refuse_other_inputs(self, self.latent_channels)
        self.tokenizers = {"tokenizer": load_part(AutoTokenizer, folder, "tokenizer")}

    @cached_property
    def text_encoders(self) -> dict[str, Any]:
        return {"text_encoder": load_qwen(self.folder, "text_encoder", self.device)}

    @property
    def text_dtype(self) -> torch.dtype:
        return language_model_dtype(self.device)

    @classmethod
    def native_size(cls, folder: Path) -> int:
        return NATIVE_SIZE_PX

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        """As ZImagePipeline.encode_prompt, which gives lists where here a mask marks the rows."""
        encoder, tokenizer = self.text_encoders["text_encoder"], self.tokenizers["tokenizer"]
        text, mask = qwen_states(encoder, tokenizer, prompts, TEXT_TOKENS, (-2,), thinking=True)
        return {"text": text * mask[..., None], "mask": mask}  # (N, T, C), (N, T)

    def condition_shapes(self) -> dict[str, tuple[int, ...]]:
        return {
            "text": (TEXT_TOKENS, self.denoiser.config.cap_feat_dim),
            "mask": (TEXT_TOKENS,),
        }

    def predict(self, latents: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        """The model counts time from noise to picture, and predicts the velocity of that way."""
        text = conditions["text"].to(self.dtype)
        own = [states[mask > 0.5] for states, mask in zip(text, conditions["mask"], strict=True)]
        output = self.denoiser(
            list(latents.to(self.dtype).unsqueeze(2).unbind()),  # (C, 1, h, w) each
            (FLOW_TIMESTEPS - timesteps) / FLOW_TIMESTEPS,
            own,
        )
        return -torch.stack(list(output.sample)).squeeze(2).float()  # (N, C, h, w)

    def sampler(self, steps: int, latents: Tensor) -> Any:
        return even_flow_sampler(self, steps, latents)

    @property
    def kohya_prefix(self) -> str:
        """SimpleTuner's prefix, the only one with underscores that ComfyUI knows for Z-Image."""
        return "lycoris_"

    @property
    def kohya_version(self) -> str:
        return "zimage"

    @property
    def modelspec_architecture(self) -> str:
        return "z-image"
