"""What a step of a pack tells about itself: its row, its speed, its memory; and the file of rows.

Seconds and a device in, plain numbers out; `metrics.jsonl` in a trial's folder is written and cut
back here. Never prints: who wants to show it reads the events.
"""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from captioning import write_atomic
from training.families import Base
from training.frozen.sharding import held_bytes
from training.pack.pack import Pack
from training.trial_files import METRICS_FILE

Row = dict[str, Any]


def begin_step(device: torch.device) -> None:
    """Forget the accelerator's earlier peak, so that `memory_bytes` gives that of this step."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def memory_bytes(device: torch.device) -> Row:
    """The memory in use: on CUDA the peak of this process's tensors since `begin_step`.

    On a CPU, which keeps no such count, the process's resident memory now. The two are not the
    same thing and have names of their own.
    """
    if device.type == "cuda":
        return {"peak_device_bytes": torch.cuda.max_memory_allocated(device)}
    return {"resident_bytes": psutil.Process().memory_info().rss}


def peak_resident_bytes() -> int:
    """The most memory that this process has had resident so far.

    From the kernel's mark of this program: `getrusage` hands on that of the parent on Linux.
    """
    status = Path("/proc/self/status")
    if not status.exists():  # macOS, which counts in bytes
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    marks = [line for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
    return int(marks[0].split()[1]) * 1024


def speed(seconds: float, slots: int, samples_per_step: int) -> Row:
    """The step's time, and the pictures per second of one trial and of all in the pack.

    `samples_per_step` are one trial's, of all workers.
    """
    rate = samples_per_step / seconds
    return {
        "step_ms": seconds * 1000,  # of the whole pack
        "pack": slots,
        "images_per_s": rate,
        "pack_images_per_s": rate * slots,
    }


def pack_facts(pack: Pack) -> Row:
    """The bytes that each trial adds to the base, and those of the base, counted tensor by tensor.

    A slot's are its weights, its gradients and, where this worker keeps it, its optimiser's state,
    which is there after the first step. Text encoders that are trained stay in memory, and are
    counted beside the denoiser. Activations, which a pack has while it computes a step, are not
    among them.
    """
    return {
        "trials": [slot.trial.id for slot in pack.slots],
        "slot_bytes": [
            pack.bank.slot_bytes() + _state_bytes(slot.optimizer) for slot in pack.slots
        ],
        "base_bytes": base_bytes(pack.base),
        "text_encoder_bytes": text_encoder_bytes(pack.base),
    }


def base_bytes(base: Base) -> int:
    """The frozen denoiser's in this worker, which all trials of a pack share."""
    return _network_bytes(base.denoiser)


def text_encoder_bytes(base: Base) -> int:
    """Those of the text encoders that stay in memory for an adapter on them; 0 without."""
    encoders = base.loaded_text_encoders.values() if base.text_is_adapted else ()
    return sum(_network_bytes(encoder) for encoder in encoders)


def _network_bytes(network: nn.Module) -> int:
    tensors = [*network.parameters(), *network.buffers()]
    return sum(held_bytes(tensor) for tensor in tensors)


def _state_bytes(optimizer: torch.optim.Optimizer) -> int:
    values = [value for state in optimizer.state.values() for value in state.values()]
    return sum(value.nbytes for value in values if isinstance(value, Tensor))


def append_row(trial_dir: Path, row: Row) -> None:
    """Add a step's row to the trial's `metrics.jsonl`."""
    with (trial_dir / METRICS_FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def drop_rows_after(trial_dir: Path, step: int) -> None:
    """Keep the rows up to `step`; later ones, and a half-written last one, are trained again."""
    path = trial_dir / METRICS_FILE
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            break
        if row["step"] > step:
            break
        kept.append(line + "\n")
    write_atomic(path, "".join(kept).encode())
