"""Multi-label taggers by the WD convention: an ONNX model and its selected_tags.csv.

Pictures in, tags with scores out. The convention is that of SmilingWolf's wd-tagger models: float32
NHWC input, BGR, 0 to 255, padded to a square with white, probabilities out.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from captioning.errors import UserError
from captioning.observers.shrink import Shrink
from captioning.observers.weights import REVISION_DIGITS
from captioning.store import content_hash

MODEL_FILE, TAGS_FILE = "model.onnx", "selected_tags.csv"
# Categories of selected_tags.csv that captions are made of. Of the others the v2 and v3 models have
# ratings (9); newer ones add artists (1), copyrights (3), meta tags (5) and more.
GENERAL, CHARACTER = 0, 4
LOWEST_SCORE = 0.05  # what an observation keeps
# In these tags the underscore is drawn, not a space (the list of kohya's tagger script).
KAOMOJI = {"0_0", "(o)_(o)", "+_+", "+_-", "._.", "<o>_<o>", "<|>_<|>", "=_=", ">_<", "3_3"}
KAOMOJI |= {"6_9", ">_o", "@_@", "^_^", "o_o", "u_u", "x_x", "|_|", "||_||"}


@dataclass(frozen=True)
class Tags:
    """Scores from 0.05 up of one picture; the fields are those of an observation."""

    tags: dict[str, float]  # general and character tags
    other_tags: dict[str, float]  # all others
    categories: dict[str, int]  # of all tags but the general ones

    def fields(self) -> dict[str, Any]:
        """For an observation; what is empty is left out, except for the tags themselves."""
        extra = {"other_tags": self.other_tags, "categories": self.categories}
        return {"tags": self.tags, **{name: value for name, value in extra.items() if value}}


class Tagger:
    """A tagger loaded from a folder. `id` and `revision` name it in observations."""

    def __init__(self, path: Path | str, threads: int = 1) -> None:
        """Raises UserError when the folder holds no tagger of the WD convention."""
        import onnxruntime

        folder = Path(path)
        require_tagger(folder)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        try:
            self._session: Any = onnxruntime.InferenceSession(
                str(folder / MODEL_FILE), options, providers=onnxruntime.get_available_providers()
            )
        except Exception as error:  # onnxruntime's errors share no public base class
            raise UserError(
                str(folder / MODEL_FILE),
                f"not an ONNX model ({str(error).splitlines()[0]})",
                "download it again",
            ) from error
        self._tags = _read_tags(folder / TAGS_FILE)
        self._input = self._session.get_inputs()[0]
        self._batch, self.size_px = _batch_and_size(folder, self._input.shape)
        self.shrink = Shrink(self.size_px, on_white_square=True)
        classes = self._session.get_outputs()[0].shape[-1]
        if isinstance(classes, int) and classes != len(self._tags):
            raise UserError(
                str(folder / TAGS_FILE),
                f"{len(self._tags)} tags for a model of {classes}",
                "take the selected_tags.csv that came with the model",
            )
        self.id = folder.resolve().name
        self.revision = content_hash(folder)[:REVISION_DIGITS]

    def observe(self, pictures: list[Image.Image]) -> list[Tags]:
        """All tags with a score from 0.05 up, for each RGB picture."""
        inputs = np.stack([_prepare(self.shrink(picture)) for picture in pictures])  # (N, S, S, 3)
        step = self._batch or len(inputs)
        scores = [self._run(inputs[start : start + step]) for start in range(0, len(inputs), step)]
        return [self._named(row) for row in np.concatenate(scores)]

    def _run(self, inputs: np.ndarray) -> np.ndarray:
        """(N, tags) for (N, S, S, 3); a model of one fixed batch size gets white pictures added."""
        added = (self._batch or len(inputs)) - len(inputs)
        padded = np.pad(inputs, [(0, added), (0, 0), (0, 0), (0, 0)], constant_values=255)
        scores: np.ndarray = self._session.run(None, {self._input.name: padded})[0]
        return scores[: len(inputs)]

    def _named(self, row: np.ndarray) -> Tags:
        tags: dict[str, float] = {}
        other_tags: dict[str, float] = {}
        categories: dict[str, int] = {}
        for number in np.flatnonzero(row >= LOWEST_SCORE):
            name, category = self._tags[number]
            found = tags if category in (GENERAL, CHARACTER) else other_tags
            found[name] = round(float(row[number]), 4)
            if category != GENERAL:
                categories[name] = category
        return Tags(tags, other_tags, categories)


def require_tagger(folder: Path) -> None:
    """Raise UserError when the folder lacks one of a tagger's two files."""
    for name in (MODEL_FILE, TAGS_FILE):
        if not (folder / name).is_file():
            raise UserError(
                str(folder),
                f"no tagger: {name} is missing" if folder.is_dir() else "there is no such folder",
                f"give a folder with {MODEL_FILE} and {TAGS_FILE} (a WD tagger)",
            )


def _batch_and_size(folder: Path, shape: list[Any]) -> tuple[int | None, int]:
    """(batch size if the model has a fixed one, side in px) of the input (N, S, S, 3)."""
    batch, *picture = shape
    if len(picture) != 3 or not isinstance(picture[0], int) or picture != [picture[0]] * 2 + [3]:
        raise UserError(
            str(folder / MODEL_FILE),
            f"its input has the shape {shape}",
            "give a model of the WD convention, whose input is (batch, side, side, 3)",
        )
    return (batch if isinstance(batch, int) else None), picture[0]


def _read_tags(path: Path) -> list[tuple[str, int]]:
    with path.open(newline="", encoding="utf-8") as file:
        try:
            return [(_spaced(row["name"]), int(row["category"])) for row in csv.DictReader(file)]
        except (KeyError, ValueError) as error:
            raise UserError(
                str(path), f"bad column: {error}", "it needs the columns name and category"
            ) from error


def _spaced(name: str) -> str:
    return name if name in KAOMOJI else name.replace("_", " ")


def _prepare(square: Image.Image) -> np.ndarray:
    """float32 (S, S, 3), BGR, 0 to 255."""
    return np.asarray(square, np.float32)[:, :, ::-1]
