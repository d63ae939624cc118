"""BLIP-2 (Li et al. 2023): a frozen language model that goes on from a beginning."""

from __future__ import annotations

from typing import Any

from PIL import Image

MODEL_TYPES = ("blip-2",)
FREE_PROMPT = False  # its prompt is the beginning of the caption, not a question
DEFAULT_PROMPT = "a picture of"
RETRY_PROMPT = "this picture shows"


def load_processor(source: str) -> Any:
    """The processor from a folder or a hub id."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(source, backend="pil")
    processor.tokenizer.padding_side = "left"
    return processor


def inputs(processor: Any, pictures: list[Image.Image], prompt: str) -> Any:
    """What `generate` takes for N RGB pictures."""
    return processor(
        images=pictures, text=[prompt] * len(pictures), padding=True, return_tensors="pt"
    )


def new_tokens(tokens: Any, inputs: Any) -> Any:
    """The tokens (N, L) after the prompt's, which only OPT models repeat; T5's don't."""
    prompt = inputs["input_ids"]
    length = prompt.shape[1]
    if tokens.shape[1] >= length and bool((tokens[:, :length] == prompt).all()):
        return tokens[:, length:]
    return tokens
