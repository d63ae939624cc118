"""render(): what models said, what people changed and the character's rules in, the caption out.

Pure and deterministic; the order of its steps is part of the contract and is in docs/captions.md.
The trigger stands first and once, always; the text never has more tokens than the encoder reads,
unless trigger, class word and fixed tags alone have.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from captioning.character import Character
from captioning.edits import NONE, Corrections
from captioning.lexicon import PARTS, lexicon
from captioning.lexicon.names import plain_tag, split_weight, without_weights
from captioning.render_tags import Gathered, Ready, Removed, Seen, gather, intrinsic_tags, settle
from captioning.tokens import Encoder, load_encoder

SEPARATOR = ", "
NOTHING: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Caption:
    """A rendered caption, and what was done to get it."""

    text: str
    tags: tuple[str, ...]  # as they stand, after trigger and class word
    fixed: tuple[str, ...]  # those of `tags` that are fixed
    prose: str  # as it stands
    tokens: int  # without start and end tokens; emphasis is not counted
    limit: int
    lost: tuple[str, ...] = ()  # tags and words that did not fit
    removed: tuple[Removed, ...] = ()
    hits: tuple[int, ...] = ()  # places of the replace rules that changed something
    by_hand: bool = False  # a person wrote the whole text


def encoder_of(character: Character) -> Encoder:
    """The encoder whose limit the character's captions are fitted to; raises UserError."""
    family = lexicon().family(character.rules.family)
    source = character.rules.encoder or family.encoder
    limit = character.rules.max_tokens
    if limit is None and source == family.encoder:
        limit = family.tokens
    return load_encoder(source, limit)


def render(
    seen: Seen,
    character: Character,
    human: Corrections = NONE,
    intrinsic: frozenset[str] = NOTHING,
) -> Caption:
    """The caption of one picture; `intrinsic` are the tags that many of the set share.

    Raises UserError when the encoder of the rules cannot be loaded.
    """
    ready, encoder = Ready(character), encoder_of(character)
    named = ready.named(human)
    shared = ready.names(intrinsic)
    return _compose(gather(seen, named, ready), seen, named, shared, ready, encoder)


def render_all(
    pictures: Mapping[str, Seen], character: Character, human: Mapping[str, Corrections]
) -> dict[str, Caption]:
    """The captions of a whole set, by the same keys; traits are found over all of it."""
    ready, encoder = Ready(character), encoder_of(character)
    changed = {key: ready.named(human[key]) if key in human else NONE for key in pictures}
    gathered = {key: gather(seen, changed[key], ready) for key, seen in pictures.items()}
    intrinsic = intrinsic_tags(list(gathered.values()), ready)
    return {
        key: _compose(gathered[key], seen, changed[key], intrinsic, ready, encoder)
        for key, seen in pictures.items()
    }


def _compose(
    gathered: Gathered,
    seen: Seen,
    human: Corrections,
    intrinsic: frozenset[str],
    ready: Ready,
    encoder: Encoder,
) -> Caption:
    """Everything from the intrinsic policy on."""
    if human.caption is not None:
        return _by_hand(human.caption, ready, encoder)
    form = ready.rules.form
    prose = _sentence(human.prose or seen.prose, ready) if form not in ("tags", "four-part") else ""
    scores, fixed, removed = settle(gathered, human, intrinsic, ready)
    shown = list(scores)  # fixed ones first
    if form == "prose":
        shown = [tag for tag in shown if scores[tag] > 1]
    elif form == "prose+tags":
        shown = [tag for tag in shown if tag in fixed or _adds_to(tag, prose, scores, ready)]
    elif form == "four-part":
        rest = shown[len(fixed) :]
        shown = fixed + sorted(rest, key=lambda tag: PARTS.index(ready.lexicon.group(tag).part))
    tags, prose, lost = _fit(shown, fixed, scores, prose, ready, encoder)
    plain = text = _assemble(tags, len(fixed), prose, ready)
    if ready.rules.weight_syntax:
        weights = ready.weights | human.weights
        emphasised = [_emphasised(tag, weights) for tag in tags]
        text = _assemble(emphasised, len(fixed), prose, ready)
    return Caption(
        text,
        tuple(tags),
        tuple(fixed),
        prose,
        encoder.count(plain),
        encoder.limit,
        tuple(lost),
        removed,
        gathered.hits,
    )


def _assemble(tags: list[str], fixed: int, prose: str, ready: Ready) -> str:
    """The template: trigger, class word and the first `fixed` tags, then tags and prose."""
    head = [ready.character.trigger, ready.character.class_word, *tags[:fixed]]
    rest = tags[fixed:]
    if ready.rules.form == "prose+tags" and prose:
        sentence = SEPARATOR.join([*head, prose])
        return f"{sentence}. {SEPARATOR.join(rest)}" if rest else sentence
    return SEPARATOR.join([*head, *rest, *([prose] if prose else [])])


def _sentence(prose: str, ready: Ready) -> str:
    """One line without its last full stop; a trigger in it becomes the class word."""
    one_line = " ".join(_visible_only(prose).split()).rstrip(". ")
    if not ready.rules.weight_syntax:
        one_line = without_weights(one_line)
    return ready.trigger.sub(lambda _: ready.character.class_word, one_line)


def _adds_to(tag: str, prose: str, scores: Mapping[str, float], ready: Ready) -> bool:
    """Whether a tag of camera, light or style (or a person's) says what the sentence does not."""
    if scores[tag] <= 1 and ready.lexicon.group(tag).part not in ("scene", "style"):
        return False
    said = plain_tag(prose.replace("-", " ")).split()
    return not all(word in said for word in tag.replace("-", " ").split())


def _fit(
    tags: list[str],
    fixed: list[str],
    scores: Mapping[str, float],
    prose: str,
    ready: Ready,
    encoder: Encoder,
) -> tuple[list[str], str, list[str]]:
    """(tags, prose, what was lost): the least sure tags go first, then the end of the prose."""
    count = len(fixed)
    if encoder.fits(_assemble(tags, count, prose, ready)):
        return tags, prose, []
    places = {tag: place for place, tag in enumerate(tags)}
    weakest = sorted(tags[count:], key=lambda tag: (scores[tag], -places[tag]))

    def without(number: int) -> list[str]:
        gone = set(weakest[:number])
        return [tag for tag in tags if tag not in gone]

    low, high = 1, len(weakest)
    while low < high:  # the fewest that must go
        middle = (low + high) // 2
        if encoder.fits(_assemble(without(middle), count, prose, ready)):
            high = middle
        else:
            low = middle + 1
    kept, lost = without(high), weakest[:high]
    if encoder.fits(_assemble(kept, count, prose, ready)):
        return kept, prose, lost
    words = prose.split()
    left = _longest(words, lambda part: _assemble(kept, count, part, ready), encoder)
    while left and _unfinished(words[left - 1], ready):
        left -= 1
    return kept, " ".join(words[:left]).rstrip(" ,;:"), lost + words[left:]


def _longest(words: list[str], text_of: Callable[[str], str], encoder: Encoder) -> int:
    """With how many of the first words the text fits; 0 when it does with none either."""
    low, high = 0, len(words)
    while low < high:  # more words never take fewer tokens
        middle = (low + high + 1) // 2
        if encoder.fits(text_of(" ".join(words[:middle]))):
            low = middle
        else:
            high = middle - 1
    return low


def _unfinished(word: str, ready: Ready) -> bool:
    """Whether a sentence cannot end in this word."""
    return word.strip(",;:.").lower() in ready.lexicon.words.unfinished


def _by_hand(text: str, ready: Ready, encoder: Encoder) -> Caption:
    """A person's own words after the trigger, cut where the encoder stops reading."""
    trigger = ready.character.trigger
    body = " ".join(_visible_only(text).split())
    if not ready.rules.weight_syntax or not encoder.fits(f"{trigger}, {without_weights(body)}"):
        body = without_weights(body)
    if opening := ready.trigger.match(body):
        body = body[opening.end() :].lstrip(" ,")
    words = ready.trigger.sub(lambda _: ready.character.class_word, body).split()

    def whole(part: str) -> str:
        return SEPARATOR.join([trigger, part]) if part else trigger

    left = _longest(words, lambda part: without_weights(whole(part)), encoder)
    caption = whole(" ".join(words[:left]).rstrip(" ,"))
    tags = [plain_tag(split_weight(part)[0]) for part in caption.split(",")[1:]]
    return Caption(
        caption,
        tuple(dict.fromkeys(tag for tag in tags if tag and tag != ready.class_word)),
        (),
        "",
        encoder.count(without_weights(caption)),
        encoder.limit,
        tuple(words[left:]),
        by_hand=True,
    )


def _visible_only(text: str) -> str:
    return "".join(letter if letter.isprintable() else " " for letter in text)


def _emphasised(tag: str, weights: Mapping[str, float]) -> str:
    """`(red eyes:1.3)`; brackets that are part of a tag are escaped, as sd-scripts wants them."""
    escaped = tag.replace("(", r"\(").replace(")", r"\)")
    weight = weights.get(tag, 1.0)
    return escaped if weight == 1 else f"({escaped}:{weight:g})"
