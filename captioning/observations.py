"""Observations: what one model at one revision said about one image, raw and stored for good.

Infer once, decide many times: only what is missing is asked for, and every answer is on disk the
moment it comes, so stopping in the middle loses nothing.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from captioning.errors import UserError
from captioning.intake import Image, read_image
from captioning.store import Store, write_atomic

ProgressCallback = Callable[[int, int], None]
Kind = Literal["tags", "prose", "embedding", "quality", "boxes"]
# An answer is flushed to the disk, which takes 2 to 20 ms; side by side they wait for it together.
WRITERS = 8
SHOWN_FAILURES = 5  # in the error after a run in which pictures failed


class Quality(BaseModel):
    """The figures that pixels alone give; each is measured on the upright picture on white."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sharpness: float = Field(
        description="Laplacian variance in the subject's box, grey 0-255, short side 512 px."
    )
    effective_px: int | None = Field(
        None,
        description="Short side from which the picture looks enlarged; None when it is native.",
    )
    luminance: float = Field(description="Mean grey, 0 to 1.")
    dark_share: float = Field(description="Share of pixels below 5 % grey.")
    bright_share: float = Field(description="Share of pixels above 95 % grey.")
    contrast: float = Field(description="Standard deviation of grey, 0 to 1.")
    entropy_bits: float = Field(description="Of the grey histogram: 0 is blank, 8 the most.")
    colourfulness: float = Field(description="Mean chroma 0 to 1; about 0 is monochrome.")
    phash: str = Field(description="64-bit perceptual hash, 16 hex digits (ImageHash).")
    pixels_sha256: str = Field(description="Of size and RGB bytes: equal pictures, any format.")


class Box(BaseModel):
    """A box in shares of the upright picture's width and height, from its top left corner."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    label: str
    score: float
    left: float
    top: float
    width: float
    height: float


class Observation(BaseModel):
    """One model's answer; exactly one of the kinds' fields and `error` is set."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    image: str  # sha256
    kind: Kind
    model: str
    revision: str
    tags: dict[str, float] | None = None  # scores from 0.05 up; general and character tags
    other_tags: dict[str, float] | None = None  # ratings, artists and so on: never in a caption
    categories: dict[str, int] | None = None  # of all tags but the general ones (0)
    prose: str | None = None
    embedding: tuple[float, ...] | None = None  # length 1
    quality: Quality | None = None
    boxes: tuple[Box, ...] | None = None
    milliseconds: float  # this picture's share of its batch
    error: str | None = None


class ObservationsFailed(UserError):
    """Models failed on some pictures; everything else was observed and stored."""


class ObserverClient(Protocol):
    """What answers the requests: models behind Ray Serve, or anything with the same two methods."""

    def models(self) -> dict[Kind, tuple[str, str]]:
        """(id, revision) of the model for each kind."""
        ...

    def ask(self, requests: Iterable[tuple[str, Kind, bytes]]) -> Iterator[Observation]:
        """Answers to (sha256, kind, picture bytes), in any order, as they come.

        Requests for one picture follow each other, so that it need be decoded only once.
        """
        ...


def observe(
    images: list[Image],
    store: Store,
    client: ObserverClient,
    progress: ProgressCallback | None = None,
) -> None:
    """Ask for every observation of `images` that the store does not have yet.

    An answer with an error is stored as well, for people to read, but the next run asks again.
    What is there already counts as the newest again: a model that was changed back speaks for the
    picture, not the one that was tried meanwhile. Raises ObservationsFailed naming the pictures on
    which models failed, after all others were observed.
    """
    models = client.models()
    wanted = [
        (image, kind, _path(store, image.sha256, *model))
        for image in images
        for kind, model in models.items()
    ]
    missing = [(image, kind) for image, kind, path in wanted if not _still_answered(path)]
    done = len(wanted) - len(missing)
    if progress:
        progress(done, len(wanted))
    failed: list[Observation] = []
    for answer in _kept(store, client.ask(_requests(store, missing))):
        if answer.error is not None:
            failed.append(answer)
        done += 1
        if progress:
            progress(done, len(wanted))
    if failed:
        sources = {image.sha256: image.source for image in images}
        listed = [f"{sources[seen.image]} ({seen.model}: {seen.error})" for seen in failed]
        more = len(listed) - SHOWN_FAILURES
        raise ObservationsFailed(
            "captioning",
            f"{len({seen.image for seen in failed})} of {len(images)} pictures failed: "
            + "; ".join(listed[:SHOWN_FAILURES])
            + (f"; and {more} more" if more > 0 else ""),
            "run the same command again; it asks only for what is missing",
        )


def load_observations(store: Store, sha256: str) -> list[Observation]:
    """All stored observations of an image, oldest first; raises UserError for a spoiled file."""
    place = store.observations / sha256
    if not place.is_dir():
        return []
    files = sorted(place.glob("*.json"), key=lambda file: (file.stat().st_mtime_ns, file.name))
    return [_read(file) for file in files]


def _requests(store: Store, missing: list[tuple[Image, Kind]]) -> Iterator[tuple[str, Kind, bytes]]:
    """What to ask for; the bytes of a picture are read once, when its turn comes."""
    for _, asked in groupby(missing, key=lambda row: row[0].sha256):
        rows = list(asked)
        data = read_image(store, rows[0][0])
        yield from ((image.sha256, kind, data) for image, kind in rows)


def _kept(store: Store, answers: Iterable[Observation]) -> Iterator[Observation]:
    """The answers, each once it is on the disk; whatever ends the loop, all that came are kept."""
    writing: deque[Future[Observation]] = deque()
    with ThreadPoolExecutor(WRITERS, "store") as pool:
        for answer in answers:
            writing.append(pool.submit(_keep, store, answer))
            while len(writing) > WRITERS or (writing and writing[0].done()):
                yield writing.popleft().result()
        while writing:
            yield writing.popleft().result()


def _keep(store: Store, answer: Observation) -> Observation:
    path = _path(store, answer.image, answer.model, answer.revision)
    write_atomic(path, answer.model_dump_json(exclude_none=True).encode())
    return answer


def _still_answered(path: Path) -> bool:
    if not path.exists() or _read(path).error is not None:
        return False
    os.utime(path)  # from now on the newest
    return True


def _read(path: Path) -> Observation:
    try:
        return Observation.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise UserError(
            str(path), "not an observation", "delete it and run `lorafarm dataset caption` again"
        ) from error


def _path(store: Store, sha256: str, model: str, revision: str) -> Path:
    return store.observations / sha256 / f"{model}@{revision}.json"
