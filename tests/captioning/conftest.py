"""Pictures, tiny random models of the real architectures, and a store to put things in."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from captioning_examples import png
from seaweed import seaweed
from tiny_onnx import write_tagger

from captioning import Character, Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "home" / "store")


@pytest.fixture
def aya() -> Character:
    return Character(name="aya", trigger="ayatok", class_word="woman")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Six good pictures: 1.png to 6.png, all different."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(1, 7):
        (folder / f"{number}.png").write_bytes(png((40 * number, 0, 0)))
    return folder


@pytest.fixture(scope="session")
def tiny_tagger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tagger(tmp_path_factory.mktemp("models") / "tiny-tagger")


@pytest.fixture(scope="session")
def tiny_captioner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BLIP with the layout that `save_pretrained` gives."""
    import torch
    from transformers import (
        BertTokenizer,
        BlipConfig,
        BlipForConditionalGeneration,
        BlipImageProcessorPil,
        BlipProcessor,
    )

    folder = tmp_path_factory.mktemp("models") / "tiny-captioner"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "a", "red", "blue", "woman"]
    tokenizer = BertTokenizer(
        vocab={word: row for row, word in enumerate(words)}, bos_token="[DEC]", model_max_length=16
    )
    torch.manual_seed(0)
    small = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    config = BlipConfig(
        text_config={
            **small,
            "vocab_size": len(words),
            "encoder_hidden_size": 16,
            "max_position_embeddings": 16,
            "bos_token_id": 5,
            "eos_token_id": 3,
            "sep_token_id": 3,
            "pad_token_id": 0,
        },
        vision_config={**small, "image_size": 32, "patch_size": 16},
        projection_dim=8,
    )
    model = BlipForConditionalGeneration(config)
    # Random weights repeat one word for ever. With large positions each place has its own word, the
    # end among them; a low bias keeps the other special tokens away.
    random = torch.Generator().manual_seed(2)
    decoder = model.text_decoder.bert
    with torch.no_grad():
        decoder.embeddings.position_embeddings.weight.normal_(0, 0.4, generator=random)
        decoder.encoder.layer[0].crossattention.self.value.weight *= 30
        model.vision_model.embeddings.patch_embedding.weight *= 30
        model.text_decoder.cls.predictions.bias[[0, 1, 2, 4, 5]] = -10
    model.save_pretrained(folder)
    processor = BlipImageProcessorPil(size={"height": 32, "width": 32})
    BlipProcessor(processor, tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random CLIP with the layout that `save_pretrained` gives."""
    import torch
    from transformers import (
        CLIPConfig,
        CLIPImageProcessorPil,
        CLIPModel,
        CLIPProcessor,
        CLIPTokenizer,
    )

    folder = tmp_path_factory.mktemp("models") / "tiny-clip"
    folder.mkdir()
    letters = "abcdefghijklmnopqrstuvwxyz,"
    pieces = [*letters, *(f"{letter}</w>" for letter in letters)]
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({piece: row for row, piece in enumerate(pieces)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    small = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config={
            **small,
            "vocab_size": len(pieces),
            "max_position_embeddings": 12,
            "bos_token_id": len(pieces) - 2,
            "eos_token_id": len(pieces) - 1,
        },
        vision_config={**small, "image_size": 32, "patch_size": 16},
        projection_dim=8,
    )
    CLIPModel(config).save_pretrained(folder)
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    CLIPProcessor(processor, tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def s3_endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real S3 server with the bucket `farm`."""
    with seaweed(tmp_path_factory.mktemp("seaweed")) as endpoint:
        yield endpoint
