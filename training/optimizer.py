"""The optimisers that a recipe can choose, each with the settings that it has and no others.

A mapping whose `type` tells them apart in, a frozen config out. The algorithms are the libraries';
`training.pack.optimizer` makes them. Fields have the libraries' names.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag, model_validator

from training.strict import Strict


def _in_range(betas: tuple[float, float]) -> tuple[float, float]:
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas {list(betas)} must both be in 0..1 (1 excluded)")
    return betas


Betas = Annotated[tuple[float, float], AfterValidator(_in_range)]

_BETAS = "Decay of the running mean and of the running square."
_EPS = "Added to the denominator."
_DECAY = "Decoupled weight decay."


class _Options(Strict):
    """The settings that all optimisers have."""

    type: str
    lr: float = Field(1e-4, gt=0, le=1, description="Peak learning rate.")

    library: ClassVar[str]  # the class that takes the steps
    #: How many numbers of 4 bytes it keeps for each weight.
    state_size: ClassVar[float]
    one_lr: ClassVar[str | None] = None  # why some weights cannot have a learning rate of their own

    @model_validator(mode="before")
    @classmethod
    def _lora_plus_fits(cls, data: Any) -> Any:
        if cls.one_lr is not None and isinstance(data, dict) and "lora_plus_ratio" in data:
            raise ValueError(f"lora_plus_ratio cannot be set: {cls.one_lr}; use adamw for LoRA+")
        return data


class _LoraPlus(_Options):
    """Optimisers whose steps are proportional to the learning rate."""

    lora_plus_ratio: float = Field(
        1.0,
        gt=0,
        le=1024,
        description="The learning rate of B is this times that of A and of the magnitudes. Above "
        "1 is LoRA+ (Hayou et al. 2024, who use 16).",
    )


class _Adam(_Options):
    """The settings of AdamW in all its forms."""

    betas: Betas = Field((0.9, 0.999), description=_BETAS)
    eps: float = Field(1e-8, gt=0, description=_EPS)
    weight_decay: float = Field(0.01, ge=0, description=_DECAY)


class AdamW(_LoraPlus, _Adam):
    """AdamW (Loshchilov & Hutter 2019); the defaults are those of diffusers' LoRA scripts."""

    type: Literal["adamw"] = Field(
        "adamw",
        description="adamw, adamw8bit, adafactor, lion, prodigy or schedulefree. Each has settings "
        "and defaults of its own: docs/optimisers.md.",
    )
    library: ClassVar[str] = "torch.optim.AdamW"
    state_size: ClassVar[float] = 2.0


class AdamW8bit(_LoraPlus, _Adam):
    """AdamW with moments of 8 bits (Dettmers et al. 2022); small parts keep 32, as the library has
    it. Needs the package bitsandbytes.
    """

    type: Literal["adamw8bit"] = Field("adamw8bit", description="AdamW with moments of 8 bits.")
    library: ClassVar[str] = "bitsandbytes.optim.AdamW8bit"
    state_size: ClassVar[float] = 0.5


class Adafactor(_LoraPlus):
    """Adafactor (Shazeer & Stern 2018) with a fixed learning rate, neither relative nor scaled by
    the weights: as kohya's users run it, and transformers advises for fine-tuning.

    Its update has an RMS of 1 at most, about that of AdamW's, so its learning rates are AdamW's.
    """

    type: Literal["adafactor"] = Field("adafactor", description="Adafactor, at a fixed lr.")
    library: ClassVar[str] = "transformers.optimization.Adafactor"
    state_size: ClassVar[float] = 0.0  # it keeps sums of rows and columns alone
    eps: float = Field(1e-30, gt=0, description="Added to the squared gradient.")
    clip_threshold: float = Field(1.0, gt=0, description="Largest RMS of a part's update.")
    decay_rate: float = Field(
        -0.8, lt=0, ge=-1, description="The running square's decay is 1 - step^this."
    )
    weight_decay: float = Field(0.0, ge=0, description=_DECAY)


class Lion(_LoraPlus):
    """Lion (Chen et al. 2023): steps of the sign of the momentum.

    Section 5 there: lr 3 to 10 times smaller than AdamW's and weight decay as much larger, so that
    their product stays. The defaults are a third and three times those of AdamW here.
    """

    type: Literal["lion"] = Field("lion", description="Lion.")
    library: ClassVar[str] = "lion_pytorch.Lion"
    state_size: ClassVar[float] = 1.0
    lr: float = Field(3e-5, gt=0, le=1, description="Peak learning rate; about AdamW's / 3.")
    betas: Betas = Field(
        (0.9, 0.99), description="Share of the momentum in the step, and decay of the momentum."
    )
    weight_decay: float = Field(0.03, ge=0, description=_DECAY)


class Prodigy(_Adam):
    """Prodigy (Mishchenko & Defazio 2024): AdamW that finds its learning rate.

    Weight decay, bias correction and `safeguard_warmup` are what its authors' README advises for
    diffusion models; diffusers' LoRA scripts have the latter two as well.
    """

    type: Literal["prodigy"] = Field("prodigy", description="Prodigy.")
    library: ClassVar[str] = "prodigyopt.Prodigy"
    state_size: ClassVar[float] = 4.0
    one_lr: ClassVar[str | None] = "prodigy finds one step size for all weights"
    lr: float = Field(
        1.0, gt=0, le=10, description="Factor on the step size that it finds; leave it at 1."
    )
    beta3: float | None = Field(
        None, ge=0, lt=1, description="Decay of what the step size is found from. None: √beta2."
    )
    d0: float = Field(1e-6, gt=0, description="First guess of the distance to the solution.")
    d_coef: float = Field(
        1.0, gt=0, description="Factor on that distance: 0.5 or 2 for smaller or larger steps."
    )
    use_bias_correction: bool = Field(True, description="Adam's bias correction.")
    safeguard_warmup: bool = Field(
        True, description="Do not overrate the distance while the learning rate warms up."
    )


class ScheduleFree(_Adam):
    """Schedule-free AdamW (Defazio et al. 2024): the average of the weights in place of a decay.

    Its authors' README: learning rates 1 to 10 times those of AdamW with a schedule (3 times here),
    and warm-up.
    """

    type: Literal["schedulefree"] = Field("schedulefree", description="Schedule-free AdamW.")
    library: ClassVar[str] = "schedulefree.AdamWScheduleFree"
    state_size: ClassVar[float] = 2.0
    one_lr: ClassVar[str | None] = (
        "schedulefree weighs the weights that it averages by one learning rate"
    )
    lr: float = Field(3e-4, gt=0, le=1, description="Learning rate after the warm-up.")
    betas: Betas = Field(
        (0.9, 0.999), description="Share of the average where gradients are taken; running square."
    )

    @model_validator(mode="after")
    def _averages(self) -> ScheduleFree:
        if self.betas[0] == 0:
            raise ValueError("betas: the first must be above 0, or there is no average")
        return self


def _type_of(value: Any) -> Any:
    return value.get("type", "adamw") if isinstance(value, dict) else getattr(value, "type", None)


_TYPES = ("adamw", "adamw8bit", "adafactor", "lion", "prodigy", "schedulefree")

#: Any optimiser; a mapping without `type` is an AdamW.
Optimizer = Annotated[
    Annotated[AdamW, Tag("adamw")]
    | Annotated[AdamW8bit, Tag("adamw8bit")]
    | Annotated[Adafactor, Tag("adafactor")]
    | Annotated[Lion, Tag("lion")]
    | Annotated[Prodigy, Tag("prodigy")]
    | Annotated[ScheduleFree, Tag("schedulefree")],
    Discriminator(
        _type_of,
        custom_error_type="optimizer_type",
        custom_error_message=f"type must be one of {', '.join(_TYPES)}",
    ),
]
