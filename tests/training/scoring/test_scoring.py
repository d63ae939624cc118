"""Scoring whole checkpoints on the tiny base, with an embedder that sees colours only."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from captioning import DatasetVersion, Sample, UserError
from training.families import Base
from training.pack.adapters import attach, detach
from training.recipe import Network
from training.scoring import scorer
from training.scoring.prompts import ScoringConfig
from training.scoring.scorer import (
    choose_references,
    existing_score,
    score_base,
    score_checkpoint,
    scoring_key,
)
from training.scoring.scores import MEASURES, BaseScores, Score

CONFIG = ScoringConfig(
    prompts=("{subject}, red", "{subject}, green", "{subject}, blue"),
    unrelated=("a car", "a house"),
    seeds=2,
    steps=2,
    bootstrap=200,
)


class ColourEmbedder:
    """Unit vectors of 2 x 2 mean colours; texts point to the colour they name."""

    id = "colour"
    revision = "1"

    def __init__(self) -> None:
        self.seen = 0

    def embed_images(self, images: list[Image.Image]) -> np.ndarray:
        self.seen += len(images)
        rows = [np.asarray(image.resize((2, 2), Image.Resampling.BOX)) for image in images]
        return self._unit(np.stack(rows).reshape(len(images), 12) / 127.5 - 1)

    def embed_texts(self, texts: list[str]) -> np.ndarray:
        colours = ("red", "green", "blue")
        rows = [[2.0 * (colour in text) - 1 for colour in colours] * 4 for text in texts]
        return self._unit(np.array(rows))

    def _unit(self, rows: np.ndarray) -> np.ndarray:
        rows = np.hstack([rows, np.full((len(rows), 1), 0.1)])
        return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


class FlatEmbedder(ColourEmbedder):
    """Sees no difference between any two pictures."""

    id = "flat"

    def embed_images(self, images: list[Image.Image]) -> np.ndarray:
        return np.tile(np.eye(1, 13, dtype=np.float32), (len(images), 1))


@pytest.fixture
def embedder() -> ColourEmbedder:
    return ColourEmbedder()


def pictures(folder: Path, colours: list[tuple[int, int, int]]) -> tuple[Sample, ...]:
    """Plain pictures of nearly one colour as samples."""
    folder.mkdir(parents=True)
    samples = []
    for number, colour in enumerate(colours):
        noise = np.random.default_rng(number).integers(-12, 12, (64, 64, 3))
        path = folder / f"{number}.png"
        Image.fromarray(np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)).save(path)
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        samples.append(Sample(sha256=sha256, path=path, caption="", width=64, height=64))
    return tuple(samples)


@pytest.fixture
def dataset(tiny_dataset: DatasetVersion, tmp_path: Path) -> DatasetVersion:
    """A character that is yellow."""
    yellow = [(250, 240, 10), (255, 255, 40), (235, 220, 0), (240, 250, 60), (245, 230, 30)]
    samples = pictures(tmp_path / "pictures", [*yellow, *yellow[:4]])
    return replace(tiny_dataset, train=samples[:5], holdout=samples[5:])


@pytest.fixture
def adapted(tiny_v_base: Base) -> Iterator[Base]:
    """The tiny base with an adapter that visibly changes its pictures."""
    yield with_adapter(tiny_v_base, 0.5)
    detach(tiny_v_base)


def with_adapter(base: Base, size: float) -> Base:
    generator = torch.Generator().manual_seed(2)
    bank = attach(base, Network(rank=4), seed=0)
    bank.weights += size * torch.randn(bank.weights.shape, generator=generator)
    bank.changed()
    return base


def score(base: Base, dataset: DatasetVersion, embedder: ColourEmbedder, tmp: Path) -> Score:
    detach(base)
    bare = score_base(base, dataset, CONFIG, embedder, tmp / "base")
    with_adapter(base, 0.5)
    (tmp / "step").mkdir(exist_ok=True)
    return score_checkpoint(base, dataset, CONFIG, embedder, bare, tmp / "step")


def test_the_bare_base_is_the_zero_of_every_relative_measure(
    tiny_v_base: Base, dataset: DatasetVersion, embedder: ColourEmbedder, tmp_path: Path
) -> None:
    bare = score_base(tiny_v_base, dataset, CONFIG, embedder, tmp_path)
    assert bare.identity.value == pytest.approx(0, abs=1e-9)
    assert bare.identity.low < 0 < bare.identity.high
    assert bare.identity == bare.base_identity
    for measure, value in (("prompt_fidelity", 1), ("drift", 0), ("leak", 0)):
        found = getattr(bare, measure)
        assert (found.value, found.low, found.high) == pytest.approx((value,) * 3, abs=1e-9)
    assert bare.references == "holdout" and bare.reference_count == 4
    assert bare.identity_normalised and bare.ceiling > bare.floor


def test_an_adapter_without_effect_scores_as_the_base(
    tiny_v_base: Base, dataset: DatasetVersion, embedder: ColourEmbedder, tmp_path: Path
) -> None:
    bare = score_base(tiny_v_base, dataset, CONFIG, embedder, tmp_path / "base")
    attach(tiny_v_base, Network(rank=4), seed=0)  # untrained
    (tmp_path / "step").mkdir()
    found = score_checkpoint(tiny_v_base, dataset, CONFIG, embedder, bare, tmp_path / "step")
    for name, interval in found.measures().items():
        assert interval.value == pytest.approx(getattr(bare, name).value, abs=0.02), name
    assert found.identity.low == pytest.approx(bare.identity.low, abs=0.02)


def test_the_measures_are_their_formulas_on_the_stored_pictures(
    adapted: Base, dataset: DatasetVersion, embedder: ColourEmbedder, tmp_path: Path
) -> None:
    found = score(adapted, dataset, embedder, tmp_path)
    base_folder = next((tmp_path / "base").iterdir())

    def embed(folder: Path, kind: str) -> np.ndarray:
        files = [folder / p.file for p in found.pictures if p.kind == kind]
        return embedder.embed_images([Image.open(file) for file in files]).astype(float)

    def embed_samples(samples: tuple[Sample, ...]) -> np.ndarray:
        return embedder.embed_images([Image.open(sample.path) for sample in samples]).astype(float)

    mine, bases = embed(tmp_path / "step", "subject"), embed(base_folder, "subject")
    references, train = embed_samples(dataset.holdout), embed_samples(dataset.train)
    floor, raw = (bases @ references.T).mean(), (mine @ references.T).mean()
    cosines = references @ references.T
    ceiling = cosines[~np.eye(4, dtype=bool)].mean()
    assert found.floor == pytest.approx(floor, abs=1e-6)
    assert found.ceiling == pytest.approx(ceiling, abs=1e-6)
    assert found.identity_raw.value == pytest.approx(raw, abs=1e-6)
    assert found.identity.value == pytest.approx((raw - floor) / (ceiling - floor), abs=1e-5)
    each = ((mine @ references.T).mean(1) - floor) / (ceiling - floor)
    assert found.identities == pytest.approx(each, abs=1e-5)

    texts = embedder.embed_texts(["person, red", "person, green", "person, blue"]).astype(float)
    own = np.repeat(np.eye(3), 2, axis=0)  # two seeds a prompt

    def margin(images: np.ndarray) -> float:
        cosine = images @ texts.T
        return float(np.mean((cosine * own).sum(1) - (cosine * (1 - own)).sum(1) / 2))

    scale = margin(bases) if found.prompt_fidelity_normalised else 1.0
    wanted = 1 + (margin(mine) - margin(bases)) / scale
    assert found.prompt_fidelity.value == pytest.approx(wanted, abs=1e-5)

    drift = 1 - (embed(tmp_path / "step", "unrelated") * embed(base_folder, "unrelated")).sum(1)
    assert found.drift.value == pytest.approx(drift.mean(), abs=1e-6)
    moved = embed(tmp_path / "step", "class_word") - embed(base_folder, "class_word")
    leak = (moved @ references.T).mean() / (ceiling - floor)
    assert found.leak.value == pytest.approx(leak, abs=1e-5)
    nearest = (train @ train.T - 2 * np.eye(5)).max(1)
    share = ((mine @ train.T).max(1) > np.quantile(nearest, 0.9)).mean()
    assert found.memorisation.value == pytest.approx(share)
    distances = (1 - mine @ mine.T)[~np.eye(6, dtype=bool)].mean()
    assert found.diversity.value == pytest.approx(distances, abs=1e-6)


def test_pictures_of_the_character_itself_have_identity_one(
    adapted: Base,
    dataset: DatasetVersion,
    embedder: ColourEmbedder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    detach(adapted)
    bare = score_base(adapted, dataset, CONFIG, embedder, tmp_path / "base")
    with_adapter(adapted, 0.5)
    yellow = np.asarray(Image.open(dataset.holdout[0].path))
    monkeypatch.setattr(scorer, "sample", lambda base, prompts, seeds, **_: [yellow] * len(seeds))
    (tmp_path / "step").mkdir()
    found = score_checkpoint(adapted, dataset, CONFIG, embedder, bare, tmp_path / "step")
    assert found.identity.value == pytest.approx(1, abs=0.05)
    assert found.identity.low > bare.identity.high
    assert found.memorisation.value == 1  # the same colour is in the training pictures
    assert found.diversity.value == pytest.approx(0, abs=1e-6)
    assert found.leak.value > 0.5 and found.drift.value > 0.1


def test_the_file_is_what_other_rooms_read(
    adapted: Base, dataset: DatasetVersion, embedder: ColourEmbedder, tmp_path: Path
) -> None:
    found = score(adapted, dataset, embedder, tmp_path)
    data = json.loads((tmp_path / "step" / "scores.json").read_text())
    assert [set(data[name]) for name in MEASURES] == [{"value", "low", "high"}] * 6
    assert data["embedder"] == "colour" and data["embedder_revision"] == "1"
    assert Score.load(tmp_path / "step") == found
    assert pickle.loads(pickle.dumps(found)) == found
    row = found.row(tmp_path / "step")
    assert len(row) == 3 and all(Image.open(path).size == (64, 64) for path in row)
    assert found.pictures[0].prompt == "zkw, person, red"


def test_scoring_again_gives_the_same_score(
    adapted: Base, dataset: DatasetVersion, embedder: ColourEmbedder, tmp_path: Path
) -> None:
    first = score(adapted, dataset, embedder, tmp_path)
    assert score(adapted, dataset, embedder, tmp_path) == first


def test_the_base_is_drawn_once_and_again_only_when_something_is_missing(
    tiny_v_base: Base, dataset: DatasetVersion, embedder: ColourEmbedder, tmp_path: Path
) -> None:
    first = score_base(tiny_v_base, dataset, CONFIG, embedder, tmp_path)
    drawn = embedder.seen
    assert score_base(tiny_v_base, dataset, CONFIG, embedder, tmp_path) == first
    assert embedder.seen == drawn
    (first.folder / first.pictures[0].file).unlink()
    assert score_base(tiny_v_base, dataset, CONFIG, embedder, tmp_path) == first
    assert embedder.seen == 2 * drawn
    (first.folder / "vectors.safetensors").write_bytes(b"torn")
    assert score_base(tiny_v_base, dataset, CONFIG, embedder, tmp_path) == first


def test_a_moved_folder_of_base_scores_still_loads(
    tiny_v_base: Base, dataset: DatasetVersion, embedder: ColourEmbedder, tmp_path: Path
) -> None:
    first = score_base(tiny_v_base, dataset, CONFIG, embedder, tmp_path / "a")
    shutil.move(first.folder, tmp_path / "b")
    moved = BaseScores.load(tmp_path / "b")
    assert moved.folder == tmp_path / "b" and moved.identity == first.identity
    assert set(moved.vectors()) == {
        "subject", "class_word", "unrelated", "references", "train", "prompts",
    }  # fmt: skip


def test_with_fewer_than_three_held_out_the_training_pictures_are_the_references(
    tiny_v_base: Base, dataset: DatasetVersion, embedder: ColourEmbedder, tmp_path: Path
) -> None:
    few = replace(dataset, holdout=dataset.holdout[:2])
    assert choose_references(few).samples == dataset.train
    bare = score_base(tiny_v_base, few, CONFIG, embedder, tmp_path)
    assert bare.references == "train" and bare.reference_count == 5
    assert "held out" in bare.notes[0]
    with pytest.raises(UserError, match="1 training picture"):
        choose_references(replace(dataset, train=dataset.train[:1]))


def test_an_embedder_that_cannot_tell_the_character_apart_is_flagged_not_divided_by(
    adapted: Base, dataset: DatasetVersion, tmp_path: Path
) -> None:
    found = score(adapted, dataset, FlatEmbedder(), tmp_path)
    assert not found.identity_normalised and not found.prompt_fidelity_normalised
    assert found.identity.value == pytest.approx(0) and found.prompt_fidelity.value == 1
    assert any("not normalised" in note for note in found.notes)


def test_a_ceiling_below_the_floor_is_flagged(
    tiny_v_base: Base, dataset: DatasetVersion, embedder: ColourEmbedder, tmp_path: Path
) -> None:
    mixed = pictures(tmp_path / "mixed", [(0, 0, 0), (255, 255, 255), (255, 0, 0), (0, 255, 255)])
    bare = score_base(
        tiny_v_base, replace(dataset, holdout=mixed), CONFIG, embedder, tmp_path / "base"
    )
    assert bare.ceiling < bare.floor and not bare.identity_normalised
    assert bare.identity.value == pytest.approx(0, abs=1e-9)


def test_scores_of_another_setup_are_not_comparable(
    adapted: Base, dataset: DatasetVersion, embedder: ColourEmbedder, tmp_path: Path
) -> None:
    found = score(adapted, dataset, embedder, tmp_path)
    detach(adapted)
    bare = score_base(adapted, dataset, CONFIG, embedder, tmp_path / "base")
    assert existing_score(tmp_path / "step", bare) == found
    other = CONFIG.model_copy(update={"guidance": 2.0})
    other_bare = score_base(adapted, dataset, other, embedder, tmp_path / "base")
    assert existing_score(tmp_path / "step", other_bare) is None
    assert existing_score(tmp_path / "nothing", bare) is None
    with_adapter(adapted, 0.5)
    with pytest.raises(ValueError, match="belong to another"):
        score_checkpoint(adapted, dataset, CONFIG, embedder, other_bare, tmp_path / "step")


def test_the_key_holds_all_that_scores_rest_on_but_not_the_limits(
    tiny_v_base: Base, tiny_base: Base, dataset: DatasetVersion, embedder: ColourEmbedder
) -> None:
    key = scoring_key(tiny_v_base, dataset, CONFIG, embedder)
    limits = CONFIG.limits.model_copy(update={"drift_max": 0.1})
    same = CONFIG.model_copy(update={"limits": limits, "size_px": 64})
    assert scoring_key(tiny_v_base, dataset, CONFIG, ColourEmbedder()) == key
    same_size = CONFIG.model_copy(update={"limits": limits})
    assert scoring_key(tiny_v_base, dataset, same_size, embedder) == key
    assert scoring_key(tiny_v_base, dataset, same, embedder) == key
    assert scoring_key(tiny_base, dataset, CONFIG, embedder) != key
    assert scoring_key(tiny_v_base, replace(dataset, trigger="x"), CONFIG, embedder) != key
    assert scoring_key(tiny_v_base, dataset, CONFIG, FlatEmbedder()) != key
    longer = CONFIG.model_copy(update={"steps": 3})
    assert scoring_key(tiny_v_base, dataset, longer, embedder) != key


def test_an_adapter_where_none_belongs_and_none_where_one_belongs(
    tiny_v_base: Base, dataset: DatasetVersion, embedder: ColourEmbedder, tmp_path: Path
) -> None:
    bare = score_base(tiny_v_base, dataset, CONFIG, embedder, tmp_path)
    with pytest.raises(RuntimeError, match="no adapter"):
        score_checkpoint(tiny_v_base, dataset, CONFIG, embedder, bare, tmp_path)
    with_adapter(tiny_v_base, 0.1)
    with pytest.raises(RuntimeError, match="detach"):
        score_base(tiny_v_base, dataset, CONFIG, embedder, tmp_path)


def test_a_malformed_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"scores\.json: cannot be read"):
        Score.load(tmp_path)
    (tmp_path / "scores.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        Score.load(tmp_path)
    (tmp_path / "scores.json").write_text("{}")
    with pytest.raises(UserError, match="identity"):
        Score.load(tmp_path)
