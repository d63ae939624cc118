"""Captioning models as Ray Serve deployments with dynamic batching, reached by handle.

Picture bytes in, observations out. The HTTP proxy stays off: nothing listens on a port.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL.Image import Image as Picture

from captioning.decode import PictureError, upright_rgb
from captioning.errors import UserError
from captioning.observations import Kind, Observation
from captioning.observers.tagger import require_tagger
from captioning.observers.weights import require_model

# A batch goes out when it is full or when its first request has waited this long.
BATCH_WAIT_S = 0.05
# Requests in flight per deployment: two full batches keep the model busy while answers travel.
BATCHES_IN_FLIGHT = 2
ANSWER_TIMEOUT_S = 600.0
START_TIMEOUT_S = 300.0
# Both models share one core, so that the default also fits into a machine with two.
REPLICA_CPUS = 0.5


class _Replica:
    """One model in its own process: batches that Serve collects, one answer per picture."""

    def __init__(self, kind: Kind, source: str, batch_size: int) -> None:
        from ray import serve

        self._kind = kind
        self._observer = load_observer(kind, source)
        self._batch_sizes: list[int] = []
        self._ask = serve.batch(
            self._observe_batch, max_batch_size=batch_size, batch_wait_timeout_s=BATCH_WAIT_S
        )

    async def __call__(self, request: tuple[str, bytes]) -> Observation:
        answer: Observation = await self._ask(request)
        return answer

    def model(self) -> tuple[str, str]:
        return self._observer.id, self._observer.revision

    def batch_sizes(self) -> list[int]:
        return self._batch_sizes

    async def _observe_batch(self, requests: list[tuple[str, bytes]]) -> list[Observation]:
        self._batch_sizes.append(len(requests))
        started = time.perf_counter()
        # In a thread, so that the replica goes on collecting the next batch meanwhile.
        answers = await asyncio.to_thread(self._answers, [data for _, data in requests])
        each_ms = (time.perf_counter() - started) * 1000 / len(requests)
        return [
            self._observation(sha256, answer, each_ms)
            for (sha256, _), answer in zip(requests, answers, strict=True)
        ]

    def _answers(self, contents: list[bytes]) -> list[Any]:
        """One answer or one exception per picture; a bad picture costs only its own answer."""
        answers: list[Any] = []
        for data in contents:
            try:
                answers.append(upright_rgb(data))
            except PictureError as error:
                answers.append(error)
        good = [row for row, answer in enumerate(answers) if not isinstance(answer, Exception)]
        observed = self._observed([answers[row] for row in good])
        for row, answer in zip(good, observed, strict=True):
            answers[row] = answer
        return answers

    def _observed(self, pictures: list[Picture]) -> list[Any]:
        """The model's answers; when it fails on all at once, each picture is asked alone."""
        if not pictures:
            return []
        try:
            return list(self._observer.observe(pictures))
        except Exception as error:  # whatever a model raises belongs into the observation
            if len(pictures) == 1:
                return [error]
            return [answer for picture in pictures for answer in self._observed([picture])]

    def _observation(self, sha256: str, answer: Any, milliseconds: float) -> Observation:
        fields: dict[str, Any] = {}
        if isinstance(answer, Exception):
            fields["error"] = _told(answer)
        elif answer == "":
            fields["error"] = "the model found no words"
        else:
            fields[self._kind] = answer
        return Observation(
            image=sha256,
            kind=self._kind,
            model=self._observer.id,
            revision=self._observer.revision,
            milliseconds=round(milliseconds, 3),
            **fields,
        )


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def load_observer(kind: Kind, source: str) -> Any:
    """The observer for a kind; heavy imports happen here, inside the replica's process."""
    # Both models get an equal share of the machine's cores.
    threads = max(1, (os.cpu_count() or 1) // 2)
    if kind == "tags":
        from captioning.observers.tagger import Tagger

        return Tagger(source, threads)
    from captioning.observers.captioner import Captioner

    return Captioner(source, threads)


class ServedObservers:
    """The client of the deployments; see `ObserverClient`."""

    def __init__(self, handles: dict[Kind, Any], batch_size: int) -> None:
        self._handles = handles
        self._window = batch_size * BATCHES_IN_FLIGHT * len(handles)
        self._models: dict[Kind, tuple[str, str]] = {
            kind: handle.model.remote().result(timeout_s=START_TIMEOUT_S)
            for kind, handle in handles.items()
        }

    def models(self) -> dict[Kind, tuple[str, str]]:
        """(id, revision) of the model for each kind."""
        return self._models

    def batch_sizes(self, kind: Kind) -> list[int]:
        """Sizes of all batches that the model of this kind has answered."""
        sizes: list[int] = self._handles[kind].batch_sizes.remote().result(timeout_s=60)
        return sizes

    def ask(self, requests: Iterable[tuple[str, Kind, bytes]]) -> Iterator[Observation]:
        """Answers in the order of the requests, with a bounded number of them in flight.

        A request that a dying replica or a timeout costs is answered with an error.
        """
        waiting: deque[tuple[str, Kind, Any]] = deque()
        for sha256, kind, data in requests:
            waiting.append((sha256, kind, self._handles[kind].remote((sha256, data))))
            if len(waiting) >= self._window:
                yield self._answer(*waiting.popleft())
        while waiting:
            yield self._answer(*waiting.popleft())

    def _answer(self, sha256: str, kind: Kind, response: Any) -> Observation:
        from ray.exceptions import RayError

        try:
            answer: Observation = response.result(timeout_s=ANSWER_TIMEOUT_S)
            return answer
        except (RayError, TimeoutError) as error:
            model, revision = self._models[kind]
            return Observation(
                image=sha256,
                kind=kind,
                model=model,
                revision=revision,
                milliseconds=0,
                error=_told(error).splitlines()[0],
            )


@contextmanager
def serve_observers(
    tagger: Path | str, captioner: Path | str, batch_size: int = 16
) -> Iterator[ServedObservers]:
    """Have a tagger and a captioner served inside the `with` block; Ray must be running.

    Raises UserError when Ray is not running or a model can't be loaded. At the end only its own
    deployments go; Serve itself stays up while others use it.
    """
    import ray
    from ray import serve

    if not ray.is_initialized():
        raise UserError("captioning", "Ray is not running", "start Ray before serving models")
    sources: dict[Kind, str] = {"tags": _absolute(tagger), "prose": _absolute(captioner)}
    require_tagger(Path(sources["tags"]))
    require_model(sources["prose"])
    session = secrets.token_hex(4)
    names: dict[Kind, str] = {kind: f"lorafarm-{kind}-{session}" for kind in sources}
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    serve.start(proxy_location="Disabled")
    try:
        handles = _deploy(names, sources, batch_size)
        yield ServedObservers(handles, batch_size)
    finally:
        if set(serve.status().applications) - set(names.values()):
            for name in names.values():
                serve.delete(name)
        else:
            serve.shutdown()


def _absolute(source: Path | str) -> str:
    """A folder by its absolute path (replicas run elsewhere); anything else is a hub id."""
    return str(Path(source).resolve()) if Path(source).exists() else str(source)


def _deploy(names: dict[Kind, str], sources: dict[Kind, str], batch_size: int) -> dict[Kind, Any]:
    """A handle for each model; their processes start side by side."""
    from ray import serve
    from ray.serve.exceptions import RayServeException

    targets = []
    for kind, source in sources.items():
        deployment = serve.deployment(
            _Replica,
            name=kind,
            max_ongoing_requests=batch_size * BATCHES_IN_FLIGHT,
            ray_actor_options={"num_cpus": REPLICA_CPUS},
        )
        application = deployment.bind(kind, source, batch_size)
        targets.append(serve.RunTarget(application, name=names[kind], route_prefix=None))
    try:
        return dict(zip(sources, serve.run_many(targets), strict=True))
    except (RuntimeError, RayServeException) as error:
        raise _load_failure(sources, str(error)) from error


def _load_failure(sources: dict[Kind, str], message: str) -> UserError:
    """The UserError that a replica raised, found by loading the models here once more."""
    for kind, source in sources.items():
        try:
            load_observer(kind, source)
        except UserError as error:
            return error
    return UserError("captioning", f"its models did not start ({message})", "see Ray's logs")
