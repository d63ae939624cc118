"""Every family of captioners on a tiny random model of its real architecture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as Pillow
from tiny_captioners import WRITERS

from captioning import CaptionerConfig, Prompt, UserError
from captioning.observers.answers import AnswerError
from captioning.observers.captioner import Captioner
from captioning.observers.families import FAMILIES
from captioning.observers.load import identify

CHATS = ("llava", "qwen2_vl")
PROMPT = Prompt(text="what is in the picture", max_new_tokens=12)


def noise(height: int, width: int) -> Pillow.Image:
    pixels = np.random.default_rng(height).integers(0, 255, (height, width, 3), np.uint8)
    return Pillow.fromarray(pixels)


PICTURES = [noise(40, 60), noise(64, 32), noise(50, 50)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("models")
    return {name: write(place / name) for name, write in WRITERS.items()}


def by_hand(folder: Path, picture: Pillow.Image, prompt: str, beams: int, room: int) -> str:
    """The answer as transformers' documentation gets it, with its own processor and one picture."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(folder, backend="pil")
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    text = prompt
    if processor.chat_template:
        content = [{"type": "image"}, {"type": "text", "text": prompt}]
        text = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
    inputs = processor(images=picture, text=text, return_tensors="pt")
    with torch.inference_mode():
        tokens = model.generate(
            **inputs, num_beams=beams, do_sample=False, max_new_tokens=room, max_length=None
        )
    if not model.config.is_encoder_decoder:
        tokens = tokens[:, inputs["input_ids"].shape[1] :]
    said: str = processor.batch_decode(tokens, skip_special_tokens=True)[0]
    return said


@pytest.mark.parametrize("name", WRITERS)
def test_a_batch_of_pictures_of_any_size_says_what_each_alone_says(
    folders: dict[str, Path], name: str
):
    captioner = Captioner(folders[name], prompt=PROMPT if name in CHATS else None)
    prompt = PROMPT.text if name in CHATS else "<CAPTION>" if name == "florence2" else "a picture"
    together = captioner.generate(PICTURES, prompt)
    assert any(text for text, _ in together)
    assert together == [captioner.generate([picture], prompt)[0] for picture in PICTURES]


@pytest.mark.parametrize(("name", "beams"), [("llava", 1), ("blip-2", 3), ("florence2", 3)])
def test_it_says_what_transformers_own_processor_gets(
    folders: dict[str, Path], name: str, beams: int
):
    chat = name in CHATS
    captioner = Captioner(folders[name], prompt=PROMPT if chat else None)
    prompt = PROMPT.text if chat else "<CAPTION>" if name == "florence2" else "a picture"
    room = PROMPT.max_new_tokens if chat else 75
    said = captioner.generate([PICTURES[0]], prompt)[0][0]
    assert said.strip() == by_hand(folders[name], PICTURES[0], prompt, beams, room).strip()


def test_qwen_gets_one_token_for_each_merged_square_of_patches(folders: dict[str, Path]):
    # generate() itself raises when there are more or fewer than the model has features for.
    from captioning.observers.families import qwen_vl

    processor = qwen_vl.load_processor(str(folders["qwen2_vl"]))
    inputs = qwen_vl.inputs(processor, [Pillow.new("RGB", (56, 28))], "what is in the picture")
    token = processor.tokenizer.convert_tokens_to_ids(qwen_vl.IMAGE_TOKEN)
    assert int((inputs["input_ids"] == token).sum()) == 2  # 2 x 4 patches of 14 px, merged by 2 x 2


@pytest.mark.parametrize("name", WRITERS)
def test_what_is_no_caption_is_an_error_after_one_retry(
    folders: dict[str, Path], name: str, monkeypatch: pytest.MonkeyPatch
):
    captioner = Captioner(folders[name])
    prompts: list[tuple[int, str]] = []

    def says(pictures: list[Pillow.Image], prompt: str) -> list[tuple[str, bool]]:
        prompts.append((len(pictures), prompt))
        bad = [("I'm sorry, I can't help with that.", True), ("a red red", False)]
        return [("a woman in a hat", True), *bad][: len(pictures)] if len(prompts) == 1 else bad

    monkeypatch.setattr(captioner, "generate", says)
    good, refused, cut = captioner.observe(PICTURES)
    assert good == "a woman in a hat"
    assert isinstance(refused, AnswerError) and "refusal" in str(refused)
    assert isinstance(cut, AnswerError) and "cut off" in str(cut)
    family = next(one for one in FAMILIES if name in one.MODEL_TYPES)
    assert prompts == [(3, family.DEFAULT_PROMPT), (2, family.RETRY_PROMPT)]


def test_an_answer_at_its_longest_is_known_to_be_cut_off(folders: dict[str, Path]):
    captioner = Captioner(folders["florence2"])  # its generation forces an end at the last place
    text, ended = captioner.generate([PICTURES[0]], "<CAPTION>")[0]
    assert len(text.split()) > 60 and not ended
    chat = Captioner(folders["llava"], prompt=PROMPT)
    assert not chat.generate([PICTURES[0]], PROMPT.text)[0][1]


def test_what_not_to_mention_is_in_both_prompts_and_in_the_revision(folders: dict[str, Path]):
    source = str(folders["llava"])
    prompt = Prompt(text="Describe.", do_not_mention=("red hair", "the scar"))
    assert prompt.rendered() == "Describe. Do not mention red hair, the scar."
    captioner = Captioner(source, prompt=prompt)
    config = CaptionerConfig(source=source, prompt=prompt)
    assert identify(config) == (captioner.id, captioner.revision)
    plain = identify(CaptionerConfig(source=source))
    assert captioner.revision == f"{plain[1]}-{prompt.digits()}"
    asked: list[str] = []
    captioner.generate = lambda pictures, text: asked.append(text) or [("", True)]  # type: ignore
    captioner.observe(PICTURES[:1])
    assert len(asked) == 2 and all("Do not mention red hair, the scar." in text for text in asked)


@pytest.mark.parametrize("name", ["blip-2", "florence2"])
def test_a_model_without_free_prompts_says_so(folders: dict[str, Path], name: str):
    with pytest.raises(UserError, match="can't be told what not to mention"):
        Captioner(folders[name], prompt=Prompt(do_not_mention=("hair",)))


def test_all_families_have_the_same_names_in_the_same_order():
    wanted = ["MODEL_TYPES", "FREE_PROMPT", "DEFAULT_PROMPT", "RETRY_PROMPT"]
    wanted += ["load_processor", "inputs", "new_tokens"]
    for family in FAMILIES:
        own = [name for name in vars(family) if name in wanted]
        assert own == wanted, family.__name__
