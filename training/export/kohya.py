"""Kohya's key names and its two forms: low-rank (`lora_down`, `lora_up`, `alpha`) and `diff`.

Updates in, named tensors out. ComfyUI, A1111, Forge, InvokeAI and SwarmUI read the low-rank form,
with `dora_scale` for a DoRA on the input axis; diffusers reads it without. A DoRA on the output
axis becomes `diff`, the exact change of every weight: those tools take a `dora_scale` on the output
axis for something else, and are silently wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from training.export.updates import Update, file_module


def kohya_name(component: str, module: str, prefixes: Mapping[str, str]) -> str:
    """`lora_unet_…` or `lora_te_text_model_…` for a module's dotted name.

    `prefixes` are the components', `Base.kohya_prefixes`.
    """
    return prefixes[component] + file_module(component, module).replace(".", "_")


def low_rank_tensors(
    updates: Sequence[Update], dtype: torch.dtype, prefixes: Mapping[str, str]
) -> dict[str, Tensor]:
    """LoRA updates in kohya's names; alpha = rank, since the scale is in `lora_up` already.

    A DoRA's magnitudes are `dora_scale`, (1, in) or (1, in, 1, 1) in fp32: tools tell the axis by
    the first length.
    Raises ValueError for a DoRA on the output axis, which they would misread.
    """
    tensors: dict[str, Tensor] = {}
    for update in updates:
        if update.magnitude is not None and not update.by_input:
            raise ValueError(f"{update.module}: a DoRA on the output axis has no low-rank form")
        name = kohya_name(update.component, update.module, prefixes)
        tensors[f"{name}.lora_down.weight"] = update.down.to(dtype)
        tensors[f"{name}.lora_up.weight"] = update.up.to(dtype)
        tensors[f"{name}.alpha"] = torch.tensor(float(len(update.down)), dtype=dtype)
        if update.magnitude is not None:
            ones = [1] * (update.down.ndim - 2)
            tensors[f"{name}.dora_scale"] = update.magnitude.reshape(1, -1, *ones)
    return tensors


def diff_tensors(
    updates: Sequence[Update],
    weight_of: Callable[[str, str], Tensor],
    dtype: torch.dtype,
    prefixes: Mapping[str, str],
) -> dict[str, Tensor]:
    """Every update, LoRA or DoRA, as `<name>.diff` of the weight `weight_of(component, module)`.

    The file is as large as the layers it changes (about 190 MB in fp16 for all attention layers of
    Stable Diffusion 1.5), and right for this base only.
    """
    return {
        f"{kohya_name(update.component, update.module, prefixes)}.diff": update.merged_difference(
            weight_of(update.component, update.module)
        ).to(dtype)
        for update in updates
    }
