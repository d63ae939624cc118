"""The starter tagger: a small convolutional network, exported to ONNX in the WD tagger's form.

Input `input`: float32 (N, 64, 64, 3), BGR, 0 to 255, padded to a square with white. Output
`output`: float32 (N, tags) probabilities, in the rows' order of selected_tags.csv.
"""

from __future__ import annotations

import csv
import time
from pathlib import Path

import muon
import numpy as np
import pictures
import torch
from clip import targets, vocabulary
from torch import nn
from training_state import Training

BATCH = 64
LR = 1.5e-3
EMA_DECAY = 0.995
SEED = 23
MAX_SHIFT_PX = 2
CHECKPOINT = "tagger.pt"
# The WD convention's rating tags have category 9; all our pictures are of this one.
RATING = ("general", 9)


class Residual(nn.Module):
    """Two 3 x 3 convolutions beside the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(8, width), nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(8, width),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.silu(x + self.inner(x))


class Tagger(nn.Module):
    """NHWC BGR 0-255 in, logits out."""

    def __init__(self, tags: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 32, 4, stride=2, padding=1), nn.SiLU(),
            nn.Conv2d(32, 64, 4, stride=2, padding=1), nn.GroupNorm(8, 64), nn.SiLU(),
            Residual(64),
            nn.Conv2d(64, 128, 4, stride=2, padding=1), nn.GroupNorm(8, 128), nn.SiLU(),
            Residual(128),
            nn.Conv2d(128, 192, 4, stride=2, padding=1), nn.GroupNorm(8, 192), nn.SiLU(),
            Residual(192),
        )  # fmt: skip
        self.head = nn.Sequential(
            nn.Flatten(), nn.Linear(192 * 16, 256), nn.SiLU(), nn.Linear(256, tags)
        )

    def forward(self, bgr: torch.Tensor) -> torch.Tensor:
        x = bgr.permute(0, 3, 1, 2) / 127.5 - 1  # (N, 3, 64, 64)
        return self.head(self.body(x))


class Probabilities(nn.Module):
    """What is exported: logits to probabilities."""

    def __init__(self, tagger: Tagger) -> None:
        super().__init__()
        self.tagger = tagger

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(self.tagger(input))


def to_bgr(batch: np.ndarray) -> torch.Tensor:
    """uint8 RGB (N, H, W, 3) to float BGR 0-255."""
    return torch.from_numpy(batch[..., ::-1].astype(np.float32))


def state(path: Path, model: Tagger) -> Training:
    """Muon for the convolutions but the first, AdamW for the rest."""
    optimizer = muon.for_convolutions(model, LR, (model.body[0].weight,))
    return Training(path, model, LR, EMA_DECAY, optimizer)


def train(work: Path, steps: int) -> None:
    pixels, avatars = pictures.load(work, "train")
    names = vocabulary(avatars)
    hot = torch.from_numpy(with_rating(targets(avatars, names)))
    torch.manual_seed(SEED)
    model = Tagger(hot.shape[1])
    training = state(work / CHECKPOINT, model)
    started = time.monotonic()
    while training.step < steps:
        rng = np.random.default_rng((SEED, training.step))
        rows = np.sort(rng.integers(len(pixels), size=BATCH))
        x = to_bgr(augment(pixels[rows], rng))
        loss = nn.functional.binary_cross_entropy_with_logits(model(x), hot[rows])
        training.update(loss, steps)
        if training.step % 100 == 0:
            print(f"{training.step} bce {loss:.4f} {time.monotonic() - started:.0f} s", flush=True)
    training.save()


def augment(batch: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Mirrored at random and shifted by up to MAX_SHIFT_PX (edges repeated)."""
    padded = np.pad(batch, ((0, 0), (MAX_SHIFT_PX,) * 2, (MAX_SHIFT_PX,) * 2, (0, 0)), "edge")
    size = batch.shape[1]
    out = np.empty_like(batch)
    for row, (x, y, mirror) in enumerate(rng.integers(0, (5, 5, 2), size=(len(batch), 3))):
        crop = padded[row, y : y + size, x : x + size]
        out[row] = crop[:, ::-1] if mirror else crop
    return out


def with_rating(hot: np.ndarray) -> np.ndarray:
    """The rating's column (always 1) before the tags."""
    return np.concatenate([np.ones((len(hot), 1), np.float32), hot], axis=1)


def finished(work: Path) -> tuple[Tagger, list[str]]:
    """The tagger with averaged weights, and its tag names after the rating."""
    _, avatars = pictures.load(work, "train")
    names = vocabulary(avatars)
    model = Tagger(len(names) + 1)
    state(work / CHECKPOINT, model).use_average()
    return model.eval(), names


def bundle(work: Path, folder: Path) -> None:
    """model.onnx and selected_tags.csv into `folder`."""
    model, names = finished(work)
    _, avatars = pictures.load(work, "train")
    counts = targets(avatars, names).sum(0).astype(int)
    program = torch.onnx.export(
        Probabilities(model).eval(),
        (torch.zeros(2, pictures.SIZE_PX, pictures.SIZE_PX, 3),),
        input_names=["input"],
        output_names=["output"],
        dynamic_shapes={"input": {0: torch.export.Dim("batch")}},
        dynamo=True,
        verbose=False,
    )
    program.save(str(folder / "model.onnx"), external_data=False)
    with (folder / "selected_tags.csv").open("w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(("tag_id", "name", "category", "count"))
        rows.writerow((0, *RATING, len(avatars)))
        for number, (name, count) in enumerate(zip(names, counts, strict=True), start=1):
            rows.writerow((number, name.replace(" ", "_"), 0, count))
