"""Packs in the loop: every trial as if it were alone, in what it learns and in how it fails."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from training.checkpoints import Contents, list_checkpoints, load_checkpoint
from training.data.latents import LatentCache
from training.families import Base
from training.loop import Callbacks, TrainingDiverged, train, train_pack
from training.pack.adapters import detach, initial_adapter, is_attached
from training.pack.pack import TrialState, form_pack, shared_by_a_pack
from training.pack.plan import MAX_SAMPLES, TRIALS_PER_PACK, plan_packs
from training.pack.slot import Trial
from training.recipe import Recipe

MakeCache = Callable[..., LatentCache]
TOLERANCE = 1e-5
STATE_TOLERANCE = 1e-3  # squares of gradients, whose rounding the weights hardly show
# With Adam's usual 1e-8 a gradient of pure rounding noise would move a weight by a whole step.
EPS = 1e-4


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def small(**changes: Any) -> Recipe:
    data: dict[str, Any] = {
        "network": {"rank": 4},
        "optimizer": {"lr": 1e-3, "eps": EPS},
        "steps": 4,
        "checkpoint_every": 2,
        "batch_size": 2,
    }
    return Recipe.model_validate({**data, **changes})


def mixed() -> list[Recipe]:
    """Four ranks, both methods and axes, and everything else that may differ, differing."""
    return [
        small(
            seed=1,
            network={"rank": 2, "alpha": 4.0, "rank_stabilised": True},
            clip_norm=None,
            noise_offset=0.1,
        ),
        small(
            seed=2,
            network={"rank": 4, "method": "dora", "dora_axis": "output"},
            optimizer={"lr": 2e-3, "eps": EPS, "weight_decay": 0.1},
            caption_dropout=0.6,
            steps=6,
        ),
        small(
            seed=3,
            network={"rank": 8, "method": "dora", "dora_axis": "input", "alpha": 2.0},
            schedule={"type": "cosine", "warmup_steps": 2},
            min_snr_gamma=None,
            steps=5,
            checkpoint_every=3,
        ),
        small(
            seed=4,
            network={"rank": 3},
            clip_norm=0.01,
            optimizer={"lr": 5e-4, "eps": EPS, "lora_plus_ratio": 4.0},
        ),
        small(
            seed=5,
            network={"rank": 2, "method": "dora", "dora_axis": "input"},
            optimizer={"lr": 1e-3, "eps": EPS, "betas": (0.8, 0.95)},
            min_snr_gamma=1.0,
            huber_c=0.2,
        ),
    ]


def fail(trial: Trial, error: Exception) -> None:
    raise AssertionError(f"{trial.id} failed") from error


def rows(trial_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (trial_dir / "metrics.jsonl").read_text().splitlines()]


def losses(trial_dir: Path) -> list[float]:
    return [row["loss"] for row in rows(trial_dir)]


def steps_saved(trial_dir: Path) -> list[int]:
    return [checkpoint.step for checkpoint in list_checkpoints(trial_dir)]


def trials(folder: Path, recipes: list[Recipe], caches: list[LatentCache]) -> list[Trial]:
    return [
        Trial(folder / f"t{number}", recipe, cache)
        for number, (recipe, cache) in enumerate(zip(recipes, caches, strict=True))
    ]


def assert_same_training(packed: Path, solo: Path) -> None:
    """Equal curves, and equal weights and moments at every checkpoint."""
    assert losses(packed) == pytest.approx(losses(solo), rel=TOLERANCE)
    norms = [[row["grad_norm"] for row in rows(folder)] for folder in (packed, solo)]
    assert norms[0] == pytest.approx(norms[1], rel=10 * TOLERANCE)
    assert steps_saved(packed) == steps_saved(solo)
    for one, other in zip(list_checkpoints(packed), list_checkpoints(solo), strict=True):
        found, wanted = load_checkpoint(one.path), load_checkpoint(other.path)
        assert found.recipe == wanted.recipe
        assert found.adapter.keys() == wanted.adapter.keys()
        assert found.state.keys() == wanted.state.keys()
        for name, tensor in wanted.adapter.items():
            error = float((found.adapter[name] - tensor).abs().max())
            assert error <= TOLERANCE * float(tensor.abs().max()), name
        for name, tensor in wanted.state.items():
            error = float((found.state[name] - tensor).abs().max())
            assert error <= STATE_TOLERANCE * float(tensor.abs().max()), name


def test_every_slot_of_a_mixed_pack_equals_its_solo_run(
    tiny_v_base: Base, make_cache: MakeCache, tmp_path: Path
) -> None:
    recipes = mixed()
    caches = [make_cache(tiny_v_base, count=4 + number, seed=number) for number in range(5)]
    packed = trials(tmp_path / "packed", recipes, caches)
    done = train_pack(tiny_v_base, packed, Callbacks(fail))
    assert done == {f"t{number}": recipe.steps for number, recipe in enumerate(recipes)}
    assert not is_attached(tiny_v_base)
    for number, (recipe, cache) in enumerate(zip(recipes, caches, strict=True)):
        solo = tmp_path / f"solo/t{number}"
        train(tiny_v_base, cache, recipe, solo)
        assert_same_training(packed[number].trial_dir, solo)
        moved = load_checkpoint(list_checkpoints(solo)[-1].path).adapter
        assert max(float(t.abs().max()) for name, t in moved.items() if "lora_B" in name) > 1e-5
    # Those with fewer steps left the pack, those with more went on in a smaller one.
    assert [row["pack"] for row in rows(packed[1].trial_dir)] == [5, 5, 5, 5, 2, 1]


def test_trials_at_different_steps_share_a_pack(
    tiny_base: Base, tiny_cache: LatentCache, tmp_path: Path
) -> None:
    recipes = [small(seed=1), small(seed=2, network={"rank": 2, "method": "dora"})]
    for folder in ("solo", "packed"):
        for trial in trials(tmp_path / folder, recipes, [tiny_cache] * 2):
            short = trial.recipe if folder == "solo" else small(**_halved(trial.recipe))
            if folder == "solo" or trial.id == "t0":
                train(tiny_base, tiny_cache, short, trial.trial_dir)
    packed = trials(tmp_path / "packed", recipes, [tiny_cache] * 2)
    train_pack(tiny_base, packed, Callbacks(fail))
    for trial in packed:
        assert losses(trial.trial_dir) == pytest.approx(
            losses(tmp_path / "solo" / trial.id), rel=TOLERANCE
        )
    assert [row["pack"] for row in rows(packed[0].trial_dir)] == [1, 1, 2, 2]
    assert [row["pack"] for row in rows(packed[1].trial_dir)] == [2, 2, 1, 1]


def _halved(recipe: Recipe) -> dict[str, Any]:
    return recipe.model_dump(mode="json") | {"steps": recipe.steps // 2}


def test_an_interrupted_pack_equals_an_unbroken_one_bit_for_bit(
    tiny_v_base: Base, tiny_v_cache: LatentCache, tmp_path: Path
) -> None:
    recipes = [
        recipe.model_copy(update={"steps": 6, "checkpoint_every": 2}) for recipe in mixed()[:4]
    ]
    recipes[0] = recipes[0].model_copy(update={"steps": 4})  # one leaves on the way
    whole = trials(tmp_path / "whole", recipes, [tiny_v_cache] * 4)
    broken = trials(tmp_path / "broken", recipes, [tiny_v_cache] * 4)
    train_pack(tiny_v_base, whole, Callbacks(fail))
    for stop_after in (1, 3, 2, 1):
        asked: list[int] = []
        train_pack(
            tiny_v_base,
            broken,
            Callbacks(
                fail,
                stop=lambda asked=asked, last=stop_after: asked.append(1) or len(asked) >= last,
            ),
        )
    train_pack(tiny_v_base, broken, Callbacks(fail))
    assert_bit_equal(broken, whole)


def assert_bit_equal(found: list[Trial], wanted: list[Trial]) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert losses(one.trial_dir) == losses(other.trial_dir)
        assert steps_saved(one.trial_dir) == steps_saved(other.trial_dir)
        for step in steps_saved(other.trial_dir):
            for name in ("adapter.safetensors", "state.safetensors", "manifest.json"):
                file = f"step-{step:06d}/{name}"
                assert (one.trial_dir / file).read_bytes() == (other.trial_dir / file).read_bytes()


def test_a_pack_that_ends_while_a_checkpoint_is_looked_at_has_saved_all_of_them(
    tiny_v_base: Base, tiny_v_cache: LatentCache, tmp_path: Path
) -> None:
    """Else its trials would go on from different steps, the last of them without company."""
    recipes = mixed()[3:5]
    whole = trials(tmp_path / "whole", recipes, [tiny_v_cache] * 2)
    broken = trials(tmp_path / "broken", recipes, [tiny_v_cache] * 2)
    train_pack(tiny_v_base, whole, Callbacks(fail))

    def end(trial: Trial, step: int, folder: Path) -> None:
        raise KeyboardInterrupt

    for expected in (2, 4):
        with pytest.raises(KeyboardInterrupt):
            train_pack(tiny_v_base, broken, Callbacks(fail, on_checkpoint=end))
        assert [steps_saved(trial.trial_dir)[-1] for trial in broken] == [expected] * 2
    train_pack(tiny_v_base, broken, Callbacks(fail))
    assert_bit_equal(broken, whole)


def poison(
    base: Base, call: int, rows: slice, monkeypatch: pytest.MonkeyPatch, gradient: bool = False
) -> None:
    """Make some rows of the given call's output, or of its gradient, infinite."""
    calls = 0
    predict = base.predict

    def spoil(tensor: torch.Tensor) -> torch.Tensor:
        factors = torch.ones(len(tensor), 1, 1, 1)
        factors[rows] = math.inf
        return tensor * factors

    def poisoned(*arguments: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        output = predict(*arguments)
        if calls != call:
            return output
        if not gradient:
            return spoil(output)
        output.register_hook(spoil)
        return output

    monkeypatch.setattr(base, "predict", poisoned)


@pytest.mark.parametrize("gradient", [True, False])
def test_what_is_not_finite_fails_its_trial_only(
    tiny_base: Base,
    tiny_cache: LatentCache,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    gradient: bool,
) -> None:
    recipes = [small(seed=seed, steps=5) for seed in range(3)]
    clean = trials(tmp_path / "clean", recipes, [tiny_cache] * 3)
    train_pack(tiny_base, clean, Callbacks(fail))
    poison(tiny_base, 3, slice(2, 4), monkeypatch, gradient)
    failed: list[tuple[str, str]] = []
    spoilt = trials(tmp_path / "spoilt", recipes, [tiny_cache] * 3)
    done = train_pack(
        tiny_base, spoilt, Callbacks(lambda trial, error: failed.append((trial.id, str(error))))
    )
    assert done == {"t0": 5, "t2": 5}
    ((trial, message),) = failed
    assert trial == "t1"
    assert "trial t1, step 3" in message and "optimizer.lr" in message
    assert steps_saved(spoilt[1].trial_dir) == [2]
    assert len(rows(spoilt[1].trial_dir)) == 2
    for number in (0, 2):
        assert_same_training(spoilt[number].trial_dir, clean[number].trial_dir)
        # To the last bit while the pack was whole, and in the step of the failure itself.
        assert losses(spoilt[number].trial_dir)[:3] == losses(clean[number].trial_dir)[:3]


def test_an_overflow_in_fp16_skips_the_step_of_its_own_slot_only(
    tiny_base: Base, tiny_cache: LatentCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipes = [small(seed=seed, precision="fp16", checkpoint_every=1, steps=3) for seed in (0, 1)]
    packed = trials(tmp_path, recipes, [tiny_cache] * 2)
    poison(tiny_base, 2, slice(0, 2), monkeypatch, gradient=True)
    train_pack(tiny_base, packed, Callbacks(fail))
    skipped, other = (
        [load_checkpoint(checkpoint.path) for checkpoint in list_checkpoints(trial.trial_dir)]
        for trial in packed
    )
    assert [float(c.state["scaler/scale"]) for c in skipped] == [65536.0, 32768.0, 32768.0]
    assert [float(c.state["scaler/scale"]) for c in other] == [65536.0] * 3

    def moved(before: Contents, after: Contents) -> bool:
        same = [torch.equal(before.adapter[name], after.adapter[name]) for name in before.adapter]
        return not all(same)

    assert [moved(*pair) for pair in itertools.pairwise(skipped)] == [False, True]
    assert [moved(*pair) for pair in itertools.pairwise(other)] == [True, True]
    step_counts = [{float(t) for n, t in c.state.items() if "/step" in n} for c in skipped]
    assert step_counts == [{1.0}, {1.0}, {2.0}]


def test_a_checkpoint_is_seen_with_its_own_adapter_alone(
    tiny_base: Base, tiny_cache: LatentCache, tmp_path: Path
) -> None:
    """What the base gives within `on_checkpoint` is what the saved adapter alone gives."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(3, 4, 8, 8, generator=generator)
    text = torch.randn(3, 77, 32, generator=generator)
    timesteps = torch.tensor([1, 500, 900])
    seen: dict[Path, torch.Tensor] = {}

    def look(trial: Trial, step: int, path: Path) -> None:
        with torch.no_grad():
            seen[path] = tiny_base.predict(latents, timesteps, {"text": text})

    recipes = [small(seed=7, optimizer={"lr": 1e-2}), *mixed()[1:3]]
    packed = trials(tmp_path, recipes, [tiny_cache] * 3)
    train_pack(tiny_base, packed, Callbacks(fail, on_checkpoint=look))
    assert len(seen) == 2 + 3 + 2
    for path, output in seen.items():
        contents = load_checkpoint(path)
        trial = Trial(path.parent, contents.recipe, tiny_cache)
        form_pack(tiny_base, [TrialState(trial, contents)], scaled=False)
        with torch.no_grad():
            wanted = tiny_base.predict(latents, timesteps, {"text": text})
        torch.testing.assert_close(output, wanted, rtol=1e-5, atol=1e-6)
        detach(tiny_base)
    outputs = list(seen.values())
    assert not torch.allclose(outputs[0], outputs[1], rtol=1e-3, atol=1e-4)


def test_a_slot_gives_back_what_it_was_given(
    tiny_base: Base, tiny_cache: LatentCache, tmp_path: Path
) -> None:
    recipes = [small(seed=seed, precision="fp16") for seed in (1, 2)]
    packed = trials(tmp_path, recipes, [tiny_cache] * 2)
    train_pack(tiny_base, packed, Callbacks(fail))
    saved = [load_checkpoint(list_checkpoints(trial.trial_dir)[-1].path) for trial in packed]
    pack = form_pack(tiny_base, list(map(TrialState, packed, saved)), scaled=True)
    for slot, wanted in zip(pack.slots, saved, strict=True):
        found = slot.contents()
        for name in ("adapter", "state"):
            tensors, expected = getattr(found, name), getattr(wanted, name)
            assert tensors.keys() == expected.keys()
            assert all(torch.equal(tensors[key], tensor) for key, tensor in expected.items())
    (left,) = pack.states_without(pack.slots[:1])
    assert left.trial.id == "t1"
    assert left.contents.adapter.keys() == saved[1].adapter.keys()


def test_a_slot_that_never_stepped_has_no_optimiser_state(
    tiny_base: Base, tiny_cache: LatentCache, tmp_path: Path
) -> None:
    recipe = small()
    contents = Contents(0, recipe, initial_adapter(tiny_base, recipe.network, 0), {})
    pack = form_pack(
        tiny_base, [TrialState(Trial(tmp_path, recipe, tiny_cache), contents)], scaled=False
    )
    assert pack.slots[0].optimizer_state() == {}


def test_trials_that_cannot_share_a_pack_are_refused(
    tiny_base: Base, tiny_cache: LatentCache, tmp_path: Path
) -> None:
    for other in (
        small(batch_size=1),
        small(accumulation=2),
        small(precision="bf16"),
        small(resolution=128),
        small(network={"rank": 4, "targets": "attention+ff"}),
    ):
        with pytest.raises(ValueError, match="must agree"):
            train_pack(
                tiny_base, trials(tmp_path, [small(), other], [tiny_cache] * 2), Callbacks(fail)
            )
        assert not is_attached(tiny_base)


def test_a_saving_that_fails_costs_its_own_trial_only(
    tiny_base: Base, tiny_cache: LatentCache, tmp_path: Path
) -> None:
    def full(trial: Trial, step: int, path: Path) -> None:
        if trial.id == "t0":
            raise OSError("no space left")

    failed: list[tuple[str, Exception]] = []
    packed = trials(tmp_path, [small(), small(seed=1)], [tiny_cache] * 2)
    done = train_pack(
        tiny_base,
        packed,
        Callbacks(lambda trial, error: failed.append((trial.id, error)), on_checkpoint=full),
    )
    assert done == {"t1": 4}
    assert [(trial, type(error)) for trial, error in failed] == [("t0", OSError)]
    (tmp_path / "full/t1").mkdir(parents=True)
    (tmp_path / "full/t1/step-000002").write_text("a file where a folder has to be")
    packed = trials(tmp_path / "full", [small(), small(seed=1)], [tiny_cache] * 2)
    done = train_pack(
        tiny_base, packed, Callbacks(lambda trial, error: failed.append((trial.id, error)))
    )
    assert done == {"t0": 4}
    assert [(trial, type(error)) for trial, error in failed[1:]] == [("t1", NotADirectoryError)]
    assert [path.name for path in packed[1].trial_dir.glob(".*")] == []
    with pytest.raises(TrainingDiverged), pytest.MonkeyPatch.context() as patch:
        poison(tiny_base, 1, slice(None), patch)
        train(tiny_base, tiny_cache, small(), tmp_path / "alone")


@given(
    kinds=st.lists(st.tuples(st.sampled_from([1, 4, 8]), st.booleans()), max_size=40),
    trials_per_pack=st.integers(1, TRIALS_PER_PACK),
)
def test_packs_hold_every_trial_once_within_the_limits(
    kinds: list[tuple[int, bool]], trials_per_pack: int
) -> None:
    recipes = [
        small(
            batch_size=batch, network={"rank": 2, "targets": "attention+ff" if ff else "attention"}
        )
        for batch, ff in kinds
    ]
    packs = plan_packs(recipes, trials_per_pack)
    assert sorted(index for pack in packs for index in pack) == list(range(len(recipes)))
    for pack in packs:
        assert 1 <= len(pack) <= trials_per_pack
        assert len({shared_by_a_pack(recipes[index]) for index in pack}) == 1
        assert len(pack) * recipes[pack[0]].batch_size <= MAX_SAMPLES
    # As few as possible, and none much smaller than another.
    for key in {shared_by_a_pack(recipe) for recipe in recipes}:
        own = [len(pack) for pack in packs if shared_by_a_pack(recipes[pack[0]]) == key]
        batch = next(r.batch_size for r in recipes if shared_by_a_pack(r) == key)
        assert len(own) == math.ceil(sum(own) / min(trials_per_pack, MAX_SAMPLES // batch))
        assert max(own) - min(own) <= 1


def test_a_sample_too_large_for_company_is_packed_alone() -> None:
    recipes = [small(batch_size=100), small(batch_size=100)]
    assert plan_packs(recipes) == [[0], [1]]
    with pytest.raises(ValueError, match="trials_per_pack"):
        plan_packs(recipes, 0)
