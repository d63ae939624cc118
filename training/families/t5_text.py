"""Encodes prompts with a T5 encoder, as diffusers' SD3 and FLUX pipelines do.

Prompts in, hidden states out, fp32.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from training.families.files import language_model_dtype, load_network


def load_t5(folder: Path, component: str, device: torch.device) -> Any:
    """A T5 encoder in the precision of `language_model_dtype`."""
    from transformers import T5EncoderModel

    dtype = language_model_dtype(device)
    return load_network(T5EncoderModel, folder, component, dtype, device)


@torch.no_grad()
def t5_states(encoder: Any, tokenizer: Any, prompts: list[str], length: int) -> Tensor:
    """The last hidden states of prompts cut off and padded to `length` tokens.  # (N, T, C)

    The padding is not masked, since these models were trained with it (as in the pipelines).
    """
    tokens = tokenizer(
        prompts,
        padding="max_length",
        max_length=length,
        truncation=True,
        add_special_tokens=True,
        return_tensors="pt",
    )
    return encoder(tokens.input_ids.to(encoder.device))[0].float()
