"""What this machine is, as far as speed and memory go: its processor, its accelerator, its RAM.

Settings in, plain values out; measurements are kept under them.
"""

from __future__ import annotations

import os
import platform
from pathlib import Path

import psutil

from services.farm.settings import Settings

GIB = 1024**3


def uses_gpu(settings: Settings) -> bool:
    """Whether training runs on CUDA: as the settings say, else where it is available."""
    if settings.use_gpu is not None:
        return settings.use_gpu
    import torch

    return bool(torch.cuda.is_available())


def machine_facts(settings: Settings) -> dict[str, str | int]:
    """What the time of a step depends on, besides the work; equal machines give equal facts.

    No host name: a container has another one every day.
    """
    facts: dict[str, str | int] = {
        "processor": _processor(),
        "cores": os.cpu_count() or 1,
        "threads": settings.cpus_per_worker,
        "memory_gib": round(psutil.virtual_memory().total / GIB),
    }
    if uses_gpu(settings):
        import torch

        # The command may run where the cluster's accelerators are not.
        there = torch.cuda.is_available()
        facts["accelerator"] = torch.cuda.get_device_name(0) if there else "elsewhere"
    return facts


def memory_bytes(settings: Settings) -> int | None:
    """What one worker may take: the accelerator's whole memory, or its share of the free RAM.

    None if training runs on an accelerator that is not in this machine.
    """
    if uses_gpu(settings):
        import torch

        if not torch.cuda.is_available():
            return None
        return int(torch.cuda.get_device_properties(0).total_memory)
    workers = settings.workers if settings.ray_address == "local" else 1
    return int(psutil.virtual_memory().available) // workers


def _processor() -> str:
    info = Path("/proc/cpuinfo")  # platform.processor() is empty on most Linux systems
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
