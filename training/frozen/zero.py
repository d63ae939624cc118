"""A frozen base spread over the workers by DeepSpeed: ZeRO stage 3 (Rajbhandari et al. 2020).

A base's folder in, a `Base` out whose denoiser's weights are gathered from all workers block by
block, as with `training.frozen.sharding`'s FSDP2. Nothing of it is trained, so DeepSpeed is given
no optimiser: the only gradients and optimiser states, which stages 1 and 2 share out, belong to
adapters.
"""

from __future__ import annotations

import logging
import os
from typing import Any

import torch
from torch import Tensor, nn

from captioning import UserError
from training.families import Base, load_base


def zero_config(dtype: torch.dtype, offload: bool) -> dict[str, Any]:
    """DeepSpeed's config, as docs/gpus.md prints it.

    With `offload` the shares lie in the host's memory, pinned.
    """
    zero: dict[str, Any] = {
        "stage": 3,
        # Small weights are shared out too; by default each worker holds those of up to 100,000.
        "stage3_param_persistence_threshold": 0,
    }
    if offload:
        zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,  # DeepSpeed asks for it; the loop has its own
        "zero_optimization": zero,
    }
    if dtype in (torch.float16, torch.bfloat16):
        config["fp16" if dtype == torch.float16 else "bf16"] = {"enabled": True}
    return config


def load_with_zero(
    path_or_id: str, device: torch.device, dtype: torch.dtype, offload: bool
) -> tuple[Base, Any]:
    """`load_base`, with the denoiser's weights spread over the workers of the process group.

    Returns the base and DeepSpeed's engine, which gathers the weights as long as it lives; it is
    to be kept beside the base and given to `release_engine` afterwards. The base is read into the
    host's memory first, whole. Raises UserError as `load_base` does, and when DeepSpeed is not
    installed.
    """
    deepspeed = import_deepspeed()
    if device.type == "cpu":
        # DeepSpeed would compile a kernel for reductions in inference here, for a minute.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    base = load_base(path_or_id, "cpu", dtype)
    denoiser = base.denoiser
    denoiser.requires_grad_(False)
    blocks = _innermost_blocks(denoiser)
    # A block is gathered as a whole, since adapters read its layers' weights by themselves.
    deepspeed.utils.set_z3_leaf_modules(denoiser, list({type(block) for block in blocks}))
    # Ray sets it, and so would DeepSpeed's own launcher; without either it is set here.
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))
    engine, *_ = deepspeed.initialize(
        model=denoiser, config=zero_config(dtype, offload), dist_init_required=False
    )
    inside = {id(module) for block in blocks for module in block.modules()}
    for module in denoiser.modules():
        for child in module.children() if id(module) not in inside else ():
            if isinstance(child, (nn.Linear, nn.Conv2d)):
                for weight in child.parameters():
                    deepspeed.zero.register_external_parameter(module, weight)
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    base.device = device
    return base, engine


def release_engine(engine: Any) -> None:
    """Let go of what DeepSpeed holds of its base, which it would keep in memory for good."""
    from deepspeed.runtime.zero import parameter_offload, partitioned_param_coordinator

    engine.destroy()
    parameter_offload.FWD_MODULE_STACK.clear()
    # After a backward pass, a cache of this method, one for all engines, has the modules as keys.
    coordinator = partitioned_param_coordinator.PartitionedParameterCoordinator
    wrapped = coordinator._PartitionedParameterCoordinator__params_to_release
    for cell in wrapped.__closure__:
        if hasattr(cell.cell_contents, "cache_clear"):
            cell.cell_contents.cache_clear()


def is_zero_share(weight: Tensor) -> bool:
    return hasattr(weight, "ds_status")


def gathered(weight: Any) -> Tensor:
    """A copy of a whole shared weight; all workers must ask together.  # its own shape"""
    import deepspeed

    if weight.ds_status.name == "AVAILABLE":  # its block is computing
        copied: Tensor = weight.detach().clone()
        return copied
    with deepspeed.zero.GatheredParameters([weight]):
        copied = weight.detach().clone()
    return copied


def _innermost_blocks(denoiser: Any) -> list[nn.Module]:
    """The blocks that diffusers never splits over devices, without those that contain others."""
    names = set(denoiser._no_split_modules)

    def is_block(module: nn.Module) -> bool:
        return type(module).__name__ in names

    return [
        module
        for module in denoiser.modules()
        if is_block(module) and sum(map(is_block, module.modules())) == 1
    ]


def import_deepspeed() -> Any:
    """Import the package; UserError where it is not installed."""
    try:
        import deepspeed
    except ImportError as error:
        raise UserError(
            "settings.yaml: strategy",
            f"deepspeed needs the package deepspeed, which cannot be imported ({error})",
            "pip install -c constraints.txt -e '.[deepspeed]', or set it to fsdp",
        ) from error
    deepspeed.utils.logger.setLevel(logging.WARNING)
    return deepspeed
