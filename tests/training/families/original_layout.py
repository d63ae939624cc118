"""UNets, their VAEs and CLIPs in the original repositories' layout, from diffusers folders.

Written by hand after the module names of CompVis and Stability, so that it owes nothing to
diffusers' reader, which the product uses: a folder in, the tensors of a single file out. Those of
transformers are in `original_transformers`.
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


def sd15(folder: Path) -> dict[str, Tensor]:
    """The tensors of a Stable Diffusion 1.x checkpoint."""
    return {
        **_unet(read_weights(folder, "unet"), levels=2, layers=1),
        **vae_tensors(read_weights(folder, "vae"), levels=4),
        **_clip(read_weights(folder, "text_encoder"), "cond_stage_model.transformer."),
    }


def sd2(folder: Path) -> dict[str, Tensor]:
    """The tensors of a Stable Diffusion 2.x checkpoint: its OpenCLIP is whole.

    Its last layer, the 24th, and its projection are in the file, and nobody reads them.
    """
    prefix = "cond_stage_model.model."
    encoder = _open_clip(read_weights(folder, "text_encoder"), prefix)
    layer = "transformer.resblocks."
    last = {
        name.replace(f"{layer}0.", f"{layer}23."): tensor + 1
        for name, tensor in encoder.items()
        if f"{layer}0." in name
    }
    width = len(encoder[f"{prefix}ln_final.bias"])
    return {
        **_unet(read_weights(folder, "unet"), levels=2, layers=2),
        **vae_tensors(read_weights(folder, "vae"), levels=4),
        **encoder,
        **last,
        f"{prefix}text_projection": torch.eye(width),
        f"{prefix}logit_scale": torch.tensor(4.6),
    }


def sdxl(folder: Path) -> dict[str, Tensor]:
    """The tensors of an SDXL checkpoint: a CLIP and an OpenCLIP."""
    return {
        **_unet(read_weights(folder, "unet"), levels=2, layers=1),
        **vae_tensors(read_weights(folder, "vae"), levels=4),
        **_clip(read_weights(folder, "text_encoder"), "conditioner.embedders.0.transformer."),
        **_open_clip(read_weights(folder, "text_encoder_2"), "conditioner.embedders.1.model."),
    }


def read_weights(folder: Path, component: str) -> dict[str, Tensor]:
    """The tensors of one network of a diffusers folder."""
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
        new = replace_start(name, {**_UNET_ENDS, **places})
        if ".resnets." in name:
            new = replace(new, _RESNET)
        tensors[UNET + new] = tensor
    return tensors


def vae_tensors(weights: dict[str, Tensor], levels: int) -> dict[str, Tensor]:
    """An AutoencoderKL of as many resolutions, with the prefix that whole checkpoints have."""
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
            new = replace(new, _VAE_ATTENTION)
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
            block, _, rest = replace(own, _OPEN_CLIP).partition("self_attn.")
            letter, kind = rest.split("_proj.")
            joined.setdefault(f"{block}attn.in_proj_{kind}", {})[letter] = tensor
        else:
            tensors[prefix + replace(own, _OPEN_CLIP)] = tensor
    for name, parts in joined.items():
        tensors[prefix + name] = torch.cat([parts[letter] for letter in "qkv"])
    return tensors


def replace(name: str, pairs: dict[str, str]) -> str:
    """`name` with all that is a key of `pairs` replaced by its value."""
    for old, new in pairs.items():
        name = name.replace(old, new)
    return name


def replace_start(name: str, pairs: dict[str, str]) -> str:
    """`name` with its beginning, a key of `pairs`, replaced by its value."""
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
