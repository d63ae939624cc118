"""The `lorafarm` command: the only place that knows a terminal."""

import gc

# A command imports and reads many objects that stay. By default Python looks for garbage after
# every 700 new ones, which makes a short command a few per cent slower; mypy raises the number too.
GC_THRESHOLD = 100_000
gc.set_threshold(GC_THRESHOLD)

from services.cli.main import main  # noqa: E402

__all__ = ["main"]
