"""Transformers of pictures in the original repositories' layout, from diffusers' names.

Written by hand after the module names of Stability, Black Forest Labs and Tongyi, as is
`original_layout`: a folder in, the tensors of a single file out.
"""

from __future__ import annotations

from pathlib import Path

import torch
from original_layout import UNET, VAE, read_weights, replace, replace_start, vae_tensors
from torch import Tensor

_SD3 = {
    "pos_embed.pos_embed": "pos_embed",
    "pos_embed.proj.": "x_embedder.proj.",
    "time_text_embed.timestep_embedder.linear_1.": "t_embedder.mlp.0.",
    "time_text_embed.timestep_embedder.linear_2.": "t_embedder.mlp.2.",
    "time_text_embed.text_embedder.linear_1.": "y_embedder.mlp.0.",
    "time_text_embed.text_embedder.linear_2.": "y_embedder.mlp.2.",
    "context_embedder.": "context_embedder.",
    "norm_out.linear.": "final_layer.adaLN_modulation.1.",
    "proj_out.": "final_layer.linear.",
    "transformer_blocks.": "joint_blocks.",
}
_SD3_BLOCK = {
    ".norm1.linear.": ".x_block.adaLN_modulation.1.",
    ".norm1_context.linear.": ".context_block.adaLN_modulation.1.",
    ".attn.qkv.": ".x_block.attn.qkv.",
    ".attn.added_qkv.": ".context_block.attn.qkv.",
    ".attn.norm_q.": ".x_block.attn.ln_q.",
    ".attn.norm_k.": ".x_block.attn.ln_k.",
    ".attn.norm_added_q.": ".context_block.attn.ln_q.",
    ".attn.norm_added_k.": ".context_block.attn.ln_k.",
    ".attn.to_out.0.": ".x_block.attn.proj.",
    ".attn.to_add_out.": ".context_block.attn.proj.",
    ".attn2.qkv.": ".x_block.attn2.qkv.",
    ".attn2.norm_q.": ".x_block.attn2.ln_q.",
    ".attn2.norm_k.": ".x_block.attn2.ln_k.",
    ".attn2.to_out.0.": ".x_block.attn2.proj.",
    ".ff.net.0.proj.": ".x_block.mlp.fc1.",
    ".ff.net.2.": ".x_block.mlp.fc2.",
    ".ff_context.net.0.proj.": ".context_block.mlp.fc1.",
    ".ff_context.net.2.": ".context_block.mlp.fc2.",
}
_FLUX = {
    "x_embedder.": "img_in.",
    "context_embedder.": "txt_in.",
    "time_text_embed.timestep_embedder.linear_1.": "time_in.in_layer.",
    "time_text_embed.timestep_embedder.linear_2.": "time_in.out_layer.",
    "time_text_embed.text_embedder.linear_1.": "vector_in.in_layer.",
    "time_text_embed.text_embedder.linear_2.": "vector_in.out_layer.",
    "time_text_embed.guidance_embedder.linear_1.": "guidance_in.in_layer.",
    "time_text_embed.guidance_embedder.linear_2.": "guidance_in.out_layer.",
    "norm_out.linear.": "final_layer.adaLN_modulation.1.",
    "proj_out.": "final_layer.linear.",
    "single_transformer_blocks.": "single_blocks.",
    "transformer_blocks.": "double_blocks.",
}
_DOUBLE_ATTENTION = {
    "attn.norm_q.weight": "img_attn.norm.query_norm.scale",
    "attn.norm_k.weight": "img_attn.norm.key_norm.scale",
    "attn.norm_added_q.weight": "txt_attn.norm.query_norm.scale",
    "attn.norm_added_k.weight": "txt_attn.norm.key_norm.scale",
    "attn.to_out.0.": "img_attn.proj.",
    "attn.to_add_out.": "txt_attn.proj.",
    "attn.qkv.": "img_attn.qkv.",
    "attn.added_qkv.": "txt_attn.qkv.",
}
_FLUX_DOUBLE = {
    **_DOUBLE_ATTENTION,
    "norm1.linear.": "img_mod.lin.",
    "norm1_context.linear.": "txt_mod.lin.",
    "ff.net.0.proj.": "img_mlp.0.",
    "ff.net.2.": "img_mlp.2.",
    "ff_context.net.0.proj.": "txt_mlp.0.",
    "ff_context.net.2.": "txt_mlp.2.",
}
_FLUX_SINGLE = {
    "norm.linear.": "modulation.lin.",
    "attn.norm_q.weight": "norm.query_norm.scale",
    "attn.norm_k.weight": "norm.key_norm.scale",
    "attn.qkv_mlp.": "linear1.",
    "proj_out.": "linear2.",
}
_FLUX2 = {
    "x_embedder.": "img_in.",
    "context_embedder.": "txt_in.",
    "time_guidance_embed.timestep_embedder.linear_1.": "time_in.in_layer.",
    "time_guidance_embed.timestep_embedder.linear_2.": "time_in.out_layer.",
    "time_guidance_embed.guidance_embedder.linear_1.": "guidance_in.in_layer.",
    "time_guidance_embed.guidance_embedder.linear_2.": "guidance_in.out_layer.",
    "double_stream_modulation_img.linear.": "double_stream_modulation_img.lin.",
    "double_stream_modulation_txt.linear.": "double_stream_modulation_txt.lin.",
    "single_stream_modulation.linear.": "single_stream_modulation.lin.",
    "norm_out.linear.": "final_layer.adaLN_modulation.1.",
    "proj_out.": "final_layer.linear.",
    "single_transformer_blocks.": "single_blocks.",
    "transformer_blocks.": "double_blocks.",
}
_FLUX2_DOUBLE = {
    **_DOUBLE_ATTENTION,
    "ff.linear_in.": "img_mlp.0.",
    "ff.linear_out.": "img_mlp.2.",
    "ff_context.linear_in.": "txt_mlp.0.",
    "ff_context.linear_out.": "txt_mlp.2.",
}
_FLUX2_SINGLE = {
    "attn.norm_q.weight": "norm.query_norm.scale",
    "attn.norm_k.weight": "norm.key_norm.scale",
    "attn.to_qkv_mlp_proj.": "linear1.",
    "attn.to_out.": "linear2.",
}
_Z_IMAGE = {
    "all_x_embedder.2-1.": "x_embedder.",
    "all_final_layer.2-1.": "final_layer.",
    "attention.to_out.0.": "attention.out.",
    "attention.norm_q.": "attention.q_norm.",
    "attention.norm_k.": "attention.k_norm.",
}


def sd3(folder: Path) -> dict[str, Tensor]:
    """The transformer of SD3 and SD3.5 as Stability publish it, and its VAE beside it."""
    joined = _all_joined(read_weights(folder, "transformer"))
    last = max(int(name.split(".")[1]) for name in joined if name.startswith("transformer_blocks."))
    # What text is told of the time in the last block is no block's modulation, but an output's.
    outputs = ("norm_out.", f"transformer_blocks.{last}.norm1_context.")
    tensors = {}
    for name, tensor in joined.items():
        block = name.startswith("transformer_blocks.")
        new = replace_start(_replace_one(name, _SD3_BLOCK) if block else name, _SD3)
        tensors[UNET + new] = _shift_first(tensor) if name.startswith(outputs) else tensor
    return {**tensors, **vae_tensors(read_weights(folder, "vae"), levels=4)}


def flux(folder: Path) -> dict[str, Tensor]:
    """The transformer of FLUX.1 as Black Forest Labs publish it."""
    weights = read_weights(folder, "transformer")
    single = {name for name in weights if name.startswith("single_transformer_blocks.")}
    joined = _all_joined({name: t for name, t in weights.items() if name not in single})
    # A single block has its feed-forward in the same layer as q, k and v.
    parts = ("attn.to_q.", "attn.to_k.", "attn.to_v.", "proj_mlp.")
    for name in sorted(single):
        if parts[0] in name:
            whole = [weights[name.replace(parts[0], part)] for part in parts]
            joined[name.replace(parts[0], "attn.qkv_mlp.")] = torch.cat(whole)
        elif not any(part in name for part in parts):
            joined[name] = weights[name]
    tensors = {}
    for name, tensor in joined.items():
        inner = _FLUX_SINGLE if name.startswith("single_") else _FLUX_DOUBLE
        block = "transformer_blocks." in name
        new = replace_start(_replace_one(name, inner) if block else name, _FLUX)
        tensors[new] = _shift_first(tensor) if name.startswith("norm_out.") else tensor
    return tensors


def flux2(folder: Path) -> dict[str, Tensor]:
    """The transformer of FLUX.2 as Black Forest Labs publish it."""
    tensors = {}
    for name, tensor in _all_joined(read_weights(folder, "transformer")).items():
        inner = _FLUX2_SINGLE if name.startswith("single_") else _FLUX2_DOUBLE
        block = "transformer_blocks." in name
        new = replace_start(_replace_one(name, inner) if block else name, _FLUX2)
        tensors[new] = _shift_first(tensor) if name.startswith("norm_out.") else tensor
    return tensors


def z_image(folder: Path) -> dict[str, Tensor]:
    """The transformer of Z-Image as ComfyUI has it, and its VAE beside it."""
    joined = _joined(read_weights(folder, "transformer"), ("attention.to_{}.", "attention.qkv."))
    tensors = {UNET + replace(name, _Z_IMAGE): tensor for name, tensor in joined.items()}
    tensors[UNET + "norm_final.weight"] = torch.ones(48)  # which nothing reads
    vae = vae_tensors(read_weights(folder, "vae"), levels=4)
    return {**tensors, **{"vae." + name.removeprefix(VAE): t for name, t in vae.items()}}


def qwen_image(folder: Path) -> dict[str, Tensor]:
    """The transformer of Qwen-Image, whose names are diffusers' own, as ComfyUI saves it."""
    return {UNET + name: tensor for name, tensor in read_weights(folder, "transformer").items()}


def _all_joined(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Attentions of a transformer of two streams with one layer for each stream's q, k and v."""
    joined = _joined(weights, ("attn.to_{}.", "attn.qkv."))
    joined = _joined(joined, ("attn2.to_{}.", "attn2.qkv."))
    return _joined(joined, ("attn.add_{}_proj.", "attn.added_qkv."))


def _shift_first(tensor: Tensor) -> Tensor:
    """diffusers has what scales an output before what shifts it, the originals after it."""
    scale, shift = tensor.chunk(2)
    return torch.cat([shift, scale])


def _joined(weights: dict[str, Tensor], names: tuple[str, str]) -> dict[str, Tensor]:
    """Queries, keys and values, called `names[0]`, as one layer called `names[1]`."""
    pattern, whole = names
    tensors: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if pattern.format("q") in name:
            parts = [weights[name.replace(pattern.format("q"), pattern.format(x))] for x in "qkv"]
            tensors[name.replace(pattern.format("q"), whole)] = torch.cat(parts)
        elif pattern.format("k") not in name and pattern.format("v") not in name:
            tensors[name] = tensor
    return tensors


def _replace_one(name: str, pairs: dict[str, str]) -> str:
    for old, new in pairs.items():
        if old in name:
            return name.replace(old, new)
    raise ValueError(f"{name} has no place in the original layout")
