"""Re-reads an exported file as other programs do, and compares the outputs.

A file, the base and the trained adapter in, the largest error out, or `VerificationError`. Reads
by diffusers' own loader, and by a plain numpy merge that knows kohya's names only. The caller's
base is copied, never touched.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file
from torch import Tensor

from training.export.kohya import kohya_name
from training.families import Base
from training.pack.adapters import detach, load_adapter
from training.pack.parts import is_of_encoder
from training.recipe import Network

# Largest error of any output element, as a share of the adapter's largest effect. fp16 rounding of
# the weights (2^-11 each) stays below a tenth of it on the tested bases; a lost alpha, magnitude or
# module gives ten to hundred times as much.
EFFECT_TOLERANCE = 0.01
# Float noise of an fp32 UNet, as a share of its largest output: for adapters with hardly an effect.
NOISE_TOLERANCE = 1e-5
SEED = 0
PROMPTS = ("a portrait, smile, red shirt", "a person in the rain, looking at the viewer")
INPUTS = len(PROMPTS)
# The name of the denoiser's output among those that are compared.
DENOISER = "denoiser"
# UNets take any size that their three halvings divide; small latents make the check cheap.
MAX_LATENT_SIDE = 16
# Every family's times go from 0 to this or a little above.
LAST_TIMESTEP = 999


class VerificationError(RuntimeError):
    """The file does not give what was trained; it must not be used."""


@dataclass(frozen=True)
class Verification:
    """How the re-read file compares with the trained adapter on random inputs."""

    modules: int  # how many layers the file changes
    max_error: float  # largest difference of an output element
    effect: float  # largest change of an output element by the adapter


def verify(
    path: Path, base: Base, state: Mapping[str, Tensor], network: Network, form: str
) -> Verification:
    """Compare the file at `path` with the adapter `state`.

    `form` is "lora", "dora" or "diff" (kohya), "peft" or "full" (diffusers). Raises
    VerificationError when a loader leaves a layer out or outputs differ beyond tolerance.
    """
    # There is one copy at a time, since in fp32 it may be twice as large as the base.
    twin = _copy(base)
    inputs = _inputs(twin)
    with_text = network.text_encoder is not None
    plain = _outputs(twin, inputs, with_text)
    load_adapter(twin, dict(state), network)
    wanted = _outputs(twin, inputs, with_text)
    detach(twin)
    spare = [twin]
    del twin
    effects = {name: float((wanted[name] - plain[name]).abs().max()) for name in plain}
    limits = {
        name: EFFECT_TOLERANCE * effects[name] + NOISE_TOLERANCE * float(plain[name].abs().max())
        for name in plain
    }
    expected = {key.split(".lora_")[0] for key in state}
    # diffusers knows none of the other prefixes.
    known = base.kohya_prefix == "lora_unet_"
    both = (_diffusers, _numpy_merge) if known else (_numpy_merge,)
    readers: dict[str, tuple[Callable[[Path, Base], set[str]], ...]] = {
        "lora": both,
        "dora": (_numpy_merge,),
        "diff": (_numpy_merge,),
        "peft": (_diffusers,),
        "full": (_diffusers,),
    }
    errors = []
    for read in readers[form]:
        reloaded = spare.pop() if spare else _copy(base)
        changed = read(path, reloaded)
        if changed != expected:
            raise VerificationError(
                f"{path.name}: {len(expected - changed)} layers are not loaded and "
                f"{len(changed - expected)} are foreign, e.g. {sorted(expected ^ changed)[0]}"
            )
        found = _outputs(reloaded, inputs, with_text)
        for name, limit in limits.items():
            error = float((found[name] - wanted[name]).abs().max())
            if not error <= limit:  # also when it is NaN
                raise VerificationError(
                    f"{path.name}: outputs differ by {error:.3g} ({name}) after a reload by "
                    f"{read.__name__.strip('_')}; {limit:.3g} is allowed (the adapter's effect is "
                    f"{effects[name]:.3g})"
                )
        errors.append(float((found[DENOISER] - wanted[DENOISER]).abs().max()))
        del reloaded
    return Verification(len(expected), max(errors), effects[DENOISER])


def _copy(base: Base) -> Base:
    """A copy of the base with a UNet of its own, fp32 and without adapter; the rest is shared.

    It has text encoders of its own too when they are asked for.
    """
    twin = copy.copy(base)
    twin.__dict__.pop("text_encoders", None)
    twin.denoiser = copy.deepcopy(base.denoiser)
    detach(twin)
    twin.denoiser = twin.denoiser.float().eval()
    twin.dtype = torch.float32
    return twin


def _inputs(base: Base) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(SEED)
    side = min(MAX_LATENT_SIDE, base.native_size_px // base.vae_factor)
    latents = torch.randn(INPUTS, base.latent_channels, side, side, generator=generator)
    conditions = {
        name: torch.randn(INPUTS, *shape, generator=generator)
        for name, shape in base.condition_shapes().items()
    }
    timesteps = torch.linspace(LAST_TIMESTEP // 5, LAST_TIMESTEP, INPUTS).long()
    return (
        latents.to(base.device),
        timesteps.to(base.device),
        {name: tensor.to(base.device) for name, tensor in conditions.items()},
    )


@torch.no_grad()
def _outputs(
    base: Base, inputs: tuple[Tensor, Tensor, dict[str, Tensor]], with_text: bool
) -> dict[str, Tensor]:
    """The denoiser's outputs; `with_text` also those of the encoders, which it is then given."""
    latents, timesteps, conditions = inputs
    said = base.encode_prompts(list(PROMPTS)) if with_text else {}
    outputs = {DENOISER: base.predict(latents, timesteps, {**conditions, **said}), **said}
    return {name: tensor.cpu() for name, tensor in outputs.items()}  # (INPUTS, ...) each


def _diffusers(path: Path, base: Base) -> set[str]:
    """Load with the loader of the family's pipeline; returns the layers that have an adapter."""
    import diffusers
    from peft.tuners.lora import LoraLayer

    pipeline = getattr(diffusers, base.pipelines[0])
    try:
        state, *alphas, metadata = pipeline.lora_state_dict(
            str(path), local_files_only=True, return_lora_metadata=True
        )  # alphas for UNets alone
        networks = {base.denoiser_name: base.denoiser}
        if any(is_of_encoder(key) for key in state):
            networks |= base.text_encoders
        options = {"network_alphas": alphas[0] if alphas else None, "metadata": metadata}
        for component, network in networks.items():
            if component == base.denoiser_name:
                network.load_lora_adapter(state, prefix=component, **options)
            else:
                pipeline.load_lora_into_text_encoder(
                    state, text_encoder=network, prefix=component, **options
                )
    except (ValueError, KeyError, RuntimeError, TypeError) as error:
        raise VerificationError(f"{path.name}: diffusers cannot load it ({error})") from error
    found = set()
    for component, network in networks.items():
        network.float()
        modules = network.named_modules()
        found |= {f"{component}.{name}" for name, one in modules if isinstance(one, LoraLayer)}
    return found


def _numpy_merge(path: Path, base: Base) -> set[str]:
    """Add every kohya entry to the weight of its name; returns the layers that were changed."""
    entries: dict[str, dict[str, np.ndarray]] = {}
    for key, array in load_file(path).items():
        name, _, part = key.partition(".")
        entries.setdefault(name, {})[part] = array.astype(np.float32)
    networks = {base.denoiser_name: base.denoiser}
    if any(not name.startswith(base.kohya_prefix) for name in entries):
        networks |= base.text_encoders
    layers = {
        kohya_name(component, name, base.kohya_prefixes): (f"{component}.{name}", module)
        for component, network in networks.items()
        for name, module in network.named_modules()
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d))
    }
    changed = set()
    for name, parts in entries.items():
        if name not in layers:
            raise VerificationError(f"{path.name}: {name} names no layer of the base")
        layer, module = layers[name]
        weight = module.weight.detach().cpu().numpy()
        difference = torch.from_numpy(_difference(path, name, parts, weight))
        with torch.no_grad():
            module.weight += difference.to(module.weight.device)
        changed.add(layer)
    return changed


def _difference(
    path: Path, name: str, parts: Mapping[str, np.ndarray], weight: np.ndarray
) -> np.ndarray:
    """What kohya's entry of one layer adds to its weight.  # (out, in) or (out, in, k, k)

    `dora_scale` as ComfyUI, A1111, Forge and InvokeAI take it: m·V/‖V‖, the norm of each column,
    which in a convolution is an input channel.
    """
    low_rank = {"lora_down.weight", "lora_up.weight", "alpha"}
    if parts.keys() == {"diff"}:
        return parts["diff"]
    if parts.keys() - {"dora_scale"} != low_rank:
        raise VerificationError(f"{path.name}: {name} has the parts {sorted(parts)}")
    down, up = parts["lora_down.weight"], parts["lora_up.weight"]
    product = up.reshape(len(up), -1) @ down.reshape(len(down), -1)
    change = float(parts["alpha"]) / len(down) * product.reshape(weight.shape)
    if "dora_scale" not in parts:
        return change
    scale = parts["dora_scale"]
    if scale.shape != (1, weight.shape[1], *(1,) * (weight.ndim - 2)):
        raise VerificationError(
            f"{path.name}: {name} has a dora_scale of shape {scale.shape}, which tools misread"
        )
    direction = weight + change
    others = tuple(axis for axis in range(weight.ndim) if axis != 1)
    norms = np.sqrt(np.square(direction).sum(axis=others, keepdims=True))  # (1, in, ...)
    return direction * (scale / norms) - weight
