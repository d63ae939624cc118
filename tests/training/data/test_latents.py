"""The latent cache: right numbers, right crop, a key of all that went in."""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mapped_memory import mapped_kb
from PIL import Image as Picture
from safetensors.torch import load_file, save_file

from captioning import DatasetVersion, UserError
from training.data import latents
from training.data.captions import CaptionPlan
from training.data.crop import read_pixels
from training.data.latents import INDEX_FILE, TENSORS_FILE, encode_dataset, encode_samples
from training.families import Base, load_base


def test_the_numbers_are_those_of_the_encoders(
    tiny_base: Base, tiny_dataset: DatasetVersion, tmp_path: Path
) -> None:
    cache = encode_dataset(tiny_dataset, tiny_base, None, True, tmp_path)
    (squares,) = cache.buckets
    assert squares.mean.shape == squares.logvar.shape == (6, 2, 4, 8, 8)
    assert cache.text["text"].shape == (6, 1, 77, 32)
    captions = [sample.caption for sample in tiny_dataset.train]
    wanted = tiny_base.encode_prompts(captions)["text"]
    torch.testing.assert_close(cache.text["text"][:, 0], wanted)
    empty = tiny_base.encode_prompts([""])["text"][0]
    torch.testing.assert_close(cache.empty_text["text"], empty)
    with Picture.open(tiny_dataset.train[3].path) as picture:
        pixels = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1) / 127.5 - 1
    mean, logvar = tiny_base.encode_pixels(torch.stack([pixels, pixels.flip(-1)]))
    torch.testing.assert_close(squares.mean[3], mean)
    torch.testing.assert_close(squares.logvar[3], logvar)


def test_the_second_call_reads_what_the_first_wrote(
    tiny_base: Base,
    tiny_dataset: DatasetVersion,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[tuple[int, int]] = []
    first = encode_dataset(
        tiny_dataset, tiny_base, None, False, tmp_path, lambda done, n: calls.append((done, n))
    )
    assert calls == [(done, 6) for done in range(1, 7)]

    def refuse(*_: object) -> None:
        raise AssertionError("encoded again")

    monkeypatch.setattr(tiny_base, "encode_pixels", refuse)
    second = encode_dataset(tiny_dataset, tiny_base, None, False, tmp_path)
    assert torch.equal(first.buckets[0].mean, second.buckets[0].mean)
    assert torch.equal(first.buckets[0].logvar, second.buckets[0].logvar)
    assert torch.equal(first.text["text"], second.text["text"])
    assert torch.equal(first.empty_text["text"], second.empty_text["text"])


def other_weights(file: Path) -> None:
    """Add to one number of every tensor of a safetensors file."""
    tensors = load_file(file)
    save_file({name: _one_more(tensor) for name, tensor in tensors.items()}, file)


def _one_more(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.clone()
    tensor.view(-1)[0] += 1
    return tensor


def swapped_words(file: Path) -> None:
    """Give two letters of a vocabulary each other's id."""
    words = json.loads(file.read_text())
    words["k"], words["w"] = words["w"], words["k"]
    file.write_text(json.dumps(words))


def test_the_same_inputs_elsewhere_give_the_same_key(
    tiny_base: Base, tiny_base_path: Path, tiny_dataset: DatasetVersion, tmp_path: Path
) -> None:
    first = encode_dataset(tiny_dataset, tiny_base, None, False, tmp_path / "latents")
    moved = load_base(shutil.copytree(tiny_base_path, tmp_path / "moved"))
    # The native size written out is the same thing, and so are other held-out pictures.
    without_holdout = replace(tiny_dataset, holdout=())
    again = encode_dataset(without_holdout, moved, 64, False, tmp_path / "latents")
    assert again.key == first.key


@pytest.mark.parametrize(
    ("damage", "file", "changed"),
    [
        (other_weights, "vae/diffusion_pytorch_model.safetensors", "mean"),
        (other_weights, "text_encoder/model.safetensors", "text"),
        (swapped_words, "tokenizer/vocab.json", "text"),
    ],
    ids=["VAE", "text encoder", "tokenizer"],
)
def test_every_encoder_is_in_the_key(
    tiny_base: Base,
    tiny_base_path: Path,
    tiny_dataset: DatasetVersion,
    tmp_path: Path,
    damage: Callable[[Path], None],
    file: str,
    changed: str,
) -> None:
    first = encode_dataset(tiny_dataset, tiny_base, None, False, tmp_path / "latents")
    folder = shutil.copytree(tiny_base_path, tmp_path / "other")
    damage(folder / file)
    other = encode_dataset(tiny_dataset, load_base(folder), None, False, tmp_path / "latents")
    assert other.key != first.key
    before, after = (
        cache.buckets[0].mean if changed == "mean" else cache.text["text"]
        for cache in (first, other)
    )
    assert not torch.equal(before, after)  # it does matter


def test_the_unet_is_not_in_the_key(
    tiny_base: Base, tiny_base_path: Path, tiny_dataset: DatasetVersion, tmp_path: Path
) -> None:
    first = encode_dataset(tiny_dataset, tiny_base, None, False, tmp_path / "latents")
    folder = shutil.copytree(tiny_base_path, tmp_path / "other")
    other_weights(folder / "unet/diffusion_pytorch_model.safetensors")
    other = encode_dataset(tiny_dataset, load_base(folder), None, False, tmp_path / "latents")
    assert other.key == first.key


def test_the_scheduler_is_in_the_key(
    tiny_base: Base, tiny_base_path: Path, tiny_dataset: DatasetVersion, tmp_path: Path
) -> None:
    """As every file of the base but the denoiser's, although no encoder asks it."""
    one = tiny_dataset.train[:1]
    first = encode_samples(one, tiny_base, 32, False, tmp_path / "latents")
    folder = shutil.copytree(tiny_base_path, tmp_path / "other")
    file = folder / "scheduler/scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "beta_end": 0.02}))
    other = encode_samples(one, load_base(folder), 32, False, tmp_path / "latents")
    assert other.key != first.key


def test_every_picture_and_caption_is_in_the_key(
    tiny_base: Base, tiny_dataset: DatasetVersion, tmp_path: Path
) -> None:
    first, *others = tiny_dataset.train
    with Picture.open(first.path) as picture:
        pixels = np.array(picture.convert("RGB"))
    pixels[0, 0] ^= 1  # the smallest change of one pixel
    repainted = tmp_path / "repainted.png"
    Picture.fromarray(pixels).save(repainted)
    sha256 = hashlib.sha256(repainted.read_bytes()).hexdigest()
    versions = [
        (first, *others),
        (replace(first, path=repainted, sha256=sha256), *others),
        (replace(first, caption=first.caption + "."), *others),
        tuple(others),
        (*others, first),
    ]
    keys = [
        encode_dataset(replace(tiny_dataset, train=train), tiny_base, None, False, tmp_path).key
        for train in versions
    ]
    assert len(set(keys)) == len(versions)


def test_resolution_flip_and_format_are_in_the_key(
    tiny_base: Base,
    tiny_dataset: DatasetVersion,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def key(resolution: int | None = None, flip: bool = False) -> str:
        return encode_dataset(tiny_dataset, tiny_base, resolution, flip, tmp_path).key

    keys = [key(), key(resolution=32), key(flip=True)]
    monkeypatch.setattr(latents, "FORMAT", latents.FORMAT + 1)
    assert len({*keys, key()}) == 4


ALONE = CaptionPlan(without_trigger=True)


@pytest.mark.parametrize(
    ("first", "second", "differ"),
    [
        ((CaptionPlan(), "zkw"), (CaptionPlan(orders=2), "zkw"), True),
        ((CaptionPlan(orders=2), "zkw"), (CaptionPlan(orders=2, kept=1), "zkw"), True),
        ((CaptionPlan(), "zkw"), (ALONE, "zkw"), True),
        ((ALONE, "zkw"), (ALONE, "person"), True),
        ((CaptionPlan(), "zkw"), (CaptionPlan(), "person"), False),  # taken out of nothing
    ],
    ids=["orders", "kept", "without trigger", "trigger", "unused trigger"],
)
def test_all_that_is_done_with_captions_is_in_the_key(
    tiny_base: Base,
    tiny_dataset: DatasetVersion,
    tmp_path: Path,
    first: tuple[CaptionPlan, str],
    second: tuple[CaptionPlan, str],
    differ: bool,
) -> None:
    keys = {
        encode_samples(
            tiny_dataset.train[:1], tiny_base, 32, False, tmp_path, captions=plan, trigger=trigger
        ).key
        for plan, trigger in (first, second)
    }
    assert (len(keys) == 2) == differ


def test_the_text_s_precision_is_in_the_key_where_it_is_not_full(
    tiny_base: Base, tiny_dataset: DatasetVersion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU's T5 is bf16, a CPU's fp32: with one home they must not take each other's words."""

    def index() -> dict[str, Any]:
        cache = encode_samples(tiny_dataset.train[:1], tiny_base, 32, False, tmp_path)
        told: dict[str, Any] = json.loads((tmp_path / cache.key / INDEX_FILE).read_text())
        return {"key": cache.key, **told}

    full = index()
    assert "text_dtype" not in full  # as it was before there was such an entry
    monkeypatch.setattr(type(tiny_base), "text_dtype", torch.bfloat16)
    half = index()
    assert half.pop("key") != full.pop("key")
    assert half == {**full, "text_dtype": "bfloat16"}


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="mappings are read from /proc")
def test_the_tensors_lie_in_the_mapped_file(
    tiny_base: Base, tiny_dataset: DatasetVersion, tmp_path: Path
) -> None:
    for _ in ("encoded", "read"):
        cache = encode_dataset(tiny_dataset, tiny_base, 256, True, tmp_path)
        file = tmp_path / cache.key / TENSORS_FILE
        (squares,) = cache.buckets
        tensors = (squares.mean, squares.logvar, cache.text["text"])
        assert all(torch.isfinite(tensor).all() for tensor in tensors)  # every page was read
        assert mapped_kb(file, "Rss") * 1024 >= sum(tensor.nbytes for tensor in tensors)
        # Not one page of it is this process's own copy, so that all workers share them.
        assert mapped_kb(file, "Anonymous") == 0
        del cache, squares, tensors


@pytest.mark.parametrize("damaged", [TENSORS_FILE, INDEX_FILE])
def test_a_half_written_cache_is_made_again(
    tiny_base: Base, tiny_dataset: DatasetVersion, tmp_path: Path, damaged: str
) -> None:
    first = encode_dataset(tiny_dataset, tiny_base, None, False, tmp_path)
    file = tmp_path / first.key / damaged
    file.unlink()  # and not cut off in place: `first` lies in the file
    if damaged == TENSORS_FILE:
        file.write_bytes(b"cut off")
    second = encode_dataset(tiny_dataset, tiny_base, None, False, tmp_path)
    assert torch.equal(first.buckets[0].mean, second.buckets[0].mean)
    assert (tmp_path / first.key / damaged).stat().st_size > 20


def test_wide_pictures_are_cropped_to_the_centre(tmp_path: Path) -> None:
    stripes = np.zeros((64, 192, 3), np.uint8)
    stripes[:, :64], stripes[:, 64:128], stripes[:, 128:] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    Picture.fromarray(stripes).save(tmp_path / "wide.png")
    pixels = read_pixels(tmp_path / "wide.png", 64)
    expected = torch.tensor([-1.0, 1.0, -1.0]).view(3, 1, 1).expand(3, 64, 64)
    torch.testing.assert_close(pixels, expected)


def test_exif_orientation_and_transparency(tmp_path: Path) -> None:
    upright = np.zeros((64, 64, 3), np.uint8)
    upright[:32] = 255  # white above black
    turned = Picture.fromarray(np.rot90(upright, 1))  # as a camera held sideways stores it
    exif = Picture.Exif()
    exif[0x0112] = 6  # "turn by 90 degrees clockwise to show"
    turned.save(tmp_path / "turned.png", exif=exif)
    pixels = read_pixels(tmp_path / "turned.png", 64)
    assert float(pixels[:, :31].min()) == 1.0
    assert float(pixels[:, 33:].max()) == -1.0
    Picture.new("RGBA", (64, 64), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert float(read_pixels(tmp_path / "clear.png", 64).min()) == 1.0


def test_what_cannot_be_encoded_is_said(
    tiny_base: Base, tiny_dataset: DatasetVersion, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="60 px is not a multiple"):
        encode_dataset(tiny_dataset, tiny_base, 60, False, tmp_path)
    with pytest.raises(UserError, match="no training picture"):
        encode_dataset(replace(tiny_dataset, train=()), tiny_base, None, False, tmp_path)
    broken = tmp_path / "broken.png"
    broken.write_bytes(tiny_dataset.train[0].path.read_bytes()[:200])
    sample = replace(tiny_dataset.train[0], path=broken)
    with pytest.raises(UserError, match=r"broken\.png"):
        encode_dataset(replace(tiny_dataset, train=(sample,)), tiny_base, None, False, tmp_path)
