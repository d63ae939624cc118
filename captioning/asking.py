"""The client of the served observers: every picture is handed to all of them, see `parcels`.

(sha256, kind, bytes) in, observations out as they come. What is in flight is bounded in pictures
for each observer and in bytes for all, so a folder of any size fits into the memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from threading import Event
from typing import Any

import tenacity
from PIL.Image import Image

from captioning.decode import upright_rgb
from captioning.observations import Kind, Observation
from captioning.observer_config import ObserverConfig
from captioning.observers.shrink import Shrink
from captioning.parcels import Asked, Group, Parcel, pack
from captioning.replica import told

# For each observer: two full batches for each replica keep it busy while answers travel.
BATCHES_IN_FLIGHT = 2
# Pictures that travel together. A request costs about 5 ms of CPU, whatever it carries; in
# one of 8 pictures that is less than what the quickest observer spends on them.
REQUEST_PICTURES = 8
# Decoded pictures in flight; half of the object store that a local Ray starts with. A picture that
# is larger than this travels alone.
BYTES_IN_FLIGHT = 128 * 1024 * 1024
# A request that was lost with its replica is sent again, then its pictures one by one; a
# picture that kills its replica again and again must not take its neighbours with it.
ATTEMPTS = 2
# The pause between attempts doubles, since a replica's process takes seconds to come back.
RETRY_WAIT_S, RETRY_WAIT_MOST_S = 1.0, 15.0
BATCH_SIZES_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Served:
    """One observer behind Serve: its config, its handle, and (id, revision)."""

    config: ObserverConfig
    handle: Any
    identity: tuple[str, str]

    @property
    def window(self) -> int:
        """Pictures in flight."""
        return BATCHES_IN_FLIGHT * self.config.batch_size * self.config.max_replicas

    @property
    def request_pictures(self) -> int:
        """Pictures in one request; a batch is made of several."""
        return min(REQUEST_PICTURES, self.config.batch_size)


class ServedObservers:
    """See `ObserverClient`; made by `serve_observers`."""

    def __init__(self, served: dict[Kind, Served]) -> None:
        self._served = served
        self.decoded = 0  # pictures decoded so far

    def models(self) -> dict[Kind, tuple[str, str]]:
        """(id, revision) of the observer for each kind."""
        return {kind: one.identity for kind, one in self._served.items()}

    def batch_sizes(self, kind: Kind) -> list[int]:
        """Sizes of all batches that one replica of this kind has answered."""
        answer = self._served[kind].handle.batch_sizes.remote()
        sizes: list[int] = answer.result(timeout_s=BATCH_SIZES_TIMEOUT_S)
        return sizes

    def ask(self, requests: Iterable[tuple[str, Kind, bytes]]) -> Iterator[Observation]:
        """Answers as they come, in any order; requests for one picture must follow each other.

        A picture that can't be decoded, and one whose request was lost again and again, is answered
        with an error.
        """
        flight = _Flight(self._served)
        try:
            size = max(one.request_pictures for one in self._served.values())
            for group in pack(requests, self._decode, self._shrinks, size):
                for sha256, kind, error in group.unreadable:
                    yield _failure(sha256, kind, self._served[kind].identity, error)
                yield from flight.make_room_for(group)
                flight.send(group)
            yield from flight.land()
        finally:
            flight.close()

    def _shrinks(self, kinds: Iterable[Kind]) -> dict[Kind, Shrink | None]:
        """How these observers shrink pictures; asked side by side, since some may have to start."""
        asked = {kind: self._served[kind].handle.shrink.remote() for kind in kinds}
        return {
            kind: _answered(answer, self._served[kind].config.timeout_s)
            for kind, answer in asked.items()
        }

    def _decode(self, data: bytes) -> Image:
        self.decoded += 1
        return upright_rgb(data)


class _Flight:
    """The requests in flight; each waits in a thread for its answer, or to be sent again."""

    def __init__(self, served: dict[Kind, Served]) -> None:
        self._served = served
        self._ended = Event()
        self._pools = {
            kind: ThreadPoolExecutor(max(1, one.window // one.request_pictures), f"ask-{kind}")
            for kind, one in served.items()
        }
        self._waiting: dict[Future[list[Observation]], tuple[Kind, int, Parcel]] = {}

    def make_room_for(self, group: Group) -> Iterator[Observation]:
        """Yield the answers that come until the group's pictures may be sent."""
        while not self._has_room_for(group):
            yield from self._next_answers()

    def send(self, group: Group) -> None:
        """Ask all observers at once for what is wanted of the group's pictures."""
        for kind, (parcel, asked) in group.wanted.items():
            step = self._served[kind].request_pictures
            for start in range(0, len(asked), step):
                part = asked[start : start + step]
                job = self._pools[kind].submit(self._answers, kind, parcel, part)
                self._waiting[job] = (kind, len(part), parcel)

    def land(self) -> Iterator[Observation]:
        """Yield all answers that are still to come."""
        while self._waiting:
            yield from self._next_answers()

    def close(self) -> None:
        """Send nothing more, and give up what is on its way."""
        self._ended.set()
        for pool in self._pools.values():
            pool.shutdown(wait=False, cancel_futures=True)

    def _next_answers(self) -> Iterator[Observation]:
        done, _ = wait(self._waiting, return_when=FIRST_COMPLETED)
        for job in done:
            del self._waiting[job]
            yield from job.result()

    def _has_room_for(self, group: Group) -> bool:
        parcels = {id(one): one.bytes for _, _, one in self._waiting.values()}
        if parcels and sum(parcels.values()) + group.bytes > BYTES_IN_FLIGHT:
            return False
        for kind, (_, asked) in group.wanted.items():
            pictures = sum(count for other, count, _ in self._waiting.values() if other == kind)
            # A model of small batches has a group waiting while it works on another one.
            window = max(self._served[kind].window, BATCHES_IN_FLIGHT * len(asked))
            if pictures + len(asked) > window:
                return False
        return True

    def _answers(self, kind: Kind, parcel: Parcel, asked: Asked) -> list[Observation]:
        """One observation for each asked picture, whatever happens to the replica."""
        failures = _lost_requests()
        try:
            return self._asked_repeatedly(kind, parcel, asked)
        except failures as error:
            if len(asked) > 1 and not self._ended.is_set():
                return [self._answers(kind, parcel, [one])[0] for one in asked]
            return [
                _failure(sha256, kind, self._served[kind].identity, error) for _, sha256 in asked
            ]

    def _asked_repeatedly(self, kind: Kind, parcel: Parcel, asked: Asked) -> list[Observation]:
        served = self._served[kind]
        attempts = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(_lost_requests()),
            stop=tenacity.stop_after_attempt(ATTEMPTS) | tenacity.stop_when_event_set(self._ended),
            wait=tenacity.wait_exponential(RETRY_WAIT_S, max=RETRY_WAIT_MOST_S),
            sleep=tenacity.sleep_using_event(self._ended),
            reraise=True,
        )
        return attempts(_asked_once, served, parcel, asked)


def _asked_once(served: Served, parcel: Parcel, asked: Asked) -> list[Observation]:
    response = served.handle.remote(parcel.pictures, asked)
    answers: list[Observation] = response.result(timeout_s=served.config.timeout_s)
    return answers


def _answered(answer: Any, timeout_s: float) -> Shrink | None:
    """The answer; None also when it got lost, since the observer then shrinks by itself."""
    try:
        shrink: Shrink | None = answer.result(timeout_s=timeout_s)
    except _lost_requests():
        return None
    return shrink


def _lost_requests() -> tuple[type[Exception], ...]:
    """What Ray raises when a replica, its node or the whole of Serve went away meanwhile."""
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    return RayError, RayServeException, TimeoutError


def _failure(
    sha256: str, kind: Kind, identity: tuple[str, str], error: BaseException
) -> Observation:
    model, revision = identity
    return Observation(
        image=sha256,
        kind=kind,
        model=model,
        revision=revision,
        milliseconds=0,
        error=told(error),
    )
