"""A set of pictures with every defect that curation knows, drawn by code.

`draw_defects()` gives each picture with the findings that it must have and no others. Tags stand
for a tagger; the pixels, hashes and embeddings are real.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, field

import numpy as np
from PIL import Image as Pillow
from PIL import ImageDraw, ImageFilter, ImageOps

SIDE_PX = 640
SKIN, HAIR, WHITE = (243, 205, 176), (196, 60, 120), (255, 255, 255)
BACKGROUNDS = {
    "blue": (150, 190, 230), "green": (160, 205, 150), "yellow": (235, 215, 130),
    "purple": (185, 160, 215), "orange": (240, 185, 130), "grey": (190, 190, 185),
}  # fmt: skip
SHIRTS = {
    "red": (190, 50, 45), "black": (45, 45, 50), "white": (240, 240, 235), "green": (50, 130, 75),
    "blue": (50, 80, 160), "yellow": (220, 180, 40),
}  # fmt: skip
MOUTHS = ("smile", "open mouth", "sad", "angry")
# (tags, head's size as a share of the picture, where its centre stands)
FRAMED = {
    "close-up": ({"close-up": 0.9}, 0.62, 0.48),
    "upper": ({"upper body": 0.9}, 0.34, 0.34),
    "full": ({"full body": 0.9}, 0.16, 0.20),
}
WAYS = {
    "front": {"looking at viewer": 0.9},
    "left": {"profile": 0.9, "facing left": 0.8},
    "right": {"profile": 0.9, "facing right": 0.8},
}


@dataclass(frozen=True)
class Drawn:
    """One picture of the set: its file, its tags, and the codes it must be found with."""

    name: str
    data: bytes
    tags: dict[str, float]
    codes: frozenset[str] = frozenset()


@dataclass
class Sheet:
    """Pictures as they are added."""

    pictures: list[Drawn] = field(default_factory=list)

    def add(
        self, name: str, picture: Pillow.Image, tags: dict[str, float], *codes: str, kind="PNG"
    ) -> None:
        suffix = {"PNG": "png", "JPEG": "jpg"}[kind]
        options = {"quality": 92} if kind == "JPEG" else {}
        buffer = io.BytesIO()
        picture.save(buffer, kind, **options)
        self.pictures.append(
            Drawn(f"{name}.{suffix}", buffer.getvalue(), dict(tags), frozenset(codes))
        )


def draw_defects() -> list[Drawn]:
    """About 60 pictures: clean ones of all views, then the defects, in a fixed order."""
    sheet = Sheet()
    clean = {}
    for number in range(36):
        picture, tags = character(number)
        clean[number] = (picture, tags)
        sheet.add(f"clean-{number:02d}", picture, tags)
    _too_little_picture(sheet)
    _nothing_to_see(sheet)
    _subjects(sheet)
    _outliers(sheet)
    _copies(sheet, clean)
    return sheet.pictures


def character(number: int, side: int = SIDE_PX) -> tuple[Pillow.Image, dict[str, float]]:
    """A clean picture of the one character: view, shirt, mouth and background by the number."""
    rng = np.random.default_rng(number)
    framing = ("close-up", "upper", "full")[number % 3]
    way = ("front", "left", "right")[number // 3 % 3]
    background = sorted(BACKGROUNDS)[int(rng.integers(6))]
    shirt = sorted(SHIRTS)[int(rng.integers(6))]
    mouth = MOUTHS[int(rng.integers(4))]
    framed, size, middle = FRAMED[framing]
    x = 0.5 + float(rng.uniform(-0.12, 0.12))
    picture = draw_person(
        side, BACKGROUNDS[background], SHIRTS[shirt], HAIR, mouth, way,
        size * float(rng.uniform(0.86, 1.14)), x, middle + float(rng.uniform(-0.03, 0.05)), rng,
    )  # fmt: skip
    tags = {"1girl": 0.95, "solo": 0.9, "pink hair": 0.9, "long hair": 0.85}
    tags |= {f"{background} background": 0.8, f"{shirt} shirt": 0.8, mouth: 0.7}
    return picture, tags | framed | WAYS[way]


def draw_person(
    side: int, background: tuple, shirt: tuple, hair: tuple, mouth: str, way: str,
    size: float, x: float, y: float, rng: np.random.Generator,
) -> Pillow.Image:  # fmt: skip
    """Flat shapes with hatching, drawn at twice the size; light always comes from the left."""
    big = side * 2
    picture = Pillow.new("RGB", (big, big), background)
    draw = ImageDraw.Draw(picture)
    for _ in range(14):  # a room behind: shelves and lines, never the same twice
        left, top = rng.uniform(-0.1, 1.0, 2) * big
        wide, high = rng.uniform(0.04, 0.25, 2) * big
        shade = tuple(int(c * rng.uniform(0.75, 1.1)) for c in background)
        draw.rectangle(
            (left, top, left + wide, top + high),
            fill=tuple(min(255, c) for c in shade), outline=(70, 70, 80), width=3,
        )  # fmt: skip
    r = size * big / 2
    cx, cy = x * big, y * big
    turn = {"front": 0.0, "left": -1.0, "right": 1.0}[way]
    draw.ellipse((cx - 1.25 * r, cy - 1.2 * r, cx + 1.25 * r, cy + 2.0 * r), fill=hair)
    draw.rectangle((cx - 0.3 * r, cy + 0.7 * r, cx + 0.3 * r, cy + 1.5 * r), fill=SKIN)
    body = (cx - 1.5 * r, cy + 1.35 * r, cx + 1.5 * r, cy + 5.5 * r)
    draw.rounded_rectangle(body, radius=0.7 * r, fill=shirt)
    for line in range(7):  # folds, on the side away from the light
        fold = cx + (0.2 + 0.18 * line) * r
        draw.line(
            (fold, cy + 2 * r, fold - 0.15 * r, cy + 4.8 * r), (60, 60, 70), int(0.04 * r) + 1
        )
    draw.rectangle((cx - 1.2 * r, cy + 5.4 * r, cx + 1.2 * r, cy + 9 * r), fill=(70, 70, 110))
    draw.ellipse((cx - r, cy - r, cx + r, cy + 1.15 * r), fill=SKIN)
    shift = 0.42 * turn * r
    if turn:  # the nose stands out of the face
        nose = [(cx + turn * 0.9 * r, cy), (cx + turn * 1.3 * r, cy + 0.3 * r)]
        draw.polygon([*nose, (cx + turn * 0.85 * r, cy + 0.4 * r)], fill=SKIN)
    for eye in (-0.4, 0.4):
        if turn and eye * turn < 0:
            continue
        ex = cx + eye * r * (0.6 if turn else 1) + shift
        draw.ellipse((ex - 0.16 * r, cy - 0.15 * r, ex + 0.16 * r, cy + 0.2 * r), fill=WHITE)
        draw.ellipse(
            (ex - 0.09 * r, cy - 0.08 * r, ex + 0.09 * r, cy + 0.16 * r), fill=(40, 90, 60)
        )
        draw.line(
            (ex - 0.2 * r, cy - 0.3 * r, ex + 0.2 * r, cy - 0.33 * r), (60, 30, 40), int(0.06 * r)
        )
    mx = cx + shift
    box = (mx - 0.3 * r, cy + 0.35 * r, mx + 0.3 * r, cy + 0.75 * r)
    if mouth == "open mouth":
        draw.ellipse(box, fill=(120, 30, 40))
    elif mouth == "angry":
        draw.line((box[0], box[3], box[2], box[3]), (120, 30, 40), int(0.08 * r) + 1)
    else:
        start = 20 if mouth == "smile" else 200
        draw.arc(box, start, start + 140, (120, 30, 40), int(0.08 * r) + 1)
    draw.chord((cx - 1.1 * r, cy - 1.15 * r, cx + 1.1 * r, cy + 0.5 * r), 185, 355, fill=hair)
    for strand in range(9):  # hair falls to the left: no picture is its own mirror image
        sx = cx + (-0.9 + 0.2 * strand) * r
        draw.line((sx, cy - 0.7 * r, sx - 0.25 * r, cy - 0.2 * r), (110, 25, 60), int(0.03 * r) + 1)
    for line in range(6):  # shade on the cheek away from the light
        lx = cx + (0.45 + 0.08 * line) * r
        draw.line(
            (lx, cy + 0.3 * r, lx - 0.1 * r, cy + 0.6 * r), (205, 150, 125), int(0.03 * r) + 1
        )
    return picture.resize((side, side), Pillow.Resampling.LANCZOS)


def _too_little_picture(sheet: Sheet) -> None:
    for number, side in ((100, 200), (101, 400)):
        picture, tags = character(number, side)
        sheet.add(f"small-{side}", picture, tags, "IMG201")
    for number, side, more in ((102, 370, ()), (103, 200, ("IMG204",))):
        picture, tags = character(number, side)
        large = picture.resize((1100, 1100), Pillow.Resampling.BICUBIC)
        # What was very small is soft as well, and the set is sharp.
        sheet.add(f"enlarged-from-{side}", large, tags, "IMG203", *more)
    for number, radius in ((104, 25), (105, 12)):
        picture, tags = character(number)
        sheet.add(
            f"blurred-{radius}",
            picture.filter(ImageFilter.GaussianBlur(radius)),
            tags,
            "IMG204",
            "IMG203",
        )


def _nothing_to_see(sheet: Sheet) -> None:
    _, tags = character(110)
    sheet.add("blank", Pillow.new("RGB", (SIDE_PX, SIDE_PX), WHITE), {}, "IMG205")
    sheet.add("blank-grey", Pillow.new("RGB", (700, 700), (90, 90, 90)), {}, "IMG205")
    for number, name, low, high, code in (
        (111, "dark", 0, 14, "IMG206"), (112, "bright", 244, 255, "IMG207"),
    ):  # fmt: skip
        picture, tags = character(number)
        pixels = np.asarray(picture, np.float32) / 255
        if name == "dark":
            flat = np.where(pixels.mean(2, keepdims=True) > 0.97, 200, low + pixels * high)
        else:
            flat = low + pixels * (high - low)
            flat[250:258, 200:460] = 20
        sheet.add(name, Pillow.fromarray(flat.astype(np.uint8)), tags, code)
    picture, tags = character(113)
    grey = ImageOps.grayscale(picture).convert("RGB")
    # Another style among colour pictures as well, by its embedding.
    sheet.add("greyscale", grey, tags, "IMG208", "IMG220")


def _subjects(sheet: Sheet) -> None:
    for number, name, more, code in (
        (120, "two-girls", {"2girls": 0.9}, "IMG210"),
        (121, "crowd", {"multiple boys": 0.8}, "IMG210"),
        (122, "girl-and-boy", {"1boy": 0.7}, "IMG210"),
        (123, "sunglasses", {"sunglasses": 0.8}, "IMG211"),
        (124, "mask", {"mouth mask": 0.8}, "IMG211"),
        (125, "watermark", {"watermark": 0.8, "web address": 0.6}, "IMG213"),
        (126, "signature", {"signature": 0.7}, "IMG213"),
    ):
        picture, tags = character(number)
        if code == "IMG210":
            other, _ = character(number + 200)
            half = other.resize((SIDE_PX // 2, SIDE_PX))
            picture.paste(half, (SIDE_PX // 2, 0))
            tags.pop("solo")
        sheet.add(name, picture, tags | more, code)


def _outliers(sheet: Sheet) -> None:
    picture, tags = character(130)
    sheet.add("painted", _painted(picture), tags, "IMG220")
    picture, tags = character(131)
    tags = {k: v for k, v in tags.items() if k not in ("pink hair", "long hair")}
    sheet.add("somebody-else", picture, tags | {"green hair": 0.9, "short hair": 0.9}, "IMG221")


def _painted(picture: Pillow.Image) -> Pillow.Image:
    """With brush strokes and soft light over everything, as no flat drawing has."""
    rng = np.random.default_rng(130)
    pixels = np.asarray(picture.filter(ImageFilter.GaussianBlur(1)), np.float32)
    light = Pillow.fromarray(rng.integers(70, 255, (5, 5), np.uint8))
    light = np.asarray(light.resize(picture.size, Pillow.Resampling.BICUBIC), np.float32) / 255
    strokes = Pillow.fromarray(
        rng.integers(0, 255, (picture.height, picture.width // 12), np.uint8)
    )
    strokes = strokes.resize(picture.size, Pillow.Resampling.BICUBIC)
    grain = (np.asarray(strokes, np.float32) - 128) / 6
    painted = pixels * light[..., None] + grain[..., None]
    return Pillow.fromarray(painted.clip(0, 255).astype(np.uint8))


def _copies(sheet: Sheet, clean: dict[int, tuple[Pillow.Image, dict[str, float]]]) -> None:
    for number, kind, change in (
        (0, "half", lambda p: p.resize((SIDE_PX * 9 // 10,) * 2, Pillow.Resampling.LANCZOS)),
        (1, "mirrored", ImageOps.mirror),
        (
            3,
            "crop",
            lambda p: p.crop((40, 20, 520, 500)).resize((560, 560), Pillow.Resampling.LANCZOS),
        ),
        (
            4,
            "crop-mirrored",
            lambda p: ImageOps.mirror(p.crop((100, 60, 580, 540))).resize(
                (560, 560), Pillow.Resampling.LANCZOS
            ),
        ),
    ):
        picture, tags = clean[number]
        sheet.add(f"{kind}-of-{number:02d}", change(picture), tags, "IMG231", kind="JPEG")
    picture, tags = clean[2]
    copy = io.BytesIO()
    picture.save(copy, "WEBP", lossless=True)  # other bytes, equal pixels
    sheet.pictures.append(
        Drawn("equal-to-02.webp", copy.getvalue(), dict(tags), frozenset({"IMG230"}))
    )
