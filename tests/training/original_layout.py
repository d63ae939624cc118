"""Checkpoints in the layout of the original repositories, written from diffusers folders.

Written by hand after the module names of CompVis, Stability, Black Forest Labs and Tongyi, so that
it owes nothing to diffusers' reader, which the product uses: a folder in, the tensors of a single
file out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

UNET, VAE = "model.diffusion_model.", "first_stage_model."
_RESNET = {
    "norm1.": "in_layers.0.",
    "conv1.": "in_layers.2.",
    "time_emb_proj.": "emb_layers.1.",
    "norm2.": "out_layers.0.",
    "conv2.": "out_layers.3.",
    "conv_shortcut.": "skip_connection.",
}
_UNET_ENDS = {
    "time_embedding.linear_1.": "time_embed.0.",
    "time_embedding.linear_2.": "time_embed.2.",
    "add_embedding.linear_1.": "label_emb.0.0.",
    "add_embedding.linear_2.": "label_emb.0.2.",
    "conv_in.": "input_blocks.0.0.",
    "conv_norm_out.": "out.0.",
    "conv_out.": "out.2.",
}
_VAE_ATTENTION = {
    "group_norm.": "norm.",
    "to_q.": "q.",
    "to_k.": "k.",
    "to_v.": "v.",
    "to_out.0.": "proj_out.",
}
_OPEN_CLIP = {
    "encoder.layers.": "transformer.resblocks.",
    "layer_norm1.": "ln_1.",
    "layer_norm2.": "ln_2.",
    "mlp.fc1.": "mlp.c_fc.",
    "mlp.fc2.": "mlp.c_proj.",
    "self_attn.out_proj.": "attn.out_proj.",
    "embeddings.token_embedding.": "token_embedding.",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.": "ln_final.",
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
    "attn.norm_q.weight": "img_attn.norm.query_norm.scale",
    "attn.norm_k.weight": "img_attn.norm.key_norm.scale",
    "attn.norm_added_q.weight": "txt_attn.norm.query_norm.scale",
    "attn.norm_added_k.weight": "txt_attn.norm.key_norm.scale",
    "attn.to_out.0.": "img_attn.proj.",
    "attn.to_add_out.": "txt_attn.proj.",
    "attn.qkv.": "img_attn.qkv.",
    "attn.added_qkv.": "txt_attn.qkv.",
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


def sd15(folder: Path) -> dict[str, Tensor]:
    """The tensors of a Stable Diffusion 1.x checkpoint."""
    return {
        **_unet(_weights(folder, "unet"), levels=2, layers=1),
        **_vae(_weights(folder, "vae"), levels=4),
        **_clip(_weights(folder, "text_encoder"), "cond_stage_model.transformer."),
    }


def sdxl(folder: Path) -> dict[str, Tensor]:
    """The tensors of an SDXL checkpoint: a CLIP and an OpenCLIP."""
    return {
        **_unet(_weights(folder, "unet"), levels=2, layers=1),
        **_vae(_weights(folder, "vae"), levels=4),
        **_clip(_weights(folder, "text_encoder"), "conditioner.embedders.0.transformer."),
        **_open_clip(_weights(folder, "text_encoder_2"), "conditioner.embedders.1.model."),
    }


def flux2(folder: Path) -> dict[str, Tensor]:
    """The transformer of FLUX.2 as Black Forest Labs publish it."""
    tensors = {}
    joined = _joined(_weights(folder, "transformer"), ("attn.to_{}.", "attn.qkv."))
    joined = _joined(joined, ("attn.add_{}_proj.", "attn.added_qkv."))
    for name, tensor in joined.items():
        inner = _FLUX2_SINGLE if name.startswith("single_") else _FLUX2_DOUBLE
        if name.startswith("norm_out."):
            scale, shift = tensor.chunk(2)
            tensor = torch.cat([shift, scale])
        block = "transformer_blocks." in name
        tensors[_replace_start(_replace_one(name, inner) if block else name, _FLUX2)] = tensor
    return tensors


def z_image(folder: Path) -> dict[str, Tensor]:
    """The transformer of Z-Image as ComfyUI has it, and its VAE beside it."""
    joined = _joined(_weights(folder, "transformer"), ("attention.to_{}.", "attention.qkv."))
    tensors = {UNET + _replace(name, _Z_IMAGE): tensor for name, tensor in joined.items()}
    tensors[UNET + "norm_final.weight"] = torch.ones(48)  # which nothing reads
    vae = _vae(_weights(folder, "vae"), levels=4)
    return {**tensors, **{"vae." + name.removeprefix(VAE): t for name, t in vae.items()}}


def qwen_image(folder: Path) -> dict[str, Tensor]:
    """The transformer of Qwen-Image, whose names are diffusers' own, as ComfyUI saves it."""
    return {UNET + name: tensor for name, tensor in _weights(folder, "transformer").items()}


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


def _weights(folder: Path, component: str) -> dict[str, Tensor]:
    (file,) = (folder / component).glob("*.safetensors")
    return load_file(file)


def _unet(weights: dict[str, Tensor], levels: int, layers: int) -> dict[str, Tensor]:
    """Blocks are counted through: `layers` and a sampler per level, and one more on the way up."""
    places: dict[str, str] = {}
    for level in range(levels):
        for layer in range(layers):
            number = 1 + (layers + 1) * level + layer
            places[f"down_blocks.{level}.resnets.{layer}."] = f"input_blocks.{number}.0."
            places[f"down_blocks.{level}.attentions.{layer}."] = f"input_blocks.{number}.1."
        sampler = f"input_blocks.{(layers + 1) * (level + 1)}.0.op."
        places[f"down_blocks.{level}.downsamplers.0.conv."] = sampler
        for layer in range(layers + 1):
            number = (layers + 1) * level + layer
            places[f"up_blocks.{level}.resnets.{layer}."] = f"output_blocks.{number}.0."
            places[f"up_blocks.{level}.attentions.{layer}."] = f"output_blocks.{number}.1."
        # The sampler comes after the attention of its block, where there is one.
        has_attention = any(name.startswith(f"up_blocks.{level}.attentions.") for name in weights)
        number = (layers + 1) * level + layers
        sampler = f"output_blocks.{number}.{2 if has_attention else 1}.conv."
        places[f"up_blocks.{level}.upsamplers.0.conv."] = sampler
    places["mid_block.resnets.0."] = "middle_block.0."
    places["mid_block.attentions.0."] = "middle_block.1."
    places["mid_block.resnets.1."] = "middle_block.2."
    tensors = {}
    for name, tensor in weights.items():
        new = _replace_start(name, {**_UNET_ENDS, **places})
        if ".resnets." in name:
            new = _replace(new, _RESNET)
        tensors[UNET + new] = tensor
    return tensors


def _vae(weights: dict[str, Tensor], levels: int) -> dict[str, Tensor]:
    tensors = {}
    for name, tensor in weights.items():
        new = name.replace("conv_norm_out.", "norm_out.").replace("conv_shortcut.", "nin_shortcut.")
        new = new.replace("mid_block.resnets.0.", "mid.block_1.")
        new = new.replace("mid_block.resnets.1.", "mid.block_2.")
        new = new.replace("mid_block.attentions.0.", "mid.attn_1.")
        for level in range(levels):
            new = new.replace(f"down_blocks.{level}.resnets.", f"down.{level}.block.")
            new = new.replace(f"down_blocks.{level}.downsamplers.0.", f"down.{level}.downsample.")
            # On the way up the original counts from the largest picture.
            up = f"up.{levels - 1 - level}"
            new = new.replace(f"up_blocks.{level}.resnets.", f"{up}.block.")
            new = new.replace(f"up_blocks.{level}.upsamplers.0.", f"{up}.upsample.")
        if ".attentions." in name:
            new = _replace(new, _VAE_ATTENTION)
            if tensor.ndim == 2:
                tensor = tensor[:, :, None, None]  # the original's projections are convolutions
        tensors[VAE + new] = tensor
    return tensors


def _clip(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    level = "" if any(name.startswith("text_model.") for name in weights) else "text_model."
    tensors = {f"{prefix}{level}{name}": tensor for name, tensor in weights.items()}
    # Older transformers saved the positions too, and merging tools made them floats.
    tensors[f"{prefix}text_model.embeddings.position_ids"] = torch.arange(77.0)[None]
    return tensors


def _open_clip(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    joined: dict[str, dict[str, Tensor]] = {}
    for name, tensor in weights.items():
        own = name.removeprefix("text_model.")
        if own == "text_projection.weight":
            tensors[prefix + "text_projection"] = tensor.T.contiguous()
        elif ".self_attn." in own and ".out_proj." not in own:
            block, _, rest = _replace(own, _OPEN_CLIP).partition("self_attn.")
            letter, kind = rest.split("_proj.")
            joined.setdefault(f"{block}attn.in_proj_{kind}", {})[letter] = tensor
        else:
            tensors[prefix + _replace(own, _OPEN_CLIP)] = tensor
    for name, parts in joined.items():
        tensors[prefix + name] = torch.cat([parts[letter] for letter in "qkv"])
    return tensors


def _replace(name: str, pairs: dict[str, str]) -> str:
    for old, new in pairs.items():
        name = name.replace(old, new)
    return name


def _replace_one(name: str, pairs: dict[str, str]) -> str:
    for old, new in pairs.items():
        if old in name:
            return name.replace(old, new)
    raise ValueError(f"{name} has no place in the original layout")


def _replace_start(name: str, pairs: dict[str, str]) -> str:
    for old, new in pairs.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    raise ValueError(f"{name} has no place in the original layout")


def configs_only(folder: Path, target: Path) -> Path:
    """A copy of a diffusers folder without its weights, as the hub's cache holds one."""
    import shutil

    def ignored(_: Any, names: list[str]) -> list[str]:
        return [name for name in names if name.endswith(".safetensors")]

    return Path(shutil.copytree(folder, target, ignore=ignored))
