"""Exports a checkpoint's adapter: writes it, reads it back by independent loaders, publishes it.

A checkpoint folder and its base in, one safetensors file out. A file that fails its verification
never gets its name. Never changes the base.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from captioning import DatasetVersion, UserError, sync_directory
from training.checkpoints import Contents, load_checkpoint
from training.export import diffusers, header, kohya
from training.export.updates import Update, read_updates
from training.export.verify import verify
from training.export_report import ExportReport, Format
from training.families import Base
from training.pack.parts import has_kernel
from training.recipe import Network

SUFFIX = ".safetensors"
DTYPES = (torch.float16, torch.float32)


def export_adapter(
    checkpoint_dir: Path,
    base: Base,
    out_path: Path,
    format: Format,
    metadata: Mapping[str, str] | None = None,
    *,
    dataset: DatasetVersion | None = None,
    dtype: torch.dtype = torch.float16,
) -> ExportReport:
    """Write the checkpoint's adapter to `out_path` in `format`, verified.

    kohya: low-rank form, with `dora_scale` for a DoRA on the input axis; one on the output axis as
    exact `diff`. diffusers: PEFT's names, DoRA on the output axis included; one on the input axis
    as an exact LoRA of full rank.
    `metadata` goes into the header and replaces entries from the recipe, the base and `dataset`
    (trigger, pictures). Weights are stored in `dtype` and the same inputs give the same bytes. An
    older file at `out_path` is replaced only by a verified one.

    Raises VerificationError when a loader gets something else than was trained; UserError for a
    checkpoint that is torn or does not fit the base, values that `dtype` cannot hold, or a wrong
    suffix; ValueError for a `dtype` other than float16 and float32.
    """
    if out_path.suffix != SUFFIX:
        raise UserError(
            str(out_path), f"does not end in {SUFFIX}", f"name it {out_path.stem}{SUFFIX}"
        )
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype} is not one that every tool reads (float16, float32)")
    contents = _load(checkpoint_dir)
    network = contents.recipe.network
    updates = read_updates(contents.adapter, network)
    form, tensors = _tensors(updates, _base_weights(base, network), base, format, dtype)
    facts = header.header_facts(
        base,
        contents.recipe,
        contents.step,
        form,
        out_path.stem,
        dataset,
        kernels=any(has_kernel(update.down.shape) for update in updates),
    )
    facts = header.add_caller_facts(facts, metadata or {})
    if format == "diffusers":
        facts |= diffusers.header_entry(tensors)
    data = header.encode(tensors, facts)
    out_path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=out_path.parent, prefix=".exporting-", suffix=SUFFIX)
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        verification = verify(temporary, base, contents.adapter, network, form)
        temporary.chmod(0o644)  # mkstemp's 0600 would hide it from the tools' users
        temporary.replace(out_path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(out_path.parent)
    return ExportReport(
        path=out_path,
        format=format,
        form=form,
        sha256=hashlib.sha256(data).hexdigest(),
        size_bytes=len(data),
        modules=verification.modules,
        max_error=verification.max_error,
        effect=verification.effect,
    )


def _load(checkpoint_dir: Path) -> Contents:
    try:
        return load_checkpoint(checkpoint_dir)
    except (OSError, ValueError) as error:
        raise UserError(
            str(checkpoint_dir), f"is no whole checkpoint ({error})", "export another checkpoint"
        ) from error


def _tensors(
    updates: list[Update],
    weights: Mapping[str, Tensor],
    base: Base,
    format: Format,
    dtype: torch.dtype,
) -> tuple[str, dict[str, Tensor]]:
    """The form of the file and its tensors, checked for overflow; `weights` are the base's."""

    def weight_of(component: str, module: str) -> Tensor:
        return _weight(weights, component, module)

    dora = updates[0].magnitude is not None
    by_input = updates[0].by_input
    if format == "diffusers" and by_input:
        form, tensors = "full", diffusers.full_rank_tensors(updates, weight_of, dtype)
    elif format == "diffusers":
        form, tensors = "peft", diffusers.peft_tensors(updates, dtype)
    elif format != "kohya":
        raise UserError("export: format", f"{format!r} is unknown", "use 'kohya' or 'diffusers'")
    elif dora and not by_input:
        form, tensors = "diff", kohya.diff_tensors(updates, weight_of, dtype, base.kohya_prefixes)
    else:
        form = "dora" if dora else "lora"
        tensors = kohya.low_rank_tensors(updates, dtype, base.kohya_prefixes)
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise UserError(
                f"export: {name}",
                f"its values do not fit into {str(dtype).removeprefix('torch.')}",
                "export with dtype float32",
            )
    return form, tensors


def _base_weights(base: Base, network: Network) -> dict[str, Tensor]:
    """The base's weights of the denoiser, and of text encoders that `network` trains, by module.

    It does not matter whether an adapter is on them.
    """
    encoders = {} if network.text_encoder is None else base.text_encoders
    weights = {}
    for component, module in {base.denoiser_name: base.denoiser, **encoders}.items():
        for name, parameter in module.named_parameters():
            layer, _, kind = name.rpartition(".")
            if kind == "weight" and ".lora_" not in name:
                key = f"{component}.{layer.removesuffix('.base_layer')}"
                weights[key] = parameter.detach().cpu().float()
    return weights


def _weight(weights: Mapping[str, Tensor], component: str, module: str) -> Tensor:
    try:
        return weights[f"{component}.{module}"]
    except KeyError as error:
        raise UserError(
            f"adapter: {component}.{module}",
            "names no layer of the base",
            "use the base that the adapter was trained on",
        ) from error
