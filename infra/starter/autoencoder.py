"""The starter's autoencoder: 64 px to 8 x 8 x 16 and back.

First both halves as long as it takes for latents worth training on; then diffusion trains on those
while both halves are refined, their latents held in place; at last the decoder alone.
"""

from __future__ import annotations

import time
from pathlib import Path

import muon
import numpy as np
import pictures
import torch
from diffusers import AutoencoderKL
from training_state import Training

CONFIG = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (16, 32, 64, 96),
    "layers_per_block": 1,
    "latent_channels": 16,
    "norm_num_groups": 8,
    "mid_block_add_attention": False,
    "sample_size": pictures.SIZE_PX,
    "scaling_factor": 1.0,  # the latents are normalised in the model itself: see normalise
}
BATCH = 8
LR = 2.5e-3
EMA_DECAY = 0.998
KL_WEIGHT = 2e-4  # of the KL divergence averaged over latent elements
REFINE_KL_WEIGHT = 2e-5  # once the latents are in shape, detail counts for more than smoothness
SEED = 21
# How strongly refining holds the latents where they are (mean square, latents of variance 1).
HOLD_WEIGHT = 0.02
JOINT, REFINED, SHARPENED = "autoencoder.pt", "refined.pt", "sharpened.pt"
LATENTS, STATISTICS = "latents.npy", "latent_statistics.npy"


def to_pixels(batch: np.ndarray) -> torch.Tensor:
    """uint8 (N, H, W, 3) to float (N, 3, H, W) in [-1, 1]."""
    pixels = torch.from_numpy(np.ascontiguousarray(batch)).permute(0, 3, 1, 2).float()
    return (pixels / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def build() -> AutoencoderKL:
    torch.manual_seed(SEED)
    return AutoencoderKL(**CONFIG).to(memory_format=torch.channels_last)


def state(path: Path, model: AutoencoderKL, lr: float = LR) -> Training:
    """Muon for the convolutions inside, AdamW for the first, the last and every vector."""
    ends = (model.encoder.conv_in.weight, model.decoder.conv_out.weight)
    optimizer = muon.for_convolutions(model, lr, ends)
    return Training(path, model, lr, EMA_DECAY, optimizer)


def train(work: Path, steps: int) -> None:
    """Both halves: L1 + MSE + KL."""
    pixels, _ = pictures.load(work, "train")
    model = build()
    training = state(work / JOINT, model)
    started = time.monotonic()
    while training.step < steps:
        rng = np.random.default_rng((SEED, training.step))
        x = to_pixels(pixels[np.sort(rng.integers(len(pixels), size=BATCH))])
        posterior = model.encode(x).latent_dist
        y = model.decode(posterior.sample()).sample
        l1 = (y - x).abs().mean()
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        training.update(l1 + (y - x).square().mean() + KL_WEIGHT * kl, steps, 0.4)
        if training.step % 100 == 0:
            took = time.monotonic() - started
            print(f"{training.step} l1 {l1:.4f} kl {kl:.3f} {took:.0f} s", flush=True)
    training.save()


def frozen_encoder(work: Path) -> AutoencoderKL:
    """The autoencoder with the averaged weights of the joint training, its latents normalised."""
    model = build()
    state(work / JOINT, model).use_average()
    if (work / STATISTICS).exists():
        normalise(model, *torch.from_numpy(np.load(work / STATISTICS)))
    return model.eval().requires_grad_(False)


@torch.no_grad()
def normalise(model: AutoencoderKL, mean: torch.Tensor, std: torch.Tensor) -> None:
    """Fold the latents' mean and std per channel (16,) into the 1 x 1 convolutions on both sides.

    Latents then have mean 0 and std 1 in every channel, so `scaling_factor` is 1 and the decoder
    gives the same pictures as before.
    """
    moments, back = model.quant_conv, model.post_quant_conv
    channels = len(mean)
    moments.bias[:channels] -= mean
    moments.bias[:channels] /= std
    moments.weight[:channels] /= std.view(-1, 1, 1, 1)
    moments.bias[channels:] -= 2 * std.log()
    back.bias += back.weight[:, :, 0, 0] @ mean
    back.weight *= std.view(1, -1, 1, 1)


@torch.no_grad()
def write_latents(work: Path) -> None:
    """Latent means of the training set (2 N, 16, 8, 8) as float16, once the encoder is frozen.

    The first N are of the pictures as they are, the others of the mirrored ones. Normalised per
    channel; the statistics are kept, and from then on folded into the model.
    """
    pixels, _ = pictures.load(work, "train")
    (work / STATISTICS).unlink(missing_ok=True)
    found = means_both_ways(frozen_encoder(work), pixels)
    statistics = np.stack([found.mean((0, 2, 3)), found.std((0, 2, 3))])  # (2, 16)
    found = (found - statistics[0].reshape(-1, 1, 1)) / statistics[1].reshape(-1, 1, 1)
    np.save(work / STATISTICS, statistics)
    np.save(work / LATENTS, found.astype(np.float16))


def means(model: AutoencoderKL, pixels: np.ndarray) -> np.ndarray:
    """Latent means (N, 16, 8, 8) float32."""
    starts = range(0, len(pixels), 128)
    parts = [model.encode(to_pixels(pixels[at : at + 128])).latent_dist.mean for at in starts]
    return np.concatenate([part.numpy() for part in parts])


def means_both_ways(model: AutoencoderKL, pixels: np.ndarray) -> np.ndarray:
    """Latent means (2 N, 16, 8, 8): of all pictures, then of all of them mirrored."""
    return np.concatenate([means(model, pixels), means(model, pixels[:, :, ::-1])])


def refine(work: Path, steps: int) -> None:
    """Both halves again, the latents held near those that diffusion trains on meanwhile.

    Detail may be added to the latents, but what is in them must stay: a penalty holds the means to
    the kept latents, and `write_refined_latents` then takes the rest of the way.
    """
    pixels, _ = pictures.load(work, "train")
    latents = np.load(work / LATENTS, mmap_mode="r")
    model = frozen_encoder(work).requires_grad_(True).train()
    training = state(work / REFINED, model, LR / 2)
    started = time.monotonic()
    while training.step < steps:
        rng = np.random.default_rng((SEED, 1, training.step))
        rows = np.sort(rng.integers(len(pixels), size=BATCH))
        x = to_pixels(pixels[rows])
        posterior = model.encode(x).latent_dist
        y = model.decode(posterior.sample()).sample
        l1 = (y - x).abs().mean()
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        moved = (posterior.mean - torch.from_numpy(latents[rows]).float()).square().mean()
        loss = l1 + (y - x).square().mean() + REFINE_KL_WEIGHT * kl + HOLD_WEIGHT * moved
        training.update(loss, steps, 0.6)
        if training.step % 100 == 0:
            took = time.monotonic() - started
            print(f"{training.step} l1 {l1:.4f} moved {moved:.4f} {took:.0f} s", flush=True)
    training.save()


@torch.no_grad()
def write_refined_latents(work: Path) -> None:
    """The refined encoder's latents in place of the first ones (same normalisation)."""
    pixels, _ = pictures.load(work, "train")
    found = means_both_ways(refined(work), pixels)
    np.save(work / "latents.part.npy", found.astype(np.float16))
    (work / "latents.part.npy").replace(work / LATENTS)
    (work / REFINED).with_suffix(".done").touch()


def sharpen(work: Path, steps: int) -> None:
    """The decoder alone: the latents stay as they are, so diffusion need not see them again."""
    pixels, _ = pictures.load(work, "train")
    model = decoder_only(refined(work)).train()
    training = state(work / SHARPENED, model, LR / 4)
    started = time.monotonic()
    while training.step < steps:
        rng = np.random.default_rng((SEED, 2, training.step))
        x = to_pixels(pixels[np.sort(rng.integers(len(pixels), size=BATCH))])
        with torch.no_grad():
            z = model.encode(x).latent_dist.sample()
        y = model.decode(z).sample
        l1 = (y - x).abs().mean()
        training.update(l1 + (y - x).square().mean(), steps, 0.6)
        if training.step % 100 == 0:
            print(f"{training.step} l1 {l1:.4f} {time.monotonic() - started:.0f} s", flush=True)
    training.save()


def decoder_only(model: AutoencoderKL) -> AutoencoderKL:
    """`model` with nothing left to train but the way from latents to pixels."""
    model.requires_grad_(False)
    model.decoder.requires_grad_(True)
    model.post_quant_conv.requires_grad_(True)
    return model


def refined(work: Path) -> AutoencoderKL:
    """Refined when that has begun, else as diffusion first saw it."""
    model = frozen_encoder(work)
    if (work / REFINED).exists():
        state(work / REFINED, model.requires_grad_(True)).use_average()
    return model.eval().requires_grad_(False)


def finished(work: Path) -> AutoencoderKL:
    """The best there is: refined, with the sharpened decoder when there is one."""
    model = refined(work)
    if (work / SHARPENED).exists():
        state(work / SHARPENED, decoder_only(model)).use_average()
    return model.eval().requires_grad_(False)
