"""BLIP (Li et al. 2022): describes without being asked, or goes on from a beginning."""

from __future__ import annotations

from typing import Any

from PIL import Image

MODEL_TYPES = ("blip",)
FREE_PROMPT = False  # its prompt is the beginning of the caption, not a question
DEFAULT_PROMPT = ""
RETRY_PROMPT = "a picture of"


def load_processor(source: str) -> Any:
    """The processor from a folder or a hub id."""
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(source, backend="pil")


def inputs(processor: Any, pictures: list[Image.Image], prompt: str) -> Any:
    """What `generate` takes for N RGB pictures."""
    if not prompt:
        return processor(images=pictures, return_tensors="pt")
    return processor(images=pictures, text=[prompt] * len(pictures), return_tensors="pt")


def new_tokens(tokens: Any, inputs: Any) -> Any:
    """The caption's tokens (N, L), its given beginning included."""
    return tokens
