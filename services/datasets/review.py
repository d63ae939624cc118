"""Which captions to read first, and the spreadsheet in which people read them."""

from __future__ import annotations

from pathlib import Path

from captioning import (
    Embedder,
    EmbedderConfig,
    ImportedReviews,
    Queue,
    UserError,
    caption_all,
    import_table,
    kept_images,
    load_character,
    load_observations,
    review_queue,
    to_table,
    write_atomic,
)
from services.datasets.steps import observers_of
from services.farm.progress import UNWATCHED, Progress
from services.farm.settings import Home


def import_reviews(home: Home, name: str, table: Path) -> ImportedReviews:
    """Take the states, notes and changed captions of an exported table.

    Rows that changed here since the export are conflicts: they are in the result and nothing of
    them is taken. Raises UserError when the file can't be read or is no such table.
    """
    character = load_character(home.store, name)
    done = import_table(home.store, character, _read(table))
    if done.edits:
        caption_all(home.store, character)
    return done


def queue_captions(
    home: Home, name: str, compare: bool = True, progress: Progress = UNWATCHED
) -> Queue:
    """The captions of the character `name`, the riskiest first, and which of them to read.

    With `compare`, captions are compared to their pictures where these have been embedded, and
    those that fit least stand further up.
    """
    character = load_character(home.store, name)
    embedder = _embedder_used(home, name) if compare else None
    if embedder is None:
        return review_queue(home.store, character)
    with progress.step("captions compared with pictures") as step:
        return review_queue(
            home.store, character, embedder=Embedder(embedder), progress=step.advance_to
        )


def export_queue(queue: Queue, to: Path) -> Path:
    """Write the captions to read to the CSV file `to`, which `import_reviews` takes back."""
    write_atomic(to, to_table(queue))
    return to


def _embedder_used(home: Home, name: str) -> str | None:
    """The embedder of the settings; None when it has seen none of the pictures."""
    sources = [one.source for one in observers_of(home.settings) if isinstance(one, EmbedderConfig)]
    seen = (
        one
        for image in kept_images(home.store, name)
        for one in load_observations(home.store, image.sha256)
    )
    return sources[0] if sources and any(one.embedding is not None for one in seen) else None


def _read(table: Path) -> bytes:
    try:
        return table.read_bytes()
    except OSError as error:
        raise UserError(str(table), error.strerror or "not readable", "check the path") from error
