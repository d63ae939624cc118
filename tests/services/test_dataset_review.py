"""`lorafarm dataset review`: the queue, the spreadsheet and back, conflicts by exit code."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from captioning import Store, add_character, make_character
from services.cli import main


@pytest.fixture
def lorafarm(home_path: Path, monkeypatch, capsys, dataset):
    """Runs `lorafarm dataset ...` on a frozen `aya` of 12 pictures; gives exit code and stdout."""
    add_character(Store(home_path), make_character("aya", "ayachar", "person"))
    monkeypatch.setenv("LORAFARM_HOME", str(home_path))
    monkeypatch.setenv("COLUMNS", "200")
    capsys.readouterr()

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lorafarm", "dataset", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        out = capsys.readouterr()
        return int(end.value.code or 0), out.out, out.err

    return run


def test_a_spreadsheet_goes_out_and_comes_back(lorafarm, tmp_path: Path) -> None:
    code, out, _ = lorafarm("review", "aya")
    assert code == 0 and "01.png" in out and "0 of 12 to read are read" in out
    table = tmp_path / "read.csv"
    assert lorafarm("review", "aya", "--export", table)[0] == 0
    table.write_text(table.read_text("utf-8-sig").replace(",open,", ",approved,"), "utf-8")
    code, out, _ = lorafarm("review", "aya", "--import", table)
    assert code == 0 and "12 reviews and 0 edits" in out
    assert "12 of 12 to read are read, 0 bad" in out and "at most 0% of all" in out
    code, out, _ = lorafarm("review", "aya", "--import", table)
    assert code == 2 and out.count("changed since the export") == 12


def test_a_missing_table_is_named(lorafarm, tmp_path: Path) -> None:
    code, _, err = lorafarm("review", "aya", "--import", tmp_path / "none.csv")
    assert code == 2 and "none.csv" in err
