"""Families of image-to-text models, one file each, all with the same names in the same order.

`MODEL_TYPES` of transformers' configs, `FREE_PROMPT`, `DEFAULT_PROMPT`, `RETRY_PROMPT`, then
`load_processor(source)`, `inputs(processor, pictures, prompt)` and `new_tokens(tokens, inputs)`.
"""

from __future__ import annotations

from types import ModuleType

from captioning.errors import UserError
from captioning.observers.families import blip, blip2, florence2, llava, qwen_vl

FAMILIES = (blip, blip2, florence2, llava, qwen_vl)


def family_of(source: str, model_type: str) -> ModuleType:
    """The family of a transformers config's `model_type`; UserError when there is none."""
    for family in FAMILIES:
        if model_type in family.MODEL_TYPES:
            return family
    known = sorted(name for family in FAMILIES for name in family.MODEL_TYPES)
    raise UserError(
        source,
        f"no image-to-text model of a known family ({model_type})",
        f"give a model of one of these types: {', '.join(known)}; or serve it with vLLM and name "
        "it as an endpoint",
    )
