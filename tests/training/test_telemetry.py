"""What a pack tells of itself, against tensors and clocks counted by hand."""

from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from transformers import CLIPTextModel

from training.data.latents import LatentCache
from training.events import PackMeasured, StepTaken
from training.families import Base
from training.loop import Callbacks, train_pack
from training.pack.slot import Trial
from training.recipe import Recipe


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def recipe(**changes: Any) -> Recipe:
    data = {"network": {"rank": 4}, "steps": 3, "batch_size": 2, "accumulation": 2}
    return Recipe.model_validate({**data, **changes})


def events_of(base: Base, cache: LatentCache, folder: Path, *recipes: Recipe) -> list[Any]:
    events: list[Any] = []
    trials = [Trial(folder / f"t{number}", recipe, cache) for number, recipe in enumerate(recipes)]
    train_pack(base, trials, Callbacks(lambda *a: pytest.fail(str(a)), on_event=events.append))
    return events


def test_the_bytes_of_a_slot_are_those_of_peft_s_parameters_and_adamw(
    tiny_base: Base, tiny_base_path: Path, tiny_cache: LatentCache, tmp_path: Path
) -> None:
    events = events_of(tiny_base, tiny_cache, tmp_path, recipe(), recipe(seed=1))
    (pack,) = [event for event in events if isinstance(event, PackMeasured)]
    unet = UNet2DConditionModel.from_pretrained(tiny_base_path, subfolder="unet")
    assert pack.base_bytes == sum(p.numel() * 4 for p in unet.parameters())
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=targets))
    count = sum(p.numel() for p in unet.parameters() if p.requires_grad)
    # Weights, gradients, two moments, and AdamW's count of steps.
    assert pack.slot_bytes == (4 * (count * 4 + 1),) * 2
    assert pack.trials == ("t0", "t1")


def test_trained_text_encoders_are_counted(
    tiny_base: Base, tiny_base_path: Path, tiny_cache: LatentCache, tmp_path: Path
) -> None:
    trained = recipe(network={"rank": 4, "text_encoder": {"rank": 2}})
    events = events_of(tiny_base, tiny_cache, tmp_path, trained)
    (pack,) = [event for event in events if isinstance(event, PackMeasured)]
    encoder = CLIPTextModel.from_pretrained(tiny_base_path, subfolder="text_encoder")
    assert pack.text_encoder_bytes == sum(
        tensor.nbytes for tensor in (*encoder.parameters(), *encoder.buffers())
    )
    plain = events_of(tiny_base, tiny_cache, tmp_path / "plain", recipe())
    (other,) = [event for event in plain if isinstance(event, PackMeasured)]
    assert other.text_encoder_bytes == 0
    # Two layers of four projections of 32 × 32, with A and B of rank 2: four copies, as above.
    assert pack.slot_bytes[0] - other.slot_bytes[0] == 4 * 4 * (2 * 4 * 2 * 2 * 32)


def test_a_pack_is_told_once_although_trials_leave_it(
    tiny_base: Base, tiny_cache: LatentCache, tmp_path: Path
) -> None:
    events = events_of(tiny_base, tiny_cache, tmp_path, recipe(steps=1), recipe(seed=1))
    assert [type(event) for event in events].count(PackMeasured) == 1


def test_speed_and_memory_of_every_step(
    tiny_base: Base, tiny_cache: LatentCache, tmp_path: Path
) -> None:
    events = events_of(tiny_base, tiny_cache, tmp_path, recipe(), recipe(seed=1))
    steps = [event for event in events if isinstance(event, StepTaken)]
    assert len(steps) == 6
    for event in steps:
        # 2 samples in each of 2 micro-batches, in a pack of two trials.
        assert event.images_per_s == pytest.approx(4 / (event.step_ms / 1000))
        assert event.pack_images_per_s == pytest.approx(8 / (event.step_ms / 1000))
        assert event.resident_bytes == pytest.approx(psutil.Process().memory_info().rss, rel=0.2)
