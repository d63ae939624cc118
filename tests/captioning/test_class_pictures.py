"""Sets of class pictures: what a set's name stands for, and what cannot become one."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
from captioning_examples import png

from captioning import (
    Store,
    UserError,
    is_class_set,
    keep_class_pictures,
    load_class_pictures,
)


def captions(folder: Path, **texts: str) -> None:
    for stem, text in texts.items():
        (folder / f"{stem.removeprefix('n')}.txt").write_text(text)


def test_a_set_stands_for_its_pictures_and_captions(store: Store, pictures: Path) -> None:
    captions(pictures, n1="person, smile", n2="person")
    kept = keep_class_pictures(store, pictures)
    assert is_class_set(kept.name) and not is_class_set("people")
    assert len(kept.samples) == 6
    by_source = {sample.source: sample for sample in kept.samples}
    assert by_source["1.png"].caption == "person, smile" and by_source["3.png"].caption == ""
    assert by_source["1.png"].path.read_bytes() == (pictures / "1.png").read_bytes()
    assert load_class_pictures(store, kept.name) == kept

    # Other names, and a ZIP file, of the same content: the same set in the same order.
    archive = pictures.parent / "people.zip"
    with zipfile.ZipFile(archive, "w") as packed:
        for number in range(1, 7):
            packed.write(pictures / f"{number}.png", f"sub/{9 - number}.png")
        packed.writestr("sub/8.txt", "person, smile")
        packed.writestr("sub/7.txt", "person\n")
    assert keep_class_pictures(store, archive) == kept

    captions(pictures, n2="person, hat")
    other = keep_class_pictures(store, pictures)
    (pictures / "3.png").write_bytes(png((0, 0, 77)))
    third = keep_class_pictures(store, pictures)
    assert len({kept.name, other.name, third.name}) == 3
    assert load_class_pictures(store, kept.name) == kept  # what the folder became does not matter


def test_what_cannot_become_a_set_is_named(store: Store, pictures: Path, tmp_path: Path) -> None:
    (pictures / "broken.png").write_bytes(png()[:60])
    (pictures / "photo.heic").write_bytes(b"heic")
    (pictures / "1.txt").write_text(" ")
    with pytest.raises(UserError, match=r"broken\.png: .*photo\.heic: .*1\.txt: an empty caption"):
        keep_class_pictures(store, pictures)
    assert not store.class_pictures.exists()
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no pictures in it"):
        keep_class_pictures(store, tmp_path / "empty")


def test_a_spoiled_or_absent_set_is_refused(store: Store, pictures: Path) -> None:
    kept = keep_class_pictures(store, pictures)
    with pytest.raises(UserError, match="no such set"):
        load_class_pictures(store, "c0123456789ab")
    path = kept.samples[0].path
    whole = path.read_bytes()
    path.write_bytes(b"rot")
    with pytest.raises(UserError, match="missing or spoiled"):
        load_class_pictures(store, kept.name)
    path.write_bytes(whole)
    file = store.class_pictures / f"{kept.name}.jsonl"
    file.write_text(file.read_text().replace('"caption": ""', '"caption": "aya"', 1))
    with pytest.raises(UserError, match="was changed"):
        load_class_pictures(store, kept.name)
