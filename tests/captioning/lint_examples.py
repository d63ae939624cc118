"""Captions to lint: rendered ones, and texts that came from elsewhere."""

from captioning import Character, Rules, Seen, render_all
from captioning.edits import Corrections
from captioning.lexicon.names import plain_tag, split_weight
from captioning.lint import Captioned, lint
from captioning.render import Caption, encoder_of


def character(trigger: str = "ayatok", **rules) -> Character:
    return Character(name="aya", trigger=trigger, class_word="woman", rules=Rules(**rules))


def as_it_stands(text: str, character: Character) -> Caption:
    """A caption that was not rendered; nothing is cut, so that lint sees what a trainer would."""
    encoder, class_word = encoder_of(character), plain_tag(character.class_word)
    parts = (plain_tag(split_weight(part)[0]) for part in text.split(","))
    known = {"", character.trigger.lower(), class_word}
    tags = tuple(dict.fromkeys(part for part in parts if part not in known))
    return Caption(text, tags, (), "", encoder.count(text), encoder.limit, by_hand=True)


def texts(*lines: str, seen: Seen | None = None, trigger: str = "ayatok", **rules):
    """(findings, captions, character) of texts as they stand; the images are `0`, `1`, ..."""
    aya = character(trigger, **rules)
    captions = [
        Captioned(str(place), as_it_stands(line, aya), seen or Seen())
        for place, line in enumerate(lines)
    ]
    return lint(captions, aya), captions, aya


def rendered(pictures: list[Seen], human: dict[str, Corrections] | None = None, **rules):
    """The same of what models said."""
    aya = character(**rules)
    named = {str(place): seen for place, seen in enumerate(pictures)}
    done = render_all(named, aya, human or {})
    captions = [Captioned(image, done[image], named[image]) for image in named]
    return lint(captions, aya), captions, aya


def of(code: str, findings) -> list:
    return [found for found in findings if found.code == code]


def marked(found, captions) -> str:
    """The part of the caption that the finding is about."""
    one = next(one for one in captions if one.image == found.where)
    return one.caption.text[found.start : found.end]
