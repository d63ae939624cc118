"""A frozen base spread over the workers: each holds its share of every block's weights (FSDP2).

A base's folder in, a `Base` out whose denoiser is PyTorch's `fully_shard`: a block's weights are
gathered from all workers while it computes and let go again. So all workers must compute every
forward pass together. Adapters and their gradients are no part of it: every worker has them whole.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from captioning import UserError
from training.families import Base, load_base
from training.frozen.quantised import dequantised, is_quantised, scale_bytes
from training.frozen.zero import gathered, is_zero_share
from training.recipe import Recipe


def worker_mesh(device: torch.device, workers: int) -> DeviceMesh:
    """All workers of the process group in a row; to be called by all of them."""
    # Otherwise the mesh would choose a device by itself, though Ray has chosen one for this worker.
    torch.empty(1, device=device)
    return init_device_mesh(device.type, (workers,))


def load_sharded(
    path_or_id: str, device: torch.device, dtype: torch.dtype, mesh: DeviceMesh, offload: bool
) -> Base:
    """`load_base`, with the denoiser's weights spread over the workers of `mesh`.

    It is read into the host's memory first, whole, and moved to `device` block by block. With
    `offload` the shares stay in the host's memory, pinned, and only the block that computes is on
    the device.
    Raises UserError as `load_base` does.
    """
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

    base = load_base(path_or_id, "cpu", dtype)
    # Pinned memory lets copies overlap with computing; on a CPU it has no use.
    pinned = CPUOffloadPolicy(pin_memory=device.type != "cpu")
    policy = pinned if offload else OffloadPolicy()
    options: dict[str, Any] = {
        "mesh": mesh,
        "reshard_after_forward": True,
        "offload_policy": policy,
    }
    # The transformer's or UNet's blocks, which diffusers never splits over devices. The innermost
    # come first, since a block takes the weights that the blocks inside it have left.
    blocks = set(base.denoiser._no_split_modules)
    for module in reversed(list(base.denoiser.modules())):
        if type(module).__name__ in blocks:
            fully_shard(module, **options)
    fully_shard(base.denoiser, **options)
    base.device = device
    return base


def refuse_quantised_shares(recipes: Iterable[Recipe]) -> None:
    """Raise UserError for a recipe whose base is quantised, which cannot be shared out.

    FSDP2 and ZeRO gather tensors of one type; bitsandbytes' tensors have scales of other types.
    """
    for recipe in recipes:
        if recipe.base_precision != "auto":
            raise UserError(
                "recipe: base_precision",
                f"is {recipe.base_precision}, and settings.yaml has another `strategy` than "
                "ddp: a quantised base cannot be shared out",
                "set strategy to ddp, with which every worker holds the whole quantised base, or "
                "base_precision to auto",
            )


def refuse_offloading_to_itself(device: torch.device) -> None:
    """Raise UserError where the device is the host, in whose memory the shares are anyway."""
    if device.type == "cpu":
        raise UserError(
            "settings.yaml: offload_base",
            "is true, but training runs on the CPU, whose memory it would be moved to",
            "set it to false",
        )


def is_sharded(base: Base) -> bool:
    return any(_is_share(weight) or is_zero_share(weight) for weight in base.denoiser.parameters())


def whole(weight: Tensor) -> Tensor:
    """A base's weight outside of its block's forward pass, on the device that computes.

    A shared weight is gathered: all workers must ask for the same ones in the same order. A
    quantised one is dequantised. Both are then copies, to be let go soon, without gradient.
    """
    if is_quantised(weight):
        return dequantised(weight, torch.float32)
    if is_zero_share(weight):
        return gathered(weight)
    if not _is_share(weight):
        return weight.detach()
    from torch.distributed.tensor import DTensor

    share: Any = weight.detach()
    # NCCL gathers on the device alone, and an offloaded share is in the host's memory.
    local = share.to_local().to(share.device_mesh.device_type)
    placed = DTensor.from_local(
        local,
        share.device_mesh,
        share.placements,
        run_check=False,
        shape=share.shape,
        stride=share.stride(),
    )
    full: Tensor = placed.full_tensor()
    return full


def held_bytes(tensor: Tensor) -> int:
    """The bytes of a base's tensor that this worker holds; its own share of a shared one."""
    held: Any = tensor
    if is_quantised(tensor):
        return int(tensor.nbytes) + scale_bytes(tensor)
    if is_zero_share(tensor):
        return int(held.ds_tensor.nbytes)
    return int(held.to_local().nbytes if _is_share(tensor) else tensor.nbytes)


def _is_share(tensor: Tensor) -> bool:
    # The attribute is DTensor's, whose module is imported only where there are shares.
    return hasattr(tensor, "placements")
