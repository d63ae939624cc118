"""The header of an exported file: what generation tools show about it, and its bytes.

Facts in, strings out; tensors and strings in, reproducible safetensors bytes out. Names no local
path, only the last part of the base's.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import PurePath

from safetensors.torch import save
from torch import Tensor

from captioning import DatasetVersion, UserError
from training.families import Base
from training.recipe import Recipe

# ComfyUI's `/view_metadata` reads no header above this.
MAX_HEADER_BYTES = 1_000_000
MODELSPEC_VERSION = "1.0.1"
# ModelSpec has no name for a flow: the entry is left out there.
_PREDICTION_TYPES = {"epsilon": "epsilon", "v_prediction": "v"}
# The LyCORIS arguments that would produce these forms.
LYCORIS_ARGS = {
    "diff": {"algo": "full"},
    "dora": {"algo": "lora", "dora_wd": "True", "wd_on_output": "False"},
}
_RESERVED = ("sshs_", "modelspec.hash_", "lorafarm.")


def header_facts(
    base: Base,
    recipe: Recipe,
    step: int,
    form: str,
    stem: str,
    dataset: DatasetVersion | None,
    kernels: bool = False,
) -> dict[str, str]:
    """`modelspec.*` (ModelSpec 1.0.1), `ss_*` (kohya sd-scripts) and our own entries.

    `ss_output_name` is the file's stem: A1111 takes it for the name in prompts, and two files of
    one name spoil both. `kernels`: with convolutions of more than one cell, whose rank has a name
    of its own.
    """
    size_px = recipe.resolution or base.native_size_px
    network = recipe.network
    arguments: dict[str, str] = dict(LYCORIS_ARGS.get(form, {}))
    if kernels:
        conv_rank = network.of_kernels().stored_rank  # its scale is in the weights, too
        arguments |= {"conv_dim": str(conv_rank), "conv_alpha": str(float(conv_rank))}
    facts = {
        "format": "pt",
        "modelspec.sai_model_spec": MODELSPEC_VERSION,
        "modelspec.architecture": f"{base.modelspec_architecture}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": stem,
        "modelspec.resolution": f"{size_px}x{size_px}",
        "ss_output_name": stem,
        "ss_base_model_version": base.kohya_version,
        "ss_v2": str(base.kohya_version.startswith("sd_v2")),
        "ss_sd_model_name": PurePath(base.id).name,
        "ss_network_module": "lycoris.kohya" if form in LYCORIS_ARGS else "networks.lora",
        "ss_network_args": json.dumps(arguments),
        "ss_network_dim": str(network.stored_rank),
        "ss_network_alpha": str(float(network.stored_rank)),  # the scale is in the weights
        "ss_steps": str(step),
        "ss_max_train_steps": str(recipe.steps),
        "ss_seed": str(recipe.seed),
        "ss_learning_rate": str(recipe.optimizer.lr),
        "ss_optimizer": recipe.optimizer.library,
        "ss_resolution": f"({size_px}, {size_px})",
        "lorafarm.method": network.method,
        "lorafarm.form": form,
        "lorafarm.alpha": str(network.effective_alpha),
        "lorafarm.base_hash": base.content_hash,
    }
    if base.objective.prediction_type in _PREDICTION_TYPES:
        facts["modelspec.prediction_type"] = _PREDICTION_TYPES[base.objective.prediction_type]
    if network.text_encoder is not None:
        facts["ss_text_encoder_lr"] = str(recipe.encoder_lr)
        facts["lorafarm.text_encoder_rank"] = str(network.of_encoders().rank)
    if network.method == "dora":
        facts["lorafarm.dora_axis"] = network.dora_axis
    if network.nested_ranks is not None:
        facts["lorafarm.nested_ranks"] = ",".join(map(str, network.nested_ranks))
    if recipe.aspect_buckets:
        facts["ss_enable_bucket"] = "True"
    if dataset is not None:
        facts |= {
            "modelspec.trigger_phrase": dataset.trigger,
            "modelspec.usage_hint": f"Write “{dataset.trigger}, {dataset.class_word}”.",
            "modelspec.tags": "character",
            "ss_num_train_images": str(len(dataset.train)),
            "lorafarm.dataset": f"{dataset.character}/{dataset.name}",
            "lorafarm.dataset_manifest": dataset.manifest_sha256,
        }
    return facts


def add_caller_facts(facts: Mapping[str, str], extra: Mapping[str, str]) -> dict[str, str]:
    """`facts` with the caller's entries over them.

    Raises UserError for an entry that is no string, or that states what only the exporter knows.
    """
    for key, value in extra.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise UserError(
                f"export metadata: {key}", f"{value!r} is no string", "headers hold strings only"
            )
        if (key in facts and key.startswith(_RESERVED)) or key.startswith(_RESERVED[:2]):
            raise UserError(
                f"export metadata: {key}", "is written by the exporter itself", "leave it out"
            )
    return {**facts, **extra}


def encode(tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> bytes:
    """The bytes of a safetensors file; equal inputs give equal bytes.

    Adds `sshs_model_hash`, kohya's sha256 over all bytes after the header, which tools show
    without checking it. Raises UserError when the header is larger than tools read.
    """
    plain = save({name: tensor.contiguous() for name, tensor in tensors.items()})
    length = int.from_bytes(plain[:8], "little")
    entries, body = json.loads(plain[8 : 8 + length]), plain[8 + length :]
    digest = hashlib.sha256(body).hexdigest()
    hashes = {"sshs_model_hash": digest, "modelspec.hash_sha256": f"0x{digest}"}
    # safetensors writes its metadata in random order; the same export shall have the same hash.
    entries["__metadata__"] = dict(sorted({**facts, **hashes}.items()))
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # the format aligns the tensors to 8 bytes
    if len(header) > MAX_HEADER_BYTES:
        raise UserError(
            "export metadata",
            f"makes a header of {len(header)} bytes, tools read {MAX_HEADER_BYTES}",
            "shorten the description, or leave the thumbnail out",
        )
    return len(header).to_bytes(8, "little") + header + body
