"""Florence-2 (Xiao et al. 2023): knows tasks, of which captions of three lengths are used here."""

from __future__ import annotations

from typing import Any

from PIL import Image

MODEL_TYPES = ("florence2",)
FREE_PROMPT = False  # trained on its tasks' own sentences only
DEFAULT_PROMPT = "<MORE_DETAILED_CAPTION>"
RETRY_PROMPT = "<CAPTION>"


def load_processor(source: str) -> Any:
    """The processor from a folder or a hub id."""
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(source, backend="pil")


def inputs(processor: Any, pictures: list[Image.Image], prompt: str) -> Any:
    """What `generate` takes for N RGB pictures."""
    return processor(
        images=pictures, text=[prompt] * len(pictures), padding=True, return_tensors="pt"
    )


def new_tokens(tokens: Any, inputs: Any) -> Any:
    """The decoder's tokens (N, L) after the one that it starts with."""
    return tokens[:, 1:]
