"""Small random pipelines of the real architectures on disk: SDXL, SD3, FLUX and Z-Image.

Few channels and layers, all else as in the real models' configs; nothing in them is trained.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

WIDTH = 32
WIDE = 48


def write_tokenizer(folder: Path) -> int:
    """A byte-level CLIP vocabulary without merges; returns its size."""
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(letter + "</w>" for letter in letters)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": 77,
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return len(words)


def build_sdxl(folder: Path, prediction_type: str = "epsilon", layers: int = 2) -> Path:
    """Two encoders, the second wider, added conditions, transformers of 1 and 2 layers; 64 px.

    `layers` are the second encoder's.
    """
    tokenizer = _clip_tokenizer(folder)
    pipeline = StableDiffusionXLPipeline(
        vae=_vae(4, scaling_factor=0.13025),
        text_encoder=_clip(CLIPTextModel, tokenizer),
        text_encoder_2=_clip(CLIPTextModelWithProjection, tokenizer, layers, WIDE),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16, 32),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=WIDTH + WIDE,
            attention_head_dim=(2, 4),
            transformer_layers_per_block=(1, 2),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + WIDTH,
            norm_num_groups=8,
        ),
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            steps_offset=1,
            timestep_spacing="leading",
            prediction_type=prediction_type,
        ),
    )
    return _save(pipeline, folder)


def build_sd3(folder: Path, with_t5: bool = True) -> Path:
    """Joint attention of text and picture, as SD3.5-medium's with a second attention; 64 px."""
    tokenizer = _clip_tokenizer(folder)
    pipeline = StableDiffusion3Pipeline(
        vae=_vae(16, scaling_factor=1.5305, shift_factor=0.0609),
        text_encoder=_clip(CLIPTextModelWithProjection, tokenizer),
        text_encoder_2=_clip(CLIPTextModelWithProjection, tokenizer),
        text_encoder_3=_t5() if with_t5 else None,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        tokenizer_3=_t5_tokenizer() if with_t5 else None,
        transformer=SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=16,
            out_channels=16,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            caption_projection_dim=32,
            joint_attention_dim=2 * WIDTH,
            pooled_projection_dim=2 * WIDTH,
            pos_embed_max_size=16,
            dual_attention_layers=(0,),
            qk_norm="rms_norm",
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
    return _save(pipeline, folder)


def build_flux(folder: Path, guidance_embeds: bool = True) -> Path:
    """One double and one single block; with `guidance_embeds` as dev, without as schnell."""
    tokenizer = _clip_tokenizer(folder)
    pipeline = FluxPipeline(
        vae=_vae(16, scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=_clip(CLIPTextModel, tokenizer),
        text_encoder_2=_t5(),
        tokenizer=tokenizer,
        tokenizer_2=_t5_tokenizer(),
        transformer=FluxTransformer2DModel(
            patch_size=1,
            in_channels=64,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=2 * WIDTH,
            pooled_projection_dim=WIDTH,
            axes_dims_rope=(4, 4, 8),
            guidance_embeds=guidance_embeds,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(
            shift=3.0,
            use_dynamic_shifting=guidance_embeds,
            base_shift=0.5,
            max_shift=1.15,
            base_image_seq_len=256,
            max_image_seq_len=4096,
        ),
    )
    return _save(pipeline, folder)


def build_flux2(folder: Path, is_distilled: bool = False) -> Path:
    """One double and one single block; a text encoder with all the layers that are read."""
    tokenizer = _qwen_tokenizer()
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=4,
        sample_size=64,
    )
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2.0)
    pipeline = Flux2KleinPipeline(
        vae=vae,
        text_encoder=Qwen3ForCausalLM(_qwen_config(len(tokenizer), layers=28, width=16)),
        tokenizer=tokenizer,
        transformer=Flux2Transformer2DModel(
            in_channels=32,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=3 * 16,
            axes_dims_rope=(4, 4, 4, 4),
            guidance_embeds=False,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        is_distilled=is_distilled,
    )
    return _save(pipeline, folder)


def build_z_image(folder: Path) -> Path:
    """One block for text, one for the picture and two for both; captions of any length."""
    tokenizer = _qwen_tokenizer()
    pipeline = ZImagePipeline(
        vae=_vae(16, scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=Qwen3Model(_qwen_config(len(tokenizer), layers=3)),
        tokenizer=tokenizer,
        transformer=ZImageTransformer2DModel(
            dim=48,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=2 * WIDTH,
            axes_dims=[8, 8, 8],
            axes_lens=[1024, 64, 64],
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
    return _save(pipeline, folder)


#: Family (and variant) -> its builder.
BUILDERS: dict[str, Callable[[Path], Path]] = {
    "sdxl": build_sdxl,
    "sdxl-v": lambda folder: build_sdxl(folder, "v_prediction"),
    "sd3": build_sd3,
    "sd3-no-t5": lambda folder: build_sd3(folder, with_t5=False),
    "flux-dev": build_flux,
    "flux2-klein": build_flux2,
    "flux2-distilled": lambda folder: build_flux2(folder, is_distilled=True),
    "zimage": build_z_image,
    "flux-schnell": lambda folder: build_flux(folder, guidance_embeds=False),
}


def build(name: str, folder: Path) -> Path:
    """Write the pipeline called `name` in BUILDERS to `folder`, the same bytes every time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return BUILDERS[name](folder)


def _save(pipeline: Any, folder: Path) -> Path:
    pipeline.save_pretrained(folder, safe_serialization=True)
    return folder


def _vae(channels: int, **factors: float) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=64,
        **factors,
    )


def _clip_tokenizer(folder: Path) -> CLIPTokenizer:
    write_tokenizer(folder / "tokenizer")
    return CLIPTokenizer.from_pretrained(folder / "tokenizer")


def _clip(kind: Any, tokenizer: CLIPTokenizer, layers: int = 2, width: int = WIDTH) -> Any:
    return kind(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=37,
            projection_dim=WIDTH,
            num_hidden_layers=layers,
            num_attention_heads=4,
            max_position_embeddings=77,
            bos_token_id=len(tokenizer) - 2,
            eos_token_id=len(tokenizer) - 1,
            pad_token_id=len(tokenizer) - 1,
        )
    )


def _t5() -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(vocab_size=128, d_model=2 * WIDTH, d_kv=8, d_ff=37, num_layers=2, num_heads=4)
    )


def _t5_tokenizer() -> T5TokenizerFast:
    letters = [chr(code) for code in range(33, 127)]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    return T5TokenizerFast(vocab=[*special, *((letter, -3.0) for letter in letters)], extra_ids=0)


# Qwen3's own, as far as a picture model asks it.
_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content "
    "+ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)


def _qwen_tokenizer() -> Qwen2Tokenizer:
    from tokenizers.pre_tokenizers import ByteLevel

    words = ["<|endoftext|>", *sorted(ByteLevel.alphabet())]
    tokenizer = Qwen2Tokenizer(
        vocab={word: number for number, word in enumerate(words)},
        merges=[],
        extra_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    tokenizer.chat_template = _CHAT_TEMPLATE
    return tokenizer


def _qwen_config(vocabulary: int, layers: int, width: int = 2 * WIDTH) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=37,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
    )
