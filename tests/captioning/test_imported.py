"""Captions that came with the pictures, used, kept by rendering again, and given up to people."""

from pathlib import Path

from captioning_examples import Answers

from captioning import (
    Character,
    Edit,
    Store,
    caption_all,
    load_images,
    observe,
    record_edits,
    take_in,
)
from captioning.imported import use_imported


def captions(store: Store, aya: Character) -> dict[str, str]:
    found = caption_all(store, aya)
    return {image.source: found[image.sha256] for image in load_images(store, "aya")}


def test_an_imported_caption_becomes_the_caption(pictures: Path, store: Store, aya: Character):
    (pictures / "1.txt").write_text("red coat,\nholding a sword")
    (pictures / "2.txt").write_text("ayatok, woman, blue coat")
    (pictures / "metadata.csv").write_text("3.png,green coat\n")
    take_in(pictures, store, aya)
    observe(load_images(store, "aya"), store, Answers())
    before = captions(store, aya)
    assert len(use_imported(store, "aya")) == 3
    after = captions(store, aya)
    assert after["1.png"] == "ayatok, red coat, holding a sword"
    assert after["2.png"] == "ayatok, woman, blue coat"
    assert after["3.png"] == "ayatok, green coat"
    assert after["4.png"] == before["4.png"]
    assert use_imported(store, "aya") == []
    (edit,) = [edit for edit in _edits(store) if edit.value == "green coat"]
    assert (edit.by, edit.before) == ("imported: metadata.csv", before["3.png"])


def test_a_person_s_edit_wins_and_a_changed_file_is_taken_again(
    pictures: Path, store: Store, aya: Character
):
    for number in (1, 2):
        (pictures / f"{number}.txt").write_text("red coat")
    take_in(pictures, store, aya)
    observe(load_images(store, "aya"), store, Answers())
    use_imported(store, "aya")
    first = load_images(store, "aya")[0].sha256
    record_edits(store, "aya", [Edit(image=first, action="caption", value="mine", by="kim")])
    for number in (1, 2):
        (pictures / f"{number}.txt").write_text("blue coat")
    take_in(pictures, store, aya)
    assert [edit.value for edit in use_imported(store, "aya")] == ["blue coat"]
    found = captions(store, aya)
    assert (found["1.png"], found["2.png"]) == ("ayatok, mine", "ayatok, blue coat")


def _edits(store: Store) -> list[Edit]:
    from captioning import load_edits

    return load_edits(store, "aya")
