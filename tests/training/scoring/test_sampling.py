"""Pictures from prompts and seeds: against diffusers' own pipeline, and free of side effects."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

from captioning import UserError
from training.families import Base
from training.scoring.sampling import initial_noise, sample

PROMPTS = ["zkw, person, red shirt", "a blue car", "person"]
SEEDS = [3, 1, 2]


def draw(base: Base, prompts: list[str], seeds: list[int], **options: object) -> np.ndarray:
    return sample(base, prompts, seeds, **{"steps": 4, "guidance": 3.0, **options})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["tiny_base", "tiny_v_base"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_equals_the_stable_diffusion_pipeline(
    name: str, guidance: float, request: pytest.FixtureRequest
) -> None:
    base: Base = request.getfixturevalue(name)
    pipeline = StableDiffusionPipeline(
        vae=base.vae,
        text_encoder=base.text_encoders["text_encoder"],
        tokenizer=base.tokenizers["tokenizer"],
        unet=base.denoiser,
        scheduler=DDIMScheduler.from_pretrained(base.folder, subfolder="scheduler"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    size_px = base.native_size_px
    wanted = pipeline(
        PROMPTS,
        negative_prompt=[""] * 3,
        num_inference_steps=4,
        guidance_scale=guidance,
        height=size_px,
        width=size_px,
        latents=initial_noise(base, SEEDS, size_px),
        output_type="np",
    ).images
    found = draw(base, PROMPTS, SEEDS, guidance=guidance)
    assert found.shape == (3, size_px, size_px, 3) and found.dtype == np.uint8
    # The tiny VAE is random, so a rounding of the last bit may show as one level.
    assert np.abs(found.astype(int) - (wanted * 255).round()).max() <= 1


def test_a_picture_depends_on_its_prompt_and_seed_alone(tiny_v_base: Base) -> None:
    together = draw(tiny_v_base, PROMPTS, SEEDS)
    for index in range(3):
        alone = draw(tiny_v_base, [PROMPTS[index]], [SEEDS[index]])[0]
        assert (
            np.abs(alone.astype(int) - together[index]).max() <= 1
        )  # batch sizes round differently
    split = draw(tiny_v_base, PROMPTS, SEEDS, batch=2)
    assert np.abs(split.astype(int) - together).max() <= 1
    assert not np.array_equal(together[0], draw(tiny_v_base, PROMPTS[:1], [99])[0])
    assert not np.array_equal(together[0], draw(tiny_v_base, ["a dog"], SEEDS[:1])[0])


def test_the_same_call_gives_the_same_bytes_and_leaves_no_trace(tiny_v_base: Base) -> None:
    tiny_v_base.denoiser.train()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = draw(tiny_v_base, PROMPTS, SEEDS)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(6)
    assert np.array_equal(first, draw(tiny_v_base, PROMPTS, SEEDS))
    assert tiny_v_base.denoiser.training


def test_prompts_are_encoded_once(tiny_base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[str] = []
    encode = tiny_base.encode_prompts

    def counted(prompts: list[str]) -> dict[str, torch.Tensor]:
        encoded.extend(prompts)
        return encode(prompts)

    monkeypatch.setattr(tiny_base, "encode_prompts", counted)
    draw(tiny_base, ["a", "b", "a"], [1, 2, 3])
    draw(tiny_base, ["b", "c"], [1, 2])
    assert sorted(encoded) == ["", "a", "b", "c"]


def test_latents_are_never_clamped(tiny_base: Base) -> None:
    scheduler = tiny_base.sampler(4, initial_noise(tiny_base, SEEDS, 64))
    assert not scheduler.config.clip_sample and not scheduler.config.thresholding
    assert scheduler.config.prediction_type == "epsilon"
    assert scheduler.config.beta_schedule == "scaled_linear"


def test_other_sizes_than_the_native_one(tiny_base: Base) -> None:
    assert draw(tiny_base, ["a"], [1], size_px=32).shape == (1, 32, 32, 3)
    with pytest.raises(UserError, match="use 40"):
        draw(tiny_base, ["a"], [1], size_px=37)


def test_no_prompts_no_pictures(tiny_base: Base) -> None:
    assert draw(tiny_base, [], []).shape == (0, 64, 64, 3)
    with pytest.raises(ValueError, match="1 prompts, but 2 seeds"):
        draw(tiny_base, ["a"], [1, 2])


def limit_pictures(base: Base, most: int, where: str, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let memory run out in `where` above `most` pictures at once; the numbers that it sees."""
    counts: list[int] = []
    act = getattr(base, where)

    def limited(latents: torch.Tensor, *arguments: object) -> torch.Tensor:
        counts.append(len(latents))
        if len(latents) > most:
            raise torch.OutOfMemoryError("no room for it\nand more words")
        return act(latents, *arguments)

    monkeypatch.setattr(base, where, limited)
    return counts


@pytest.mark.parametrize("where", ["predict", "decode"])
def test_when_memory_runs_out_fewer_pictures_are_drawn_at_once(
    tiny_v_base: Base, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, seeds = [*PROMPTS, "a dog", "a cat"], [*SEEDS, 7, 8]
    wanted = draw(tiny_v_base, prompts, seeds, guidance=1.0, steps=1)
    counts = limit_pictures(tiny_v_base, 1, where, monkeypatch)
    found = draw(tiny_v_base, prompts, seeds, guidance=1.0, steps=1, batch=4)
    assert np.abs(found.astype(int) - wanted).max() <= 1  # batch sizes round differently
    assert counts == [4, 2, 1, 1, 1, 1, 1]


def test_memory_that_does_not_suffice_for_a_picture_is_told_with_a_remedy(
    tiny_base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = limit_pictures(tiny_base, 0, "predict", monkeypatch)
    with pytest.raises(UserError, match=r"scoring: size_px.*no room for it.*picture of 64 px"):
        draw(tiny_base, PROMPTS, SEEDS, guidance=1.0)
    assert counts == [3, 1]


def test_other_errors_and_lacks_of_a_shared_base_are_raised_at_once(
    tiny_base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = limit_pictures(tiny_base, 1, "predict", monkeypatch)
    # What tells a weight that is spread over workers: PyTorch's DTensor has placements.
    monkeypatch.setattr(tiny_base.denoiser.conv_in.weight, "placements", (), raising=False)
    with pytest.raises(torch.OutOfMemoryError):
        draw(tiny_base, PROMPTS, SEEDS, guidance=1.0)
    assert counts == [3]

    def broken(*_: object) -> torch.Tensor:
        counts.append(0)
        raise RuntimeError("a wrong shape")

    monkeypatch.undo()
    monkeypatch.setattr(tiny_base, "predict", broken)
    with pytest.raises(RuntimeError, match="a wrong shape"):
        draw(tiny_base, PROMPTS, SEEDS)
    assert counts == [3, 0]
