"""The two demo characters: somebody fixed in a style that no model was trained on, in 24 pictures.

Expression, clothing, framing, background and pose change from picture to picture; who it is does
not. Drawn at 256 px, like pictures that somebody would bring.
"""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pictures
from avatars import Avatar, Identity, draw_avatar
from styles import FRAMING

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "services/cli/demo/pictures"
COUNT = 24
SIZE_PX = 256
SEED = 26
DEMO = {
    "aya": Identity(
        style="toonHead",
        hair="long hair",
        hair_colour="pink",
        skin="light",
        extras=(),
        options={
            "seed": "aya",
            "skinColor": ["f6d3b8"],
            "hairColor": ["e8559d"],
            "hair": ["sideComed"],
            "hairProbability": 100,
            "rearHair": ["longWavy"],
            "rearHairProbability": 100,
            "eyebrows": ["happy"],
        },
    ),
    "bruno": Identity(
        style="personas",
        hair="mohawk",
        hair_colour="orange",
        skin="brown",
        extras=("beard",),
        options={
            "seed": "bruno",
            "skinColor": ["9a6238"],
            "hairColor": ["e0772a"],
            "hair": ["mohawk"],
            "hairProbability": 100,
            "nose": ["mediumRound"],
            "facialHair": ["beardMustache"],
            "facialHairProbability": 100,
        },
    ),
}


def avatars(name: str) -> list[Avatar]:
    """The character's pictures: every framing, the portrait twice as often as the others."""
    rng = random.Random(f"{SEED} {name}")
    plan = ["portrait", "portrait", "close-up", "far view"] * (COUNT // 4)
    drawn = [draw_avatar(DEMO[name], rng, framing) for framing in plan]
    # A far view of 64 px would show next to nothing of a face, so the pictures stay nearer.
    return [_nearer(avatar, rng) if avatar.framing == "far view" else avatar for avatar in drawn]


def _nearer(avatar: Avatar, rng: random.Random) -> Avatar:
    low, high = FRAMING["far view"]
    return replace(avatar, options=avatar.options | {"scale": rng.randint((low + high) // 2, high)})


def draw(work: Path) -> None:
    """services/cli/demo/pictures/<name>/01.png and on."""
    pictures.install(work)
    for name in DEMO:
        folder = FOLDER / name
        folder.mkdir(parents=True, exist_ok=True)
        pictures.node(avatars(name), folder, SIZE_PX, work, "png")
        print(f"{folder.relative_to(ROOT)}: {COUNT} pictures", flush=True)
