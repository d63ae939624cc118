"""The doctor names what is missing together with the command that brings it."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from services.cli.doctor import print_checks
from services.farm import doctor
from services.farm.settings import open_home


def look(home: Path) -> tuple[bool, str]:
    stream = io.StringIO()
    checks = doctor.check_machine(open_home(home))
    print_checks(checks, Console(file=stream, width=300))
    return not doctor.missing_parts(checks), stream.getvalue()


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


def test_what_is_optional_does_not_count_as_missing(tmp_path: Path):
    checks = doctor.check_machine(open_home(tmp_path / "home"))
    assert {check.name for check in checks if not check.needed} >= {"GPU"}
    broken = [doctor.Check("a", False, "gone", "fetch it"), doctor.Check("b", False, "", "", False)]
    assert doctor.missing_parts(broken) == (broken[0],)
