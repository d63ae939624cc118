"""The recipe: every decision of one training run, as a strict config, and the trial's id.

A mapping (from YAML) in, a frozen `Recipe` out. Nothing here knows a model or a device.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import Literal

from pydantic import Field, field_validator, model_validator

from captioning import DatasetVersion
from training.optimizer import AdamW, Optimizer
from training.strict import Strict

# Length of a trial's id: 48 bits, so among a million trials a clash has odds of one in 500.
TRIAL_ID_HEX_DIGITS = 12


# The presets of `network.targets`.
CONV_PRESET = "attention+ff+conv"
PRESETS = ("attention", "attention+ff", CONV_PRESET)
REGEX = "regex:"

# Settings that the first trials did not have, with the values that change nothing.
_ADDED_LATER = (
    ("network", "rank_stabilised", False),
    ("network", "init", "default"),
    ("network", "conv_rank", None),
    ("network", "conv_alpha", None),
    ("network", "text_encoder", None),
    ("network", "nested_ranks", None),
    ("optimizer", "lora_plus_ratio", 1.0),
    ("", "huber_c", None),
    ("", "noise_offset", 0.0),
    ("", "tag_orders", 1),
    ("", "masked_loss", None),
    ("", "prior_weight", 0.0),
    ("", "class_pictures", None),
    ("", "class_prompt", None),
    ("", "timestep_sampling", None),
    ("", "timestep_shift", None),
    ("", "ema_decay", None),
    ("", "aspect_buckets", False),
    ("", "base_precision", "auto"),
)


class TextEncoder(Strict):
    """The adapter on the text encoders: it is like the denoiser's except for these settings."""

    rank: int | None = Field(
        None,
        ge=1,
        le=256,
        strict=True,
        description="The rank on the text encoders. None: network.rank, as in kohya's and "
        "diffusers' trainers.",
    )
    alpha: float | None = Field(
        None,
        gt=0,
        description="The alpha there. None: network.alpha, and where that is not said either, the "
        "rank there.",
    )
    lr: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Peak learning rate there, with the same schedule (kohya's text_encoder_lr). "
        "None: that of the optimiser, as in kohya.",
    )


class Network(Strict):
    """Which adapter is put on the denoiser (the UNet, or the transformer), and on text encoders."""

    method: Literal["lora", "dora"] = Field(
        "lora",
        description="lora: low-rank updates (Hu et al. 2021). dora: the same plus trained "
        "magnitudes of the weights' rows or columns (Liu et al. 2024).",
    )
    rank: int = Field(16, ge=1, le=256, strict=True, description="Rank r of every update B·A.")
    alpha: float | None = Field(
        None, gt=0, description="The update is scaled by alpha/rank. None: alpha = rank."
    )
    rank_stabilised: bool = Field(
        False,
        description="Scale by alpha/√rank instead, so that a larger rank learns no slower "
        "(Kalajdzievski 2023, rsLoRA).",
    )
    init: Literal["default", "pissa"] = Field(
        "default",
        description="default: A random, B zero, as PEFT has it. pissa: the largest singular values "
        "and vectors of every weight (Meng et al. 2024); what is trained is their change, so the "
        "adapter's file has twice the rank.",
    )
    dora_axis: Literal["input", "output"] = Field(
        "input",
        description="dora: what has a magnitude. input: every input column of a weight, as "
        "ComfyUI, A1111, Forge and InvokeAI compute it. output: every output row, as PEFT and "
        "diffusers do. In the other tools an export is exact too, but as large as the layers.",
    )
    targets: str = Field(
        "attention",
        description="attention: q, k, v and output projections of all attention layers. "
        "attention+ff: also the linear layers of the feed-forward blocks. attention+ff+conv "
        "(UNets): also the layers before and after every transformer, and in residual blocks and "
        "samplers the convolutions and time projections, which are the layers of kohya's LoCon. "
        "regex:PATTERN: all linear and convolution layers in whose name, such as "
        "mid_block.attentions.0.transformer_blocks.0.attn1.to_q, PATTERN is found.",
    )
    conv_rank: int | None = Field(
        None,
        ge=1,
        le=256,
        strict=True,
        description="The rank on convolutions of more than one cell (3 × 3), LoCon's conv_dim. "
        "None: rank.",
    )
    conv_alpha: float | None = Field(
        None,
        gt=0,
        description="The alpha on these convolutions. None: alpha, and where that is not said "
        "either, conv_rank.",
    )
    text_encoder: TextEncoder | None = Field(
        None,
        description="{rank, alpha, lr}, or {} for their defaults: also train an adapter on the "
        "text encoders (sd15, sdxl; diffusers' --train_text_encoder, and kohya's trainer without "
        "--network_train_unet_only). On their q, k, v and output projections, and their "
        "feed-forward layers where targets is a preset with those. None: they stay as they are.",
    )

    nested_ranks: tuple[int, ...] | None = Field(
        None,
        description="Ranks at which the adapter is cut afterwards, rising up to rank, such as "
        "[4, 8, 16]: every step trains it cut at one of them, which is drawn (DyLoRA, Valipour et "
        "al. 2022; Kusupati et al. 2022). Each is a candidate of its own, approximate: a run at "
        "that rank alone ends elsewhere. None: rank alone is trained.",
    )

    @field_validator("targets")
    @classmethod
    def _targets_are_known(cls, targets: str) -> str:
        if targets.startswith(REGEX):
            try:
                re.compile(targets.removeprefix(REGEX))
            except re.error as error:
                raise ValueError(f"{targets!r} is no regular expression ({error})") from error
        elif targets not in PRESETS:
            raise ValueError(f"{targets!r} is not one of {', '.join(PRESETS)}, {REGEX}PATTERN")
        return targets

    @model_validator(mode="after")
    def _conv_settings_have_layers(self) -> Network:
        if self.targets in PRESETS and self.targets != CONV_PRESET:
            for field in ("conv_rank", "conv_alpha"):
                if getattr(self, field) is not None:
                    raise ValueError(
                        f"{field} is of convolutions, and targets {self.targets} has none: leave "
                        f"it out, or set targets to {CONV_PRESET}"
                    )
        return self

    @model_validator(mode="after")
    def _nested_ranks_can_be_cut(self) -> Network:
        ranks = self.nested_ranks
        if ranks is None:
            return self
        if len(ranks) < 2 or ranks[0] < 1 or list(ranks) != sorted(set(ranks)):
            raise ValueError(f"nested_ranks {list(ranks)} are not two or more rising ranks")
        if self.rank not in ranks:
            raise ValueError(
                f"rank {self.rank} is none of nested_ranks {list(ranks)}: set it to the largest"
            )
        if self.init == "pissa":
            raise ValueError(
                "nested_ranks cut B·A, and the update of init pissa is B·A - B0·A0, of twice the "
                "rank: use init default"
            )
        if self.conv_rank is not None:
            raise ValueError(
                "nested_ranks cut all layers at one rank, and conv_rank gives convolutions one of "
                "their own: leave it out"
            )
        if self.text_encoder is not None and self.text_encoder.rank is not None:
            raise ValueError(
                "nested_ranks cut all layers at one rank, and text_encoder.rank gives text "
                "encoders one of their own: leave it out"
            )
        return self

    def of_kernels(self) -> Network:
        """The same network with the rank and alpha of convolutions over more than one cell."""
        rank = self.rank if self.conv_rank is None else self.conv_rank
        alpha = self.alpha if self.conv_alpha is None else self.conv_alpha
        return self.model_copy(update={"rank": rank, "alpha": alpha})

    def of_encoders(self) -> Network:
        """The same network with the rank and alpha of the text encoders."""
        own = self.text_encoder or TextEncoder()
        rank = self.rank if own.rank is None else own.rank
        alpha = self.alpha if own.alpha is None else own.alpha
        return self.model_copy(update={"rank": rank, "alpha": alpha})

    @property
    def title(self) -> str:
        """`lora r16`, or `lora r16 + text r8` with an adapter on the text encoders."""
        text = "" if self.text_encoder is None else f" + text r{self.of_encoders().rank}"
        return f"{self.method} r{self.rank}{text}"

    @property
    def has_feed_forward(self) -> bool:
        """Whether `targets` is a preset with the feed-forward layers."""
        return self.targets in ("attention+ff", CONV_PRESET)

    @property
    def target_pattern(self) -> re.Pattern[str] | None:
        """The regular expression of `targets`; None for a preset."""
        if not self.targets.startswith(REGEX):
            return None
        return re.compile(self.targets.removeprefix(REGEX))

    @property
    def effective_alpha(self) -> float:
        return float(self.rank) if self.alpha is None else self.alpha

    @property
    def stored_rank(self) -> int:
        """The rank of the update in files; with PiSSA the update is B·A - B0·A0."""
        return 2 * self.rank if self.init == "pissa" else self.rank

    @property
    def scale(self) -> float:
        """The factor by which B·A is multiplied."""
        return self.effective_alpha / (self.rank**0.5 if self.rank_stabilised else self.rank)


class Schedule(Strict):
    """The learning rate over the steps."""

    type: Literal["constant", "wsd", "cosine"] = Field(
        "constant",
        description="constant: every step count on the way is a fair candidate. wsd: constant, "
        "then a 1 - sqrt cooldown. cosine: half a cosine to zero.",
    )
    warmup_steps: int = Field(0, ge=0, strict=True, description="Linear warm-up, in steps.")
    decay_share: float = Field(
        0.2, gt=0, le=1, description="wsd: the share of all steps that the cooldown takes."
    )


class Recipe(Strict):
    """All that decides one training run; with a dataset version and a base it names a trial."""

    network: Network = Field(default_factory=Network, description="The adapter.")
    optimizer: Optimizer = Field(default_factory=AdamW, description="The optimiser.")
    schedule: Schedule = Field(default_factory=Schedule, description="The learning rate.")
    steps: int = Field(800, ge=1, le=1_000_000, strict=True, description="Optimiser steps.")
    checkpoint_every: int = Field(
        200,
        ge=1,
        strict=True,
        description="Steps between checkpoints; each is scored. The last step always is one.",
    )
    batch_size: int = Field(
        4, ge=1, le=1024, strict=True, description="Samples per micro-batch and worker."
    )
    accumulation: int = Field(
        1, ge=1, le=1024, strict=True, description="Micro-batches per optimiser step."
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto",
        description="Of the forward and backward pass; adapter weights and optimiser stay fp32. "
        "auto: fp16 on CUDA (bf16 for flow models), fp32 on CPU. fp16 is refused for FLUX, FLUX.2, "
        "Z-Image and Qwen-Image, which overflow it.",
    )
    base_precision: Literal["auto", "int8", "nf4"] = Field(
        "auto",
        description="How the frozen base's linear layers are held. auto: fp32, or half on CUDA. "
        "int8: 8 bits with a scale for each row. nf4: 4 bits (Dettmers et al. 2023, QLoRA). They "
        "are for bases that do not fit otherwise: the adapter is trained and scored on the rounded "
        "weights.",
    )
    resolution: int | None = Field(
        None,
        ge=8,
        le=4096,
        strict=True,
        description="Side of the square training crop in pixels. None: the base's own size.",
    )
    aspect_buckets: bool = Field(
        False,
        description="Crop every picture to the size nearest its own ratio, of at most resolution² "
        "pixels, and not to the centre square (the buckets of NovelAI and kohya). All samples of a "
        "step are of one size.",
    )
    bucket_step_px: int = Field(
        64,
        ge=8,
        le=1024,
        strict=True,
        description="With aspect_buckets: what the sides are multiples of, beside what the base "
        "itself needs (kohya's bucket_reso_steps, 64).",
    )
    bucket_max_ratio: float = Field(
        4.0,
        gt=1,
        le=16,
        description="With aspect_buckets: the largest ratio of the long side to the short one; "
        "what is longer is cropped to it. 4: SDXL's own (Podell et al. 2023, appendix I).",
    )
    min_snr_gamma: float | None = Field(
        5.0,
        gt=0,
        description="Min-SNR loss weighting (Hang et al. 2023, whose best gamma is 5). "
        "None: every timestep weighs the same, as with flows (SD3 and later) always.",
    )
    timestep_sampling: Literal["uniform", "logit_normal"] | None = Field(
        None,
        description="How often each noise level is trained. logit_normal: the middle ones more "
        "often (Esser et al. 2024). None: the family's own, uniform for SD and SDXL, logit_normal "
        "for flows.",
    )
    timestep_shift: float | None = Field(
        None,
        gt=0,
        le=100,
        description="Flows: times are moved towards noise, s·t/(1 + (s - 1)·t) (Esser et al. "
        "2024). None: the base's own shift at this resolution.",
    )
    huber_c: float | None = Field(
        None,
        gt=0,
        description="Pseudo-Huber loss 2c(√(e² + c²) - c) of every error e: errors over c weigh "
        "less, so that odd pictures spoil less (kohya and diffusers start from 0.1). None: e².",
    )
    noise_offset: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Size of a noise that is the same all over a channel, added to the noise, for "
        "darker and brighter pictures (Guttenberg 2023, who uses 0.1).",
    )
    caption_dropout: float = Field(
        0.1,
        ge=0,
        le=1,
        description="Share of samples trained with the empty caption, for classifier-free "
        "guidance (Ho & Salimans 2022 use 0.1 to 0.2).",
    )
    tag_orders: int = Field(
        1,
        ge=1,
        le=64,
        strict=True,
        description="Orders of each caption's tags that are trained: the written one and random "
        "ones (kohya's shuffle_caption; each is encoded once). 1: as written.",
    )
    kept_tags: int = Field(
        2,
        ge=0,
        strict=True,
        description="With several tag_orders, how many tags at the front stay where they are: the "
        "trigger and the class word (kohya's keep_tokens).",
    )
    masked_loss: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="What transparent parts of pictures count for in the loss, where opaque ones "
        "count 1: 0 leaves them out, 0.1 is OneTrainer's. None: all parts count.",
    )
    prior_weight: float = Field(
        0.0,
        ge=0,
        le=10,
        description="Weight of prior preservation, so that the class word does not become the "
        "character (Ruiz et al. 2023, weight 1): the loss on class_pictures, or without them that "
        "of keeping what the base itself answers to every caption without the trigger. A step "
        "computes twice as many samples; without class_pictures the base's answers come on top.",
    )
    class_pictures: str | None = Field(
        None,
        min_length=1,
        description="Folder or ZIP file of others of the class, with captions beside them: as many "
        "samples of them as of the character are in every step, weighing prior_weight (DreamBooth, "
        "Ruiz et al. 2023; kohya's regularisation images). They are kept in the store as a set, "
        "whose name can stand here too. None: the base is the teacher of prior_weight.",
    )
    class_prompt: str | None = Field(
        None,
        min_length=1,
        description="The caption of all class_pictures, such as the class word. None: the captions "
        "beside them.",
    )
    flip: bool = Field(False, description="Also train on the mirrored pictures.")
    clip_norm: float | None = Field(
        1.0, gt=0, description="Largest norm of the whole gradient. None: no clipping."
    )
    ema_decay: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Keep an exponential moving average of the adapter with this decay, which "
        "grows towards it as (1 + n)/(10 + n) over n steps (diffusers' EMAModel). The average is "
        "what is scored, exported and registered; training goes on from the weights themselves. "
        "None: no average.",
    )
    seed: int = Field(
        0, ge=0, lt=2**63, strict=True, description="Of the initial weights and of every draw."
    )

    @model_validator(mode="after")
    def _warmup_fits(self) -> Recipe:
        if self.schedule.warmup_steps > self.steps:
            raise ValueError(
                f"schedule.warmup_steps {self.schedule.warmup_steps} is more than steps "
                f"{self.steps}"
            )
        return self

    @model_validator(mode="after")
    def _class_pictures_count(self) -> Recipe:
        if self.class_pictures is not None and self.prior_weight == 0:
            raise ValueError(
                "class_pictures are trained with prior_weight, which is 0: set it, 1 is usual, or "
                "leave class_pictures out"
            )
        if self.class_pictures is not None and self.aspect_buckets:
            raise ValueError(
                "class_pictures are cropped to squares, and a step's samples are of one shape: "
                "leave out aspect_buckets or class_pictures"
            )
        if self.class_prompt is not None and self.class_pictures is None:
            raise ValueError(
                "class_prompt is the caption of class_pictures: name these, or leave it out"
            )
        return self

    @model_validator(mode="after")
    def _averages_once(self) -> Recipe:
        if self.optimizer.type == "schedulefree" and self.schedule.type != "constant":
            raise ValueError(
                f"schedule.type {self.schedule.type} decays the learning rate, and optimizer.type "
                "schedulefree averages the weights in place of a decay: use constant, with warm-up"
            )
        if self.optimizer.type == "schedulefree" and self.ema_decay is not None:
            raise ValueError(
                f"ema_decay {self.ema_decay} would average the weights a second time, after "
                "optimizer.type schedulefree: leave one of them out"
            )
        return self

    @model_validator(mode="after")
    def _encoders_learn_at_a_rate_that_can_be_set(self) -> Recipe:
        own, reason = self.network.text_encoder, self.optimizer.one_lr
        if own is not None and own.lr is not None and reason is not None:
            raise ValueError(f"network.text_encoder.lr cannot be set: {reason}; leave it out")
        return self

    @property
    def encoder_lr(self) -> float:
        """The peak learning rate of the text encoders' adapter."""
        own = self.network.text_encoder
        return self.optimizer.lr if own is None or own.lr is None else own.lr

    def canonical(self) -> str:
        """One line of sorted JSON; recipes that train the same way give the same text."""
        data = self.model_dump(mode="json")
        data["network"]["alpha"] = self.network.effective_alpha
        if self.network.method == "lora" or self.network.dora_axis == "output":
            # A LoRA has no axis, and `output` was the only axis when the first trials were named.
            del data["network"]["dora_axis"]
        if self.tag_orders == 1:
            del data["kept_tags"]
        if not self.aspect_buckets:
            del data["bucket_step_px"], data["bucket_max_ratio"]
        linear, kernels = self.network, self.network.of_kernels()
        rank, alpha = kernels.rank, kernels.effective_alpha
        data["network"]["conv_rank"] = None if rank == linear.rank else rank
        data["network"]["conv_alpha"] = None if alpha == linear.effective_alpha else alpha
        if self.network.text_encoder is not None:
            encoders = self.network.of_encoders()
            data["network"]["text_encoder"] = {
                "rank": encoders.rank,
                "alpha": encoders.effective_alpha,
                "lr": self.encoder_lr,
            }
        # Settings at these values change nothing; without them older trials keep their ids.
        for part, key, usual in _ADDED_LATER:
            place = data[part] if part else data
            if key in place and place[key] == usual:
                del place[key]
        return json.dumps(data, sort_keys=True, separators=(",", ":"))

    @property
    def samples_per_pass(self) -> int:
        """The samples of one trial in a forward pass: class pictures double a micro-batch."""
        return self.batch_size * (1 if self.class_pictures is None else 2)

    def checkpoint_steps(self) -> tuple[int, ...]:
        """The steps with a checkpoint: multiples of `checkpoint_every`, and the last step."""
        return (*range(self.checkpoint_every, self.steps, self.checkpoint_every), self.steps)


def trial_id(dataset: DatasetVersion, base_hash: str, recipe: Recipe) -> str:
    """`t` and 12 hex digits; the same dataset version, base and recipe always give the same id."""
    content = [dataset.name, dataset.manifest_sha256, base_hash, recipe.canonical()]
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return "t" + digest[:TRIAL_ID_HEX_DIGITS]
