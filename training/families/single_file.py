"""Reads from its header what a single-file checkpoint holds, as Civitai and ComfyUI have them.

A path in, the family, parts and prediction type of the file out. Reads the safetensors header only,
never a tensor, never a pickle.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from captioning import UserError

# `file.safetensors`, or `file.safetensors@config`: what the file lacks is taken from `config`.
_SPELLING = re.compile(r"(?P<file>.+\.(?P<kind>safetensors|sft|ckpt|pt|pth|bin|gguf))(@(?P<c>.+))?")
_SAFE_KINDS = {"safetensors", "sft"}
# diffusers.loaders.single_file_utils.infer_diffusers_model_type, and what `_model_type` adds to it
# -> the pipeline of the family. A type that is missing here is of a model that takes more than
# text, or that cannot be trained.
PIPELINE_OF_TYPE = {
    "v1": "StableDiffusionPipeline",
    "v2": "StableDiffusionPipeline",
    "xl_base": "StableDiffusionXLPipeline",
    "sd3": "StableDiffusion3Pipeline",
    "sd35_medium": "StableDiffusion3Pipeline",
    "sd35_large": "StableDiffusion3Pipeline",
    "flux-dev": "FluxPipeline",
    "flux-schnell": "FluxPipeline",
    "flux-2-dev": "Flux2Pipeline",
    "flux-2-klein": "Flux2KleinPipeline",
    "z-image-turbo": "ZImagePipeline",
    "qwen-image": "QwenImagePipeline",
}
# The prefixes of the parts in the file: those of the original repositories, and ComfyUI's.
DENOISER_PREFIX = "model.diffusion_model."
_UNET = (DENOISER_PREFIX,)
_VAE = ("first_stage_model.", "vae.")
_WITHIN = (*_UNET, *_VAE, "cond_stage_model.", "conditioner.", "text_encoders.")
_CLIP_L, _CLIP_G, _T5 = (f"text_encoders.{name}." for name in ("clip_l", "clip_g", "t5xxl"))
PARTS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "StableDiffusionPipeline": {
        "unet": _UNET,
        "vae": _VAE,
        "text_encoder": ("cond_stage_model.",),
    },
    "StableDiffusionXLPipeline": {
        "unet": _UNET,
        "vae": _VAE,
        "text_encoder": ("conditioner.embedders.0.",),
        "text_encoder_2": ("conditioner.embedders.1.",),
    },
    "StableDiffusion3Pipeline": {
        "transformer": (DENOISER_PREFIX, "joint_blocks."),
        "vae": _VAE,
        "text_encoder": (_CLIP_L,),
        "text_encoder_2": (_CLIP_G,),
        "text_encoder_3": (_T5,),
    },
    "FluxPipeline": {
        "transformer": (DENOISER_PREFIX, "double_blocks."),
        "vae": _VAE,
        "text_encoder": (_CLIP_L,),
        "text_encoder_2": (_T5,),
    },
    # diffusers reads no text encoders from files of these families, and no VAE from the last three.
    "ZImagePipeline": {"transformer": (DENOISER_PREFIX, "layers."), "vae": _VAE},
    "Flux2Pipeline": {"transformer": (DENOISER_PREFIX, "double_blocks.")},
    "Flux2KleinPipeline": {"transformer": (DENOISER_PREFIX, "double_blocks.")},
    "QwenImagePipeline": {"transformer": (DENOISER_PREFIX, "transformer_blocks.")},
}
# Names of tensors that only models have which also take pictures as input.
_SHOWN_PICTURES = {
    "siglip_pad_token": "Z-Image-Omni",
    "__index_timestep_zero__": "Qwen-Image-Edit-2511",  # ComfyUI's mark
    "time_text_embed.addition_t_embedding.weight": "Qwen-Image-Layered",
}
# All Qwen-Image models have this one; diffusers' inference does not look for it.
_QWEN_IMAGE_KEY = "transformer_blocks.0.img_mod.1.weight"
# FLUX.2 [dev] has it and [klein] not, which diffusers takes for dev.
_GUIDANCE_KEY = "guidance_in.in_layer.weight"
_ADAPTER_KEYS = re.compile(
    r"\.lora_(up|down|[AB])\b|^lora_(unet|te|transformer)|\.hada_w1|\.lokr_w|\.dora_scale"
)
# Marks of weights that are numbers times scales (fp8 with scales, bitsandbytes, ComfyUI's own).
_QUANTISED_KEYS = re.compile(r"scaled_fp8|\.scale_weight|\.weight_scale|\.quant_state|\.absmax")
_DTYPES = {
    "F64": torch.float32,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    # Plain fp8 is widened, since no network is loaded in it.
    "F8_E4M3": torch.bfloat16,
    "F8_E5M2": torch.bfloat16,
}


@dataclass(frozen=True)
class Spelling:
    """A base given as `file` or `file@config`."""

    file: Path
    config: str | None  # folder or hub id

    def __str__(self) -> str:
        return str(self.file) if self.config is None else f"{self.file}@{self.config}"

    def absolute(self) -> Spelling:
        """The same base from any working directory."""
        config = self.config
        if config is not None and Path(config).expanduser().is_dir():
            config = str(Path(config).expanduser().resolve())
        return Spelling(self.file.expanduser().resolve(), config)


@dataclass(frozen=True)
class Contents:
    """What a checkpoint holds."""

    model_type: str  # as diffusers calls it
    pipeline: str
    default_config: str  # hub id of the configs that diffusers takes
    dtypes: Mapping[str, torch.dtype]  # the type of every part that is in the file
    size_bytes: int  # the bytes of the tensors, as they will be stored
    prediction_type: str | None  # None: the file does not say
    zero_terminal_snr: bool


def spelled(path_or_id: str | Path) -> Spelling | None:
    """The parts of `path_or_id` when it names a single file; None for a folder or a hub id."""
    found = _SPELLING.fullmatch(str(path_or_id))
    if found is None:
        path = Path(path_or_id).expanduser()
        return Spelling(path, None) if path.is_file() else None
    if Path(path_or_id).expanduser().is_dir():
        return None
    return Spelling(Path(found["file"]).expanduser(), found["c"])


def inspect(file: Path, rest: str | None = None) -> Contents:
    """What the checkpoint holds, by its header.

    The family is known by the tensors' names and shapes, as in diffusers. `rest` is the pipeline of
    the folder that completes the file: it decides for a UNet without text encoders, which is all
    that diffusers could know its family by. Raises UserError for what is no checkpoint of a
    family that can be trained: a pickle, a broken file, an adapter, a VAE alone, an inpainting
    model, quantised weights.
    """
    shapes, kinds, metadata = _header(file)
    names = list(shapes)
    _refuse_other_files(file, shapes)
    model_type, default_config = _model_type(shapes)
    pipeline = PIPELINE_OF_TYPE.get(model_type)
    encoders = PARTS["StableDiffusionPipeline"]["text_encoder"]
    if model_type == "v1" and rest in PARTS and not any(n.startswith(encoders) for n in names):
        pipeline = rest
    if pipeline is None:
        raise UserError(
            str(file),
            f"is a model of the kind {model_type!r}, which is not loaded from a single file here",
            f"use a text-to-image checkpoint of: {', '.join(PIPELINE_OF_TYPE)}; or the folder in "
            "diffusers layout of a family that docs/real-models.md lists",
        )
    dtypes, size_bytes = {}, 0
    for part, prefixes in PARTS[pipeline].items():
        own = [name for name in names if name.startswith(prefixes)]
        if own and not own[0].startswith(_WITHIN):
            own = names  # a denoiser alone, whose names have no prefix
        if own:
            dtypes[part] = _dtype(file, part, {name: kinds[name] for name in own}, shapes)
            elements = sum(torch.Size(shapes[name]).numel() for name in own)
            size_bytes += elements * dtypes[part].itemsize
    denoiser = next(iter(PARTS[pipeline]))
    if denoiser not in dtypes:
        held = f"only: {', '.join(dtypes)}" if dtypes else next(iter(names), "nothing")
        raise UserError(
            str(file),
            f"holds no {denoiser} of a known model ({held})",
            "give a whole text-to-image checkpoint, as it is offered for image generation",
        )
    prediction_type, zero_snr = _prediction(names, metadata)
    return Contents(
        model_type, pipeline, default_config, dtypes, size_bytes, prediction_type, zero_snr
    )


def _header(file: Path) -> tuple[dict[str, list[int]], dict[str, str], dict[str, str]]:
    """Shapes and dtypes by name, and the metadata."""
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        raise UserError(str(file), "no such file", "give the path of a checkpoint, or of a folder")
    kind = file.suffix.lstrip(".").lower()
    if kind not in _SAFE_KINDS:
        pickle = kind in {"ckpt", "pt", "pth", "bin"}
        raise UserError(
            str(file),
            "is a pickle, which can run code when it is opened, and is never loaded"
            if pickle
            else f"is a .{kind} file, not a safetensors checkpoint",
            "get the model as .safetensors (the same pages nearly always offer it)",
        )
    try:
        with safe_open(file, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            shapes = {name: list(part.get_shape()) for name, part in slices.items()}
            kinds = {name: str(part.get_dtype()) for name, part in slices.items()}
            return shapes, kinds, dict(opened.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise UserError(
            str(file),
            f"is no readable safetensors file ({str(error).splitlines()[0]})",
            "download it again; it may be cut off",
        ) from error


def _refuse_other_files(file: Path, names: Collection[str]) -> None:
    for name in names:
        if _ADAPTER_KEYS.search(name):
            raise UserError(
                str(file),
                f"is an adapter (LoRA or the like), not a base model: it holds {name}",
                "give the checkpoint that adapters are trained on",
            )
        bare = name.removeprefix(DENOISER_PREFIX)
        if bare in _SHOWN_PICTURES:
            raise UserError(
                str(file),
                f"is a {_SHOWN_PICTURES[bare]}, which is shown pictures beside the text",
                "use the text-to-image model of the family",
            )
        folders = ("down_blocks.", "transformer_blocks.", "encoder.down_blocks.")
        # Qwen-Image has the same names everywhere.
        if name.startswith(folders) and _QWEN_IMAGE_KEY not in names:
            raise UserError(
                str(file),
                f"is one network out of a diffusers folder: it holds {name}",
                "give the folder that holds model_index.json",
            )
        if name.startswith("edm_vpred."):
            raise UserError(
                str(file),
                "was trained with EDM's noise levels (CosXL), which no family here has",
                "use a checkpoint that predicts noise or v",
            )


def _model_type(shapes: Mapping[str, list[int]]) -> tuple[str, str]:
    """diffusers' name of the kind of model, and the hub id of its configs.

    Two kinds are added here: diffusers knows no Qwen-Image by its names, and FLUX.2 only as dev.
    Nothing in a klein shows whether it is distilled; the folder that completes it says so.
    """
    from diffusers.loaders.single_file_utils import (
        DIFFUSERS_DEFAULT_PIPELINE_PATHS,
        infer_diffusers_model_type,
    )

    bare = {name.removeprefix(DENOISER_PREFIX): shape for name, shape in shapes.items()}
    if _QWEN_IMAGE_KEY in bare:
        return "qwen-image", "Qwen/Qwen-Image"
    hollow = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    try:
        kind = infer_diffusers_model_type(hollow)
    except (LookupError, RuntimeError, NameError, ValueError, AttributeError):
        # diffusers reads values of ControlNets, and gives up on sizes that no published model has.
        return "unknown", ""
    if kind == "flux-2-dev" and _GUIDANCE_KEY not in bare:
        return "flux-2-klein", "black-forest-labs/FLUX.2-klein-base-4B"
    return kind, DIFFUSERS_DEFAULT_PIPELINE_PATHS[kind]["pretrained_model_name_or_path"]


def _dtype(
    file: Path, part: str, kinds: Mapping[str, str], shapes: Mapping[str, list[int]]
) -> torch.dtype:
    """The type in which most of a part's values are stored."""
    marked = next((name for name in kinds if _QUANTISED_KEYS.search(name)), None)
    counts: Counter[str] = Counter()
    for name, kind in kinds.items():
        counts[kind] += torch.Size(shapes[name]).numel()
    usual = counts.most_common(1)[0][0]
    if marked is not None or usual not in _DTYPES:
        raise UserError(
            str(file),
            f"its {part} is quantised ({marked or usual})",
            "use the fp16, bf16 or fp32 file of the model",
        )
    return _DTYPES[usual]


def _prediction(names: Iterable[str], metadata: Mapping[str, str]) -> tuple[str | None, bool]:
    """Whether the model predicts v, and whether its last step has no signal.

    NoobAI-XL and ComfyUI mark a checkpoint by two empty tensors, `v_pred` and `ztsnr`; without them
    the header's `modelspec.prediction_type` counts (ModelSpec 1.0.1: epsilon or v).
    """
    marks = {"v_pred", "ztsnr"} & set(names)
    said = metadata.get("modelspec.prediction_type", "").strip().lower()
    if "v_pred" in marks or said in {"v", "v_prediction"}:
        return "v_prediction", "ztsnr" in marks
    return ("epsilon" if said == "epsilon" else None), "ztsnr" in marks
