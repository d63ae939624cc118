"""Image-to-text models of transformers (BLIP and its kin): pictures in, one sentence each out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image

from captioning.observers.weights import (
    loading,
    model_name,
    require_all_weights,
    revision_of,
)

# Beam search with 3 beams is BLIP's own setting for captioning; no sampling, so the same picture
# always gets the same caption.
BEAMS = 3
MAX_NEW_TOKENS = 75  # BLIP's long captions stay below; SD's text encoder reads 75 tokens


class Captioner:
    """A captioner loaded from a folder or a hub id, safetensors only."""

    def __init__(self, path_or_id: Path | str, threads: int = 1, beams: int = BEAMS) -> None:
        """Raises UserError when there is no such model; `threads` counts on the CPU only."""
        import torch
        from transformers import AutoModelForImageTextToText, AutoProcessor

        torch.set_num_threads(threads)
        source = str(path_or_id)
        with loading(source, "image-to-text model", "AutoModelForImageTextToText"):
            self._processor: Any = AutoProcessor.from_pretrained(source, backend="pil")
            model, info = AutoModelForImageTextToText.from_pretrained(
                source, use_safetensors=True, dtype=torch.float32, output_loading_info=True
            )
            require_all_weights(info)
        self._beams = beams
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model: Any = model.eval().to(self._device)
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self._new_tokens = min(MAX_NEW_TOKENS, (limit or MAX_NEW_TOKENS + 1) - 1)
        self.id = model_name(source)
        self.revision = revision_of(source, model.config)

    def observe(self, pictures: list[Image.Image]) -> list[str]:
        """One sentence for each RGB picture."""
        import torch

        inputs = self._processor(images=pictures, return_tensors="pt").to(self._device)
        with torch.inference_mode():
            tokens = self._model.generate(
                **inputs,
                num_beams=self._beams,
                do_sample=False,
                max_new_tokens=self._new_tokens,
                max_length=None,
            )
        texts = self._processor.batch_decode(tokens, skip_special_tokens=True)
        return [text.strip() for text in texts]
