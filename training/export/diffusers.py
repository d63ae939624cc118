"""The form that diffusers and PEFT load: `unet.<module>.lora_A.weight`, DoRA included.

Updates in, named tensors and the header entry that diffusers reads out. PEFT knows DoRA on the
output axis only; one on the input axis becomes the exact change of every weight, as a LoRA of full
rank.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from training.export.updates import Update, file_module
from training.pack.parts import is_of_encoder

# diffusers.loaders.lora_base.LORA_ADAPTER_METADATA_KEY
HEADER_KEY = "lora_adapter_metadata"


def peft_tensors(updates: Sequence[Update], dtype: torch.dtype) -> dict[str, Tensor]:
    """LoRA and DoRA updates in PEFT's names, magnitudes in fp32 as PEFT keeps them."""
    tensors: dict[str, Tensor] = {}
    for update in updates:
        name = f"{update.component}.{file_module(update.component, update.module)}"
        tensors[f"{name}.lora_A.weight"] = update.down.to(dtype)
        tensors[f"{name}.lora_B.weight"] = update.up.to(dtype)
        if update.magnitude is not None:
            # transformers 5 needs the full name for a text encoder's magnitude; PEFT accepts both.
            ending = ".weight" if is_of_encoder(update.component) else ""
            tensors[f"{name}.lora_magnitude_vector{ending}"] = update.magnitude
    return tensors


def full_rank_tensors(
    updates: Sequence[Update], weight_of: Callable[[str, str], Tensor], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Every update as a LoRA whose one factor is its `merged_difference`, the other the identity.

    The file is up to twice as large as the layers it changes (at most 380 MB in fp16 for all
    attention layers of Stable Diffusion 1.5), and right for this base only.
    """
    tensors: dict[str, Tensor] = {}
    for update in updates:
        name = f"{update.component}.{file_module(update.component, update.module)}"
        change = update.merged_difference(weight_of(update.component, update.module))
        outputs, *columns = change.shape  # a convolution's are (in, k, k)
        change = change.flatten(1)
        identity = torch.eye(min(change.shape))
        down, up = (identity, change) if change.shape[1] <= outputs else (change, identity)
        ones = [1] * (len(columns) - 1)
        tensors[f"{name}.lora_A.weight"] = down.reshape(-1, *columns).to(dtype)
        tensors[f"{name}.lora_B.weight"] = up.reshape(outputs, -1, *ones).to(dtype)
    return tensors


def header_entry(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The adapter's config as diffusers stores it; without it readers assume the same values.

    alpha = rank in every module, since the scale is in `lora_B` already.
    """
    ranks: dict[str, dict[str, int]] = {}  # by component and module
    for key, tensor in tensors.items():
        if key.endswith(".lora_A.weight"):
            component, _, module = key.removesuffix(".lora_A.weight").partition(".")
            # Versions of transformers differ in one level of the name, so only the ending that all
            # of them share is kept.
            module = module.removeprefix("text_model.encoder.")
            ranks.setdefault(component, {})[module] = len(tensor)
    entry: dict[str, object] = {}
    for component, by_module in ranks.items():
        rank = Counter(by_module.values()).most_common(1)[0][0]
        others = {module: own for module, own in by_module.items() if own != rank}
        entry |= {
            f"{component}.r": rank,
            f"{component}.lora_alpha": rank,
            f"{component}.rank_pattern": others,
            f"{component}.alpha_pattern": others,
            f"{component}.target_modules": sorted(by_module),
            f"{component}.use_dora": any("magnitude" in key for key in tensors),
        }
    return {HEADER_KEY: json.dumps(entry, sort_keys=True)}
