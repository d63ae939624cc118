"""Pictures for people: data URIs for the page, and contact sheets as one picture.

Files or PIL pictures in, small web pictures out. Pixel art is enlarged by whole pixels, everything
else is resampled smoothly; an original is never changed.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from services.report.data import CharacterReport, Picture

# Up to this side a picture is shown pixel by pixel: it is pixel art or a starter model's 64 px.
PIXEL_ART_SIDE_PX = 128
# Side of a picture as the page shows it, and as it is stored for screens of double density.
SHOWN_SIDE_PX = 128
STORED_SIDE_PX = 288
JPEG_QUALITY = 86

_BACKGROUND = (250, 250, 249)
_TEXT = (32, 34, 38)
_MUTED = (112, 116, 124)
_WINNER = (0, 106, 128)
_GAP_PX = 6
_MARGIN_PX = 20
_LABEL_WIDTH_PX = 130
_FONT_SIZE_PX = 13
_LINE_PX = 17
_HEADER_LINES = 4


@dataclass(frozen=True)
class WebPicture:
    """A picture as an `<img>` needs it."""

    uri: str
    width: int
    height: int
    pixelated: bool


@dataclass(frozen=True)
class SheetRow:
    """A row of a contact sheet: its label, its pictures, whether it is the winner."""

    label: str
    pictures: tuple[Picture, ...]
    winner: bool = False


def open_picture(picture: Picture) -> Image.Image:
    """The picture in RGB, upright, on white where it was transparent."""
    if isinstance(picture, Path):
        with Image.open(picture) as opened:
            loaded = ImageOps.exif_transpose(opened)
    else:
        loaded = picture
    if loaded.mode == "P" or loaded.mode == "LA":
        loaded = loaded.convert("RGBA")
    if loaded.mode == "RGBA":
        background = Image.new("RGBA", loaded.size, (255, 255, 255, 255))
        background.alpha_composite(loaded)
        loaded = background
    return loaded.convert("RGB")


def web_picture(picture: Picture) -> WebPicture:
    """The picture as a data URI: PNG as it is when small, else a JPEG of `STORED_SIDE_PX`.

    Width and height are those to show, at most `SHOWN_SIDE_PX`.
    """
    loaded = open_picture(picture)
    buffer = io.BytesIO()
    if max(loaded.size) <= PIXEL_ART_SIDE_PX:
        factor = whole_factor(loaded.size, SHOWN_SIDE_PX)
        loaded.save(buffer, "PNG", optimize=True)
        width, height = loaded.width * factor, loaded.height * factor
        return WebPicture(_uri(buffer, "image/png"), width, height, True)
    stored = ImageOps.contain(loaded, (STORED_SIDE_PX, STORED_SIDE_PX), Image.Resampling.LANCZOS)
    stored.save(buffer, "JPEG", quality=JPEG_QUALITY, optimize=True)
    shown = ImageOps.contain(loaded, (SHOWN_SIDE_PX, SHOWN_SIDE_PX), Image.Resampling.BOX)
    return WebPicture(_uri(buffer, "image/jpeg"), shown.width, shown.height, False)


def whole_factor(size: tuple[int, int], side_px: int) -> int:
    """By how many whole times, at least 1, a picture of `size` is enlarged within `side_px`."""
    return max(1, side_px // max(size))


def character_sheet(character: CharacterReport, side_px: int = SHOWN_SIDE_PX) -> Image.Image:
    """The character's contact sheet: base model, then the checkpoints of the winning trial.

    Without a winner the first trial's; training pictures stand beside.
    """
    rows = []
    if character.base_pictures:
        rows.append(SheetRow("base model", character.base_pictures))
    trial = character.winning_trial or next(iter(character.trials), None)
    for checkpoint in trial.checkpoints if trial else ():
        if trial and checkpoint.pictures:
            won = checkpoint is character.winning_checkpoint
            label = f"{character.title(trial)}\nstep {checkpoint.step}" + (
                "\nwinner" if won else ""
            )
            rows.append(SheetRow(label, checkpoint.pictures, won))
    training = tuple(entry.picture for entry in character.dataset.train)
    return contact_sheet(rows, character.prompts, training, side_px)


def contact_sheet(
    rows: Sequence[SheetRow],
    columns: Sequence[str],
    training: Sequence[Picture] = (),
    side_px: int = SHOWN_SIDE_PX,
) -> Image.Image:
    """One RGB picture: a row per checkpoint, a column per prompt, training pictures to the right.

    `columns` are the prompts, in the order of every row's pictures. Cells are `side_px` wide;
    small pictures are enlarged by whole pixels so that pixel art stays crisp. As many training
    pictures are shown as fit beside the rows. Raises ValueError without rows, or when a row's
    pictures do not match the columns.
    """
    if not rows:
        raise ValueError("a contact sheet needs at least one row")
    for row in rows:
        if len(row.pictures) != len(columns):
            raise ValueError(
                f"row {row.label!r}: {len(row.pictures)} pictures for {len(columns)} columns"
            )
    pitch = side_px + _GAP_PX
    header_px = _HEADER_LINES * _LINE_PX + _GAP_PX
    shown = list(training)[: 2 * len(rows)]
    training_columns = 2 if len(shown) > len(rows) else min(1, len(shown))
    grid_right = _MARGIN_PX + _LABEL_WIDTH_PX + len(columns) * pitch
    width = grid_right + _MARGIN_PX + training_columns * pitch + (_MARGIN_PX if shown else 0)
    height = 2 * _MARGIN_PX + header_px + len(rows) * pitch
    sheet = Image.new("RGB", (width, height), _BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(_FONT_SIZE_PX)
    top = _MARGIN_PX + header_px
    for column, prompt in enumerate(columns):
        left = _MARGIN_PX + _LABEL_WIDTH_PX + column * pitch
        lines = _wrap(prompt, font, side_px)[:_HEADER_LINES]
        y = top - _GAP_PX - len(lines) * _LINE_PX
        draw.multiline_text((left, y), "\n".join(lines), fill=_MUTED, font=font, spacing=4)
    for index, row in enumerate(rows):
        y = top + index * pitch
        color = _WINNER if row.winner else _TEXT
        label = "\n".join(
            part for line in row.label.split("\n") for part in _wrap(line, font, _LABEL_WIDTH_PX)
        )
        draw.multiline_text((_MARGIN_PX, y + 4), label, fill=color, font=font, spacing=4)
        for column, picture in enumerate(row.pictures):
            left = _MARGIN_PX + _LABEL_WIDTH_PX + column * pitch
            _paste(sheet, picture, left, y, side_px)
            if row.winner:
                box = (left - 2, y - 2, left + side_px + 1, y + side_px + 1)
                draw.rectangle(box, outline=_WINNER, width=2)
    for index, picture in enumerate(shown):
        left = grid_right + _MARGIN_PX + (index % training_columns) * pitch
        _paste(sheet, picture, left, top + (index // training_columns) * pitch, side_px)
    if shown:
        place = (grid_right + _MARGIN_PX, top - _GAP_PX - _LINE_PX)
        draw.text(place, "training pictures", fill=_MUTED, font=font)
    return sheet


def _paste(sheet: Image.Image, picture: Picture, left: int, top: int, side_px: int) -> None:
    """Put the picture into the middle of a square cell."""
    loaded = open_picture(picture)
    if max(loaded.size) <= PIXEL_ART_SIDE_PX and max(loaded.size) <= side_px:
        factor = whole_factor(loaded.size, side_px)
        size = (loaded.width * factor, loaded.height * factor)
        fitted = loaded.resize(size, Image.Resampling.NEAREST)
    else:
        fitted = ImageOps.contain(loaded, (side_px, side_px), Image.Resampling.LANCZOS)
    place = (left + (side_px - fitted.width) // 2, top + (side_px - fitted.height) // 2)
    sheet.paste(fitted, place)


def _wrap(
    text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width_px: int
) -> list[str]:
    """Break the text into lines that are no wider than `width_px`, at spaces where possible."""
    lines: list[str] = []
    for word in text.split():
        joined = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(joined) <= width_px:
            lines[-1] = joined
        else:
            lines.append(word)
    return lines or [""]


def _uri(buffer: io.BytesIO, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
