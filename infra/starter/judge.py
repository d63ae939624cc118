"""The tagger's bundle as whoever judges pictures sees it: pictures in, tags out."""

from __future__ import annotations

import csv

import bundle
import captions
import numpy as np
import onnxruntime
from avatars import Avatar
from tagger import to_bgr

BATCH = 32
# A tag counts as found from this probability on.
THRESHOLD = 0.5


class Tagger:
    """The tagger's bundle: pictures in, probabilities by tag name out."""

    def __init__(self) -> None:
        path = str(bundle.TAGGER / "model.onnx")
        self.session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        with (bundle.TAGGER / "selected_tags.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        self.names = [row["name"].replace("_", " ") for row in rows]
        self.general = np.array([row["category"] == "0" for row in rows])

    def probabilities(self, pixels: np.ndarray) -> np.ndarray:
        parts = [
            self.session.run(None, {"input": to_bgr(pixels[start : start + BATCH]).numpy()})[0]
            for start in range(0, len(pixels), BATCH)
        ]
        return np.concatenate(parts)

    def found(self, pixels: np.ndarray) -> np.ndarray:
        """Which tags (N, tags) the tagger finds."""
        return self.probabilities(pixels) > THRESHOLD

    def truth(self, avatars: list[Avatar]) -> np.ndarray:
        """Which tags (N, tags) the avatars have; the class word is none of the tagger's tags."""
        hot = np.zeros((len(avatars), len(self.names)), bool)
        for row, avatar in enumerate(avatars):
            for tag in captions.tags(avatar):
                if tag in self.names:
                    hot[row, self.names.index(tag)] = True
        return hot
