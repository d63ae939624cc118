"""One observer in its own process behind Ray Serve: decoded pictures in, observations out.

Serve collects requests into batches here. A picture that fails costs only its own answer.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

import numpy as np
from PIL import Image as Pillow

from captioning.observations import Observation
from captioning.observer_config import ObserverConfig, kind_of
from captioning.observers.load import load_observer
from captioning.observers.shrink import Shrink
from captioning.pixels import picture_of

# A batch goes out when it is full or when its first request has waited this long.
BATCH_WAIT_S = 0.02
Request = list[tuple[str, np.ndarray]]  # (sha256, an upright RGB picture's pixels) of each


class Replica:
    """The class that Serve deploys; the model's call is in a thread, the loop stays free."""

    def __init__(self, config: ObserverConfig, identity: tuple[str, str], threads: int) -> None:
        from ray import serve

        self._kind = kind_of(config)
        self._id, self._revision = identity
        self._observer = load_observer(config, threads)
        self._batch_sizes: list[int] = []
        self._ask = serve.batch(
            self._observe_batch,
            max_batch_size=config.batch_size,
            batch_wait_timeout_s=BATCH_WAIT_S,
            batch_size_fn=_count,
        )

    async def __call__(
        self, pictures: list[np.ndarray], asked: list[tuple[int, str]]
    ) -> list[Observation]:
        """Observations of the asked (row, sha256) among `pictures`, in their order.

        `pictures` lies in Ray's object store, where all observers that shrink alike read one copy.
        """
        answers: list[Observation] = await self._ask(
            [(sha256, pictures[row]) for row, sha256 in asked]
        )
        return answers

    def shrink(self) -> Shrink | None:
        """What may be done to a picture before it is sent here, without changing the answer."""
        return self._observer.shrink

    def batch_sizes(self) -> list[int]:
        """Pictures in each batch that was answered so far."""
        return self._batch_sizes

    async def _observe_batch(self, requests: list[Request]) -> list[list[Observation]]:
        asked = [picture for request in requests for picture in request]
        self._batch_sizes.append(len(asked))
        started = time.perf_counter()
        answers = await asyncio.to_thread(self._answers, [pixels for _, pixels in asked])
        each_ms = (time.perf_counter() - started) * 1000 / len(asked)
        observed = iter(
            self._observation(sha256, answer, each_ms)
            for (sha256, _), answer in zip(asked, answers, strict=True)
        )
        return [[next(observed) for _ in request] for request in requests]

    def _answers(self, arrays: list[np.ndarray]) -> list[Any]:
        return self._observed([picture_of(pixels) for pixels in arrays])

    def _observed(self, pictures: list[Pillow.Image]) -> list[Any]:
        """The model's answers; when it fails on all at once, each picture is asked alone."""
        try:
            return list(self._observer.observe(pictures))
        except Exception as error:  # whatever a model raises belongs into the observation
            if len(pictures) == 1:
                return [error]
            return [answer for picture in pictures for answer in self._observed([picture])]

    def _observation(self, sha256: str, answer: Any, milliseconds: float) -> Observation:
        fields: dict[str, Any]
        if isinstance(answer, Exception):
            fields = {"error": told(answer)}
        elif self._kind == "tags":
            fields = answer.fields()
        else:
            fields = {self._kind: answer}
        return Observation(
            image=sha256,
            kind=self._kind,
            model=self._id,
            revision=self._revision,
            milliseconds=round(milliseconds, 3),
            **fields,
        )


def told(error: BaseException) -> str:
    """An error as an observation keeps it: its kind and first line."""
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]


def _count(requests: list[Request]) -> int:
    return sum(len(request) for request in requests)
