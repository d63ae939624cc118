"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: a chat with a picture of any size in it.

transformers' own processor of this family also wants one for videos, which needs torchvision; here
its image processor and its tokenizer are put together without that.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from captioning.observer_config import Prompt

MODEL_TYPES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
FREE_PROMPT = True
DEFAULT_PROMPT = Prompt().text
RETRY_PROMPT = "Say in two short, complete sentences what can be seen in this picture."
IMAGE_TOKEN = "<|image_pad|>"
TEMPLATE_FILE = "chat_template.jinja"


@dataclass(frozen=True)
class Processor:
    """The two halves; `batch_decode` is what the captioner uses of a processor."""

    image_processor: Any
    tokenizer: Any
    chat_template: str | None

    def batch_decode(self, tokens: Any, **options: Any) -> list[str]:
        texts: list[str] = self.tokenizer.batch_decode(tokens, **options)
        return texts


def load_processor(source: str) -> Any:
    """The processor from a folder or a hub id."""
    from transformers import AutoImageProcessor, AutoTokenizer
    from transformers.utils import cached_file

    tokenizer = AutoTokenizer.from_pretrained(source, padding_side="left")
    template = tokenizer.chat_template
    if template is None:  # some checkpoints keep it beside the processor
        file = cached_file(source, TEMPLATE_FILE, _raise_exceptions_for_missing_entries=False)
        template = Path(file).read_text(encoding="utf-8") if file else None
    return Processor(AutoImageProcessor.from_pretrained(source, backend="pil"), tokenizer, template)


def inputs(processor: Any, pictures: list[Image.Image], prompt: str) -> Any:
    """What `generate` takes for N RGB pictures."""
    seen = processor.image_processor(images=pictures, return_tensors="pt")
    content = [{"type": "image"}, {"type": "text", "text": prompt}]
    text = processor.tokenizer.apply_chat_template(
        [{"role": "user", "content": content}],
        chat_template=processor.chat_template,
        tokenize=False,
        add_generation_prompt=True,
    )
    # One token for each square of merge_size x merge_size patches.
    merged = processor.image_processor.merge_size**2
    texts = [
        text.replace(IMAGE_TOKEN, IMAGE_TOKEN * (int(grid.prod()) // merged))
        for grid in seen["image_grid_thw"]  # (N, 3)
    ]
    read = processor.tokenizer(texts, padding=True, return_tensors="pt")
    image_token = processor.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    # Positions in the picture's grid are given to the tokens of type 1.
    read["mm_token_type_ids"] = (read["input_ids"] == image_token).long()
    seen.update(read)
    return seen


def new_tokens(tokens: Any, inputs: Any) -> Any:
    """The tokens (N, L) after the prompt's."""
    return tokens[:, inputs["input_ids"].shape[1] :]
