"""Starts a work folder from the models in the tree, so that the base can be trained on.

Comes in: the bundle in `training/starter` and the drawn pictures. Goes out: the tokenizer, the
autoencoder's and the base's checkpoints, and the latents of the training pictures.
Never overwrites anything that the work folder has, and never needs the other models.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import autoencoder
import bundle
import diffusion
import numpy as np
import pictures
import torch
from diffusers import StableDiffusionPipeline

# Steps that the tree's base was trained for (README.md): its learning rate goes on from there.
TREE_STEPS = 5900


def adopt(work: Path) -> None:
    """Put into `work` what training the base and the autoencoder needs, as far as it is missing."""
    if not (work / "tokenizer").exists():
        shutil.copytree(bundle.PIPELINE / "tokenizer", work / "tokenizer")
    pipe = StableDiffusionPipeline.from_pretrained(bundle.PIPELINE, dtype=torch.float32)
    if not (work / autoencoder.JOINT).exists():
        start_autoencoder(pipe, work)
    if not (work / autoencoder.LATENTS).exists():
        write_latents(work)
    if not (work / diffusion.CHECKPOINT).exists():
        start_diffusion(pipe, work)


def start_autoencoder(pipe: StableDiffusionPipeline, work: Path) -> None:
    model = autoencoder.build()
    model.load_state_dict(pipe.vae.state_dict())
    autoencoder.state(work / autoencoder.JOINT, model).save()


def write_latents(work: Path) -> None:
    """The training pictures' latents as they are: the tree's autoencoder normalises them itself."""
    pixels, _ = pictures.load(work, "train")
    partial = work / "latents.part.npy"
    found = autoencoder.means_both_ways(autoencoder.finished(work), pixels)
    np.save(partial, found.astype(np.float16))
    partial.replace(work / autoencoder.LATENTS)


def start_diffusion(pipe: StableDiffusionPipeline, work: Path) -> None:
    model = diffusion.Denoiser(pipe.text_encoder)
    model.unet.load_state_dict(pipe.unet.state_dict())
    training = diffusion.state(work, model)
    training.step = training.first_step = TREE_STEPS
    training.save()
