"""The starter CLIP: pictures and captions in one space, by InfoNCE.

A head that names the attributes is trained along and thrown away: it teaches the vision tower
faster than the contrast alone on a few ten thousand pictures.
"""

from __future__ import annotations

import random
import string
import time
from pathlib import Path

import bpe
import captions
import numpy as np
import pictures
import torch
from autoencoder import to_pixels
from training_state import Training
from transformers import CLIPConfig, CLIPModel

BATCH = 96
LR = 8e-4
EMA_DECAY = 0.995
SEED = 22
PROJECTION = 128
# Chance that a caption starts with a word nobody knows, so that a trigger does no harm.
UNKNOWN_WORD_PROBABILITY = 0.15
CHECKPOINT = "clip.pt"


class ClipWithNames(torch.nn.Module):
    """A CLIP and the attribute head that helps it to learn."""

    def __init__(self, clip: CLIPModel, attributes: int) -> None:
        super().__init__()
        self.clip = clip
        self.names = torch.nn.Linear(PROJECTION, attributes)


def build(tokenizer: bpe.CLIPTokenizer) -> CLIPModel:
    torch.manual_seed(SEED)
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 192,
        "intermediate_size": 768,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "max_position_embeddings": bpe.MAX_LENGTH,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "projection_dim": PROJECTION,
    }
    vision = {
        "hidden_size": 160,
        "intermediate_size": 640,
        "num_hidden_layers": 4,
        "num_attention_heads": 5,
        "image_size": pictures.SIZE_PX,
        "patch_size": 8,
        "projection_dim": PROJECTION,
    }
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=PROJECTION))


def vocabulary(avatars: list) -> list[str]:
    """Every tag of the data but the class word, sorted."""
    return sorted({tag for avatar in avatars for tag in captions.tags(avatar)[1:]})


def targets(avatars: list, names: list[str]) -> np.ndarray:
    """Multi-hot tags (N, len(names)) as float32."""
    index = {name: column for column, name in enumerate(names)}
    hot = np.zeros((len(avatars), len(names)), np.float32)
    for row, avatar in enumerate(avatars):
        for tag in captions.tags(avatar)[1:]:
            if tag in index:
                hot[row, index[tag]] = 1
    return hot


def unknown_word(rng: random.Random) -> str:
    return "".join(rng.choices(string.ascii_lowercase, k=rng.randint(4, 9)))


def caption(avatar: object, rng: random.Random) -> str:
    """A training caption, now and then led by an unknown word."""
    text = captions.training_caption(avatar, rng)
    if rng.random() < UNKNOWN_WORD_PROBABILITY:
        return f"{unknown_word(rng)}, {text}"
    return text


def train(work: Path, steps: int) -> None:
    pixels, avatars = pictures.load(work, "train")
    tokenizer = bpe.load(work)
    names = vocabulary(avatars)
    hot = torch.from_numpy(targets(avatars, names))
    model = ClipWithNames(build(tokenizer), len(names))
    training = Training(work / CHECKPOINT, model, LR, EMA_DECAY)
    started = time.monotonic()
    while training.step < steps:
        rng = np.random.default_rng((SEED, training.step))
        rows = np.sort(rng.choice(len(pixels), BATCH, replace=False))
        words = random.Random(f"{SEED} {training.step}")
        texts = [caption(avatars[row], words) for row in rows]
        tokens = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        out = model.clip(pixel_values=to_pixels(pixels[rows]).contiguous(), **tokens)
        labels = torch.arange(BATCH)
        contrast = torch.nn.functional.cross_entropy(out.logits_per_image, labels)
        contrast = contrast + torch.nn.functional.cross_entropy(out.logits_per_text, labels)
        logits = model.names(out.image_embeds * 10)
        naming = torch.nn.functional.binary_cross_entropy_with_logits(logits, hot[rows])
        training.update(contrast / 2 + 5 * naming, steps)
        if training.step % 50 == 0:
            right = (out.logits_per_image.argmax(1) == labels).float().mean()
            took = time.monotonic() - started
            print(
                f"{training.step} contrast {contrast / 2:.3f} top1 {right:.2f} "
                f"naming {naming:.3f} {took:.0f} s",
                flush=True,
            )
    training.save()


def finished(work: Path) -> CLIPModel:
    """The CLIP with averaged weights."""
    _, avatars = pictures.load(work, "train")
    model = ClipWithNames(build(bpe.load(work)), len(vocabulary(avatars)))
    Training(work / CHECKPOINT, model, LR, EMA_DECAY).use_average()
    return model.clip.eval()
