"""Encodes prompts with a Qwen3 language model, as diffusers' Z-Image and FLUX.2 pipelines do.

Prompts in, hidden states of the chosen layers and the mask of the padding out, fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from training.families.files import language_model_dtype, load_network


def load_qwen(folder: Path, component: str, device: torch.device) -> Any:
    """A Qwen3 without its head in the precision of `language_model_dtype`."""
    from transformers import AutoModel

    dtype = language_model_dtype(device)
    return load_network(AutoModel, folder, component, dtype, torch.device("cpu")).to(device)


@torch.no_grad()
def qwen_states(
    encoder: Any,
    tokenizer: Any,
    prompts: list[str],
    length: int,
    layers: Sequence[int],
    thinking: bool,
) -> tuple[Tensor, Tensor]:
    """Hidden states of `layers` side by side, of prompts cut off and padded to `length` tokens.

    Each prompt is what a user says in the model's chat template; `thinking` is the template's.
    The mask is 1 at a prompt's own tokens, 0 at the padding.  # (N, T, layers * C), (N, T)
    """
    said = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=thinking,
        )
        for prompt in prompts
    ]
    tokens = tokenizer(
        said, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    )
    mask = tokens.attention_mask.to(encoder.device)
    states = encoder(
        input_ids=tokens.input_ids.to(encoder.device),
        attention_mask=mask,
        output_hidden_states=True,
        use_cache=False,
    ).hidden_states
    return torch.cat([states[layer] for layer in layers], dim=-1).float(), mask.float()
