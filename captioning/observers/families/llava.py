"""LLaVA (Liu et al. 2023) and LLaVA-NeXT: a chat with a picture in it."""

from __future__ import annotations

from typing import Any

from PIL import Image

from captioning.observer_config import Prompt

MODEL_TYPES = ("llava", "llava_next")
FREE_PROMPT = True
DEFAULT_PROMPT = Prompt().text
RETRY_PROMPT = "Say in two short, complete sentences what can be seen in this picture."


def load_processor(source: str) -> Any:
    """The processor from a folder or a hub id."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(source, backend="pil")
    processor.tokenizer.padding_side = "left"  # answers follow the prompt without a gap
    return processor


def inputs(processor: Any, pictures: list[Image.Image], prompt: str) -> Any:
    """What `generate` takes for N RGB pictures."""
    content = [{"type": "image"}, {"type": "text", "text": prompt}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    return processor(
        images=pictures, text=[text] * len(pictures), padding=True, return_tensors="pt"
    )


def new_tokens(tokens: Any, inputs: Any) -> Any:
    """The tokens (N, L) after the prompt's."""
    return tokens[:, inputs["input_ids"].shape[1] :]
