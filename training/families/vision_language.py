"""Vision-language models as text encoders: without their head, and never shown a picture.

A folder in, the frozen network out; for FLUX.2 [dev] also prompts in and hidden states out.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from training.families.files import language_model_dtype, load_network


def load_language_model(kind: Any, folder: Path, component: str, device: torch.device) -> Any:
    """`kind`'s network below its head, in the precision of `language_model_dtype`.

    `kind` is the class that the pipelines load, which knows the names in the published files.
    """
    dtype = language_model_dtype(device)
    # The head is dropped before anything is put on the device.
    return load_network(kind, folder, component, dtype, torch.device("cpu")).model.to(device)


@torch.no_grad()
def mistral_states(
    encoder: Any, tokenizer: Any, prompts: list[str], length: int, layers: Sequence[int]
) -> Tensor:
    """Hidden states of `layers` side by side, as Flux2Pipeline.encode_prompt.  # (N, T, layers * C)

    Each prompt, cut off or padded to `length` tokens, is what a user says after FLUX.2's system
    message. The pipeline's processor adds pictures to that alone: the tokenizer is enough.
    """
    from diffusers.pipelines.flux2.pipeline_flux2 import SYSTEM_MESSAGE, format_input

    tokens = tokenizer.apply_chat_template(
        format_input(prompts, SYSTEM_MESSAGE),
        add_generation_prompt=False,
        return_dict=True,
        return_tensors="pt",
        padding="max_length",
        truncation=True,
        max_length=length,
    )
    states = encoder(
        input_ids=tokens["input_ids"].to(encoder.device),
        attention_mask=tokens["attention_mask"].to(encoder.device),
        output_hidden_states=True,
        use_cache=False,
    ).hidden_states
    return torch.cat([states[layer] for layer in layers], dim=-1).float()
