"""The starter captioner: a small BLIP that writes the prose captions.

Its vision tower starts from the starter CLIP's weights; its vocabulary is the captions' words.
"""

from __future__ import annotations

import re
import time
from pathlib import Path

import clip
import numpy as np
import pictures
import torch
from autoencoder import to_pixels
from captions import prose
from tagger import augment
from training_state import Training
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessorPil,
    BlipProcessor,
)

BATCH = 48
LR = 1e-3
EMA_DECAY = 0.995
SEED = 24
MAX_LENGTH = 56
CHECKPOINT = "captioner.pt"
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]")


def tokenizer(work: Path) -> BertTokenizer:
    """A BERT tokenizer on the captions' words, with letters so that no text is unknown."""
    _, avatars = pictures.load(work, "train")
    words = sorted(
        {word for avatar in avatars for word in re.findall(r"\w+|[^\w\s]", prose(avatar))}
    )
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    pieces = [*SPECIAL, *words, *letters, *(f"##{letter}" for letter in letters)]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    return BertTokenizer(vocab=vocabulary, bos_token="[DEC]", model_max_length=MAX_LENGTH)


def build(words: BertTokenizer) -> BlipForConditionalGeneration:
    torch.manual_seed(SEED)
    text = {
        "vocab_size": len(words),
        "hidden_size": 160,
        "encoder_hidden_size": 160,
        "intermediate_size": 640,
        "num_hidden_layers": 3,
        "num_attention_heads": 5,
        "max_position_embeddings": MAX_LENGTH,
        "bos_token_id": words.bos_token_id,
        "eos_token_id": words.sep_token_id,
        "sep_token_id": words.sep_token_id,
        "pad_token_id": words.pad_token_id,
        "label_smoothing": 0.0,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    vision = {
        "hidden_size": 160,
        "intermediate_size": 640,
        "num_hidden_layers": 4,
        "num_attention_heads": 5,
        "image_size": pictures.SIZE_PX,
        "patch_size": 8,
        "hidden_act": "quick_gelu",
        "attention_dropout": 0.0,
    }
    config = BlipConfig(text_config=text, vision_config=vision, projection_dim=128)
    config.image_text_hidden_size = 128
    return BlipForConditionalGeneration(config)


@torch.no_grad()
def start_from_clip(model: BlipForConditionalGeneration, work: Path) -> None:
    """Copy the CLIP vision tower; BLIP fuses q, k and v and has no norm before its first layer."""
    source = clip.finished(work).vision_model
    target = model.vision_model
    target.embeddings.class_embedding.copy_(source.embeddings.class_embedding.view(1, 1, -1))
    target.embeddings.patch_embedding.weight.copy_(source.embeddings.patch_embedding.weight)
    positions = source.embeddings.position_embedding.weight
    target.embeddings.position_embedding.copy_(positions.unsqueeze(0))
    for new, old in zip(target.encoder.layers, source.encoder.layers, strict=True):
        attention = old.self_attn
        heads = (attention.q_proj, attention.k_proj, attention.v_proj)
        new.self_attn.qkv.weight.copy_(torch.cat([head.weight for head in heads]))
        new.self_attn.qkv.bias.copy_(torch.cat([head.bias for head in heads]))
        new.self_attn.projection.load_state_dict(attention.out_proj.state_dict())
        for part in ("layer_norm1", "layer_norm2", "mlp"):
            getattr(new, part).load_state_dict(getattr(old, part).state_dict())
    target.post_layernorm.load_state_dict(source.post_layernorm.state_dict())


def train(work: Path, steps: int) -> None:
    pixels, avatars = pictures.load(work, "train")
    words = tokenizer(work)
    model = build(words)
    if not (work / CHECKPOINT).exists():
        start_from_clip(model, work)
    training = Training(work / CHECKPOINT, model, LR, EMA_DECAY)
    started = time.monotonic()
    while training.step < steps:
        rng = np.random.default_rng((SEED, training.step))
        rows = np.sort(rng.integers(len(pixels), size=BATCH))
        texts = [prose(avatars[row]) for row in rows]
        tokens = words(texts, padding=True, truncation=True, return_tensors="pt")
        ids = tokens["input_ids"].clone()
        ids[:, 0] = words.bos_token_id  # BLIP's decoder starts from [DEC] in place of [CLS]
        labels = ids.masked_fill(ids == words.pad_token_id, -100)
        x = to_pixels(augment(pixels[rows], rng)).contiguous()
        out = model(
            pixel_values=x, input_ids=ids, attention_mask=tokens["attention_mask"], labels=labels
        )
        training.update(out.loss, steps)
        if training.step % 50 == 0:
            took = time.monotonic() - started
            print(f"{training.step} loss {out.loss:.4f} {took:.0f} s", flush=True)
    training.save()


def finished(work: Path) -> tuple[BlipForConditionalGeneration, BlipProcessor]:
    """The captioner with averaged weights, and its processor."""
    words = tokenizer(work)
    model = build(words)
    Training(work / CHECKPOINT, model, LR, EMA_DECAY).use_average()
    model.generation_config.max_length = MAX_LENGTH
    return model.eval(), BlipProcessor(image_processor(), words)


def image_processor() -> BlipImageProcessorPil:
    """64 px squares in [-1, 1]."""
    size = {"height": pictures.SIZE_PX, "width": pictures.SIZE_PX}
    return BlipImageProcessorPil(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3)
