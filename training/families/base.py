"""The interface of every base model family for training, sampling and export.

A checked folder in, a frozen `Base` out, with the same methods in every family. The weights of a
base are never changed; adapters are put on and taken off by `training.pack.adapters`.
"""

from __future__ import annotations

import gc
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from captioning import UserError
from training.families.files import hash_components, load_network, load_part, read_json
from training.objective import Diffusion, FlowMatching, FlowShift, Objective

# The scaling factor that AutoencoderKL assumes when its config has none.
SD1_SCALING_FACTOR = 0.18215

#: What a denoiser is given beside latents and time: named tensors, one row per sample.
Conditions = Mapping[str, Tensor]


class Base(ABC):
    """A frozen base model: its networks, its objective and the sizes that follow from them.

    The denoiser is kept in `dtype` (fp32 on CPU, half on CUDA), VAE and CLIP encoders always in
    fp32. Pixels are in -1..1, model latents are the VAE's after shift and scale.
    """

    #: The family's name in trials, tags and registry entries.
    family: ClassVar[str]
    #: The classes that a family's model_index.json may name; the first loads its adapters.
    pipelines: ClassVar[tuple[str, ...]]
    #: Subfolders that make up the base; everything else in its folder is ignored.
    components: ClassVar[tuple[str, ...]]
    #: Those `components` that a complete model may lack.
    optional: ClassVar[tuple[str, ...]] = ()
    #: The component that is trained, and the prefix of its modules in adapter files.
    denoiser_name: ClassVar[str]
    #: Its VAE's class in diffusers.
    vae_class: ClassVar[str] = "AutoencoderKL"
    #: Endings of the names of the denoiser's layers, for the presets of `network.targets`.
    attention_modules: ClassVar[tuple[str, ...]]
    feed_forward_modules: ClassVar[tuple[str, ...]]
    #: Endings of the layers that `attention+ff+conv` adds: convolutions and linear layers of their
    #: blocks.
    convolution_modules: ClassVar[tuple[str, ...]] = ()
    #: Endings of the layers of its text encoders, for families whose encoders may have adapters.
    encoder_attention_modules: ClassVar[tuple[str, ...]] = ()
    encoder_feed_forward_modules: ClassVar[tuple[str, ...]] = ()
    #: Beginnings of the names of layers that get no update: they take the rows of several samples
    #: as one, so a pack could not tell which trial a row belongs to.
    unbatched_modules: ClassVar[tuple[str, ...]] = ()
    #: What `precision: auto` means on CUDA.
    half: ClassVar[str] = "fp16"
    #: Whether activations exceed 65504, the largest number of fp16, so that losses become NaN.
    overflows_fp16: ClassVar[bool] = False
    #: Whether the objective is a flow and not a diffusion.
    is_flow: ClassVar[bool] = False
    #: Dotted recipe fields whose value is this when a recipe does not say.
    defaults: ClassVar[Mapping[str, Any]] = {}
    #: Pixels per latent cell and latent cells per token, along one side.
    patch: ClassVar[int] = 1

    def __init__(
        self, path_or_id: str, folder: Path, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.id = path_or_id
        self.folder = folder
        self.device = device
        self.dtype = dtype
        # The config is read from its file, so that the VAE itself may be released.
        self.vae_config = read_json(folder / "vae" / "config.json")
        self.latent_channels = int(self.vae_config.get("latent_channels", 4))
        self.vae_factor = vae_factor(folder)
        self.native_size_px = self.native_size(folder)
        self.size_multiple_px = self.size_multiple(folder)
        self.tokenizers: dict[str, Any] = {}
        #: Whether an adapter is on the text encoders, so that their outputs cannot be kept.
        self.text_is_adapted = False
        self.denoiser: Any
        self.objective: Objective

    @classmethod
    @abstractmethod
    def native_size(cls, folder: Path) -> int:
        """The side of the pictures that the base was trained on, px; loads no weights."""

    @classmethod
    def size_multiple(cls, folder: Path) -> int:
        """What the sides of a picture must be multiples of, px; loads no weights."""
        return vae_factor(folder) * cls.patch

    @property
    def guidance_embedded(self) -> bool:
        """Whether the denoiser is told the guidance and needs no unconditional half."""
        return False

    @cached_property
    def content_hash(self) -> str:
        """sha256 over all files that make the base what it is, see `base_hash`."""
        return hash_components(self.folder, self.components)

    @cached_property
    def encoder_hash(self) -> str:
        """sha256 over all that cached latents depend on: the VAE, text encoders and tokenizers.

        The scheduler's config is part of it too, though latents do not depend on that.
        """
        own = tuple(name for name in self.components if name != self.denoiser_name)
        return hash_components(self.folder, own)

    # Encoders. They are loaded when they are asked for, and may be released.

    @cached_property
    def vae(self) -> Any:
        """The VAE, frozen, fp32, on the base's device."""
        import diffusers

        kind = getattr(diffusers, self.vae_class)
        return load_network(kind, self.folder, "vae", torch.float32, self.device)

    @cached_property
    @abstractmethod
    def text_encoders(self) -> dict[str, Any]:
        """The text encoders, frozen, on the base's device, by the names of their subfolders."""

    @property
    def text_dtype(self) -> torch.dtype:
        """The type of the least precise text encoder, known before any is loaded."""
        return torch.float32

    @property
    def loaded_text_encoders(self) -> dict[str, Any]:
        """The text encoders that are in memory now."""
        loaded: dict[str, Any] = self.__dict__.get("text_encoders", {})
        return loaded

    def is_read(self, encoder: str, module: str) -> bool:
        """Whether the denoiser's conditions depend on this layer of a text encoder."""
        return True

    @abstractmethod
    def encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        """The denoiser's conditions for every prompt, fp32 on the base's device.  # (N, ...) each

        With an adapter on the text encoders its gradients are kept, where gradients are on.
        """

    def picture_conditions(
        self, original: tuple[int, int], corner: tuple[int, int], size: tuple[int, int]
    ) -> dict[str, Tensor]:
        """The denoiser's conditions for a picture itself, fp32; most families have none.

        In pixels: `original` is the file's (height, width), `corner` the crop's (top, left) in the
        scaled picture, `size` the crop's (height, width). Sampling asks for the size and (0, 0).
        """
        return {}

    @abstractmethod
    def condition_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every condition of one sample, as `predict` takes them."""

    @torch.no_grad()
    def encode_pixels(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """The VAE's posterior of (N, 3, H, W) pixels in -1..1: mean and log-variance, fp32.

        Raw values of the VAE; `to_latents` turns a sample of it into the model's latents.
        # 2 x (N, C, h, w)
        """
        posterior = self.vae.encode(pixels.to(self.device, torch.float32)).latent_dist
        return posterior.mean, posterior.logvar

    def to_latents(self, posterior_sample: Tensor) -> Tensor:
        """Shift and scale a sample of the VAE's posterior as the denoiser expects it."""
        shift, scale = self._latent_affine(posterior_sample)
        return (posterior_sample - shift) * scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pixels (N, 3, H, W) in about -1..1, fp32, of the model's latents (N, C, h, w)."""
        latents = latents.to(self.device, torch.float32)
        shift, scale = self._latent_affine(latents)
        return self.vae.decode(latents / scale + shift).sample

    def _latent_affine(self, like: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """The shift that is subtracted from a raw latent, and the scale for the rest."""
        config = self.vae_config
        scale = float(config.get("scaling_factor", SD1_SCALING_FACTOR))
        means, deviations = config.get("latents_mean"), config.get("latents_std")
        if means is None or deviations is None:
            return float(config.get("shift_factor") or 0.0), scale
        # Per channel, as in StableDiffusionXLPipeline.
        mean = torch.tensor(means, device=like.device).view(1, -1, 1, 1)
        return mean, scale / torch.tensor(deviations, device=like.device).view(1, -1, 1, 1)

    # The denoiser.

    @abstractmethod
    def predict(self, latents: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        """The denoiser's output for noisy latents, fp32: what the objective calls its target.

        `timesteps` is (N,) as the objective draws them.  # (N, C, h, w)
        """

    def guided(self, without: Tensor, with_text: Tensor, guidance: float) -> Tensor:
        """Classifier-free guidance w of two predictions, `u + w·(c - u)`.  # (N, C, h, w)

        Ho & Salimans 2022, in diffusers' convention.
        """
        return without + guidance * (with_text - without)

    @abstractmethod
    def sampler(self, steps: int, latents: Tensor) -> Any:
        """A diffusers scheduler of the family's kind, set to `steps` for latents of this shape."""

    def release_encoders(self) -> None:
        """Free the VAE and the text encoders, on CUDA and on a CPU; training needs none.

        Text encoders with an adapter on them stay, since they are in training themselves. Whoever
        asks for one again has it loaded again. On two cores the starter's VAE takes about 0.1 s and
        its text encoder 0.05 s, and the pictures of one scored checkpoint, which need the VAE alone
        once their prompts are embedded, 21 s. That is too little for keeping a copy in the host's
        memory, where every worker would have one (FLUX's T5 takes 19 GB in fp32).
        """
        for name in ("vae",) if self.text_is_adapted else ("vae", "text_encoders"):
            self.__dict__.pop(name, None)
        gc.collect()  # objects in reference cycles would stay until the collector's next run

    # The names that generation tools know.

    @property
    def kohya_prefix(self) -> str:
        """The prefix of the denoiser's modules in kohya's naming.

        Transformers (SD3, FLUX) have OneTrainer's names, which the same tools read: kohya's own
        names are for layers that diffusers splits (q, k and v are one there).
        """
        return "lora_unet_" if self.denoiser_name == "unet" else "lora_transformer_"

    @property
    def kohya_prefixes(self) -> dict[str, str]:
        """The prefix of every component that may have an adapter, by component."""
        # For families with one text encoder; `lora_te1_` would make tools take the file for SDXL.
        return {self.denoiser_name: self.kohya_prefix, "text_encoder": "lora_te_"}

    @property
    @abstractmethod
    def kohya_version(self) -> str:
        """`ss_base_model_version`, by which A1111, Forge and InvokeAI know the family."""

    @property
    @abstractmethod
    def modelspec_architecture(self) -> str:
        """`modelspec.architecture`, without the adapter's kind."""


def diffusion_objective(folder: Path) -> Diffusion:
    """The objective of a base whose scheduler has betas; UserError for other predictions than noise
    and v.
    """
    from diffusers import DDPMScheduler

    file = folder / "scheduler" / "scheduler_config.json"
    # diffusers' schedulers predict epsilon when the config does not say.
    kind = str(read_json(file).get("prediction_type", "epsilon"))
    if kind not in {"epsilon", "v_prediction"}:
        raise UserError(
            f"{file}: prediction_type",
            f"{kind!r} is not one of epsilon, v_prediction",
            "use a base trained to predict noise or v",
        )
    scheduler = load_part(DDPMScheduler, folder, "scheduler")
    return Diffusion(kind, scheduler.alphas_cumprod)  # type: ignore[arg-type]


def ddim_sampler(folder: Path, steps: int, device: torch.device) -> Any:
    """DDIM (Song et al. 2021) with the betas, spacing and prediction type of the base's config.

    `clip_sample` and `thresholding` clamp pixels; latents have no such range, so both are off even
    where a config forgot to say so.
    """
    from diffusers import DDIMScheduler

    scheduler = load_part(DDIMScheduler, folder, "scheduler", clip_sample=False, thresholding=False)
    scheduler.set_timesteps(steps, device=device)
    return scheduler


def flow_objective(folder: Path, patch: int) -> FlowMatching:
    """The objective of a base whose scheduler is `FlowMatchEulerDiscreteScheduler`."""
    config = read_json(folder / "scheduler" / "scheduler_config.json")
    if not config.get("use_dynamic_shifting", False):
        return FlowMatching(FlowShift(float(config.get("shift", 1.0))))
    tokens = int(config.get("base_image_seq_len", 256)), int(config.get("max_image_seq_len", 4096))
    mu = float(config.get("base_shift", 0.5)), float(config.get("max_shift", 1.15))
    return FlowMatching(FlowShift(None, patch, tokens, mu))


def even_flow_sampler(base: Base, steps: int, latents: Tensor) -> Any:
    """Even steps, moved by the shift of this size, as FluxPipeline and ZImagePipeline set them."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = load_part(FlowMatchEulerDiscreteScheduler, base.folder, "scheduler")
    shift = base.objective.shift.at(*latents.shape[-2:])  # type: ignore[attr-defined]
    sigmas = np.linspace(1.0, 1 / steps, steps)
    scheduler.set_timesteps(sigmas=sigmas, device=base.device, mu=math.log(shift))
    return scheduler


def vae_factor(folder: Path) -> int:
    """Pixels per latent cell along one side; the VAE halves between two of its blocks."""
    config = read_json(folder / "vae" / "config.json")
    # A VAE for videos lists for every halving whether time is halved too (diffusers' spelling).
    halvings = config.get("temperal_downsample") or config["block_out_channels"][1:]
    return int(2 ** len(halvings))


def refuse_other_inputs(
    base: Base, expected: int, other: str = "an inpainting or depth model"
) -> None:
    """UserError when the denoiser takes more than latents of `expected` channels.

    `other` says which models of the family do so.
    """
    channels = base.denoiser.config.in_channels
    if channels != expected:
        raise UserError(
            str(base.folder / base.denoiser_name / "config.json"),
            f"in_channels is {channels}, but latents have {expected} channels ({other}?)",
            "use the text-to-image model of the family",
        )
