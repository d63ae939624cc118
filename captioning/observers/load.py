"""From an observer's config to the observer, and to its name and revision without loading it.

The heavy imports happen inside the functions: the client only needs the names.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from PIL.Image import Image

from captioning.observer_config import (
    CaptionerConfig,
    EmbedderConfig,
    EndpointConfig,
    ObserverConfig,
    TaggerConfig,
)
from captioning.observers.shrink import Shrink
from captioning.observers.tagger import require_tagger
from captioning.observers.weights import REVISION_DIGITS, identify_model, model_name
from captioning.store import content_hash


class Observer(Protocol):
    """What looks at pictures; `id` and `revision` name it in observations."""

    id: str
    revision: str

    @property
    def shrink(self) -> Shrink | None:
        """What it does to every picture first, if it shrinks it; None: it looks at all of it."""
        ...

    def observe(self, pictures: list[Image]) -> list[Any]:
        """An answer, or the exception that it cost, for each upright RGB picture."""
        ...


def identify(config: ObserverConfig) -> tuple[str, str]:
    """(id, revision) that the observer's answers will bear.

    Reads files but loads no model. Raises UserError when there is no such model.
    """
    if isinstance(config, TaggerConfig):
        folder = Path(config.source)
        require_tagger(folder)
        return model_name(config.source), content_hash(folder)[:REVISION_DIGITS]
    if isinstance(config, CaptionerConfig | EmbedderConfig):
        name, revision = identify_model(config.source)
        prompt = config.prompt if isinstance(config, CaptionerConfig) else None
        return name, f"{revision}-{prompt.digits()}" if prompt else revision
    if isinstance(config, EndpointConfig):
        # The server does not say which files it has loaded; its model's name must do.
        return model_name(config.model), f"endpoint-{config.prompt.digits()}"
    if config.type == "quality":
        from captioning.observers.quality import QualityMeter

        return QualityMeter.id, QualityMeter.revision
    from captioning.observers.subject import SubjectFinder

    return SubjectFinder.id, SubjectFinder.revision


def load_observer(config: ObserverConfig, threads: int) -> Observer:
    """The observer itself; raises UserError when its model can't be loaded."""
    if isinstance(config, TaggerConfig):
        from captioning.observers.tagger import Tagger

        return Tagger(config.source, threads)
    if isinstance(config, CaptionerConfig):
        from captioning.observers.captioner import Captioner

        return Captioner(config.source, threads, prompt=config.prompt)
    if isinstance(config, EmbedderConfig):
        from captioning.observers.embedder import Embedder

        return Embedder(config.source, threads)
    if isinstance(config, EndpointConfig):
        from captioning.observers.endpoint import Endpoint

        return Endpoint(config)
    if config.type == "quality":
        from captioning.observers.quality import QualityMeter

        return QualityMeter()
    from captioning.observers.subject import SubjectFinder

    return SubjectFinder()
