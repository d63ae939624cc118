"""Qwen-Image (also 2512): a Qwen2.5-VL encoder, two streams of text and 2 x 2 patches, a flow.

Its VAE is made for videos; a picture is a single frame. Text has its own length in every
sample; it is padded to a fixed one, with a mask beside it.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from training.families.base import (
    Base,
    Conditions,
    even_flow_sampler,
    flow_objective,
    refuse_other_inputs,
)
from training.families.files import language_model_dtype, load_network, load_part
from training.families.patches import from_tokens, to_tokens
from training.families.vision_language import load_language_model
from training.family_facts import QWEN_IMAGE
from training.objective import FLOW_TIMESTEPS

# QwenImagePipeline's prompt_template_encode, the tokens of it that are dropped again
# (prompt_template_encode_start_idx), and its max_sequence_length for what is left.
TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, "
    "quantity, text, spatial relationships of the objects and background:<|im_end|>\n"
    "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
TEMPLATE_TOKENS = 34
TEXT_TOKENS = 512
# QwenImagePipeline's default size; the transformer's config names none.
NATIVE_SIZE_PX = 1024


class QwenImageBase(Base):
    """A Qwen-Image base; see `Base` for what the methods take and give."""

    family = QWEN_IMAGE.family
    pipelines = ("QwenImagePipeline",)
    components = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
    denoiser_name = "transformer"
    vae_class = "AutoencoderKLQwenImage"
    # The default targets of diffusers' train_dreambooth_lora_qwen_image.py (`to_*`), and the same
    # of the text's stream; with the feed-forward ones they are those of kohya's musubi-tuner
    # (networks/lora_qwen_image.py), which leaves the modulation out as well.
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
        "img_mlp.net.0.proj",
        "img_mlp.net.2",
        "txt_mlp.net.0.proj",
        "txt_mlp.net.2",
    )
    half = QWEN_IMAGE.half
    overflows_fp16 = True  # ComfyUI, which offers bf16 and fp32 for it, gets black pictures in fp16
    is_flow = QWEN_IMAGE.is_flow
    defaults = QWEN_IMAGE.defaults
    patch = 2

    def __init__(
        self, path_or_id: str, folder: Path, device: torch.device, dtype: torch.dtype
    ) -> None:
        from diffusers import QwenImageTransformer2DModel
        from transformers import AutoTokenizer

        super().__init__(path_or_id, folder, device, dtype)
        self.latent_channels = int(self.vae_config["z_dim"])
        self.objective = flow_objective(folder, self.patch)
        place = folder, "transformer", dtype, device
        self.denoiser = load_network(QwenImageTransformer2DModel, *place)
        refuse_other_inputs(
            self, self.latent_channels * self.patch**2, "a model of layers or controls"
        )
        self.tokenizers = {"tokenizer": load_part(AutoTokenizer, folder, "tokenizer")}

    @cached_property
    def text_encoders(self) -> dict[str, Any]:
        from transformers import Qwen2_5_VLForConditionalGeneration

        kind = Qwen2_5_VLForConditionalGeneration
        return {"text_encoder": load_language_model(kind, self.folder, "text_encoder", self.device)}

    @property
    def text_dtype(self) -> torch.dtype:
        return language_model_dtype(self.device)

    @classmethod
    def native_size(cls, folder: Path) -> int:
        return NATIVE_SIZE_PX

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        """As QwenImagePipeline.encode_prompt, the template's first tokens cut off."""
        encoder = self.text_encoders["text_encoder"]
        tokens = self.tokenizers["tokenizer"](
            [TEMPLATE.format(prompt) for prompt in prompts],
            padding=True,
            max_length=TEMPLATE_TOKENS + TEXT_TOKENS,
            truncation=True,
            return_tensors="pt",
        )
        mask = tokens.attention_mask.to(encoder.device)
        states = encoder(
            input_ids=tokens.input_ids.to(encoder.device),
            attention_mask=mask,
            output_hidden_states=True,
            use_cache=False,
        ).hidden_states[-1]
        rows = [
            own[kept > 0][TEMPLATE_TOKENS:].float()
            for own, kept in zip(states, mask, strict=True)  # the padding may be on either side
        ]
        text = [F.pad(row, (0, 0, 0, TEXT_TOKENS - len(row))) for row in rows]
        masks = [F.pad(row.new_ones(len(row)), (0, TEXT_TOKENS - len(row))) for row in rows]
        return {"text": torch.stack(text), "mask": torch.stack(masks)}  # (N, T, C), (N, T)

    def condition_shapes(self) -> dict[str, tuple[int, ...]]:
        return {
            "text": (TEXT_TOKENS, self.denoiser.config.joint_attention_dim),
            "mask": (TEXT_TOKENS,),
        }

    @torch.no_grad()
    def encode_pixels(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """The posterior's mean and log-variance of pictures as videos of one frame."""
        posterior = self.vae.encode(pixels.to(self.device, torch.float32).unsqueeze(2)).latent_dist
        return posterior.mean.squeeze(2), posterior.logvar.squeeze(2)  # 2 x (N, C, h, w)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        shift, scale = self._latent_affine(latents)
        raw = latents.to(self.device, torch.float32) / scale + shift
        return self.vae.decode(raw.unsqueeze(2)).sample.squeeze(2)

    def _latent_affine(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """The published mean and deviation of every channel, and no factor beside them."""
        mean = torch.tensor(self.vae_config["latents_mean"], device=like.device)
        deviation = torch.tensor(self.vae_config["latents_std"], device=like.device)
        return mean.view(1, -1, 1, 1), 1 / deviation.view(1, -1, 1, 1)

    def predict(self, latents: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        count, _, height, width = latents.shape
        told = conditions["mask"] > 0.5
        # Padding that no sample's text reaches is cut off; without a mask attention is faster.
        longest = int(told.any(dim=0).nonzero().max()) + 1
        told = told[:, :longest]
        text = conditions["text"][:, :longest]
        output = self.denoiser(
            hidden_states=to_tokens(latents, self.patch).to(self.dtype),
            timestep=timesteps / FLOW_TIMESTEPS,
            encoder_hidden_states=text.to(self.dtype),
            encoder_hidden_states_mask=None if bool(told.all()) else told,
            img_shapes=[[(1, height // self.patch, width // self.patch)]] * count,
        )
        return from_tokens(output.sample.float(), self.patch, height, width)

    def guided(self, without: Tensor, with_text: Tensor, guidance: float) -> Tensor:
        """Guidance rescaled, in every token, to the length of the prediction with text.

        This is QwenImagePipeline's true CFG.
        """
        height, width = without.shape[-2:]
        wanted = to_tokens(with_text, self.patch).norm(dim=-1, keepdim=True)
        tokens = to_tokens(super().guided(without, with_text, guidance), self.patch)
        tokens = tokens * (wanted / tokens.norm(dim=-1, keepdim=True))
        return from_tokens(tokens, self.patch, height, width)

    def sampler(self, steps: int, latents: Tensor) -> Any:
        return even_flow_sampler(self, steps, latents)

    @property
    def kohya_prefix(self) -> str:
        """musubi-tuner's prefix; ComfyUI reads diffusers' module names behind it."""
        return "lora_unet_"

    @property
    def kohya_version(self) -> str:
        return "qwen_image"

    @property
    def modelspec_architecture(self) -> str:
        """SwarmUI's name, which it also accepts in the capitals of musubi-tuner (`Qwen-Image`)."""
        return "qwen-image"
