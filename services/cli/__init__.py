"""The `lorafarm` command: the only place that knows a terminal."""

from services.cli.main import main

__all__ = ["main"]
