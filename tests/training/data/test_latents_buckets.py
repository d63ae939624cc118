"""The latent cache with buckets: each picture in the shape of its own, under a key of its own."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from mapped_memory import mapped_kb
from PIL import Image as Picture
from safetensors import safe_open

from captioning import DatasetVersion, Sample
from training.data import latents
from training.data.buckets import BucketLimits
from training.data.latents import INDEX_FILE, TENSORS_FILE, LatentCache, encode_dataset
from training.families import Base

LIMITS = BucketLimits(8, 4.0)
# (width, height) of the pictures, and (height, width) of their buckets at 64 px.
PICTURES = [(64, 64), (240, 60), (90, 120), (30, 30), (100, 140), (72, 56)]
BUCKETS = [(64, 64), (32, 128), (72, 56), (64, 64), (72, 56), (56, 72)]


@pytest.fixture(scope="module")
def shaped(
    tiny_dataset: DatasetVersion, tmp_path_factory: pytest.TempPathFactory
) -> DatasetVersion:
    """Pictures of several shapes, the third with a transparent left half."""
    folder = tmp_path_factory.mktemp("shaped")
    generator = np.random.default_rng(3)
    samples = []
    for number, (width, height) in enumerate(PICTURES):
        noise = Picture.fromarray(generator.integers(0, 256, (5, 4, 3), np.uint8))
        picture = noise.resize((width, height), Picture.Resampling.BICUBIC)
        if number == 2:
            alpha = np.full((height, width), 255, np.uint8)
            alpha[:, : width // 2] = 0
            picture.putalpha(Picture.fromarray(alpha))
        path = folder / f"{number}.png"
        picture.save(path)
        caption = f"zkw, person, picture {number}"
        samples.append(Sample(f"{number:064}", path, caption, width, height))
    return replace(tiny_dataset, path=folder, train=tuple(samples))


def encode(
    base: Base, dataset: DatasetVersion, folder: Path, limits: BucketLimits | None = LIMITS
) -> LatentCache:
    return encode_dataset(dataset, base, 64, True, folder, limits=limits)


def test_every_picture_is_in_its_bucket(
    tiny_base: Base, shaped: DatasetVersion, tmp_path: Path
) -> None:
    cache = encode(tiny_base, shaped, tmp_path)
    found = {
        (8 * bucket.mean.shape[-2], 8 * bucket.mean.shape[-1]): bucket for bucket in cache.buckets
    }
    assert list(found) == sorted(set(BUCKETS))
    for size, bucket in found.items():
        assert bucket.images == tuple(k for k, own in enumerate(BUCKETS) if own == size)
        for row, image in enumerate(bucket.images):
            with Picture.open(shaped.train[image].path) as opened:
                white = Picture.new("RGBA", opened.size, "white")
                pixels = scaled(Picture.alpha_composite(white, opened.convert("RGBA")), *size)
            mean, logvar = tiny_base.encode_pixels(torch.stack([pixels, pixels.flip(-1)]))
            torch.testing.assert_close(bucket.mean[row], mean, rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(bucket.logvar[row], logvar, rtol=1e-3, atol=1e-3)
    mask = found[72, 56].mask[0, 0, 0]  # the picture that is transparent on the left
    assert mask.shape == (9, 7) and not mask[:, :3].any() and (mask[:, 4:] > 0.99).all()
    assert torch.equal(found[72, 56].mask[0, 1, 0], mask.flip(-1))
    assert (found[72, 56].mask[1] == 1).all()
    captions = [sample.caption for sample in shaped.train]
    torch.testing.assert_close(cache.text["text"][:, 0], tiny_base.encode_prompts(captions)["text"])


def scaled(picture: Picture.Image, height: int, width: int) -> torch.Tensor:
    """The centre of the picture at the bucket's ratio, scaled to it; nothing of ours."""
    scale = max(height / picture.height, width / picture.width)
    left, top = (picture.width - width / scale) / 2, (picture.height - height / scale) / 2
    box = (left, top, picture.width - left, picture.height - top)
    own = picture.convert("RGB").resize((width, height), Picture.Resampling.LANCZOS, box)
    return torch.from_numpy(np.array(own)).permute(2, 0, 1) / 127.5 - 1


def test_the_second_call_reads_the_same_from_one_mapped_file(
    tiny_base: Base, shaped: DatasetVersion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = encode(tiny_base, shaped, tmp_path)
    monkeypatch.setattr(tiny_base, "encode_pixels", lambda *_: pytest.fail("encoded again"))
    second = encode(tiny_base, shaped, tmp_path)
    for one, other in zip(first.buckets, second.buckets, strict=True):
        assert one.images == other.images
        assert all(torch.equal(getattr(one, n), getattr(other, n)) for n in ("mean", "logvar"))
        assert torch.equal(one.mask, other.mask)
    if Path("/proc/self/smaps").exists():
        assert mapped_kb(tmp_path / first.key / TENSORS_FILE, "Anonymous") == 0


def test_the_sizes_are_in_the_key_and_nothing_else_of_the_limits(
    tiny_base: Base, shaped: DatasetVersion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def key(limits: BucketLimits | None) -> str:
        return encode(tiny_base, shaped, tmp_path, limits).key

    others = [None, LIMITS, BucketLimits(16, 4.0), BucketLimits(8, 2.0)]
    keys = {key(limits) for limits in others}
    assert len(keys) == 4
    assert key(BucketLimits(8, 2.01)) in keys  # no other size has come
    assert key(BucketLimits(1, 4.0)) in keys  # the latents are of 8 px
    monkeypatch.setattr(latents, "FORMAT", latents.FORMAT + 1)
    assert key(LIMITS) not in keys


def test_caches_of_squares_are_as_before_there_were_buckets(
    tiny_base: Base, shaped: DatasetVersion, tmp_path: Path
) -> None:
    cache = encode(tiny_base, shaped, tmp_path, None)
    (squares,) = cache.buckets
    assert squares.images == tuple(range(6)) and squares.mean.shape == (6, 2, 4, 8, 8)
    with safe_open(tmp_path / cache.key / TENSORS_FILE, "pt") as file:
        assert set(file.keys()) == {"mean", "logvar", "mask", "text.text", "empty_text.text"}
    index = json.loads((tmp_path / cache.key / INDEX_FILE).read_text())
    assert index["format"] == 2 and list(index) == [
        *("format", "encoders", "size_px", "flip", "dtype", "captions", "trigger", "samples")
    ]
