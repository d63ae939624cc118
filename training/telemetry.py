"""How much memory a pack and its steps take: devices and tensors in, bytes out.

Never prints: whoever wants to show it reads the events.
"""

from __future__ import annotations

import resource
from pathlib import Path

import psutil
import torch
from torch import Tensor, nn

from training.events import PackMeasured
from training.families import Base
from training.frozen.sharding import held_bytes
from training.pack.pack import Pack


def begin_step(device: torch.device) -> None:
    """Forget the earlier peak on CUDA, so that `peak_device_bytes` is the peak of this step."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_device_bytes(device: torch.device) -> int | None:
    """On CUDA the peak of this process's tensors since `begin_step`; None on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def resident_bytes(device: torch.device) -> int | None:
    """On a CPU, which keeps no count of tensors, this process's resident memory now; else None."""
    return None if device.type == "cuda" else int(psutil.Process().memory_info().rss)


def peak_resident_bytes() -> int:
    """The most memory that this process has had resident so far.

    On Linux it is read from /proc, since `getrusage` would start from the parent's peak.
    """
    status = Path("/proc/self/status")
    if not status.exists():  # macOS, which counts in bytes
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    marks = [line for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
    return int(marks[0].split()[1]) * 1024


def pack_measured(pack: Pack) -> PackMeasured:
    """The bytes that each trial adds to the base, and those of the base, counted tensor by tensor.

    A slot has its weights, its gradients and, where this worker keeps it, its optimiser's state,
    which is there after the first step. Text encoders that are trained stay in memory and are
    counted beside the denoiser. Activations, which a pack has while it computes a step, are not
    counted.
    """
    return PackMeasured(
        trials=tuple(slot.trial.id for slot in pack.slots),
        slot_bytes=tuple(
            pack.bank.slot_bytes() + _state_bytes(slot.optimizer) for slot in pack.slots
        ),
        base_bytes=base_bytes(pack.base),
        text_encoder_bytes=text_encoder_bytes(pack.base),
    )


def base_bytes(base: Base) -> int:
    """The bytes of the frozen denoiser in this worker, which all trials of a pack share."""
    return _network_bytes(base.denoiser)


def text_encoder_bytes(base: Base) -> int:
    """The bytes of text encoders that stay in memory for an adapter on them; 0 without one."""
    encoders = base.loaded_text_encoders.values() if base.text_is_adapted else ()
    return sum(_network_bytes(encoder) for encoder in encoders)


def _network_bytes(network: nn.Module) -> int:
    tensors = [*network.parameters(), *network.buffers()]
    return sum(held_bytes(tensor) for tensor in tensors)


def _state_bytes(optimizer: torch.optim.Optimizer) -> int:
    values = [value for state in optimizer.state.values() for value in state.values()]
    return sum(value.nbytes for value in values if isinstance(value, Tensor))
