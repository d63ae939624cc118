"""Pictures on their way to the observers: decoded once, shrunk once, laid into Ray's object store.

(sha256, kind, bytes) in, groups of pictures out. A parcel holds a group's pictures in the size that
an observer looks at, so the full size travels only to those that want all of it.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np
from PIL.Image import Image

from captioning.decode import PictureError
from captioning.observations import Kind
from captioning.observers.shrink import Shrink
from captioning.pixels import pixels_of

# Beside what is in flight one group more may be on its way to the object store.
GROUP_BYTES = 32 * 1024 * 1024
# Decoding runs ahead of asking by this many pictures, on as many threads.
DECODERS = min(4, os.cpu_count() or 1)

Asked = list[tuple[int, str]]  # (row among the parcel's pictures, sha256)
Shrinks = dict[Kind, Shrink | None]  # how each observer shrinks; None: it wants the full size
Sizes = dict[Shrink | None, np.ndarray]  # one picture as each shrinks it, see `pixels`


@dataclass
class Parcel:
    """A group's pictures in one size."""

    pictures: list[np.ndarray] | Any = field(default_factory=list)  # once sealed a reference
    bytes: int = 0

    def add(self, pixels: np.ndarray) -> int:
        """The row that the picture has in here."""
        self.pictures.append(pixels)
        self.bytes += pixels.nbytes
        return len(self.pictures) - 1

    def seal(self) -> None:
        """Lay the pictures into Ray's object store, as one object."""
        import ray

        self.pictures = ray.put(self.pictures)


@dataclass
class Group:
    """Pictures that were decoded together."""

    parcels: dict[Shrink | None, Parcel] = field(default_factory=dict)
    wanted: dict[Kind, tuple[Parcel, Asked]] = field(default_factory=dict)
    unreadable: list[tuple[str, Kind, PictureError]] = field(default_factory=list)
    pictures: int = 0

    @property
    def bytes(self) -> int:
        """The bytes of the group's pictures in all sizes."""
        return sum(parcel.bytes for parcel in self.parcels.values())

    def add(self, sha256: str, shrinks: Shrinks, sizes: Sizes) -> None:
        """Put in one picture, for these kinds of observers, in their sizes."""
        self.pictures += 1
        rows = {
            shrink: self.parcels.setdefault(shrink, Parcel()).add(pixels)
            for shrink, pixels in sizes.items()
        }
        for kind, shrink in shrinks.items():
            _, asked = self.wanted.setdefault(kind, (self.parcels[shrink], []))
            asked.append((rows[shrink], sha256))

    def sealed(self) -> Group:
        """The same group with its pictures in the object store."""
        for parcel in self.parcels.values():
            parcel.seal()
        return self


def pack(
    requests: Iterable[tuple[str, Kind, bytes]],
    decode: Callable[[bytes], Image],
    shrinks_of: Callable[[list[Kind]], Shrinks],
    pictures: int,
) -> Iterator[Group]:
    """Groups of up to `pictures`, decoded ahead on threads; the last one may be empty.

    `decode` raises PictureError. `shrinks_of` says how observers shrink, None that one wants the
    full size; it is asked for each kind once, when the first picture for it comes.
    """
    group = Group()
    for sha256, shrinks, sizes in _decoded(requests, decode, shrinks_of):
        if isinstance(sizes, PictureError):
            group.unreadable += [(sha256, kind, sizes) for kind in shrinks]
            continue
        group.add(sha256, shrinks, sizes)
        if group.pictures == pictures or group.bytes >= GROUP_BYTES:
            yield group.sealed()
            group = Group()
    yield group.sealed()


def _decoded(
    requests: Iterable[tuple[str, Kind, bytes]],
    decode: Callable[[bytes], Image],
    shrinks_of: Callable[[list[Kind]], Shrinks],
) -> Iterator[tuple[str, Shrinks, Sizes | PictureError]]:
    """Each picture with the kinds that it was asked for, in the order of the requests."""
    known: Shrinks = {}
    ahead: deque[tuple[str, Shrinks, Future[Sizes | PictureError]]] = deque()
    with ThreadPoolExecutor(DECODERS, "decode") as pool:
        for sha256, asked in groupby(requests, key=lambda request: request[0]):
            rows = list(asked)
            if new := [kind for _, kind, _ in rows if kind not in known]:
                known |= shrinks_of(new)
            shrinks = {kind: known[kind] for _, kind, _ in rows}
            job = pool.submit(_sizes, rows[0][2], decode, set(shrinks.values()))
            ahead.append((sha256, shrinks, job))
            if len(ahead) > DECODERS:
                yield _settled(*ahead.popleft())
        while ahead:
            yield _settled(*ahead.popleft())


def _settled(
    sha256: str, shrinks: Shrinks, job: Future[Sizes | PictureError]
) -> tuple[str, Shrinks, Sizes | PictureError]:
    return sha256, shrinks, job.result()


def _sizes(
    data: bytes, decode: Callable[[bytes], Image], shrinks: set[Shrink | None]
) -> Sizes | PictureError:
    """The picture, decoded once, in all sizes that are wanted; two that are equal are made once."""
    try:
        picture = decode(data)
    except PictureError as error:
        return error
    made: Sizes = {}
    sizes: Sizes = {}
    for shrink in shrinks:
        # A strip or a tiny picture would grow here; its observer enlarges it by itself.
        how = shrink.on(picture) if shrink and shrink.makes_smaller(picture) else None
        if how not in made:
            made[how] = pixels_of(how(picture) if how else picture)
        sizes[shrink] = made[how]
    return sizes
