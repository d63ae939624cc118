"""DeepSpeed's config, against what the docs print of it."""

import json
import re
from pathlib import Path

import pytest
import torch

from training.frozen.zero import zero_config

DOCS = Path(__file__).parents[3] / "docs/gpus.md"


@pytest.mark.parametrize("offload", [True, False])
@pytest.mark.parametrize(
    ("dtype", "enabled"), [(torch.float16, "fp16"), (torch.bfloat16, "bf16"), (torch.float32, None)]
)
def test_the_config_is_what_the_docs_print(
    dtype: torch.dtype, enabled: str | None, offload: bool
) -> None:
    (block,) = re.findall(r"(?ms)^```json\n(.*?)^```$", DOCS.read_text("utf-8"))
    printed = json.loads(block)
    # As the text below it says: with offload_base, and as the base is held.
    switched_on = printed.pop("fp16")
    if enabled is not None:
        printed[enabled] = switched_on
    if not offload:
        del printed["zero_optimization"]["offload_param"]
    assert zero_config(dtype, offload) == printed
