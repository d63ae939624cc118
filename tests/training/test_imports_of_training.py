"""What reads and plans is imported without torch; only training and scoring need it."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import training

HEAVY = ("torch", "diffusers", "transformers", "peft", "ray")
READ_SIDE = (
    "training.checkpoint_files",
    "training.cuts",
    "training.data.views",
    "training.events",
    "training.family_facts",
    "training.fitting",
    "training.recipe",
    "training.scoring.prompts",
    "training.scoring.scores",
    "training.scoring.selection",
    "training.trial_files",
)


def heavy_after(statement: str) -> set[str]:
    """The heavy packages that a fresh Python has imported after `statement`."""
    code = f"import sys\n{statement}\nprint(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(HEAVY) & set(run.stdout.split())


def asked_for() -> dict[str, str]:
    """The names under `if TYPE_CHECKING:` in the room's `__init__`, with their modules."""
    tree = ast.parse(Path(training.__file__).read_text())
    [block] = [node for node in tree.body if isinstance(node, ast.If)]
    return {
        alias.name: str(statement.module)
        for statement in block.body
        if isinstance(statement, ast.ImportFrom)
        for alias in statement.names
    }


def test_the_room_and_its_read_side_are_imported_without_torch() -> None:
    light = sorted(set(training.__all__) - asked_for().keys())
    statement = f"import {', '.join(READ_SIDE)}\nfrom training import {', '.join(light)}"
    assert heavy_after(statement) == set()


def test_a_type_checker_sees_the_names_that_are_imported_when_they_are_asked_for() -> None:
    assert asked_for() == training._ASKED_FOR
    assert asked_for().keys() <= set(training.__all__) == set(dir(training)) & set(training.__all__)


@pytest.mark.parametrize("name", sorted(training.__all__))
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(training, name) is not None


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        training.trian  # noqa: B018


def test_what_is_said_of_families_without_their_networks_is_what_they_are() -> None:
    from training.families import FAMILIES

    assert list(FAMILIES) == list(training.FAMILY_FACTS)
    for name, facts in training.FAMILY_FACTS.items():
        kind = FAMILIES[name]
        assert (kind.family, kind.half, kind.is_flow) == (name, facts.half, facts.is_flow)
        assert kind.defaults == facts.defaults
        assert bool(kind.encoder_attention_modules) == facts.trains_text_encoders
        assert bool(kind.convolution_modules) == facts.has_convolutions
