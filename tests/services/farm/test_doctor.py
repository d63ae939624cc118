"""The doctor names what is missing together with the command that brings it."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from services.farm import doctor
from services.farm.settings import open_home


def look(home: Path) -> tuple[bool, str]:
    stream = io.StringIO()
    ready = doctor.run_doctor(open_home(home), Console(file=stream, width=300))
    return ready, stream.getvalue()


def test_every_part_is_listed_and_nothing_is_created(tmp_path: Path):
    _, text = look(tmp_path / "home")
    for part in ("Python", "torch", "ray", "mlflow", "starter base", "disk", "GPU"):
        assert part in text
    assert not (tmp_path / "home").exists()


def test_a_missing_starter_is_named_with_its_fix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor, "STARTER_CLIP", tmp_path / "gone")
    ready, text = look(tmp_path)
    assert not ready
    assert "missing: starter CLIP" in text
    assert "git checkout" in text
