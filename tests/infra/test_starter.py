"""The committed starter models load through the public classes and keep what they promise."""

from __future__ import annotations

import csv
import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image
from transformers import (
    AutoProcessor,
    BlipForConditionalGeneration,
    CLIPModel,
    CLIPTokenizer,
)

ROOT = Path(__file__).parents[2]
STARTER = ROOT / "infra/starter"
TAGGER = ROOT / "captioning/starter/tagger"
CAPTIONER = ROOT / "captioning/starter/captioner"
CLIP = ROOT / "captioning/starter/clip"
BASE = ROOT / "training/starter"
MAX_FILE_BYTES = 30_000_000
MAX_TOTAL_BYTES = 60_000_000
DEMO = ROOT / "services/cli/demo/pictures"


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    return Image.open(DEMO / "aya/01.png").convert("RGB")


@pytest.fixture
def rules(monkeypatch: pytest.MonkeyPatch):
    """The caption rules of the data, imported as the build script imports them."""
    monkeypatch.syspath_prepend(str(STARTER))
    import avatars
    import captions
    import styles

    yield avatars, captions, styles
    for name in ("avatars", "captions", "styles"):
        sys.modules.pop(name, None)


def test_weights_stay_small_enough_for_git() -> None:
    files = [
        file
        for folder in (TAGGER, CAPTIONER, CLIP, BASE)
        for file in folder.rglob("*")
        if file.is_file()
    ]
    sizes = {file: file.stat().st_size for file in files}
    assert max(sizes.values()) < MAX_FILE_BYTES
    assert sum(sizes.values()) < MAX_TOTAL_BYTES
    assert not [file for file in files if file.suffix in (".bin", ".pt", ".pkl", ".ckpt")]


def test_base_draws_a_picture_through_the_public_pipeline() -> None:
    pipe = StableDiffusionPipeline.from_pretrained(BASE, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.safety_checker is None
    drawn = pipe(
        "person, purple hair, green background",
        num_inference_steps=4,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).images
    assert drawn.shape == (1, 64, 64, 3)
    assert np.isfinite(drawn).all()
    assert drawn.std() > 0.02


def test_scheduler_keeps_latents_unclamped_and_ends_in_pure_noise() -> None:
    config = json.loads((BASE / "scheduler/scheduler_config.json").read_text())
    assert config["clip_sample"] is False
    assert config["timestep_spacing"] == "trailing"
    assert config["prediction_type"] == "v_prediction"
    scheduler = DDIMScheduler.from_pretrained(BASE, subfolder="scheduler")
    assert float(scheduler.alphas_cumprod[-1]) == pytest.approx(0.0, abs=1e-6)


def test_weights_are_half_precision() -> None:
    from safetensors import safe_open

    for file in [*BASE.rglob("*.safetensors"), *CLIP.glob("*.safetensors")]:
        with safe_open(file, "pt") as weights:
            types = {weights.get_slice(name).get_dtype() for name in weights.keys()}  # noqa: SIM118
        assert types <= {"F16", "I64"}, file


@pytest.mark.parametrize("folder", [BASE / "tokenizer", CLIP])
@pytest.mark.parametrize("word", ["ayachar", "zqx7", "Łódź", "日本"])
def test_tokenizer_spells_a_word_that_it_never_saw(folder: Path, word: str) -> None:
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    assert tokenizer.model_max_length == 77
    ids = tokenizer(word)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.unk_token_id not in ids[1:-1]
    # CLIP's splitting sets digits apart, so a decoded word may have spaces inside.
    spelled = tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "")
    assert spelled == word.lower()


def test_tag_list_matches_the_outputs(picture: Image.Image) -> None:
    with (TAGGER / "selected_tags.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["tag_id", "name", "category", "count"]
    assert {row["category"] for row in rows} == {"0", "9"}
    assert not [row["name"] for row in rows if " " in row["name"]]
    session = onnxruntime.InferenceSession(
        str(TAGGER / "model.onnx"), providers=["CPUExecutionProvider"]
    )
    (given,) = session.get_inputs()
    assert given.shape[1:] == [64, 64, 3]
    bgr = np.asarray(picture.resize((64, 64)), np.float32)[None, ..., ::-1]
    for batch in (1, 3):
        (out,) = session.run(None, {given.name: np.repeat(bgr, batch, 0)})
        assert out.shape == (batch, len(rows))
        assert out.min() >= 0
        assert out.max() <= 1
    found = {row["name"] for row, score in zip(rows, out[0], strict=True) if score > 0.5}
    # A style that it never saw: what holds for every style is what it can be held to.
    assert {"light_skin", "portrait"} <= found


def test_captioner_writes_a_sentence_about_a_person(picture: Image.Image) -> None:
    model = BlipForConditionalGeneration.from_pretrained(CAPTIONER, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(CAPTIONER, backend="pil")
    inputs = processor(images=[picture], return_tensors="pt")
    out = model.generate(**inputs, num_beams=1, do_sample=False)
    text = processor.batch_decode(out, skip_special_tokens=True)[0]
    assert " of a person with " in text


def test_clip_prefers_the_true_caption(picture: Image.Image) -> None:
    model = CLIPModel.from_pretrained(CLIP, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(CLIP, backend="pil")
    texts = ["person, long hair, pink hair, yellow background", "person, green hair, bald"]
    inputs = processor(text=texts, images=[picture], padding=True, return_tensors="pt")
    logits = model(**inputs).logits_per_image[0]
    assert logits[0] > logits[1]


def test_demo_characters_have_their_pictures() -> None:
    for name in ("aya", "bruno"):
        files = sorted((DEMO / name).glob("*.png"))
        assert len(files) == 24
        for file in files:
            with Image.open(file) as opened:
                assert opened.size == (256, 256)
    assert "CC BY 4.0" in (DEMO / "ATTRIBUTION.md").read_text()


def test_captions_come_in_both_forms_and_agree_on_the_facts(rules) -> None:
    avatars, captions, styles = rules
    rng = random.Random(3)
    for style in (*styles.TRAIN_STYLES, *styles.HELD_OUT_STYLES):
        who = avatars.draw_identity(style, rng)
        avatar = avatars.draw_avatar(who, rng)
        tags, prose = captions.tag_caption(avatar), captions.prose(avatar)
        assert tags.startswith("person, ")
        assert " of a person with " in prose
        for text in (tags, prose):
            assert f"{avatar.background} background" in text
            assert avatar.framing in text
            assert f"{avatar.skin} skin" in text
            assert styles.STYLE_WORDS[style] in text


def test_the_same_somebody_keeps_hair_and_skin_over_pictures(rules) -> None:
    avatars, _, _ = rules
    rng = random.Random(4)
    who = avatars.draw_identity("micah", rng)
    drawn = [avatars.draw_avatar(who, rng) for _ in range(8)]
    assert len({(avatar.identity, avatar.hair, avatar.skin) for avatar in drawn}) == 1
    assert len({avatar.background for avatar in drawn}) > 1
    assert len({avatar.held_out for avatar in drawn}) == 1


def test_build_lists_its_stages() -> None:
    command = [sys.executable, str(STARTER / "build.py"), "--help"]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "demo-pictures" in out
