"""From pictures to a version by calling the operations, as a script or a page does."""

from pathlib import Path

import pytest

from captioning import DatasetVersion, UserError
from services.datasets.captions import use_captions
from services.datasets.decisions import decide_picture
from services.datasets.overview import describe_dataset
from services.datasets.steps import add_pictures, caption_pictures, freeze_dataset
from services.farm.progress import UNWATCHED
from services.farm.settings import Home, open_home


@pytest.fixture
def home(home_path: Path) -> Home:
    return open_home(home_path)


def test_adding_gives_what_was_taken_skipped_and_captioned(
    home: Home, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (pictures / "00.txt").write_text("red coat")
    (pictures / "note.png").write_text("this is no picture")
    added = add_pictures(home, "aya", pictures, "ayachar", "person", "keep", UNWATCHED)
    assert added.character.trigger == "ayachar"
    assert len(added.report.images) == 12 and added.with_captions == 1
    assert [one.source for one in added.report.skipped] == ["note.png"]
    used = use_captions(home, "aya")
    assert [(used.sources[one.image], one.value) for one in used.edits] == [("00.png", "red coat")]
    assert not used.rendered and use_captions(home, "aya").edits == ()
    assert capsys.readouterr() == ("", "")


def test_the_same_content_is_found_frozen(home: Home, dataset: DatasetVersion) -> None:
    found = freeze_dataset(home, "aya", 0.25, UNWATCHED)
    assert found.existed and found.dataset.name == dataset.name and found.pushed is None
    dropped = decide_picture(home, "aya", "03.png", keep=False, reason="blurred")
    assert (dropped.image.source, dropped.keep, dropped.kept) == ("03.png", False, 11)
    fresh = freeze_dataset(home, "aya", 0.25, UNWATCHED)
    assert not fresh.existed and fresh.dataset.parent == dataset.name
    assert fresh.advised[0].views < fresh.advised[-1].views
    assert fresh.advised[0].steps < fresh.advised[-1].steps
    overview = describe_dataset(home, "aya")
    assert [one.name for one in overview.versions] == [dataset.name, fresh.dataset.name]
    why = {one.image.source: one.dropped.reason for one in overview.pictures if one.dropped}
    assert why == {"03.png": "blurred"}


def test_a_frozen_version_is_pushed_to_the_settings_store(
    home_path: Path, dataset: DatasetVersion, tmp_path: Path
) -> None:
    (home_path / "settings.yaml").write_text(f"dataset_store: {tmp_path / 'store'}\n")
    pushed = freeze_dataset(open_home(home_path), "aya", 0.25, UNWATCHED).pushed
    assert pushed is not None and pushed.dataset.name == dataset.name
    assert pushed.url == str(tmp_path / "store") and pushed.transfer.sent > 0


def test_captions_are_needed_before_freezing(home: Home, pictures: Path) -> None:
    add_pictures(home, "aya", pictures, "ayachar", "person", "keep", UNWATCHED)
    assert {one.caption for one in describe_dataset(home, "aya").pictures} == {None}
    with pytest.raises(UserError, match="12 of 12 pictures have no caption"):
        freeze_dataset(home, "aya", 0.25, UNWATCHED)


@pytest.mark.slow
def test_a_script_takes_pictures_to_a_version(home: Home, pictures: Path, ray_local: None) -> None:
    add_pictures(home, "aya", pictures, "ayachar", "person", "keep", UNWATCHED)
    done = caption_pictures(home, ["aya"], UNWATCHED)
    assert len(done.captions["aya"]) == 12 and done.failures == ()
    assert all(caption.startswith("ayachar, person") for caption in done.captions["aya"].values())
    overview = describe_dataset(home, "aya")
    assert {one.image.sha256: one.caption for one in overview.pictures} == done.captions["aya"]
