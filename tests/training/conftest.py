"""A tiny random SD1.5-family pipeline on disk and a tiny dataset version, for all training tests.

The networks are the real classes with random weights and few channels: 64 px pictures, 8 px
latents, a VAE of factor 8. Nothing in them is trained.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from PIL import Image as Picture
from tiny_text import write_tokenizer

from captioning import (
    ClassPictures,
    DatasetVersion,
    Observation,
    Sample,
    Store,
    add_character,
    caption_all,
    freeze,
    keep_class_pictures,
    load_images,
    make_character,
    observe,
    take_in,
)
from training.data.latents import Bucket, LatentCache
from training.families import Base, load_base

Kind = Literal["tags", "prose"]
BuildCache = Callable[..., LatentCache]


def build_base(
    folder: Path,
    prediction_type: str = "epsilon",
    latent_channels: int = 4,
    zero_terminal_snr: bool = False,
    seed: int = 0,
) -> Path:
    """Write a tiny random pipeline in diffusers layout to `folder` and return it."""
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            sample_size=8,
            in_channels=latent_channels,
            out_channels=latent_channels,
            block_out_channels=(16, 32),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=32,
            attention_head_dim=8,
            norm_num_groups=8,
        )
        vae = AutoencoderKL(
            block_out_channels=(8, 8, 16, 16),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=1,
            latent_channels=latent_channels,
            norm_num_groups=4,
            sample_size=64,
            scaling_factor=0.18215,
        )
        vocabulary = write_tokenizer(folder / "tokenizer")
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=vocabulary,
                hidden_size=32,
                intermediate_size=37,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=77,
                bos_token_id=vocabulary - 2,
                eos_token_id=vocabulary - 1,
                pad_token_id=vocabulary - 1,
            )
        )
    unet.save_pretrained(folder / "unet", safe_serialization=True)
    vae.save_pretrained(folder / "vae", safe_serialization=True)
    text_encoder.save_pretrained(folder / "text_encoder", safe_serialization=True)
    DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
        rescale_betas_zero_snr=zero_terminal_snr,
        timestep_spacing="trailing" if zero_terminal_snr else "leading",
    ).save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": "0.42.1",
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def build_dataset(folder: Path, train: int = 6, holdout: int = 2, seed: int = 0) -> DatasetVersion:
    """Random 64 px pictures with captions as an in-memory version; files under `folder`."""
    generator = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    samples = []
    for number in range(train + holdout):
        colour = generator.integers(0, 256, 3)
        pixels = np.clip(colour + generator.normal(0, 30, (64, 64, 3)), 0, 255).astype(np.uint8)
        path = folder / f"{number + 1:04d}.png"
        Picture.fromarray(pixels).save(path)
        caption = f"zkw, person, wearing colour {number}"
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        samples.append(Sample(sha256=sha256, path=path, caption=caption, width=64, height=64))
    manifest = hashlib.sha256("".join(sample.sha256 for sample in samples).encode()).hexdigest()
    return DatasetVersion(
        name=f"v0001-{manifest[:8]}",
        path=folder,
        character="zara",
        trigger="zkw",
        class_word="person",
        train=tuple(samples[:train]),
        holdout=tuple(samples[train:]),
        manifest_sha256=manifest,
    )


@pytest.fixture(scope="session")
def tiny_base_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random epsilon-prediction pipeline with 4 latent channels; read it, never change it."""
    return build_base(tmp_path_factory.mktemp("bases") / "epsilon")


@pytest.fixture(scope="session")
def tiny_v_base_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with v-prediction, 16 latent channels and zero terminal SNR, like the starter."""
    folder = tmp_path_factory.mktemp("bases") / "v_prediction"
    return build_base(folder, "v_prediction", latent_channels=16, zero_terminal_snr=True)


@pytest.fixture
def tiny_base(tiny_base_path: Path) -> Base:
    """The epsilon pipeline, loaded afresh on the CPU."""
    return load_base(tiny_base_path)


@pytest.fixture
def tiny_v_base(tiny_v_base_path: Path) -> Base:
    """The v-prediction pipeline, loaded afresh on the CPU."""
    return load_base(tiny_v_base_path)


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory: pytest.TempPathFactory) -> DatasetVersion:
    """Six training and two held-out random pictures with captions; read it, never change it."""
    return build_dataset(tmp_path_factory.mktemp("dataset"))


class _Tagger:
    """An observer that answers at once: every picture shows one colour, its own number."""

    def models(self) -> dict[Kind, tuple[str, str]]:
        return {"tags": ("fixed", "1")}

    def ask(self, requests: Iterable[tuple[str, Kind, bytes]]) -> Iterator[Observation]:
        for sha256, kind, _ in requests:
            yield Observation(
                image=sha256,
                kind=kind,
                model="fixed",
                revision="1",
                tags={f"colour {sha256[:4]}": 0.9},
                milliseconds=0.0,
            )


def freeze_folder(folder: Path, home: Path) -> DatasetVersion:
    """The pictures of a folder as a real version on disk: taken in, captioned, frozen."""
    store = Store(home)
    character = make_character("zara", trigger="zkw", class_word="person")
    take_in(folder, store, character)
    add_character(store, character)
    observe(load_images(store, "zara"), store, _Tagger())
    caption_all(store, character)
    return freeze(store, character, holdout_share=0.25)


@pytest.fixture(scope="session")
def frozen_dataset(
    tiny_dataset: DatasetVersion, tmp_path_factory: pytest.TempPathFactory
) -> DatasetVersion:
    """The pictures of `tiny_dataset` as `freeze_folder` gives them."""
    return freeze_folder(tiny_dataset.path, tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="session")
def frozen_wide_dataset(tmp_path_factory: pytest.TempPathFactory) -> DatasetVersion:
    """The same with half of them 120 × 70 px."""
    folder = tmp_path_factory.mktemp("wide")
    for sample in build_dataset(folder).train[::2]:
        with Picture.open(sample.path) as picture:
            wide = picture.resize((120, 70))
        wide.save(sample.path)
    return freeze_folder(folder, tmp_path_factory.mktemp("wide-store"))


@pytest.fixture(scope="session")
def tiny_clip_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random CLIP in transformers' layout for 32 px pictures, to score with."""
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

    folder = tmp_path_factory.mktemp("clip")
    vocabulary = write_tokenizer(folder)
    CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    ).save_pretrained(folder)
    layers = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2}
    config = CLIPConfig(
        text_config={
            **layers,
            "num_attention_heads": 4,
            "vocab_size": vocabulary,
            "bos_token_id": vocabulary - 2,
            "eos_token_id": vocabulary - 1,
            "pad_token_id": vocabulary - 1,
        },
        vision_config={**layers, "num_attention_heads": 4, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        CLIPModel(config).save_pretrained(folder, safe_serialization=True)
    return folder


def build_cache(
    base: Base,
    count: int = 6,
    views: int = 1,
    seed: int = 0,
    buckets: Mapping[tuple[int, int], int] | None = None,
) -> LatentCache:
    """A cache of `count` random pictures and captions in the shapes that `base` wants.

    With `buckets` there are instead as many of each (height, width) in latent cells.
    """
    generator = torch.Generator().manual_seed(seed)
    side = base.native_size_px // base.vae_factor
    buckets = buckets or {(side, side): count}
    count = sum(buckets.values())
    shapes, of_picture = (
        base.condition_shapes(),
        base.picture_conditions((64, 64), (0, 0), (64, 64)),
    )
    of_text = {name: shape for name, shape in shapes.items() if name not in of_picture}

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    made: list[Bucket] = []
    for (height, width), own in buckets.items():
        first = sum(len(bucket.images) for bucket in made)
        shape = (own, views, base.latent_channels, height, width)
        mean, logvar = 5 * draw(*shape), torch.full(shape, -4.0)
        mask = torch.ones(own, views, 1, height, width)
        made.append(Bucket(tuple(range(first, first + own)), mean, logvar, mask))
    return LatentCache(
        key=f"random-{seed}",
        buckets=tuple(made),
        text={name: draw(count, 1, *shape) for name, shape in of_text.items()},
        empty_text={name: draw(*shape) for name, shape in of_text.items()},
        prior_text={},
        picture={name: draw(count, *shapes[name]) for name in of_picture},
        captions=tuple((f"zkw, person, wearing colour {number}",) for number in range(count)),
        prior_captions=(),
    )


@pytest.fixture
def make_cache() -> BuildCache:
    """`build_cache` for tests that want other sizes than the two fixtures below."""
    return build_cache


@pytest.fixture
def tiny_cache(tiny_base: Base) -> LatentCache:
    """Six random pictures for `tiny_base`."""
    return build_cache(tiny_base)


@pytest.fixture
def tiny_v_cache(tiny_v_base: Base) -> LatentCache:
    """Six random pictures for `tiny_v_base`."""
    return build_cache(tiny_v_base)


@pytest.fixture
def class_set(frozen_dataset: DatasetVersion, tmp_path: Path) -> tuple[Store, ClassPictures]:
    """Three pictures that are not the character's, one of them with a caption."""
    folder, generator = tmp_path / "people", np.random.default_rng(9)
    folder.mkdir()
    for number in range(3):
        pixels = generator.integers(0, 256, (64, 64, 3), np.uint8)
        Picture.fromarray(pixels).save(folder / f"{number}.png")
    (folder / "0.txt").write_text("person, smile")
    store = Store(tmp_path / "class_store")
    return store, keep_class_pictures(store, folder)
