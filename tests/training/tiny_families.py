"""Small random pipelines of the real architectures on disk, of every family.

Few channels and layers, all else as in the real models' configs; nothing in them is trained.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tiny_text import (
    WIDE,
    WIDTH,
    clip,
    clip_tokenizer,
    mistral3,
    mistral_tokenizer,
    qwen_config,
    qwen_tokenizer,
    qwen_vl,
    t5,
    t5_tokenizer,
)
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Qwen3ForCausalLM,
    Qwen3Model,
)

# By the width of its text Stable Diffusion 2 is told from 1.
SD2_WIDTH = 1024


def build_sd15(folder: Path) -> Path:
    """A CLIP whose last layer is read, convolutions around the attention; 64 px."""
    tokenizer = clip_tokenizer(folder)
    unet = {"layers_per_block": 1, "attention_head_dim": 8}
    return _stable_diffusion(folder, tokenizer, clip(CLIPTextModel, tokenizer), "epsilon", **unet)


def build_sd2(folder: Path, layers: int = 1) -> Path:
    """As 2.1's: an OpenCLIP that lacks its last layer, linear layers around the attention.

    It is padded with "!" and as wide as the real one, which is what 2 is told by. `layers` are
    those of the UNet's blocks.
    """
    tokenizer = clip_tokenizer(folder, pad="!")
    encoder = clip(CLIPTextModel, tokenizer, width=SD2_WIDTH, activation="gelu")
    unet = {
        "layers_per_block": layers,
        "attention_head_dim": (2, 4),
        "use_linear_projection": True,
        "upcast_attention": True,
    }
    return _stable_diffusion(folder, tokenizer, encoder, "v_prediction", **unet)


def _stable_diffusion(
    folder: Path, tokenizer: Any, encoder: Any, prediction_type: str, **unet: Any
) -> Path:
    pipeline = StableDiffusionPipeline(
        vae=_vae(4, scaling_factor=0.18215),
        text_encoder=encoder,
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16, 32),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=encoder.config.hidden_size,
            norm_num_groups=8,
            **unet,
        ),
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
            prediction_type=prediction_type,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return _save(pipeline, folder)


def build_sdxl(folder: Path, prediction_type: str = "epsilon", layers: int = 2) -> Path:
    """Two encoders, the second wider, added conditions, transformers of 1 and 2 layers; 64 px.

    `layers` are the second encoder's.
    """
    tokenizer = clip_tokenizer(folder)
    pipeline = StableDiffusionXLPipeline(
        vae=_vae(4, scaling_factor=0.13025),
        text_encoder=clip(CLIPTextModel, tokenizer),
        text_encoder_2=clip(CLIPTextModelWithProjection, tokenizer, layers, WIDE),
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


def build_sd3(folder: Path, with_t5: bool = True, layers: int = 2) -> Path:
    """Joint attention of text and picture, as SD3.5-medium's with a second attention; 64 px.

    `layers` are the transformer's.
    """
    tokenizer = clip_tokenizer(folder)
    pipeline = StableDiffusion3Pipeline(
        vae=_vae(16, scaling_factor=1.5305, shift_factor=0.0609),
        text_encoder=clip(CLIPTextModelWithProjection, tokenizer),
        text_encoder_2=clip(CLIPTextModelWithProjection, tokenizer),
        text_encoder_3=t5() if with_t5 else None,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        tokenizer_3=t5_tokenizer() if with_t5 else None,
        transformer=SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=16,
            out_channels=16,
            num_layers=layers,
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
    tokenizer = clip_tokenizer(folder)
    pipeline = FluxPipeline(
        vae=_vae(16, scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=clip(CLIPTextModel, tokenizer),
        text_encoder_2=t5(),
        tokenizer=tokenizer,
        tokenizer_2=t5_tokenizer(),
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
    """[klein]; a text encoder with all the layers that are read."""
    tokenizer = qwen_tokenizer()
    pipeline = Flux2KleinPipeline(
        text_encoder=Qwen3ForCausalLM(qwen_config(len(tokenizer), layers=28, width=16)),
        tokenizer=tokenizer,
        is_distilled=is_distilled,
        **_flux2_parts(guidance_embeds=False),
    )
    return _save(pipeline, folder)


def build_flux2_dev(folder: Path) -> Path:
    """Told the guidance. Its processor would need torchvision: the tokenizer is what it holds."""
    tokenizer = mistral_tokenizer()
    pipeline = Flux2Pipeline(
        text_encoder=mistral3(len(tokenizer), layers=30, width=16),
        tokenizer=tokenizer,
        **_flux2_parts(guidance_embeds=True),
    )
    return _save(pipeline, folder)


def _flux2_parts(guidance_embeds: bool) -> dict[str, Any]:
    """One double and one single block, and a VAE with running statistics."""
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=4,
        sample_size=64,
    )
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2.0)
    transformer = Flux2Transformer2DModel(
        in_channels=32,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=3 * 16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance_embeds,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    return {"vae": vae, "transformer": transformer, "scheduler": scheduler}


def build_z_image(folder: Path) -> Path:
    """One block for text, one for the picture and two for both; captions of any length."""
    tokenizer = qwen_tokenizer()
    pipeline = ZImagePipeline(
        vae=_vae(16, scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=Qwen3Model(qwen_config(len(tokenizer), layers=3)),
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


def build_qwen_image(folder: Path) -> Path:
    """Two blocks of two streams, a VAE of videos, Qwen2.5-VL with eyes that are never used."""
    tokenizer = qwen_tokenizer()
    pipeline = QwenImagePipeline(
        vae=AutoencoderKLQwenImage(base_dim=8, dim_mult=[1, 1, 2, 2], num_res_blocks=1),
        text_encoder=qwen_vl(len(tokenizer), layers=2),
        tokenizer=tokenizer,
        transformer=QwenImageTransformer2DModel(
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=2 * WIDTH,
            axes_dims_rope=(4, 6, 6),
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True,
            base_shift=0.5,
            max_shift=0.9,
            base_image_seq_len=256,
            max_image_seq_len=8192,
            shift_terminal=0.02,
        ),
    )
    return _save(pipeline, folder)


#: Family (and variant) -> its builder.
BUILDERS: dict[str, Callable[[Path], Path]] = {
    "sd15": build_sd15,
    "sd15-sd2": build_sd2,
    "sdxl": build_sdxl,
    "sdxl-v": lambda folder: build_sdxl(folder, "v_prediction"),
    "sd3": build_sd3,
    "sd3-no-t5": lambda folder: build_sd3(folder, with_t5=False),
    "flux-dev": build_flux,
    "flux2-klein": build_flux2,
    "flux2-distilled": lambda folder: build_flux2(folder, is_distilled=True),
    "flux2-dev": build_flux2_dev,
    "zimage": build_z_image,
    "qwen_image": build_qwen_image,
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
