"""Writes the models that are trained so far where the rooms load them from, in fp16.

Each bundle is made beside its place and then renamed into it: no reader sees half of one.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import bpe
import captioner
import clip
import diffusion
import pictures
import tagger
import torch
from transformers import CLIPImageProcessorPil, CLIPProcessor

ROOT = Path(__file__).parents[2]
TAGGER = ROOT / "captioning/starter/tagger"
CAPTIONER = ROOT / "captioning/starter/captioner"
CLIP = ROOT / "captioning/starter/clip"
PIPELINE = ROOT / "training/starter"
# Mean and std that the CLIP sees its pixels by: [-1, 1], like the autoencoder's.
HALF = [0.5, 0.5, 0.5]
LICENCE = """
Trained from scratch by `infra/starter/build.py` on drawn avatars; nothing was copied from another
model. Weights: Apache-2.0, like the code. The avatars' artists and licences are named in
`infra/starter/ATTRIBUTION.md`, the measured quality in `infra/starter/README.md`.
"""
ABOUT = {
    TAGGER: "# Starter tagger\n\nA small convolutional network in the WD tagger's form: "
    "`input` float32 (N, 64, 64, 3), BGR, 0 to 255, square by white padding; `output` float32 "
    "(N, tags) probabilities in the order of `selected_tags.csv`.\n",
    CAPTIONER: "# Starter captioner\n\nA small `BlipForConditionalGeneration` with its processor; "
    "writes one sentence about an avatar of 64 x 64 px.\n",
    CLIP: "# Starter CLIP\n\nA small `CLIPModel` with its processor; pictures of 64 x 64 px, "
    "embeddings of 128.\n",
    PIPELINE: "# Starter base model\n\nA latent diffusion model in `StableDiffusionPipeline` "
    "layout: 64 x 64 px, latents 8 x 8 x 16, v-prediction with zero terminal SNR, trailing "
    "timesteps, `clip_sample: false`. Good settings: 25 DDIM steps, guidance 3 to 5. It draws "
    "avatars and nothing else.\n",
}


def bundle(work: Path) -> None:
    """Every bundle whose checkpoint is there."""
    ready = {
        TAGGER: (tagger.CHECKPOINT, write_tagger),
        CLIP: (clip.CHECKPOINT, write_clip),
        CAPTIONER: (captioner.CHECKPOINT, write_captioner),
        PIPELINE: (diffusion.CHECKPOINT, write_pipeline),
    }
    for folder, (checkpoint, write) in ready.items():
        if (work / checkpoint).exists():
            replace_folder(folder, write, work)
            print(f"{folder.relative_to(ROOT)}: {size_bytes(folder) / 1e6:.1f} MB", flush=True)


def replace_folder(folder: Path, write: Callable[[Path, Path], None], work: Path) -> None:
    """Have `write` fill a new folder, then put it where `folder` is."""
    fresh = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    write(work, fresh)
    (fresh / "MODEL.md").write_text(ABOUT[folder] + LICENCE)
    for file in fresh.rglob("*"):
        file.chmod(0o755 if file.is_dir() else 0o644)
    if folder.exists():
        old = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
        fresh.rename(folder)
        shutil.rmtree(old)
    else:
        fresh.rename(folder)


def size_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def write_tagger(work: Path, folder: Path) -> None:
    # Here alone the `starters` extra is needed: reading and measuring bundles goes without it.
    from onnx_half import store_as_half

    tagger.bundle(work, folder)
    store_as_half(folder / "model.onnx")


def write_clip(work: Path, folder: Path) -> None:
    clip.finished(work).half().save_pretrained(folder)
    side = pictures.SIZE_PX
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_mean=HALF,
        image_std=HALF,
    )
    CLIPProcessor(processor, bpe.load(work)).save_pretrained(folder)


def write_captioner(work: Path, folder: Path) -> None:
    model, processor = captioner.finished(work)
    model.half().save_pretrained(folder)
    processor.save_pretrained(folder)


def write_pipeline(work: Path, folder: Path) -> None:
    diffusion.pipeline(work).to(dtype=torch.float16).save_pretrained(folder)
