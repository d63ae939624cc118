"""How a worker group talks to the driver: events one way, the wish to stop the other way.

The mailbox is a Ray actor of the driver; it lives and dies with it.
"""

from __future__ import annotations

import time
from typing import Any

from training.events import Event, StepTaken

# Events are small and many, so they travel together, at most this many seconds late.
POST_INTERVAL_S = 0.2


class Mailbox:
    """Holds events until the driver takes them; made an actor by `launch`."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._stopped = False

    def post(self, events: list[Event]) -> bool:
        """Add events; the answer tells the worker whether to stop."""
        self._events += events
        return self._stopped

    def take(self) -> list[Event]:
        """All events since the last call, in order."""
        events, self._events = self._events, []
        return events

    def stop(self) -> None:
        self._stopped = True


class Post:
    """A worker's line to the mailbox."""

    def __init__(self, mailbox: Any) -> None:
        self._mailbox = mailbox
        self._waiting: list[Event] = []
        self._sent_at = 0.0
        self._stopped = False

    def __call__(self, event: Event) -> None:
        """Send an event: a `StepTaken` with the next batch, any other event at once."""
        self._waiting.append(event)
        if not isinstance(event, StepTaken) or self._due():
            self.flush()

    def stopped(self) -> bool:
        """Whether the driver asked to stop, or is gone."""
        if self._due():
            self.flush()
        return self._stopped

    def flush(self) -> None:
        import ray

        events, self._waiting = self._waiting, []
        self._sent_at = time.monotonic()
        try:
            self._stopped = ray.get(self._mailbox.post.remote(events)) or self._stopped
        except ray.exceptions.RayActorError:
            self._stopped = True  # without a driver there is nobody left to train for

    def _due(self) -> bool:
        return time.monotonic() - self._sent_at >= POST_INTERVAL_S
