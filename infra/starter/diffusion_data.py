"""The batches that the base is trained on: noised latents, what to find in them, captions.

Comes in: the latents and avatars of a work folder. Every batch follows from the seed and its step
alone, so that a training that was cut off sees what it would have seen.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import autoencoder
import bpe
import clip
import numpy as np
import pictures
import torch

SEED = 25
CAPTION_DROPOUT = 0.1
# This share of the batches has captions padded to 77 tokens, as at sampling; the others only as far
# as the batch needs, which saves a fifth of the time.
WHOLE_LENGTH_SHARE = 0.3
# Times are drawn as in Esser et al. 2024 (arXiv:2403.03206, logit-normal), which puts most of them
# where detail is decided, and this share evenly, for the noisiest: README.md has the figures.
TIME_LOGIT_MEAN, TIME_EVEN_SHARE = -0.5, 0.3
# Batches that are made while the model works on another one.
AHEAD = 3


@dataclass(frozen=True)
class Batch:
    """What one step is trained on."""

    noisy: torch.Tensor  # (N, 16, 8, 8)
    v: torch.Tensor  # (N, 16, 8, 8): what the UNet has to find
    t: torch.Tensor  # (N,)
    ids: torch.Tensor  # (N, tokens)

    def to(self, device: str) -> Batch:
        noisy = self.noisy.to(device, memory_format=torch.channels_last)
        return Batch(noisy, self.v.to(device), self.t.to(device), self.ids.to(device))


class Batches:
    """Makes the batch of any step."""

    def __init__(self, work: Path, size: int, alphas: torch.Tensor) -> None:
        self.size, self.alphas = size, alphas
        _, self.avatars = pictures.load(work, "train")
        self.latents = np.load(work / autoencoder.LATENTS, mmap_mode="r")
        self.tokenizer = bpe.load(work)

    def make(self, step: int) -> Batch:
        rng = np.random.default_rng((SEED, step))
        words = random.Random(f"{SEED} {step}")
        draw = torch.Generator().manual_seed(SEED * 1_000_000 + step)
        rows = np.sort(rng.integers(len(self.latents), size=self.size))
        # Mirrored pictures come after all the others: see autoencoder.write_latents.
        avatars = [self.avatars[row % len(self.avatars)] for row in rows]
        texts = [clip.caption(avatar, words) for avatar in avatars]
        texts = ["" if words.random() < CAPTION_DROPOUT else text for text in texts]
        ids = tokens(self.tokenizer, texts, whole=words.random() < WHOLE_LENGTH_SHARE)
        z = torch.from_numpy(self.latents[rows]).float()  # (N, 16, 8, 8)
        noise = torch.randn(z.shape, generator=draw)
        t = times(self.size, len(self.alphas), draw)
        return Batch(*noised(z, noise, self.alphas[t]), t, ids)

    def between(self, first: int, end: int) -> Iterator[Batch]:
        """The batches of the steps from `first` to `end`, exclusive, each made ahead of its use."""
        with ThreadPoolExecutor(1) as maker:
            steps = iter(range(first, end))
            waiting = deque(maker.submit(self.make, step) for step in islice(steps, AHEAD))
            while waiting:
                batch = waiting.popleft().result()
                waiting.extend(maker.submit(self.make, step) for step in islice(steps, 1))
                yield batch


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


def tokens(tokenizer: bpe.CLIPTokenizer, texts: list[str], whole: bool = True) -> torch.Tensor:
    """Token ids (N, 77), as the pipeline makes them; if not `whole` as few as will do."""
    padding = "max_length" if whole else "longest"
    return tokenizer(
        texts, padding=padding, truncation=True, max_length=bpe.MAX_LENGTH, return_tensors="pt"
    )["input_ids"]
