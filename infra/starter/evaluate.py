"""Measures every bundle on characters that no model has seen, and writes the README's table.

`val`: characters kept out, in the styles that are trained on. `unseen`: styles kept out. Reads the
bundles as anybody would (public classes, fp16 files), never the training checkpoints.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import base_quality
import bundle
import captions
import groups
import numpy as np
import pictures
import sheets
import torch
from autoencoder import to_pixels
from avatars import Avatar
from captioner import MAX_LENGTH
from diffusers import StableDiffusionPipeline
from judge import Tagger
from styles import TRAIN_STYLES
from transformers import BlipForConditionalGeneration, BlipProcessor, CLIPModel, CLIPProcessor

HERE = Path(__file__).parent
MAX_PICTURES = 1280
RETRIEVAL_GROUP = 64
CAPTIONED = 256
BATCH = 32
# The kernel distance of the first base (5,900 steps); a better base must at least halve it.
FIRST_KERNEL_DISTANCE = 0.0207
TARGETS = {
    "autoencoder L1, [-1, 1] scale": "<= 0.03",
    "CLIP picture to caption, top-1 of 64": ">= 0.80",
    "tagger micro-F1 at 0.5": ">= 0.90",
    "captioner, share of attributes right": ">= 0.85",
    "generated: tagger finds prompted attributes, guidance 3": ">= 0.70",
    "generated: tagger finds prompted attributes, guidance 4": ">= 0.70",
    "generated: tagger finds prompted attributes, guidance 5": ">= 0.70",
    "generated: KID to kept-out pictures, guidance 4": f"<= {FIRST_KERNEL_DISTANCE / 2:.3f}",
    "generated: share that are copies, guidance 4": "<= 0.02",
}


def evaluate(work: Path) -> None:
    """All measures for both sets, the contact sheets, and the table in README.md."""
    table: dict[str, dict[str, float]] = {name: {} for name in TARGETS}
    for part in ("val", "unseen"):
        pixels, avatars = pictures.load(work, part)
        pixels, avatars = np.asarray(pixels[:MAX_PICTURES]), avatars[:MAX_PICTURES]
        values = [autoencoder_l1(pixels, part), clip_top1(pixels, avatars)]
        values += [tagger_f1(pixels, avatars), captioner_share(pixels, avatars, part)]
        if part == "val":
            trained, _ = pictures.load(work, "train")
            sheet = HERE / "pictures/generated.png"
            base = base_quality.measure(pipeline(), pixels, avatars, trained, sheet)
            values += [*base.shares.values(), base.kernel_distance, base.copied_share]
        for name, value in zip(TARGETS, values, strict=False):
            table[name][part] = value
            print(f"{part}: {name}: {value:.3f}", flush=True)
    (work / "quality.json").write_text(json.dumps(table, indent=1))
    write_block("quality", table_lines(table))
    write_block("groups", group_lines({"generated": base.groups, "drawn": base.drawn_groups}))


@torch.no_grad()
def autoencoder_l1(pixels: np.ndarray, part: str) -> float:
    """Mean absolute error of reconstructions from the latent means, on the [-1, 1] scale."""
    vae = pipeline().vae
    errors, shown = [], []
    for start in range(0, len(pixels), BATCH):
        x = to_pixels(pixels[start : start + BATCH])
        y = vae.decode(vae.encode(x).latent_dist.mean).sample.clamp(-1, 1)
        errors += (y - x).abs().mean((1, 2, 3)).tolist()
        if start == 0:
            shown = [to_uint8(picture) for picture in y]
    sheets.pairs(pixels[:24], shown[:24], HERE / f"pictures/reconstructions-{part}.png")
    return float(np.mean(errors))


@torch.no_grad()
def clip_top1(pixels: np.ndarray, avatars: list[Avatar]) -> float:
    """Share of pictures whose own caption is the nearest of 64 (groups in the set's order)."""
    model = CLIPModel.from_pretrained(bundle.CLIP, dtype=torch.float32).eval()
    processor = CLIPProcessor.from_pretrained(bundle.CLIP, backend="pil")
    right = []
    for start in range(0, len(pixels) - RETRIEVAL_GROUP + 1, RETRIEVAL_GROUP):
        rows = slice(start, start + RETRIEVAL_GROUP)
        texts = [captions.prose(avatar) for avatar in avatars[rows]]
        inputs = processor(text=texts, images=list(pixels[rows]), padding=True, return_tensors="pt")
        nearest = model(**inputs).logits_per_image.argmax(1).numpy()
        # Two avatars with the same caption are both right.
        right += [texts[found] == texts[own] for own, found in enumerate(nearest)]
    return float(np.mean(right))


def tagger_f1(pixels: np.ndarray, avatars: list[Avatar]) -> float:
    """Micro-F1 over the general tags. A style's own tag is not asked of styles never seen."""
    tagger = Tagger()
    kept = tagger.general & np.array(
        [not name.endswith(" style") or avatars[0].style in TRAIN_STYLES for name in tagger.names]
    )
    found = tagger.found(pixels)[:, kept]
    true = tagger.truth(avatars)[:, kept]
    return float(2 * (found & true).sum() / (found.sum() + true.sum()))


@torch.no_grad()
def captioner_share(pixels: np.ndarray, avatars: list[Avatar], part: str) -> float:
    """Attributes (style apart) that both sentences, true and written, share, of the longer one."""
    model = BlipForConditionalGeneration.from_pretrained(bundle.CAPTIONER, dtype=torch.float32)
    processor = BlipProcessor.from_pretrained(bundle.CAPTIONER, backend="pil")
    right, texts = [], []
    for start in range(0, min(CAPTIONED, len(pixels)), BATCH):
        rows = slice(start, start + BATCH)
        inputs = processor(images=list(pixels[rows]), return_tensors="pt")
        ids = model.eval().generate(**inputs, max_new_tokens=MAX_LENGTH, num_beams=1)
        written = processor.batch_decode(ids, skip_special_tokens=True)
        texts += written
        for avatar, text in zip(avatars[rows], written, strict=True):
            wanted = attributes(captions.prose(avatar))
            got = attributes(text)
            right.append(len(wanted & got) / max(len(wanted), len(got)))
    sheets.captioned(pixels[:15], texts[:15], HERE / f"pictures/captions-{part}.png")
    return float(np.mean(right))


def attributes(sentence: str) -> set[str]:
    """The facts of a prose caption, style apart; of hair and clothing the colour is its own."""
    text = re.sub(r" *, *", ", ", sentence.replace(" - ", "-")).strip()
    found = set()
    for clause in re.split(r", with | with |, | and ", text):
        words = [word for word in clause.split() if word not in ("a", "an", "wearing")]
        if clause.startswith("wearing "):
            found |= {f"{words[0]} clothing", " ".join(words[1:])}
        elif clause.endswith(" hair"):
            found |= {f"{word} hair" for word in words[:-1]}
        elif not clause.endswith(" style"):
            found.add(" ".join(words))
    return found


def pipeline() -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(bundle.PIPELINE, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def to_uint8(picture: torch.Tensor) -> np.ndarray:
    return ((picture.permute(1, 2, 0) + 1) * 127.5).round().byte().numpy()


def table_lines(table: dict[str, dict[str, float]]) -> list[str]:
    """The README's table of all measures."""
    lines = ["| measure | target | kept-out characters | kept-out styles |", "|---|---|---|---|"]
    for name, target in TARGETS.items():
        cells = [
            f"{table[name][part]:.3f}" if part in table[name] else "-" for part in ("val", "unseen")
        ]
        lines.append(f"| {name} | {target} | {' | '.join(cells)} |")
    return lines


def group_lines(columns: dict[str, dict[str, float]]) -> list[str]:
    """A table with a row for every group of attributes and a column for each set of pictures."""
    lines = [f"| attributes | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    for name in groups.GROUPS:
        cells = [f"{column[name]:.2f}" for column in columns.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def write_block(name: str, lines: list[str]) -> None:
    """Put `lines` between the README's markers of that name."""
    readme = HERE / "README.md"
    start, end = f"<!-- {name}:start -->\n", f"<!-- {name}:end -->"
    before, rest = readme.read_text().split(start)
    after = rest.split(end)[1]
    readme.write_text(before + start + "\n".join(lines) + "\n" + end + after)
