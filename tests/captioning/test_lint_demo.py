"""The demo's pictures, seen by the shipped models: no caption of theirs may be blocked."""

from pathlib import Path

import pytest
from PIL import Image

from captioning import STARTER_CAPTIONER, STARTER_TAGGER, Character, Rules, Seen, render_all
from captioning.lint import Captioned, lint
from captioning.observers.captioner import Captioner
from captioning.observers.tagger import Tagger

pytestmark = pytest.mark.slow  # 48 captions by a real model

PICTURES = Path(__file__).parents[2] / "services" / "cli" / "demo" / "pictures"
TRIGGERS = {"aya": "ayachar", "bruno": "brunochar"}


@pytest.fixture(scope="module", params=TRIGGERS)
def seen(request) -> tuple[str, dict[str, Seen]]:
    """(trigger, what the starter models say of each picture)."""
    files = sorted((PICTURES / request.param).glob("*.png"))
    pictures = [Image.open(file).convert("RGB") for file in files]
    tags = Tagger(STARTER_TAGGER).observe(pictures)
    prose = Captioner(STARTER_CAPTIONER, beams=1).observe(pictures)
    return TRIGGERS[request.param], {
        file.name: Seen(said.tags, str(text), "tagger")
        for file, said, text in zip(files, tags, prose, strict=True)
    }


@pytest.mark.parametrize("form", ["tags", "prose", "tags+prose", "prose+tags", "four-part"])
def test_clean_characters_are_not_blocked(seen, form):
    trigger, pictures = seen
    character = Character(name="aya", trigger=trigger, rules=Rules(form=form))
    done = render_all(pictures, character, {})
    captions = [Captioned(name, done[name], pictures[name]) for name in pictures]
    findings = lint(captions, character)
    assert [one for one in findings if one.severity == "block"] == []
    assert all(one.caption.text.startswith(f"{trigger}, person, ") for one in captions)
    if form == "tags":  # nor does anything else need a person's eye in most of them
        assert sum(one.severity == "warn" for one in findings) <= 3
