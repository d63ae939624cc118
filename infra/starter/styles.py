"""What each style can draw, and the words for it: colours, hair, mouths, eyes, clothing, extras.

Tables only. The words were chosen by looking at every variant of every style.
"""

from __future__ import annotations

TRAIN_STYLES = ("micah", "miniavs", "openPeeps", "adventurer", "bigSmile", "bigEars", "dylan")
HELD_OUT_STYLES = ("toonHead", "personas")
STYLE_WORDS = {
    "micah": "micah style",
    "miniavs": "miniavs style",
    "openPeeps": "peeps style",
    "adventurer": "adventurer style",
    "bigSmile": "big smile style",
    "bigEars": "big ears style",
    "dylan": "dylan style",
    "toonHead": "toon style",
    "personas": "personas style",
}
# One identity in this many is kept out of the training data in the styles that are trained on.
HELD_OUT_ONE_IN = 25

# Colour words and the hexes that they stand for; each avatar moves its hex by up to JITTER.
HAIR = {
    "black": "17120f", "brown": "6b4226", "blonde": "e6c46a", "red": "b5301f",
    "grey": "a9a9a9", "blue": "3a68d8", "green": "3d9e4f", "pink": "ee85b5",
    "purple": "7a3fb8", "orange": "e0772a",
}  # fmt: skip
SKIN = {"light": "f6d3b8", "tan": "d8a070", "brown": "9a6238", "dark": "5e3a24"}
CLOTHES = {
    "red": "c62828", "blue": "2f5fd0", "green": "2e8b45", "yellow": "f0c832",
    "purple": "7b3fc4", "pink": "f07ab0", "orange": "ef7f24", "black": "1c1c1e",
    "white": "f4f4f2", "grey": "8d9096",
}  # fmt: skip
BACKGROUND = {
    "white": "ffffff", "grey": "b4b8be", "blue": "9cc3f5", "green": "a5dba9",
    "yellow": "f9e79a", "pink": "f9c2d6", "purple": "c9b3ee", "orange": "fbc692",
    "black": "25262b",
}  # fmt: skip
JITTER = 10  # of 255, per channel
# Zoom in per cent of the drawing's own size, and the words for it.
FRAMING = {"close-up": (132, 155), "portrait": (90, 104), "far view": (50, 66)}
FRAMING_WEIGHTS = (0.25, 0.5, 0.25)
MAX_SHIFT_PER_CENT = 6
MAX_ROTATION_DEGREES = 8

_SHORT = tuple(f"short{n:02d}" for n in range(1, 20))
_LONG = tuple(f"long{n:02d}" for n in range(1, 27))
# Per style: word -> variants of the field that draws hair (a head in open-peeps).
HAIR_VARIANTS: dict[str, dict[str, tuple[str, ...]]] = {
    "micah": {
        "short hair": ("fonze", "dannyPhantom"), "mohawk": ("mrT",), "bald": ("mrClean",),
        "long hair": ("full",), "medium hair": ("pixie",), "turban": ("turban",),
    },
    "miniavs": {
        "bald": ("balndess",), "ponytail": ("ponyTail",), "long hair": ("long",),
        "curly hair": ("curly",), "short hair": ("stylish", "elvis", "classic02", "classic01"),
    },
    "openPeeps": {
        "afro": ("afro", "longAfro"),
        "medium hair": ("bangs", "bangs2", "medium1", "medium2", "grayMedium"),
        "bun": ("bun2", "grayBun"), "long hair": ("long", "longBangs", "mediumStraight"),
        "curly hair": ("longCurly", "dreads1"), "mohawk": ("mohawk",),
        "short hair": ("flatTop", "short1", "short2", "short4", "grayShort", "pomp"),
        "bald": ("noHair1",), "turban": ("turban",), "hat": ("hatHip",), "hijab": ("hijab",),
    },
    "adventurer": {"short hair": _SHORT, "long hair": _LONG},
    "bigSmile": {
        "short hair": ("shortHair", "bowlCutHair"), "medium hair": ("wavyBob",),
        "curly hair": ("curlyBob", "curlyShortHair"), "long hair": ("straightHair",),
        "bald": ("shavedHead",), "bun": ("bunHair", "froBun"), "mohawk": ("mohawk",),
    },
    "bigEars": {"short hair": (*_SHORT, "short20"), "long hair": _LONG[:20]},
    "dylan": {
        "short hair": ("plain", "parting", "flatTop"), "spiky hair": ("spiky",),
        "curly hair": ("shortCurls", "longCurls"), "medium hair": ("bangs", "roundBob"),
        "bun": ("buns",), "long hair": ("shaggy",),
    },
    "toonHead": {
        "short hair": ("sideComed", "undercut"), "spiky hair": ("spiky",), "bun": ("bun",),
    },
    "personas": {
        "long hair": ("long", "extraLong"), "short hair": ("shortCombover", "fade"),
        "medium hair": ("bobCut", "bobBangs"), "curly hair": ("curly",), "bald": ("bald",),
        "bun": ("curlyBun", "straightBun"), "mohawk": ("mohawk",), "ponytail": ("pigtails",),
        "hat": ("beanie", "cap"),
    },
}  # fmt: skip
# Heads of open-peeps that take the contrast colour; all the others are drawn black.
PEEPS_COLOURED = {"bangs", "grayBun", "grayMedium", "grayShort", "mohawk", "short4"}
NO_HAIR_COLOUR = {"bald", "turban", "hat", "hijab"}
MOUTHS: dict[str, dict[str, tuple[str, ...]]] = {
    "micah": {
        "smile": ("smile",), "open mouth": ("surprised",), "laughing": ("laughing",),
        "sad": ("sad", "frown"),
    },
    "miniavs": {"smile": ("default",)},
    "openPeeps": {
        "smile": ("smile", "calm"), "laughing": ("smileBig", "smileLOL"), "sad": ("concerned",),
        "angry": ("rage", "veryAngry"), "open mouth": ("awe",),
    },
    "adventurer": {
        "smile": ("variant29", "variant10", "variant02"), "open mouth": ("variant15", "variant03"),
        "laughing": ("variant26", "variant25", "variant24"), "sad": ("variant19", "variant04"),
    },
    "bigSmile": {
        "laughing": ("openedSmile", "gapSmile"), "smile": ("kawaii",), "sad": ("openSad",),
    },
    "bigEars": {
        "smile": ("variant0702", "variant0707", "variant0708"),
        "sad": ("variant0705", "variant0504"),
        "laughing": ("variant0304", "variant0604", "variant0204"),
        "open mouth": ("variant0105", "variant0104"),
    },
    "dylan": {
        "smile": ("happy",), "angry": ("angry",), "laughing": ("superHappy",), "sad": ("sad",),
    },
    "toonHead": {
        "laughing": ("laugh",), "angry": ("angry",), "open mouth": ("agape",), "smile": ("smile",),
        "sad": ("sad",),
    },
    "personas": {
        "smile": ("smile", "smirk"), "sad": ("frown",), "open mouth": ("surprise",),
        "laughing": ("bigSmile",),
    },
}  # fmt: skip
MOUTH_FIELD = {"openPeeps": "face", "dylan": "mood"}
EYES: dict[str, dict[str, tuple[str, ...]]] = {
    "micah": {"": ("eyes", "round"), "closed eyes": ("smiling",)},
    "miniavs": {"": ("normal",), "closed eyes": ("happy",)},
    "adventurer": {
        "": ("variant26", "variant25", "variant03", "variant02", "variant01", "variant12"),
        "closed eyes": ("variant20", "variant19"), "wink": ("variant22", "variant21"),
    },
    "bigSmile": {"": ("cheery", "normal"), "wink": ("winking",)},
    "toonHead": {"": ("happy", "wide"), "closed eyes": ("bow",), "wink": ("wink",)},
    "personas": {"": ("open",), "closed eyes": ("happy", "sleep"), "wink": ("wink",)},
}  # fmt: skip
CLOTHING: dict[str, tuple[str, dict[str, tuple[str, ...]]]] = {
    "micah": ("shirt", {"shirt": ("crew",), "collared shirt": ("collared", "open")}),
    "miniavs": ("body", {"shirt": ("tShirt",), "collared shirt": ("golf",)}),
    "openPeeps": ("", {"shirt": ("",)}),
    "toonHead": ("clothes", {"shirt": ("tShirt", "turtleNeck"), "collared shirt": ("shirt",)}),
    "personas": ("body", {"shirt": ("squared", "rounded")}),
}
CLOTHING_COLOUR_FIELD = {
    "micah": "shirtColor", "miniavs": "bodyColor", "openPeeps": "clothingColor",
    "toonHead": "clothesColor", "personas": "clothingColor",
}  # fmt: skip
# word -> (style -> field, variants), each drawn with PROBABILITY where the style has it.
EXTRAS: dict[str, dict[str, tuple[str, tuple[str, ...]]]] = {
    "glasses": {
        "micah": ("glasses", ("round", "square")), "miniavs": ("glasses", ("normal",)),
        "openPeeps": ("accessories", ("glasses", "glasses2")),
        "adventurer": ("glasses", tuple(f"variant{n:02d}" for n in range(1, 6))),
        "bigSmile": ("accessories", ("glasses",)), "personas": ("eyes", ("glasses",)),
    },
    "sunglasses": {
        "openPeeps": ("accessories", ("sunglasses", "sunglasses2")),
        "bigSmile": ("accessories", ("sunglasses",)), "personas": ("eyes", ("sunglasses",)),
    },
    "earrings": {
        "micah": ("earrings", ("hoop",)),
        "adventurer": ("earrings", tuple(f"variant{n:02d}" for n in range(1, 7))),
    },
    "beard": {
        "micah": ("facialHair", ("beard",)),
        "openPeeps": ("facialHair", ("full", "full2", "full3")),
        "dylan": ("facialHair", ("default",)), "toonHead": ("beard", ("fullBeard",)),
        "personas": ("facialHair", ("beardMustache",)),
    },
    "mustache": {
        "miniavs": ("mustache", ("freddy", "horshoe")),
        "openPeeps": ("facialHair", ("moustache1", "moustache2", "moustache3")),
        "bigSmile": ("accessories", ("mustache",)), "personas": ("facialHair", ("walrus",)),
    },
    "face mask": {
        "openPeeps": ("mask", ("medicalMask",)), "bigSmile": ("accessories", ("faceMask",)),
    },
    "cat ears": {"bigSmile": ("accessories", ("catEars",))},
}  # fmt: skip
EXTRA_PROBABILITY = {
    "glasses": 0.22, "sunglasses": 0.12, "earrings": 0.2, "beard": 0.16, "mustache": 0.14,
    "face mask": 0.06, "cat ears": 0.12,
}  # fmt: skip
# Extras that belong to who somebody is, rather than to what they wear today.
IDENTITY_EXTRAS = ("beard", "mustache")
OPTIONAL_FIELDS = ("glasses", "accessories", "earrings", "facialHair", "beard", "mustache", "mask")
OPTIONAL_FIELDS += ("rearHair", "features", "blushes")
