"""Observers as Ray Serve deployments, one for each, with dynamic batching, reached by handle.

Configs in, a client out. The HTTP proxy stays off: nothing listens on a port.
"""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from captioning.asking import BATCHES_IN_FLIGHT, REQUEST_PICTURES, Served, ServedObservers
from captioning.errors import UserError
from captioning.observations import Kind
from captioning.observer_config import (
    CaptionerConfig,
    EmbedderConfig,
    ObserverConfig,
    TaggerConfig,
    kind_of,
)
from captioning.observers.load import identify, load_observer
from captioning.replica import Replica

# Autoscaling: another replica when the queue held more than this share of the window for so long.
BUSY_SHARE = 0.5
UPSCALE_DELAY_S = 5.0
DOWNSCALE_DELAY_S = 30.0


@contextmanager
def serve_observers(observers: Sequence[ObserverConfig]) -> Iterator[ServedObservers]:
    """Have observers served inside the `with` block; Ray must be running.

    Raises UserError when Ray is not running, when two observers answer the same kind or when a
    model can't be loaded. At the end only its own deployments go; Serve itself stays up while
    others use it.
    """
    import ray
    from ray import serve

    if not ray.is_initialized():
        raise UserError("captioning", "Ray is not running", "start Ray before serving models")
    configs = require_one_per_kind(_absolute(config) for config in observers)
    identities = {kind: identify(config) for kind, config in configs.items()}
    session = secrets.token_hex(4)
    names: dict[Kind, str] = {kind: f"lorafarm-{kind}-{session}" for kind in configs}
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    serve.start(proxy_location="Disabled")
    try:
        handles = _deploy(names, configs, identities)
        yield ServedObservers(
            {kind: Served(configs[kind], handles[kind], identities[kind]) for kind in configs}
        )
    finally:
        if set(serve.status().applications) - set(names.values()):
            for name in names.values():
                serve.delete(name)
        else:
            serve.shutdown()


def require_one_per_kind(configs: Any) -> dict[Kind, ObserverConfig]:
    """The configs by kind; raises UserError for two of one kind, or for none at all."""
    found: dict[Kind, ObserverConfig] = {}
    for config in configs:
        kind = kind_of(config)
        if kind in found:
            raise UserError(
                "observers",
                f"{found[kind].type} and {config.type} both answer with {kind}",
                "name one of them; what the other one said stays in the store",
            )
        found[kind] = config
    if not found:
        raise UserError("observers", "the list is empty", "name one, or leave `observers` out")
    return found


def _absolute(config: ObserverConfig) -> ObserverConfig:
    """A folder by its absolute path (replicas run elsewhere); anything else is a hub id."""
    if not isinstance(config, TaggerConfig | CaptionerConfig | EmbedderConfig):
        return config
    if not Path(config.source).exists():
        return config
    return config.model_copy(update={"source": str(Path(config.source).resolve())})


def _deploy(
    names: dict[Kind, str],
    configs: dict[Kind, ObserverConfig],
    identities: dict[Kind, tuple[str, str]],
) -> dict[Kind, Any]:
    """A handle for each observer; their processes start side by side."""
    from ray import serve
    from ray.serve.exceptions import RayServeException

    # The observers get equal shares of the machine's cores.
    threads = max(1, (os.cpu_count() or 1) // len(configs))
    targets = []
    for kind, config in configs.items():
        deployment = serve.deployment(Replica, name=kind, **_options(config))
        application = deployment.bind(config, identities[kind], threads)
        targets.append(serve.RunTarget(application, name=names[kind], route_prefix=None))
    try:
        return dict(zip(configs, serve.run_many(targets), strict=True))
    except (RuntimeError, RayServeException) as error:
        raise _load_failure(configs, threads, str(error)) from error


def _options(config: ObserverConfig) -> dict[str, Any]:
    """Serve's options for a deployment."""
    window = config.batch_size * BATCHES_IN_FLIGHT
    pictures = min(REQUEST_PICTURES, config.batch_size)
    options: dict[str, Any] = {
        "max_ongoing_requests": window,
        "ray_actor_options": {"num_cpus": config.cpus, "num_gpus": config.gpus},
    }
    if config.min_replicas == config.max_replicas:
        return {**options, "num_replicas": config.min_replicas}
    return {
        **options,
        "autoscaling_config": {
            "min_replicas": config.min_replicas,
            "max_replicas": config.max_replicas,
            "target_ongoing_requests": max(1.0, BUSY_SHARE * window / pictures),
            "upscale_delay_s": UPSCALE_DELAY_S,
            "downscale_delay_s": DOWNSCALE_DELAY_S,
        },
    }


def _load_failure(configs: dict[Kind, ObserverConfig], threads: int, message: str) -> UserError:
    """The UserError that a replica raised, found by loading the models here once more."""
    for config in configs.values():
        try:
            load_observer(config, threads)
        except UserError as error:
            return error
    return UserError("captioning", f"its models did not start ({message})", "see Ray's logs")
