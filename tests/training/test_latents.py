"""The latent cache: right numbers, right crop, a key of all that went in."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as Picture

from captioning import DatasetVersion, UserError
from training.families import Base
from training.latents import INDEX_FILE, TENSORS_FILE, encode_dataset, read_pixels


def test_the_numbers_are_those_of_the_encoders(
    tiny_base: Base, tiny_dataset: DatasetVersion, tmp_path: Path
) -> None:
    cache = encode_dataset(tiny_dataset, tiny_base, None, True, tmp_path)
    assert cache.mean.shape == cache.logvar.shape == (6, 2, 4, 8, 8)
    assert cache.text["text"].shape == (6, 77, 32)
    captions = [sample.caption for sample in tiny_dataset.train]
    torch.testing.assert_close(cache.text, tiny_base.encode_prompts(captions))
    empty = tiny_base.encode_prompts([""])["text"][0]
    torch.testing.assert_close(cache.empty_text["text"], empty)
    with Picture.open(tiny_dataset.train[3].path) as picture:
        pixels = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1) / 127.5 - 1
    mean, logvar = tiny_base.encode_pixels(torch.stack([pixels, pixels.flip(-1)]))
    torch.testing.assert_close(cache.mean[3], mean)
    torch.testing.assert_close(cache.logvar[3], logvar)


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
    assert torch.equal(first.mean, second.mean)
    assert torch.equal(first.logvar, second.logvar)
    assert torch.equal(first.text["text"], second.text["text"])
    assert torch.equal(first.empty_text["text"], second.empty_text["text"])


def test_the_key_is_of_everything_that_went_in(
    tiny_base: Base, tiny_v_base: Base, tiny_dataset: DatasetVersion, tmp_path: Path
) -> None:
    recaptioned = replace(
        tiny_dataset,
        train=(replace(tiny_dataset.train[0], caption="zkw, person"), *tiny_dataset.train[1:]),
    )
    fewer = replace(tiny_dataset, train=tiny_dataset.train[1:])
    keys = {
        encode_dataset(dataset, base, size, flip, tmp_path).key
        for dataset, base, size, flip in [
            (tiny_dataset, tiny_base, None, False),
            (tiny_dataset, tiny_base, None, True),
            (tiny_dataset, tiny_base, 32, False),
            (tiny_dataset, tiny_v_base, None, False),
            (recaptioned, tiny_base, None, False),
            (fewer, tiny_base, None, False),
        ]
    }
    assert len(keys) == 6
    # The native size written out is the same thing, and so are other held-out pictures.
    without_holdout = replace(tiny_dataset, holdout=())
    assert encode_dataset(without_holdout, tiny_base, 64, False, tmp_path).key in keys


@pytest.mark.parametrize("damaged", [TENSORS_FILE, INDEX_FILE])
def test_a_half_written_cache_is_made_again(
    tiny_base: Base, tiny_dataset: DatasetVersion, tmp_path: Path, damaged: str
) -> None:
    first = encode_dataset(tiny_dataset, tiny_base, None, False, tmp_path)
    file = tmp_path / first.key / damaged
    file.unlink() if damaged == INDEX_FILE else file.write_bytes(b"cut off")
    second = encode_dataset(tiny_dataset, tiny_base, None, False, tmp_path)
    assert torch.equal(first.mean, second.mean)
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
