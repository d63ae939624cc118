"""CLIP embeddings of pictures and texts, unit length: what identity is measured with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from captioning.observers.shrink import Shrink
from captioning.observers.weights import (
    loading,
    model_name,
    require_all_weights,
    revision_of,
)

BATCH = 64
DIGITS = 6  # after the point, of what is stored


class Embedder:
    """A CLIP loaded from a folder or a hub id, safetensors only."""

    def __init__(self, path_or_id: Path | str, threads: int | None = None) -> None:
        """Raises UserError when there is no such model; without `threads` torch's own number."""
        import torch
        from transformers import AutoProcessor, CLIPModel

        if threads is not None:
            torch.set_num_threads(threads)
        source = str(path_or_id)
        with loading(source, "CLIP model", "CLIPModel"):
            self._processor: Any = AutoProcessor.from_pretrained(source, backend="pil")
            model, info = CLIPModel.from_pretrained(
                source, use_safetensors=True, dtype=torch.float32, output_loading_info=True
            )
            require_all_weights(info)
        self.shrink = _shrink(self._processor.image_processor)
        self._text_tokens = model.config.text_config.max_position_embeddings
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model: Any = model.eval().to(self._device)
        self.id = model_name(source)
        self.revision = revision_of(source, model.config)

    def observe(self, pictures: list[Image.Image]) -> list[tuple[float, ...]]:
        """The embedding of each RGB picture, of length 1, with the digits that float32 has.

        Rounded, because the last bits depend on how many pictures share a batch.
        """
        rows = self.embed_images(pictures).astype(np.float64).round(DIGITS)
        return [tuple(row) for row in rows.tolist()]

    def embed_images(self, pictures: list[Image.Image]) -> np.ndarray:
        """float32 (N, D), each row of length 1, for N RGB pictures."""
        return self._embed(
            pictures,
            lambda part: self._model.get_image_features(
                **self._processor(images=part, return_tensors="pt").to(self._device)
            ),
        )

    def embed_texts(self, texts: list[str]) -> np.ndarray:
        """float32 (N, D), each row of length 1; a text is cut after the model's longest."""
        return self._embed(
            texts,
            lambda part: self._model.get_text_features(
                **self._processor(
                    text=part,
                    padding=True,
                    truncation=True,
                    max_length=self._text_tokens,
                    return_tensors="pt",
                ).to(self._device)
            ),
        )

    def _embed(self, items: list[Any], features: Any) -> np.ndarray:
        import torch

        if not items:
            return np.zeros((0, self._model.config.projection_dim), np.float32)
        rows = []
        with torch.inference_mode():
            for start in range(0, len(items), BATCH):
                out = features(items[start : start + BATCH])
                # transformers 5 returns the projected features inside an output object.
                rows.append(out if torch.is_tensor(out) else out.pooler_output)
        found = torch.cat(rows).float()  # (N, D)
        unit: np.ndarray = torch.nn.functional.normalize(found, dim=-1).cpu().numpy()
        return unit


def _shrink(processor: Any) -> Shrink | None:
    """What CLIP's processor does first; None when this model's does something else."""
    side = dict(processor.size or {})
    if not processor.do_resize or processor.resample != Image.Resampling.BICUBIC:
        return None
    if {name for name, px in side.items() if px} != {"shortest_edge"}:
        return None
    return Shrink(int(side["shortest_edge"]), on_white_square=False)
