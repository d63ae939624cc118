"""Fixtures that every room's tests share."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# Lines that are compared must not be folded at the width of whoever's terminal, or of none.
os.environ["COLUMNS"] = "160"

# The same examples in every run: a change is judged by what it did, not by a lucky draw. To search
# further: pytest --hypothesis-profile=default. Deadlines measure the machine, not the code.
settings.register_profile("steady", derandomize=True, deadline=None)
settings.load_profile("steady")


@pytest.fixture(scope="session")
def ray_local(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A local Ray with 2 logical CPUs, started as the command line starts it."""
    from services.farm.engine import running_ray
    from services.farm.settings import Home, Settings

    home = Home(Path(tmp_path_factory.mktemp("home")), Settings(cpus_per_worker=2))
    with running_ray(home):
        yield
