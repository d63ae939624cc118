"""The commands on dataset versions, from the command line, as people type them."""

import csv
import zipfile
from pathlib import Path

import pytest

from captioning import (
    DatasetVersion,
    Edit,
    Store,
    caption_all,
    freeze,
    list_dataset_versions,
    load_character,
    load_images,
    record_edits,
)
from services.datasets.versions import (
    compare_versions,
    export_dataset,
    newest_dataset,
    pull_dataset,
    push_dataset,
)
from services.farm.progress import UNWATCHED
from services.farm.settings import open_home


@pytest.fixture
def second(home_path: Path, dataset: DatasetVersion) -> DatasetVersion:
    """The next version of `dataset`: one caption written by hand."""
    store = Store(home_path)
    image = next(one for one in load_images(store, "aya") if one.source == "03.png")
    caption = "[red] coat, smile"
    record_edits(store, "aya", [Edit(image=image.sha256, action="caption", value=caption)])
    caption_all(store, load_character(store, "aya"))
    return freeze(store, load_character(store, "aya"), 0.25)


def test_a_zip_and_a_folder_are_added_with_their_captions(lorafarm, pictures: Path, tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "more.zip", "w") as made:
        for number in range(3):
            made.write(pictures / f"{number:02d}.png", f"nested/{number}.png")
            (pictures / f"{number:02d}.png").unlink()
        made.writestr("nested/0.txt", "red coat")
        made.writestr("nested/metadata.csv", "9.png,nobody\n")
    add = ["dataset", "add", "aya", pictures, tmp_path / "more.zip", "--trigger", "ayachar"]
    code, out, _ = lorafarm(*add)
    assert code == 0
    assert "12 pictures" in out and "1 of them came with a caption, kept as imported" in out
    assert "note more.zip/nested/metadata.csv: 1 of 1 captions are of no picture" in out
    code, out, _ = lorafarm("dataset", "use-captions", "aya")
    assert code == 0
    assert "more.zip/nested/0.png: red coat" in out and "1 imported caption used now" in out


def test_captions_can_be_ignored(lorafarm, pictures: Path):
    (pictures / "00.txt").write_text("red coat")
    code, out, _ = lorafarm(
        "dataset", "add", "aya", pictures, "--trigger", "ayachar", "--captions", "ignore"
    )
    assert code == 0 and "came with a caption" not in out
    assert "0 imported captions" in lorafarm("dataset", "use-captions", "aya")[1]


def test_a_hostile_archive_is_refused_and_nothing_is_written(
    lorafarm, tmp_path: Path, home_path: Path
):
    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as made:
        made.writestr("../../evil.png", b"x")
    code, _, err = lorafarm("dataset", "add", "aya", tmp_path / "evil.zip", "--trigger", "ayachar")
    assert code == 2
    assert "leads out of the archive" in err
    assert not home_path.exists()


def test_a_diff_names_what_changed(lorafarm, dataset: DatasetVersion, second: DatasetVersion):
    code, out, _ = lorafarm("dataset", "diff", "aya@v1", "aya@v2")
    assert code == 0
    assert f"aya/{dataset.name} → aya/{second.name}" in out
    assert "1 caption changed:" in out
    assert "03.png: ayachar" in out and "{+[red] coat" in out
    assert "11 pictures with the same caption" in out
    code, out, _ = lorafarm("dataset", "diff", "aya@v2", f"aya@{second.name}")
    assert code == 0 and "changed:" not in out


def test_an_unknown_version_is_answered_with_the_known_ones(lorafarm, dataset: DatasetVersion):
    code, _, err = lorafarm("dataset", "diff", "aya@v1", "aya@v9")
    assert code == 2
    assert "aya@v9" in err and dataset.name in err


def test_exports_are_written_and_foreign_files_kept(
    lorafarm, dataset: DatasetVersion, tmp_path: Path
):
    to = tmp_path / "out"
    code, out, _ = lorafarm("dataset", "export", "aya", "--format", "csv", "--to", to)
    assert code == 0
    assert "9 pictures" in out and "3 held out" in out
    with (to / "metadata.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 9
    code, out, _ = lorafarm("dataset", "export", "aya@v1", "--format", "ai-toolkit", "--to", to)
    assert code == 0 and "trigger_word: ayachar" in out
    (to / "mine.txt").write_text("by hand")
    code, _, err = lorafarm("dataset", "export", "aya", "--format", "kohya", "--to", to)
    assert code == 2 and "mine.txt" in err
    assert (to / "mine.txt").read_text() == "by hand"


def test_a_version_travels_to_another_farm(
    lorafarm, dataset: DatasetVersion, second: DatasetVersion, tmp_path: Path, monkeypatch
):
    share, other = tmp_path / "share", tmp_path / "other"
    code, out, _ = lorafarm("dataset", "push", "aya@v1", "--to", share)
    assert code == 0 and "were there" in out
    assert lorafarm("dataset", "push", "aya", "--to", share)[0] == 0
    code, out, _ = lorafarm("dataset", "pull", "aya", "--from", share, "--home", other)
    assert code == 0
    assert f"aya/{second.name}" in out and "9 pictures to train on" in out
    assert list_dataset_versions(Store(other), "aya")[0].manifest_sha256 == second.manifest_sha256
    assert load_character(Store(other), "aya") == load_character(
        Store(dataset.path.parents[2]), "aya"
    )
    code, out, _ = lorafarm("dataset", "show", "aya", "--home", other)
    assert code == 0 and second.name in out
    code, _, err = lorafarm("dataset", "pull", "aya@v7", "--from", share, "--home", other)
    assert code == 2 and dataset.name in err


def test_the_settings_name_a_store_that_every_farm_shares(
    lorafarm, dataset: DatasetVersion, home_path: Path, tmp_path: Path
):
    code, _, err = lorafarm("dataset", "push", "aya")
    assert code == 2 and "dataset_store" in err and str(home_path / "settings.yaml") in err
    store, other = tmp_path / "store", tmp_path / "other"
    other.mkdir()
    for home in (home_path, other):
        (home / "settings.yaml").write_text(f"dataset_store: {store}\n")
    assert lorafarm("dataset", "push", "aya")[0] == 0
    fetched = newest_dataset(open_home(other), "aya", UNWATCHED)
    assert fetched.manifest_sha256 == dataset.manifest_sha256
    # A new version is there as soon as it is frozen; what a farm has already is not fetched again.
    assert lorafarm("dataset", "edit", "aya", "03.png", "--add", "red coat")[0] == 0
    code, out, err = lorafarm("dataset", "freeze", "aya")
    assert code == 0 and "pushed to" in out, err
    assert len(list((store / "datasets" / "aya").iterdir())) == 2
    assert newest_dataset(open_home(other), "aya", UNWATCHED).name == dataset.name


def test_a_bucket_without_credentials_names_the_variables(
    lorafarm, dataset: DatasetVersion, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID", raising=False)
    code, _, err = lorafarm("dataset", "push", "aya", "--to", "s3://farm/x")
    assert code == 2
    assert "AWS_ACCESS_KEY_ID is not set" in err


def test_a_script_compares_exports_and_shares_versions(
    dataset: DatasetVersion, second: DatasetVersion, home_path: Path, tmp_path: Path
):
    home, other = open_home(home_path), open_home(tmp_path / "other")
    compared = compare_versions(home, "aya@v1", "aya@v2")
    assert (compared.before.name, compared.after.name) == (dataset.name, second.name)
    assert len(compared.diff.captions) == 1 and compared.unchanged == 11
    exported = export_dataset(home, "aya@v2", "csv", tmp_path / "out")
    assert exported.dataset == second and (exported.folder / "metadata.csv").is_file()
    store = str(tmp_path / "share")
    pushed = push_dataset(home, "aya@v2", store, UNWATCHED)
    assert pushed.url == store and pushed.transfer.present == 0
    pulled = pull_dataset(other, "aya", store, UNWATCHED)
    assert pulled.transfer.sent > 0 and pulled.transfer.present == 0
    assert pulled.dataset.manifest_sha256 == second.manifest_sha256
    assert newest_dataset(other, "aya", UNWATCHED).name == second.name
