"""The facts about base model families that need no networks.

A family's name in, its facts out. This is all that recipes, sweeps' plans and reports need of a
family; its networks are in `training.families`. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

#: The small base model that comes with the farm.
STARTER_BASE: Path = Path(__file__).resolve().parent / "starter"


@dataclass(frozen=True)
class BaseFacts:
    """What names a base model without loading it."""

    source: str  # path or hub id
    content_hash: str
    family: str


@dataclass(frozen=True)
class FamilyFacts:
    """The facts of one family."""

    #: The family's name in trials, tags and registry entries.
    family: str
    #: What `precision: auto` means on CUDA.
    half: str = "fp16"
    #: Whether the objective is a flow and not a diffusion.
    is_flow: bool = False
    #: Dotted recipe fields whose value is this when a recipe does not say.
    defaults: Mapping[str, Any] = field(default_factory=dict)
    #: Whether adapters can be trained on its text encoders too.
    trains_text_encoders: bool = False
    #: Whether the preset `attention+ff+conv` of `network.targets` has convolutions to name.
    has_convolutions: bool = False


SD15 = FamilyFacts("sd15", trains_text_encoders=True, has_convolutions=True)
SDXL = FamilyFacts("sdxl", trains_text_encoders=True, has_convolutions=True)
SD3 = FamilyFacts(
    "sd3",
    half="bf16",  # SD3.5 is published in it; diffusers' README_sd3.md trains SD3 in fp16
    is_flow=True,
    # Esser et al. 2024 train with logit-normal times; Stability's own fine-tuning guide and
    # diffusers' train_dreambooth_lora_sd3.py do so too, the latter with this learning rate.
    defaults={"min_snr_gamma": None, "optimizer.lr": 1e-4},
)
FLUX = FamilyFacts(
    "flux",
    half="bf16",
    is_flow=True,
    # The learning rate is that of Replicate's flux-fine-tuner at rank 16.
    defaults={"min_snr_gamma": None, "optimizer.lr": 4e-4, "batch_size": 1},
)
FLUX2 = FamilyFacts(
    "flux2",
    half="bf16",
    is_flow=True,
    # Rate and batch are those of diffusers' README_flux2.md.
    defaults={"min_snr_gamma": None, "optimizer.lr": 1e-4, "batch_size": 1},
)
Z_IMAGE = FamilyFacts(
    "zimage",
    half="bf16",  # it is trained and published in it
    is_flow=True,
    # Rate and batch are those of diffusers' README_z_image.md.
    defaults={"min_snr_gamma": None, "optimizer.lr": 1e-4, "batch_size": 1},
)
QWEN_IMAGE = FamilyFacts(
    "qwen_image",
    half="bf16",  # it is trained and published in it
    is_flow=True,
    # Rate and batch are those of ai-toolkit's train_lora_qwen_image_24gb.yaml; the rate is also
    # the default of diffusers' train_dreambooth_lora_qwen_image.py.
    defaults={"min_snr_gamma": None, "optimizer.lr": 1e-4, "batch_size": 1},
)

#: The facts of every family by its name; `training.families.FAMILIES` has the same order.
FAMILY_FACTS: Mapping[str, FamilyFacts] = {
    facts.family: facts for facts in (SD15, SDXL, SD3, FLUX, FLUX2, Z_IMAGE, QWEN_IMAGE)
}
