"""The starter's diffusion model: a small UNet and its text encoder on the autoencoder's latents.

v-prediction on a noise schedule that ends in pure noise (zero terminal SNR, Lin et al. 2023,
arXiv:2305.08891): at 8 x 8 a plain background would else shine through the last step, and pictures
drawn from noise would all be grey. The text encoder starts from the CLIP's and is trained along.
"""

from __future__ import annotations

import time
from pathlib import Path

import autoencoder
import bpe
import clip
import pictures
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusion_data import Batches
from training_state import Training
from transformers import CLIPTextConfig, CLIPTextModel

# Pictures a step; a GPU has room for more, and is kept waiting by fewer.
BATCH = {"cpu": 32, "cuda": 1024}
LR = 1e-3
# The rate is constant so long, then falls with the root of the step: the training has no set end.
LR_CONSTANT_STEPS = 1000
# So near to 1 that the average always spans about the last tenth of all steps: see Training.
EMA_DECAY = 0.9999
SEED = 25
CHECKPOINT = "diffusion.pt"
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


def state(work: Path, model: Denoiser) -> Training:
    """The training of `model`, from its checkpoint where there is one."""
    return Training(work / CHECKPOINT, model, LR, EMA_DECAY)


def start(work: Path, device: str = "cpu") -> Training:
    """The training where it stands (from the CLIP's text encoder when it is new)."""
    return state(work, Denoiser(text_encoder(clip.finished(work))).to(device))


def train(work: Path, steps: int) -> None:
    """Mean squared error of v, on the GPU where there is one.

    The training may be stopped at any step: the averaged weights are as good as they get by then.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    training = start(work, device)
    model = training.model.train()
    model.unet.to(memory_format=torch.channels_last)
    batches = Batches(work, BATCH[device], scheduler().alphas_cumprod)
    started, first, losses = time.monotonic(), training.step, []
    for made in batches.between(first, steps):
        batch = made.to(device)
        # bfloat16 is many times slower than float32 on the processors that this was measured on.
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            guess = model(batch.noisy, batch.t, batch.ids)
        loss = (guess.float() - batch.v).square().mean()
        training.update_open_ended(loss, LR_CONSTANT_STEPS)
        losses.append(loss.detach())
        if training.step % 50 == 0:
            took = (time.monotonic() - started) / (training.step - first)
            error = torch.stack(losses).mean().item()
            print(f"{training.step} mse {error:.4f} {took:.3f} s/step", flush=True)
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
