"""The three observers on tiny models: conventions, independent references, useful errors."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as Pillow
from tiny_onnx import TAGS, write_tagger

from captioning import Embedder, UserError
from captioning.observers.captioner import Captioner
from captioning.observers.tagger import Tagger

RED, BLUE, BLACK = (Pillow.new("RGB", (40, 40), name) for name in ("red", "blue", "black"))


def noise(seed: int, size: tuple[int, int] = (48, 40)) -> Pillow.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return Pillow.fromarray(pixels)


def test_the_tagger_feeds_bgr_from_0_to_255(tiny_tagger: Path):
    red, blue = Tagger(tiny_tagger).observe([RED, BLUE])
    assert red.tags == {"red hair": 0.9996, "^_^": 0.9996}  # sigmoid((255 - 128) / 16)
    assert blue.tags == {"blue sky": 0.9996}


def test_scores_below_5_percent_are_left_out_and_categories_are_kept(tiny_tagger: Path):
    red, black = Tagger(tiny_tagger).observe([RED, BLACK])
    assert black.tags == {}  # the rating alone scores high
    assert black.other_tags == {"general": 0.9526} and black.categories == {"general": 9}
    assert red.categories == {"general": 9, "red hair": 4}
    assert black.fields() == {
        "tags": {},
        "other_tags": {"general": 0.9526},
        "categories": {"general": 9},
    }


def test_the_tagger_pads_with_white_to_a_square(tiny_tagger: Path):
    wide = Pillow.new("RGB", (64, 32), "black")  # half of its square is white
    (seen,) = Tagger(tiny_tagger).observe([wide])
    assert seen.tags["blue sky"] == pytest.approx(1 / (1 + np.exp(0.5 / 16)), abs=0.02)


@pytest.mark.parametrize("batch", [1, 4])
def test_a_model_of_one_fixed_batch_size_gives_the_same(
    tmp_path: Path, tiny_tagger: Path, batch: int
):
    pictures = [noise(seed) for seed in range(6)]
    fixed = Tagger(write_tagger(tmp_path / "fixed", batch=batch))
    assert fixed.observe(pictures) == Tagger(tiny_tagger).observe(pictures)


def test_the_revision_changes_with_the_files(tmp_path: Path, tiny_tagger: Path):
    same = tmp_path / "tiny-tagger"
    shutil.copytree(tiny_tagger, same)
    assert Tagger(same).revision == Tagger(tiny_tagger).revision
    tags = same / "selected_tags.csv"
    tags.write_text(tags.read_text().replace("blue_sky", "azure_sky"))
    assert Tagger(same).revision != Tagger(tiny_tagger).revision


def test_a_folder_that_is_no_tagger_is_named(tmp_path: Path, tiny_tagger: Path):
    with pytest.raises(UserError, match="there is no such folder"):
        Tagger(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"model\.onnx is missing"):
        Tagger(tmp_path)
    broken = tmp_path / "broken"
    shutil.copytree(tiny_tagger, broken)
    (broken / "model.onnx").write_bytes(b"not onnx")
    with pytest.raises(UserError, match="not an ONNX model"):
        Tagger(broken)


def test_a_tag_list_of_another_model_is_refused(tmp_path: Path):
    folder = write_tagger(tmp_path / "tagger")
    tags = folder / "selected_tags.csv"
    tags.write_text("\n".join(tags.read_text().splitlines()[:-1]))
    with pytest.raises(UserError, match=f"{len(TAGS) - 1} tags for a model of {len(TAGS)}"):
        Tagger(folder)
    tags.write_text("just,nothing\n1,2\n")
    with pytest.raises(UserError, match="it needs the columns"):
        Tagger(folder)


def test_captions_are_the_same_alone_and_in_a_batch(tiny_captioner: Path):
    captioner = Captioner(tiny_captioner)
    pictures = [noise(seed, (30 + seed, 50)) for seed in range(5)]
    together = captioner.observe(pictures)
    assert together == [captioner.observe([picture])[0] for picture in pictures]
    assert together == captioner.observe(pictures)
    assert all(set(text.split()) <= {"a", "red", "blue", "woman"} and text for text in together)


def test_greedy_search_is_what_generate_gives_by_hand(tiny_captioner: Path):
    from transformers import BlipForConditionalGeneration, BlipProcessor

    model = BlipForConditionalGeneration.from_pretrained(tiny_captioner).eval()
    processor = BlipProcessor.from_pretrained(tiny_captioner, backend="pil")
    inputs = processor(images=[RED], return_tensors="pt")
    tokens = [5]
    with torch.inference_mode():
        states = model.vision_model(inputs.pixel_values).last_hidden_state
        while len(tokens) < 16:
            out = model.text_decoder(
                input_ids=torch.tensor([tokens]), encoder_hidden_states=states, is_decoder=True
            )
            tokens.append(int(out.logits[0, -1].argmax()))
            if tokens[-1] == 3:
                break
    expected = processor.decode(tokens, skip_special_tokens=True).strip()
    assert Captioner(tiny_captioner, beams=1).observe([RED]) == [expected]


def test_embeddings_are_unit_rows_and_match_clip_by_hand(tiny_clip: Path):
    from transformers import CLIPModel, CLIPProcessor

    model = CLIPModel.from_pretrained(tiny_clip).eval()
    processor = CLIPProcessor.from_pretrained(tiny_clip, backend="pil")
    pictures = [noise(seed) for seed in range(3)]
    texts = ["a red hat", "blue"]
    with torch.inference_mode():
        pixels = processor(images=pictures, return_tensors="pt").pixel_values
        pooled = model.vision_model(pixels).pooler_output
        seen = pooled.numpy() @ model.visual_projection.weight.numpy().T
        read = []
        for text in texts:  # one by one, so that padding plays no part
            tokens = processor(text=[text], return_tensors="pt")
            pooled = model.text_model(tokens.input_ids, tokens.attention_mask).pooler_output
            read.append(pooled[0].numpy() @ model.text_projection.weight.numpy().T)
    embedder = Embedder(tiny_clip)
    for got, raw in (
        (embedder.embed_images(pictures), seen),
        (embedder.embed_texts(texts), np.stack(read)),
    ):
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, raw / np.linalg.norm(raw, axis=1, keepdims=True), atol=1e-5)


def test_long_texts_are_cut_and_nothing_gives_no_rows(tiny_clip: Path):
    embedder = Embedder(tiny_clip)
    assert embedder.embed_texts(["very long text " * 40]).shape == (1, 8)
    assert embedder.embed_texts([]).shape == embedder.embed_images([]).shape == (0, 8)


@pytest.mark.parametrize("observer", [Captioner, Embedder])
def test_a_wrong_path_is_named(tmp_path: Path, observer: type):
    with pytest.raises(UserError, match="there is no such folder"):
        observer(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"config\.json is missing"):
        observer(tmp_path)


def test_a_model_of_another_kind_is_refused(tiny_clip: Path, tiny_captioner: Path):
    with pytest.raises(UserError, match="no image-to-text model"):
        Captioner(tiny_clip)
    with pytest.raises(UserError, match="no CLIP model"):
        Embedder(tiny_captioner)


@pytest.mark.parametrize(("observer", "model"), [(Captioner, "captioner"), (Embedder, "clip")])
def test_a_download_that_stopped_half_way_is_refused(
    tmp_path: Path, request: pytest.FixtureRequest, observer: type, model: str
):
    folder = tmp_path / "half"
    shutil.copytree(request.getfixturevalue(f"tiny_{model}"), folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(UserError, match=r"half: no "):
        observer(folder)
