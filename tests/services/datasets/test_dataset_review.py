"""`lorafarm dataset review`: the queue, the spreadsheet and back, conflicts by exit code."""

from __future__ import annotations

from pathlib import Path

from services.datasets.review import export_queue, import_reviews, queue_captions
from services.farm.progress import UNWATCHED
from services.farm.settings import open_home


def test_a_spreadsheet_goes_out_and_comes_back(dataset_command, tmp_path: Path) -> None:
    code, out, _ = dataset_command("review", "aya")
    assert code == 0 and "01.png" in out and "0 of 12 to read are read" in out
    table = tmp_path / "read.csv"
    assert dataset_command("review", "aya", "--export", table)[0] == 0
    table.write_text(table.read_text("utf-8-sig").replace(",open,", ",approved,"), "utf-8")
    code, out, _ = dataset_command("review", "aya", "--import", table)
    assert code == 0 and "12 reviews and 0 edits" in out
    assert "12 of 12 to read are read, 0 bad" in out and "at most 0% of all" in out
    code, out, _ = dataset_command("review", "aya", "--import", table)
    assert code == 2 and out.count("changed since the export") == 12


def test_a_missing_table_is_named(dataset_command, tmp_path: Path) -> None:
    code, _, err = dataset_command("review", "aya", "--import", tmp_path / "none.csv")
    assert code == 2 and "none.csv" in err


def test_a_script_reads_the_queue_and_takes_reviews_in(
    dataset_command, home_path: Path, tmp_path: Path
) -> None:
    home = open_home(home_path)
    queue = queue_captions(home, "aya", compare=True, progress=UNWATCHED)
    assert len(queue.sample) == 12 and queue.read == 0
    table = export_queue(queue, tmp_path / "read.csv")
    table.write_text(table.read_text("utf-8-sig").replace(",open,", ",rejected,"), "utf-8")
    done = import_reviews(home, "aya", table)
    assert (done.reviews, done.edits, done.conflicts) == (12, 0, ())
    assert queue_captions(home, "aya", compare=False, progress=UNWATCHED).bad == 12
    assert len(import_reviews(home, "aya", table).conflicts) == 12
