"""Captions that came with the pictures, made the captions that are used.

They become edits of the whole caption, signed by the file they are from: rendering again keeps
them, a person's later edit wins, and taking the edit back gives the models the word again.
"""

from __future__ import annotations

from captioning.captions import load_captions
from captioning.edits import Edit, load_edits, record_edits
from captioning.intake import load_imported
from captioning.store import Store

ORIGIN = "imported"  # what the signature of such an edit begins with


def use_imported(store: Store, name: str) -> list[Edit]:
    """Record an edit for every image that came with a caption; gives the edits recorded.

    An image whose whole caption a person has edited is left alone, and so is one that has this
    very caption already. Raises UserError when the character is unknown.
    """
    imported = load_imported(store, name)
    rendered = load_captions(store, name)
    latest = {edit.image: edit for edit in load_edits(store, name) if edit.action == "caption"}
    edits = []
    for sha256, caption in imported.items():
        last = latest.get(sha256)
        if last is not None and not last.by.startswith(ORIGIN):
            continue
        text = " ".join(caption.text.split())
        if last is not None and last.value == text:
            continue
        edits.append(
            Edit(
                image=sha256,
                action="caption",
                value=text,
                by=f"{ORIGIN}: {caption.origin}",
                before=rendered.get(sha256, ""),
                after=text,
            )
        )
    record_edits(store, name, edits)
    return edits
