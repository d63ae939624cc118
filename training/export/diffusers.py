"""The form that diffusers and PEFT load: `unet.<module>.lora_A.weight`, DoRA included.

Updates in, named tensors and the header entry that diffusers reads out.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import torch
from torch import Tensor

from training.export.updates import Update

# diffusers.loaders.lora_base.LORA_ADAPTER_METADATA_KEY
HEADER_KEY = "lora_adapter_metadata"


def peft_tensors(updates: Sequence[Update], dtype: torch.dtype) -> dict[str, Tensor]:
    """LoRA and DoRA updates in PEFT's names, magnitudes in fp32 as PEFT keeps them."""
    tensors: dict[str, Tensor] = {}
    for update in updates:
        name = f"{update.component}.{update.module}"
        tensors[f"{name}.lora_A.weight"] = update.down.to(dtype)
        tensors[f"{name}.lora_B.weight"] = update.up.to(dtype)
        if update.magnitude is not None:
            tensors[f"{name}.lora_magnitude_vector"] = update.magnitude
    return tensors


def header_entry(updates: Sequence[Update]) -> dict[str, str]:
    """The adapter's config as diffusers stores it; without it readers assume the same values.

    alpha = rank, since the scale is in `lora_B` already.
    """
    entry: dict[str, object] = {}
    for component in sorted({update.component for update in updates}):
        own = [update for update in updates if update.component == component]
        entry |= {
            f"{component}.r": len(own[0].down),
            f"{component}.lora_alpha": len(own[0].down),
            f"{component}.target_modules": sorted(update.module for update in own),
            f"{component}.use_dora": own[0].magnitude is not None,
        }
    return {HEADER_KEY: json.dumps(entry, sort_keys=True)}
