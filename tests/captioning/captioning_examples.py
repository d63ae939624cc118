"""Pictures as bytes, and an observer without a model."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator

from PIL import Image as Pillow

from captioning import Observation


def png(colour: object = "red", size: tuple[int, int] = (64, 64), mode: str = "RGB") -> bytes:
    return saved(Pillow.new(mode, size, colour), "PNG")


def saved(picture: Pillow.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


class Answers:
    """An observer without a model: tags and prose made of the picture's sha256."""

    def __init__(self, stop_after: int | None = None, failing: frozenset[str] = frozenset()):
        self.asked: list[tuple[str, str]] = []
        self.stop_after, self.failing = stop_after, failing

    def models(self) -> dict[str, tuple[str, str]]:
        return {"tags": ("tagger", "r1"), "prose": ("captioner", "r1")}

    def ask(self, requests: Iterable[tuple[str, str, bytes]]) -> Iterator[Observation]:
        for sha256, kind, _ in requests:
            if len(self.asked) == self.stop_after:
                raise KeyboardInterrupt
            self.asked.append((sha256, kind))
            said: dict[str, object] = {
                "tags": {"smile": 0.9, f"tag {sha256[:4]}": 0.5, "faint": 0.1}
            }
            if kind == "prose":
                said = {"prose": f"a picture of {sha256[:4]}."}
            if sha256 in self.failing:
                said = {"error": "RuntimeError: no answer"}
            yield Observation(
                image=sha256,
                kind=kind,
                model=self.models()[kind][0],
                revision="r1",
                milliseconds=1,
                **said,
            )
