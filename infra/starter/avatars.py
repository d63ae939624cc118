"""What an avatar shows, in words, and the drawing options that show exactly that.

A seeded generator in, `Avatar`s out: the caption's facts and the options for `render.mjs`.
Never draws. The words are those of `styles.py`.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass, field

from styles import (
    BACKGROUND,
    CLOTHES,
    CLOTHING,
    CLOTHING_COLOUR_FIELD,
    EXTRA_PROBABILITY,
    EXTRAS,
    EYES,
    FRAMING,
    FRAMING_WEIGHTS,
    HAIR,
    HAIR_VARIANTS,
    HELD_OUT_ONE_IN,
    HELD_OUT_STYLES,
    IDENTITY_EXTRAS,
    JITTER,
    MAX_ROTATION_DEGREES,
    MAX_SHIFT_PER_CENT,
    MOUTH_FIELD,
    MOUTHS,
    NO_HAIR_COLOUR,
    OPTIONAL_FIELDS,
    PEEPS_COLOURED,
    SKIN,
)


@dataclass(frozen=True)
class Avatar:
    """The facts that a caption may state ("" or () where the style draws none) and the options."""

    style: str
    identity: str  # hash of what makes this somebody
    hair: str
    hair_colour: str
    skin: str
    mouth: str
    eyes: str
    clothing: str
    clothing_colour: str
    extras: tuple[str, ...]
    background: str
    framing: str
    options: dict[str, object] = field(compare=False)

    @property
    def held_out(self) -> bool:
        """Whether this character is kept out of all training."""
        return self.style in HELD_OUT_STYLES or int(self.identity, 16) % HELD_OUT_ONE_IN == 0


@dataclass(frozen=True)
class Identity:
    """Somebody: what stays the same over all their pictures."""

    style: str
    hair: str
    hair_colour: str
    skin: str
    extras: tuple[str, ...]
    options: dict[str, object]

    @property
    def hash(self) -> str:
        text = repr((self.style, sorted((key, str(value)) for key, value in self.options.items())))
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def draw_identity(style: str, rng: random.Random) -> Identity:
    """Somebody in `style`: hair, colours, facial hair, and the style's own face parts by seed."""
    hair = rng.choice(list(HAIR_VARIANTS[style]))
    variant = rng.choice(HAIR_VARIANTS[style][hair])
    hair_colour = rng.choice(list(HAIR))
    if style == "openPeeps" and variant not in PEEPS_COLOURED:
        hair_colour = "black"
    skin = rng.choice(list(SKIN))
    options: dict[str, object] = {
        "seed": f"{rng.getrandbits(32):08x}",
        "skinColor": [near(SKIN[skin], rng)],
        "baseColor": [near(SKIN[skin], rng)],
        "hairProbability": 100,
    }
    colour = near(HAIR[hair_colour], rng)
    options["headContrastColor" if style == "openPeeps" else "hairColor"] = [colour]
    options["facialHairColor"] = options["eyebrowsColor"] = [colour]
    options["head" if style == "openPeeps" else "hair"] = [variant]
    if style == "toonHead" and hair != "bun" and rng.random() < 0.4:
        hair = "long hair"
        options |= {"rearHair": ["longStraight"], "rearHairProbability": 100}
    extras = []
    for word in IDENTITY_EXTRAS:
        if style in EXTRAS[word] and not extras and rng.random() < EXTRA_PROBABILITY[word]:
            extras.append(word)
            options |= _wear(word, style, rng)
    if hair in NO_HAIR_COLOUR:
        hair_colour = ""
    return Identity(style, hair, hair_colour, skin, tuple(extras), options)


def draw_avatar(who: Identity, rng: random.Random, framing: str | None = None) -> Avatar:
    """A picture of `who`: another expression, clothing, framing and background each time."""
    style = who.style
    options: dict[str, object] = {f"{name}Probability": 0 for name in OPTIONAL_FIELDS}
    mouth = rng.choice(list(MOUTHS[style]))
    options[MOUTH_FIELD.get(style, "mouth")] = [rng.choice(MOUTHS[style][mouth])]
    eyes = ""
    if style in EYES:
        eyes = rng.choice(list(EYES[style])) if rng.random() < 0.5 else ""
        options["eyes"] = [rng.choice(EYES[style][eyes])]
    clothing = clothing_colour = ""
    if style in CLOTHING:
        place, choices = CLOTHING[style]
        clothing = rng.choice(list(choices))
        if place:
            options[place] = [rng.choice(choices[clothing])]
        clothing_colour = rng.choice(list(CLOTHES))
        options[CLOTHING_COLOUR_FIELD[style]] = [near(CLOTHES[clothing_colour], rng)]
    options |= who.options
    extras = list(who.extras)
    taken = {key for key in options if options.get(f"{key}Probability")}
    for word, styles in EXTRAS.items():
        if word in IDENTITY_EXTRAS or style not in styles or styles[style][0] in taken:
            continue
        if rng.random() < EXTRA_PROBABILITY[word]:
            worn = _wear(word, style, rng)
            options |= worn
            taken |= set(worn)
            extras.append(word)
            if styles[style][0] == "eyes":
                eyes = ""
    if "face mask" in extras:
        mouth = ""
    background = rng.choice(list(BACKGROUND))
    framing = framing or rng.choices(list(FRAMING), FRAMING_WEIGHTS)[0]
    low, high = FRAMING[framing]
    options |= {
        "backgroundColor": [near(BACKGROUND[background], rng)],
        "scale": rng.randint(low, high),
        "translateX": rng.randint(-MAX_SHIFT_PER_CENT, MAX_SHIFT_PER_CENT),
        "translateY": rng.randint(-MAX_SHIFT_PER_CENT, MAX_SHIFT_PER_CENT),
        "rotate": rng.randint(-MAX_ROTATION_DEGREES, MAX_ROTATION_DEGREES) % 360,
        "flip": rng.random() < 0.5,
    }
    return Avatar(
        style, who.hash, who.hair, who.hair_colour, who.skin, mouth, eyes, clothing,
        clothing_colour, tuple(sorted(extras)), background, framing, options,
    )  # fmt: skip


def clothing_hex(avatar: Avatar) -> str:
    """The colour (rrggbb) that the clothing is drawn in."""
    (colour,) = avatar.options[CLOTHING_COLOUR_FIELD[avatar.style]]
    return colour


def near(colour: str, rng: random.Random) -> str:
    """`colour` (rrggbb) moved by up to JITTER per channel, so that a word is a range."""
    channels = (int(colour[start : start + 2], 16) for start in (0, 2, 4))
    moved = (min(255, max(0, channel + rng.randint(-JITTER, JITTER))) for channel in channels)
    return "".join(f"{channel:02x}" for channel in moved)


def _wear(word: str, style: str, rng: random.Random) -> dict[str, object]:
    place, variants = EXTRAS[word][style]
    worn: dict[str, object] = {place: [rng.choice(variants)]}
    if place != "eyes":
        worn[f"{place}Probability"] = 100
    return worn
