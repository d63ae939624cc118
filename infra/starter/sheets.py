"""Contact sheets: rows of pictures, with text below where there is some. Writes PNG files."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

SHOWN_PX = 128
CAPTION_COLUMNS = 5
CAPTION_CHARACTERS = 34
LINE_PX = 11
CAPTION_LINES = 6


def pairs(originals: Sequence[np.ndarray], copies: Sequence[np.ndarray], path: Path) -> None:
    """Rows of 12 originals, each row with its copies below."""
    columns = 12
    rows = -(-len(originals) // columns)
    sheet = Image.new("RGB", (columns * SHOWN_PX, rows * 2 * SHOWN_PX), "white")
    for number, two in enumerate(zip(originals, copies, strict=True)):
        row, column = divmod(number, columns)
        for below, picture in enumerate(two):
            place = (column * SHOWN_PX, (2 * row + below) * SHOWN_PX)
            sheet.paste(_enlarged(picture), place)
    _save(sheet, path)


def captioned(drawn: Sequence[np.ndarray], texts: Sequence[str], path: Path) -> None:
    """Pictures with their text below, five in a row."""
    width, height = CAPTION_CHARACTERS * 6 + 8, SHOWN_PX + CAPTION_LINES * LINE_PX
    rows = -(-len(drawn) // CAPTION_COLUMNS)
    sheet = Image.new("RGB", (CAPTION_COLUMNS * width, rows * height), "white")
    pen = ImageDraw.Draw(sheet)
    for number, (picture, text) in enumerate(zip(drawn, texts, strict=True)):
        row, column = divmod(number, CAPTION_COLUMNS)
        x, y = column * width, row * height
        sheet.paste(_enlarged(picture), (x, y))
        for line, words in enumerate(textwrap.wrap(text, CAPTION_CHARACTERS)[:CAPTION_LINES]):
            pen.text((x, y + SHOWN_PX + line * LINE_PX), words, fill="black")
    _save(sheet, path)


def _enlarged(picture: np.ndarray) -> Image.Image:
    return Image.fromarray(picture).resize((SHOWN_PX, SHOWN_PX), Image.Resampling.NEAREST)


def _save(sheet: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, optimize=True)
