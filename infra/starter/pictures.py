"""Draws the data: specs by a seeded generator, pixels by node, both kept in the work folder.

Sets: `train`, `val` (characters kept out, in the styles that are trained on) and `unseen` (styles
kept out). Each is `<set>.jsonl` and `<set>.npy` (uint8, N x 64 x 64 x 3, RGB).
"""

from __future__ import annotations

import json
import random
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from avatars import Avatar, clothing_hex, draw_avatar, draw_identity
from styles import HELD_OUT_STYLES, TRAIN_STYLES

SIZE_PX = 64
SEED = 20
PICTURES_PER_IDENTITY = 4
# Identities drawn per style: about 30,000 training pictures and 1,200 of kept-out characters.
IDENTITIES_PER_STYLE = 1120
UNSEEN_IDENTITIES_PER_STYLE = 60
# Styles with clothing teach the most words, so they get more characters.
STYLE_WEIGHT = {"micah": 1.3, "miniavs": 1.3, "openPeeps": 1.3}
NODE_PROCESSES = 2
# Clothing counts as shown when this share of the picture has its colour, within so much of 255.
MIN_SHARE_SEEN = 0.005
SAME_COLOUR = 6
HERE = Path(__file__).parent


def render(work: Path) -> None:
    """Make every set that is not there yet."""
    work.mkdir(parents=True, exist_ok=True)
    sets: dict[str, list[Avatar]] = {"train": [], "val": [], "unseen": []}
    rng = random.Random(SEED)
    for style in TRAIN_STYLES:
        for _ in range(int(IDENTITIES_PER_STYLE * STYLE_WEIGHT.get(style, 1.0))):
            avatars = _pictures(style, rng)
            sets["val" if avatars[0].held_out else "train"] += avatars
    for style in HELD_OUT_STYLES:
        for _ in range(UNSEEN_IDENTITIES_PER_STYLE):
            sets["unseen"] += _pictures(style, rng)
    for name, avatars in sets.items():
        if (work / f"{name}.npy").exists():
            continue
        rng.shuffle(avatars)
        pixels = draw(avatars, work)
        avatars = [seen(*pair) for pair in zip(avatars, pixels, strict=True)]
        lines = "\n".join(json.dumps(asdict(avatar)) for avatar in avatars)
        (work / f"{name}.jsonl").write_text(lines + "\n")
        np.save(work / f"{name}.part.npy", pixels)
        (work / f"{name}.part.npy").replace(work / f"{name}.npy")
        print(f"{name}: {len(avatars)} pictures", flush=True)


def seen(avatar: Avatar, pixels: np.ndarray) -> Avatar:
    """The avatar, less its clothing where the frame cuts that off: captions name what is shown."""
    if not avatar.clothing:
        return avatar
    colour = np.frombuffer(bytes.fromhex(clothing_hex(avatar)), np.uint8).astype(int)
    share = (np.abs(pixels.astype(int) - colour).max(-1) <= SAME_COLOUR).mean()
    return avatar if share >= MIN_SHARE_SEEN else replace(avatar, clothing="", clothing_colour="")


def load(work: Path, name: str) -> tuple[np.ndarray, list[Avatar]]:
    """Pixels (uint8, N x 64 x 64 x 3) and avatars of a set."""
    lines = (work / f"{name}.jsonl").read_text().splitlines()
    avatars = [
        Avatar(**data | {"extras": tuple(data["extras"])}) for data in map(json.loads, lines)
    ]
    return np.load(work / f"{name}.npy", mmap_mode="r"), avatars


def draw(avatars: list[Avatar], work: Path) -> np.ndarray:
    """The avatars' pixels, drawn by parallel node processes."""
    share = -(-len(avatars) // NODE_PROCESSES)
    parts = [avatars[start : start + share] for start in range(0, len(avatars), share)]
    with ThreadPoolExecutor(NODE_PROCESSES) as pool:
        files = [work / f"part-{number}.rgb" for number in range(len(parts))]
        list(pool.map(lambda job: node(*job, SIZE_PX, work), zip(parts, files, strict=True)))
    pixels = np.concatenate([np.fromfile(file, np.uint8) for file in files])
    for file in files:
        file.unlink()
    return pixels.reshape(-1, SIZE_PX, SIZE_PX, 3)


def node(avatars: list[Avatar], target: Path, size_px: int, work: Path, *form: str) -> None:
    """Run render.mjs in the work folder, where its packages are installed."""
    script = work / "render.mjs"
    shutil.copy(HERE / "render.mjs", script)
    specs = "\n".join(json.dumps({"style": a.style, "options": a.options}) for a in avatars)
    command = ["node", str(script), str(size_px), str(target), *form]
    subprocess.run(command, input=specs + "\n", text=True, check=True, cwd=work)


def install(work: Path) -> None:
    """Put the drawing packages into the work folder, once."""
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "node_modules").exists():
        shutil.copy(HERE / "package.json", work / "package.json")
        subprocess.run(["npm", "install", "--no-audit", "--no-fund"], cwd=work, check=True)


def _pictures(style: str, rng: random.Random) -> list[Avatar]:
    who = draw_identity(style, rng)
    return [draw_avatar(who, rng) for _ in range(PICTURES_PER_IDENTITY)]
