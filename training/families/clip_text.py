"""Encodes prompts with CLIP text encoders, as diffusers' pipelines do.

Prompts in, hidden states and pooled embeddings out, fp32, with gradients where an adapter is on the
encoder.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

# Module name endings in transformers' CLIPTextModel: the layers that diffusers' scripts train, and
# those that kohya's scripts train too.
CLIP_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj")
CLIP_FEED_FORWARD = ("mlp.fc1", "mlp.fc2")


def clip_tokens(tokenizer: Any, prompts: list[str]) -> Any:
    """Token ids and mask, cut off and padded to the encoder's length.  # (N, T) each"""
    return tokenizer(
        prompts,
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    )


def penultimate_and_pooled(
    encoder: Any, tokenizer: Any, prompts: list[str]
) -> tuple[Tensor, Tensor]:
    """The last hidden state but one, and the encoder's first output, as SDXL and SD3 use them.

    The latter is the projected pooled embedding of an encoder that has a projection.
    # (N, T, C), (N, P)
    """
    ids = clip_tokens(tokenizer, prompts).input_ids.to(encoder.device)
    output = encoder(ids, output_hidden_states=True)
    return output.hidden_states[-2].float(), output[0].float()
