"""Pictures as curation sees them: really measured and embedded, with tags given or really read."""

from __future__ import annotations

import hashlib
from functools import cache

from defects import Drawn
from PIL import Image as Pillow

from captioning import STARTER_CLIP, STARTER_TAGGER, Embedder, Finding, Image, Quality
from captioning.curation import CurationLimits, Observed, curate
from captioning.curation.same_picture import difference, shrink
from captioning.decode import decode
from captioning.observers.quality import measure
from captioning.observers.tagger import Tagger


@cache
def clip() -> Embedder:
    return Embedder(STARTER_CLIP)


@cache
def tagger() -> Tagger:
    return Tagger(STARTER_TAGGER)


class Curated:
    """Pictures with their observations; `findings` runs every check on them."""

    def __init__(self, files: list[tuple[str, bytes]], tags: list[dict[str, float]] | None = None):
        decoded = [decode(data) for _, data in files]
        pictures = [picture for picture, _ in decoded]
        tags = [said.tags for said in tagger().observe(pictures)] if tags is None else tags
        self.observed = [
            Observed(
                Image(hashlib.sha256(data).hexdigest(), *picture.size, kind, name),
                said,
                measure(picture),
                tuple(float(value) for value in vector),
                "clip@1",
            )
            for (name, data), (picture, kind), said, vector in zip(
                files, decoded, tags, clip().embed_images(pictures), strict=True
            )
        ]
        self._pictures = dict(zip((seen.where for seen in self.observed), pictures, strict=True))
        self._shrunk = cache(lambda where: shrink(self._pictures[where]))
        self._found: dict[CurationLimits | None, list[Finding]] = {}
        self.names = {seen.where: seen.image.source for seen in self.observed}

    def findings(self, limits: CurationLimits | None = None) -> list[Finding]:
        if limits not in self._found:
            self._found[limits] = curate(self.observed, limits, self.apart)
        return self._found[limits]

    def apart(self, one: str, other: str) -> float:
        return difference(self._shrunk(one), self._shrunk(other))

    def codes(self, limits: CurationLimits | None = None) -> set[tuple[str, str]]:
        """(name or `dataset`, code) of every finding."""
        return {
            (self.names.get(found.where, found.where), found.code)
            for found in self.findings(limits)
        }


def curated(drawn: list[Drawn]) -> Curated:
    return Curated([(one.name, one.data) for one in drawn], [one.tags for one in drawn])


def seen(name: str, side: int = 1024, quality: Quality | None = None, **more: object) -> Observed:
    """An observed picture that is nothing but its values."""
    sha256 = hashlib.sha256(name.encode()).hexdigest()
    return Observed(Image(sha256, side, side, "PNG", name), quality=quality, **more)


def quality(number: int = 0, **figures: object) -> Quality:
    """The figures of a good picture, unlike those of any other number."""
    good = {
        "sharpness": 500.0, "effective_px": None, "luminance": 0.5, "dark_share": 0.1,
        "bright_share": 0.1, "contrast": 0.2, "entropy_bits": 6.0, "colourfulness": 0.3,
        "phash": hashlib.sha256(str(number).encode()).hexdigest()[:16],
        "pixels_sha256": str(number),
    }  # fmt: skip
    return Quality.model_validate(good | figures)


def halves(picture: Pillow.Image) -> Pillow.Image:
    return picture.resize((picture.width // 2, picture.height // 2), Pillow.Resampling.LANCZOS)
