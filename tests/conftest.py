"""Fixtures that every room's tests share."""

from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def ray_local(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A local Ray with 2 logical CPUs, started as the command line starts it."""
    from services.engine import running_ray
    from services.settings import Home, Settings

    home = Home(Path(tmp_path_factory.mktemp("home")), Settings(cpus_per_worker=2))
    with running_ray(home):
        yield
