"""Nested ranks: a step at a drawn rank, and what is cut afterwards, against plain references."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from captioning import DatasetVersion, UserError
from training.checkpoints import list_checkpoints, load_checkpoint
from training.cuts import cut_network, cut_recipes
from training.data.batches import draw_batch, drawn_rank
from training.data.latents import LatentCache
from training.events import CheckpointScored, Event, StepTaken, TrialSucceeded
from training.families import Base, load_base
from training.fitting import fit_recipe
from training.group import Group
from training.loop import Callbacks, train, train_pack
from training.pack.adapters import (
    adapter_state,
    attach_pack,
    cut_at,
    detach,
    initial_adapter,
    load_adapter,
)
from training.pack.nested import cut_adapter
from training.pack.slot import Trial
from training.recipe import Network, Recipe, trial_id
from training.run.job import SweepJob, TrialSpec
from training.run.worker import Worker
from training.scoring.prompts import ScoringConfig
from training.scoring.scores import Score

EPS = 1e-4  # keeps rounding in the smallest gradients small
TOLERANCE = 1e-5
RANKS = (1, 2, 4)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def recipe(network: dict[str, Any] | None = None, **changes: Any) -> Recipe:
    options = {
        "network": {"rank": 4, "nested_ranks": RANKS} if network is None else network,
        "optimizer": {"lr": 1e-2, "eps": EPS},
        "steps": 6,
        "checkpoint_every": 3,
        "batch_size": 2,
        "min_snr_gamma": None,
    }
    return Recipe.model_validate({**options, **changes})


def adapter(trial_dir: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(list_checkpoints(trial_dir)[-1].path).adapter


def fail(trial: Trial, error: Exception) -> None:
    raise AssertionError(trial.id) from error


def test_equal_to_a_plain_peft_loop_cut_at_the_drawn_ranks(
    tiny_base: Base, tiny_base_path: Path, tiny_cache: LatentCache, tmp_path: Path
) -> None:
    options = recipe(seed=3)
    train(tiny_base, tiny_cache, options, tmp_path / "trial")
    found = adapter(tmp_path / "trial")

    unet = load_base(tiny_base_path).denoiser
    torch.manual_seed(options.seed)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    unet.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=targets))
    rank = 4
    for name, module in unet.named_modules():
        if name.endswith("lora_A.default"):
            # B·(mask ∘ A·x): as if the further rows and columns were not there.
            module.register_forward_hook(lambda m, args, out: out * (torch.arange(4) < rank))
    parameters = [p for p in unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, eps=EPS, weight_decay=0.01)
    drawn = set()
    for step in range(options.steps):
        rank = drawn_rank(options, step) or 0
        drawn.add(rank)
        batch = draw_batch(options, tiny_cache, step, range(2), 2, tiny_base.objective)
        latents = tiny_base.to_latents(batch.posterior_samples)
        noisy = tiny_base.objective.noisy(latents, batch.noise, batch.timesteps)
        output = unet(noisy, batch.timesteps, batch.conditions["text"]).sample
        loss = torch.nn.functional.mse_loss(output, batch.noise)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    assert drawn == set(RANKS)
    for key, tensor in unet.named_parameters():
        if "lora_" in key:
            wanted = tensor.detach()
            own = found[f"unet.{key.replace('.default', '')}"]
            assert (own - wanted).abs().max() <= TOLERANCE * wanted.abs().max(), key


NETWORKS = [
    {"alpha": 2.0},
    {"rank_stabilised": True},
    {"method": "dora", "dora_axis": "input"},
    {"method": "dora", "dora_axis": "output", "targets": "attention+ff+conv", "conv_alpha": 3.0},
]


@pytest.mark.parametrize("changes", NETWORKS)
def test_a_cut_file_computes_and_learns_what_the_cut_adapter_does(
    tiny_base: Base, tiny_cache: LatentCache, changes: dict[str, Any]
) -> None:
    network = Network.model_validate({"rank": 4, "nested_ranks": RANKS, **changes})
    other = Network(rank=2, targets=network.targets)
    generator = torch.Generator().manual_seed(1)
    states = []
    for one in (network, other):
        state = initial_adapter(tiny_base, one, 0)
        states.append(
            {k: t + 0.1 * torch.randn(t.shape, generator=generator) for k, t in state.items()}
        )
    batch = draw_batch(Recipe(), tiny_cache, 0, range(2), 2, tiny_base.objective)
    noise, timesteps = batch.noise, batch.timesteps

    def answer(copies: int, backward: bool = True) -> torch.Tensor:
        conditions = {k: torch.cat([t] * copies) for k, t in batch.conditions.items()}
        output = tiny_base.predict(
            torch.cat([noise] * copies), torch.cat([timesteps] * copies), conditions
        )
        if backward:
            output.square().sum().backward()
        return output.detach()

    bank = attach_pack(tiny_base, [(network, states[0]), (other, states[1])])
    whole = answer(2)
    bank.cut(0, 2)
    bank.zero_grad()
    cut = answer(2)
    bank.collect_gradients()
    gradients = adapter_state(bank, 0, bank.grads[0])
    assert torch.equal(cut[2:], whole[2:])  # the other slot
    assert (cut[:2] - whole[:2]).abs().max() > 1e-3
    with torch.no_grad(), bank.only([0]), bank.at_rank(0, None):
        torch.testing.assert_close(answer(1, False), whole[:2], rtol=1e-5, atol=1e-5)
        with cut_at(tiny_base, 2):
            torch.testing.assert_close(answer(1, False), cut[:2], rtol=1e-5, atol=1e-5)
    with pytest.raises(RuntimeError, match="no adapter acts alone"), cut_at(tiny_base, 2):
        pass
    detach(tiny_base)

    small = cut_network(network, 2)
    assert small.scale == pytest.approx(network.scale)
    assert small.of_kernels().scale == pytest.approx(network.of_kernels().scale)
    alone = load_adapter(tiny_base, cut_adapter(states[0], 2), small)
    torch.testing.assert_close(answer(1), cut[:2], rtol=1e-5, atol=1e-5)
    alone.collect_gradients()
    wanted = adapter_state(alone, 0, alone.grads[0])
    found = cut_adapter(gradients, 2)
    for name, gradient in wanted.items():
        error = (found[name] - gradient).abs().max()
        assert error <= 1e-4 * gradient.abs().max(), name
    rest = sum(float(g.abs().sum()) for g in gradients.values())
    assert rest == pytest.approx(sum(float(g.abs().sum()) for g in found.values()), rel=1e-6)
    detach(tiny_base)


def test_in_company_and_interrupted_as_alone(
    tiny_base: Base, tiny_cache: LatentCache, tmp_path: Path
) -> None:
    recipes = [
        recipe(),
        recipe({"rank": 3, "nested_ranks": (1, 3), "method": "dora"}, seed=1, ema_decay=0.9),
        recipe({"rank": 2}, seed=2),
    ]
    recipes = [one.model_copy(update={"steps": 4, "checkpoint_every": 2}) for one in recipes]

    def trials(folder: str) -> list[Trial]:
        return [
            Trial(tmp_path / folder / f"t{k}", one, tiny_cache) for k, one in enumerate(recipes)
        ]

    train_pack(tiny_base, trials("packed"), Callbacks(fail))
    steps: list[int] = []

    def count(event: dict[str, Any]) -> None:
        steps.extend([event.step] if isinstance(event, StepTaken) else [])

    broken = trials("broken")
    train_pack(tiny_base, broken, Callbacks(fail, on_event=count, stop=lambda: len(steps) >= 6))
    assert [c.step for c in list_checkpoints(broken[0].trial_dir)] == [2]
    train_pack(tiny_base, broken, Callbacks(fail))
    for trial in trials("packed"):
        wanted = adapter(trial.trial_dir)
        again = adapter(tmp_path / "broken" / trial.id)
        assert all(torch.equal(again[name], tensor) for name, tensor in wanted.items())
        train(tiny_base, tiny_cache, trial.recipe, tmp_path / "solo" / trial.id)
        for name, tensor in adapter(tmp_path / "solo" / trial.id).items():
            assert (wanted[name] - tensor).abs().max() <= TOLERANCE * tensor.abs().max(), name


def test_ranks_are_drawn_alike_by_seed_and_step() -> None:
    counts = Counter(drawn_rank(recipe(seed=5), step) for step in range(600))
    assert set(counts) == set(RANKS) and min(counts.values()) > 150
    other = [drawn_rank(recipe(seed=6), step) for step in range(20)]
    assert other != [drawn_rank(recipe(seed=5), step) for step in range(20)]
    assert drawn_rank(Recipe(), 0) is None


def test_what_cannot_be_nested_is_refused(tiny_dataset: DatasetVersion) -> None:
    for changes, said in (
        ({"nested_ranks": (4,)}, "two or more rising"),
        ({"nested_ranks": (2, 2, 4)}, "two or more rising"),
        ({"nested_ranks": (0, 4)}, "two or more rising"),
        ({"nested_ranks": (2, 8)}, "rank 4 is none of"),
        ({"nested_ranks": (2, 4), "init": "pissa"}, "init pissa"),
        ({"nested_ranks": (2, 4), "conv_rank": 4, "targets": "attention+ff+conv"}, "conv_rank"),
    ):
        with pytest.raises(ValueError, match=said):
            Network.model_validate({"rank": 4, **changes})
    whole = recipe()
    cuts = cut_recipes(whole)
    assert [cut.network.rank for cut in cuts] == [1, 2] and cut_recipes(Recipe()) == ()
    with pytest.raises(UserError, match=r"the largest of .* is trained"):
        fit_recipe(cuts[0], "sd15", "test")
    assert len({trial_id(tiny_dataset, "b", one) for one in (whole, *cuts)}) == 3
    assert "nested" not in Recipe().canonical()


def test_a_worker_scores_every_rank_of_every_checkpoint(
    tiny_base: Base,
    tiny_base_path: Path,
    frozen_dataset: DatasetVersion,
    tiny_clip_path: Path,
    tmp_path: Path,
) -> None:
    whole = recipe({"rank": 4, "nested_ranks": (2, 4)}, steps=1, checkpoint_every=1)
    cuts = tuple(
        TrialSpec(f"cut{one.network.rank}", one, tmp_path / f"cut{one.network.rank}")
        for one in cut_recipes(whole)
    )
    scoring = ScoringConfig(
        prompts=("{subject}, smile", "{subject}, hat"),
        unrelated=("a house",),
        seeds=1,
        steps=1,
        guidance=1.0,
        bootstrap=100,
        embedder=str(tiny_clip_path),
    )
    job = SweepJob(
        base=str(tiny_base_path),
        dataset_path=str(frozen_dataset.path),
        latents_dir=str(tmp_path / "latents"),
        trials=(TrialSpec("t0", whole, tmp_path / "t0", cuts),),
        scoring=scoring,
        score_dir=str(tmp_path / "scores"),
    )

    def run(job: SweepJob) -> list[Event]:
        events: list[Event] = []
        device = torch.device("cpu")
        worker = Worker(job, Group(0, 1), device, events.append, lambda: False, None, 1)
        assert worker.run() is None
        return [event for event in events if isinstance(event, CheckpointScored | TrialSucceeded)]

    events = run(job)
    scored = [(e.step, e.trial) for e in events if isinstance(e, CheckpointScored)]
    assert scored == [(1, "t0"), (1, "cut2")]
    assert [e.trial for e in events if isinstance(e, TrialSucceeded)] == ["t0", "cut2"]

    last = load_checkpoint(tmp_path / "t0" / "step-000001")
    cut = load_checkpoint(tmp_path / "cut2" / "step-000001")
    assert cut.recipe == cuts[0].recipe and cut.step_samples == last.step_samples
    for name, tensor in cut_adapter(last.adapter, 2).items():
        assert torch.equal(cut.adapter[name], tensor)
    # Killed before the cut of a checkpoint was kept: it is made good, and what is loaded from its
    # file scores as what acted in the run.
    before = Score.load(tmp_path / "cut2/step-000001").identity.value
    for file in sorted((tmp_path / "cut2/step-000001").rglob("*"), reverse=True):
        file.rmdir() if file.is_dir() else file.unlink()
    assert [e.trial for e in run(job) if isinstance(e, CheckpointScored)] == ["cut2"]
    assert Score.load(tmp_path / "cut2/step-000001").identity.value == pytest.approx(
        before, abs=1e-3
    )
