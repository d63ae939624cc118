"""The starter's diffusion model: a small UNet and its text encoder on the autoencoder's latents.

v-prediction on a noise schedule that ends in pure noise (zero terminal SNR, Lin et al. 2023,
arXiv:2305.08891): at 8 x 8 a plain background would else shine through the last step, and pictures
drawn from noise would all be grey. The text encoder starts from the CLIP's and is trained along.
"""

from __future__ import annotations

import random
import time
from pathlib import Path

import autoencoder
import bpe
import clip
import numpy as np
import pictures
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from training_state import Training
from transformers import CLIPTextConfig, CLIPTextModel

BATCH = 32
LR = 1e-3
# The rate is constant so long, then falls with the root of the step: the training has no set end.
LR_CONSTANT_STEPS = 1000
# So near to 1 that the average always spans about the last tenth of all steps: see Training.
EMA_DECAY = 0.9999
CAPTION_DROPOUT = 0.1
# Times are drawn as in Esser et al. 2024 (arXiv:2403.03206, logit-normal), which puts most of them
# where detail is decided, and this share evenly, for the noisiest: README.md has the figures.
TIME_LOGIT_MEAN, TIME_EVEN_SHARE = -0.5, 0.3
SEED = 25
CHECKPOINT = "diffusion.pt"
# This share of the batches has captions padded to 77 tokens, as at sampling; the others only as far
# as the batch needs, which saves a fifth of the time.
WHOLE_LENGTH_SHARE = 0.3
UNET = {
    "sample_size": pictures.SIZE_PX // 8,
    "in_channels": 16,
    "out_channels": 16,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (96, 160, 224),
    "layers_per_block": 1,
    "cross_attention_dim": 192,
    "attention_head_dim": 8,
    "norm_num_groups": 16,
}
SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
    "steps_offset": 0,
    "set_alpha_to_one": True,
    # diffusers' default clamps latents to [-1, 1], which ruins every colour.
    "clip_sample": False,
}


class Denoiser(torch.nn.Module):
    """UNet and text encoder, trained together."""

    def __init__(self, text_encoder: CLIPTextModel) -> None:
        super().__init__()
        torch.manual_seed(SEED)
        self.unet = UNet2DConditionModel(**UNET)
        self.text_encoder = text_encoder

    def forward(self, noisy: torch.Tensor, t: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        text = self.text_encoder(input_ids=ids).last_hidden_state  # (N, 77, 192)
        return self.unet(noisy, t, text).sample


def scheduler() -> DDIMScheduler:
    return DDIMScheduler(**SCHEDULER)


def text_encoder(source: clip.CLIPModel) -> CLIPTextModel:
    """The CLIP's text tower as a model of its own."""
    config = CLIPTextConfig(**source.config.text_config.to_dict())
    model = CLIPTextModel(config)
    wanted = model.state_dict()
    tower = {
        name if name in wanted else f"text_model.{name}": value
        for name, value in source.text_model.state_dict().items()
    }
    model.load_state_dict(tower)
    return model


def tokens(tokenizer: bpe.CLIPTokenizer, texts: list[str], whole: bool = True) -> torch.Tensor:
    """Token ids (N, 77), as the pipeline makes them; if not `whole` as few as will do."""
    padding = "max_length" if whole else "longest"
    return tokenizer(
        texts, padding=padding, truncation=True, max_length=bpe.MAX_LENGTH, return_tensors="pt"
    )["input_ids"]


def state(work: Path, model: Denoiser) -> Training:
    """The training of `model`, from its checkpoint where there is one."""
    return Training(work / CHECKPOINT, model, LR, EMA_DECAY)


def start(work: Path) -> Training:
    """The training where it stands (from the CLIP's text encoder when it is new)."""
    return state(work, Denoiser(text_encoder(clip.finished(work))))


def times(count: int, end: int, draw: torch.Generator) -> torch.Tensor:
    """Noise levels (count,) from 0 to `end`, exclusive: see TIME_LOGIT_MEAN."""
    detailed = torch.sigmoid(TIME_LOGIT_MEAN + torch.randn(count, generator=draw))
    even = torch.rand(count, generator=draw)
    chosen = torch.where(torch.rand(count, generator=draw) < TIME_EVEN_SHARE, even, detailed)
    return (chosen * end).long().clamp(max=end - 1)


def noised(
    z: torch.Tensor, noise: torch.Tensor, alphas: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents (N, 16, 8, 8) at the levels `alphas` (N,), and v, which the UNet has to find."""
    alphas = alphas.view(-1, 1, 1, 1)
    noisy = alphas.sqrt() * z + (1 - alphas).sqrt() * noise
    return noisy, alphas.sqrt() * noise - (1 - alphas).sqrt() * z


def train(work: Path, steps: int) -> None:
    """Mean squared error of v at random times, with some captions emptied for guidance.

    The training may be stopped at any step: the averaged weights are as good as they get by then.
    """
    _, avatars = pictures.load(work, "train")
    latents = np.load(work / autoencoder.LATENTS, mmap_mode="r")
    tokenizer = bpe.load(work)
    alphas = scheduler().alphas_cumprod
    training = start(work)
    model = training.model.train()
    model.unet.to(memory_format=torch.channels_last)
    started, first, losses = time.monotonic(), training.step, []
    while training.step < steps:
        rng = np.random.default_rng((SEED, training.step))
        words = random.Random(f"{SEED} {training.step}")
        draw = torch.Generator().manual_seed(SEED * 1_000_000 + training.step)
        rows = np.sort(rng.integers(len(latents), size=BATCH))
        # Mirrored pictures come after all the others: see autoencoder.write_latents.
        texts = [clip.caption(avatars[row % len(avatars)], words) for row in rows]
        texts = ["" if words.random() < CAPTION_DROPOUT else text for text in texts]
        z = torch.from_numpy(latents[rows]).float()  # (N, 16, 8, 8)
        noise = torch.randn(z.shape, generator=draw)
        t = times(BATCH, len(alphas), draw)
        noisy, v = noised(z, noise, alphas[t])
        ids = tokens(tokenizer, texts, whole=words.random() < WHOLE_LENGTH_SHARE)
        noisy = noisy.contiguous(memory_format=torch.channels_last)
        loss = (model(noisy, t, ids) - v).square().mean()
        training.update_open_ended(loss, LR_CONSTANT_STEPS)
        losses.append(loss.item())
        if training.step % 50 == 0:
            took = (time.monotonic() - started) / (training.step - first)
            print(f"{training.step} mse {np.mean(losses):.4f} {took:.3f} s/step", flush=True)
            losses = []
    training.save()


def pipeline(work: Path) -> StableDiffusionPipeline:
    """Everything trained so far (averaged weights) as a pipeline."""
    model = start(work).use_average().eval()
    return assemble(autoencoder.finished(work), model, bpe.load(work))


def assemble(
    vae: AutoencoderKL, model: Denoiser, tokenizer: bpe.CLIPTokenizer
) -> StableDiffusionPipeline:
    made = StableDiffusionPipeline(
        vae=vae,
        text_encoder=model.text_encoder,
        tokenizer=tokenizer,
        unet=model.unet,
        scheduler=scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    made.set_progress_bar_config(disable=True)
    return made
