"""One worker without Ray: trials in packs, failures kept apart, all of it resumable."""

import json
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import pytest
import torch

from captioning import DatasetVersion
from training.checkpoints import list_checkpoints, load_checkpoint
from training.compiled import compile_blocks
from training.events import (
    BaseScoring,
    Buckets,
    CheckpointSaved,
    CheckpointScored,
    CompiledChecked,
    Encoding,
    Event,
    PackMeasured,
    StepTaken,
    TrialFailed,
    TrialStarted,
    TrialStopped,
    TrialSucceeded,
)
from training.families import Base
from training.frozen.quantised import load_quantised
from training.group import Group, Ledger
from training.pack.layer import BankLinear
from training.recipe import Recipe
from training.run.job import SweepJob, TrialSpec
from training.run.worker import SETUP, SetupError, Worker
from training.scoring.prompts import Limits, ScoringConfig
from training.scoring.scores import Score
from training.trial_files import FAILED_FILE

SCORING = ScoringConfig(
    prompts=("{subject}, smile", "{subject}, hat"),
    unrelated=("a house",),
    seeds=2,
    steps=2,
    guidance=1.0,
    bootstrap=100,
)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def recipe(**changes: Any) -> Recipe:
    data: dict[str, Any] = {
        "network": {"rank": 2},
        "optimizer": {"lr": 1e-3},
        "steps": 4,
        "checkpoint_every": 2,
        "batch_size": 2,
    }
    return Recipe.model_validate({**data, **changes})


MakeJob = Callable[..., SweepJob]


@pytest.fixture
def make_job(
    tiny_base_path: Path, frozen_dataset: DatasetVersion, tiny_clip_path: Path, tmp_path: Path
) -> MakeJob:
    def make(*recipes: Recipe, scored: bool = False, base: Path = tiny_base_path) -> SweepJob:
        scoring = SCORING.model_copy(update={"embedder": str(tiny_clip_path)}) if scored else None
        return SweepJob(
            base=str(base),
            dataset_path=str(frozen_dataset.path),
            latents_dir=str(tmp_path / "latents"),
            trials=tuple(
                TrialSpec(f"t{i}", recipe, tmp_path / f"runs/t{i}")
                for i, recipe in enumerate(recipes)
            ),
            scoring=scoring,
            score_dir=str(tmp_path / "base"),
        )

    return make


def run(
    job: SweepJob,
    stopped: Callable[[], bool] = lambda: False,
    ledger: Ledger | None = None,
    on_event: Callable[[Event], None] = lambda event: None,
) -> tuple[SetupError | None, list[Event]]:
    events: list[Event] = []

    def listen(event: Event) -> None:
        events.append(event)
        on_event(event)

    worker = Worker(job, Group(0, 1), torch.device("cpu"), listen, stopped, ledger, max_deaths=2)
    return worker.run(), events


def kinds(events: list[Event]) -> list[type]:
    frequent = StepTaken | Encoding | PackMeasured
    return [type(event) for event in events if not isinstance(event, frequent)]


def test_activations_computed_again_give_the_same_adapters(
    make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = make_job(recipe(), recipe(seed=1, network={"rank": 4, "method": "dora"}))
    moved = tuple(replace(spec, trial_dir=tmp_path / "again" / spec.trial) for spec in kept.trials)
    calls: list[int] = []
    forward = BankLinear.forward

    def counted(layer: BankLinear, x: torch.Tensor) -> torch.Tensor:
        calls[-1] += 1
        return forward(layer, x)

    monkeypatch.setattr(BankLinear, "forward", counted)
    for job in (kept, replace(kept, trials=moved, gradient_checkpointing=True)):
        calls.append(0)
        assert run(job)[0] is None
    assert calls[1] == 2 * calls[0]
    for one, other in zip(kept.trials, moved, strict=True):
        first, again = (
            load_checkpoint(list_checkpoints(spec.trial_dir)[-1].path).adapter
            for spec in (one, other)
        )
        assert all(torch.equal(first[name], again[name]) for name in first)


def test_a_compiled_base_gives_the_same_adapters(
    make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The compiler follows the code and generates none, which takes seconds and not minutes.
    monkeypatch.setattr(
        "training.run.held_base.compile_blocks", partial(compile_blocks, backend="eager")
    )
    plain = make_job(recipe(), recipe(seed=1, network={"rank": 4, "method": "dora"}))
    moved = tuple(replace(spec, trial_dir=tmp_path / "again" / spec.trial) for spec in plain.trials)
    assert run(plain)[0] is None
    problem, events = run(replace(plain, trials=moved, compile=True))
    assert problem is None
    assert [event.kept for event in events if isinstance(event, CompiledChecked)] == [True, True]
    for one, other in zip(plain.trials, moved, strict=True):
        first, again = (
            load_checkpoint(list_checkpoints(spec.trial_dir)[-1].path).adapter
            for spec in (one, other)
        )
        assert all(torch.allclose(first[n], again[n], rtol=1e-4, atol=1e-6) for n in first)


def test_trials_are_trained_and_every_checkpoint_scored(make_job: MakeJob) -> None:
    job = make_job(recipe(), recipe(network={"rank": 2, "method": "dora"}), scored=True)
    problem, events = run(job)
    assert problem is None
    saved = [CheckpointSaved, CheckpointScored]
    started = [BaseScoring, BaseScoring, TrialStarted, TrialStarted]
    ended = [*3 * saved, TrialSucceeded, *saved, TrialSucceeded]
    assert kinds(events) == started + ended
    assert [(e.trial, e.step) for e in events if isinstance(e, CheckpointScored)] == [
        ("t0", 2),
        ("t1", 2),
        ("t0", 4),
        ("t1", 4),
    ]
    for spec in job.trials:
        for checkpoint in list_checkpoints(spec.trial_dir):
            score = Score.load(checkpoint.path)
            told = [e for e in events if isinstance(e, CheckpointScored) and e.trial == spec.trial]
            stored = json.loads((checkpoint.path / "scores.json").read_text())
            assert stored["identity"] in [e.score.identity.model_dump() for e in told]
            assert all((checkpoint.path / picture.file).is_file() for picture in score.pictures)
    # Everything is there, so a second run only says so.
    problem, again = run(job)
    assert problem is None
    assert kinds(again) == [*started, TrialSucceeded, TrialSucceeded]
    assert [e.step for e in again if isinstance(e, TrialStarted)] == [4, 4]


def test_pictures_are_encoded_in_buckets_where_the_recipe_says_so(
    make_job: MakeJob, frozen_dataset: DatasetVersion, tmp_path: Path
) -> None:
    limits = {"aspect_buckets": True, "bucket_step_px": 8}
    problem, events = run(make_job(recipe(), recipe(**limits), recipe(**limits, seed=1)))
    assert problem is None
    told = [event.buckets for event in events if isinstance(event, Buckets)]
    assert told == [((64, 64, len(frozen_dataset.train)),)]  # they all are squares
    assert [event.pack for event in events if isinstance(event, StepTaken)] == [1] * 4 + [2] * 8
    indices = [json.loads(file.read_text()) for file in tmp_path.glob("latents/*/index.json")]
    assert sorted("sizes" in index for index in indices) == [False, True]

    problem, _ = run(make_job(recipe(aspect_buckets=True)))  # of 64 px, as the pictures are
    assert problem is not None and problem.where == "recipe: aspect_buckets"
    assert "bucket_step_px" in (problem.fix or "")


def test_scoring_in_between_does_not_change_the_training(make_job: MakeJob, tmp_path: Path) -> None:
    run(make_job(recipe(), scored=True))
    scored = (tmp_path / "runs/t0/step-000004/adapter.safetensors").read_bytes()
    (tmp_path / "runs").rename(tmp_path / "scored")
    run(make_job(recipe(), scored=False))
    assert (tmp_path / "runs/t0/step-000004/adapter.safetensors").read_bytes() == scored


def test_the_encoders_are_gone_while_training_and_only_the_vae_is_loaded_to_score(
    make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    import training.run.held_base as base_module

    made: list[tuple[str, weakref.ref[torch.nn.Module]]] = []  # every encoder ever loaded
    alive: dict[type, list[list[str]]] = {StepTaken: [], CheckpointScored: []}

    def load(*arguments: Any) -> Base:
        base = load_quantised(*arguments)
        kind = type(base)
        for name in ("vae", "text_encoders"):
            loader = getattr(kind, name).func

            def watched(base: Base, name: str = name, loader: Any = loader) -> Any:
                found = loader(base)
                modules = found.values() if isinstance(found, dict) else [found]
                made.extend((name, weakref.ref(module)) for module in modules)
                return found

            encoders = cached_property(watched)
            encoders.__set_name__(kind, name)
            monkeypatch.setattr(kind, name, encoders)
        return base

    def look(event: Event) -> None:
        if type(event) in alive:
            alive[type(event)].append([name for name, module in made if module() is not None])

    monkeypatch.setattr(base_module, "load_quantised", load)
    problem, _ = run(make_job(recipe(), scored=True), on_event=look)
    assert problem is None
    assert alive[StepTaken] == [[]] * 4
    assert alive[CheckpointScored] == [[]] * 2
    # Loaded to encode, and the VAE again for each of two scored checkpoints: the prompts were
    # embedded when the bare base was scored.
    assert [name for name, _ in made] == ["vae", "text_encoders", "vae", "vae"]


def test_the_states_of_the_best_and_the_last_checkpoint_are_kept(
    make_job: MakeJob, tmp_path: Path
) -> None:
    job = make_job(recipe(steps=4, checkpoint_every=1, optimizer={"lr": 0.1}), scored=True)
    trial, scoring = job.trials[0], job.scoring
    assert run(job)[0] is None and scoring is not None
    checkpoints = list_checkpoints(trial.trial_dir)
    assert all(one.has_state for one in checkpoints)
    scores = {one.step: Score.load(one.path) for one in checkpoints}
    # A guard that one checkpoint passes alone, and not the one of the highest identity.
    nearest = min(scores, key=lambda step: scores[step].drift.value)
    assert nearest < 4 and nearest != max(scores, key=lambda step: scores[step].identity.value)
    drift = scores[nearest].drift.value
    limits = Limits(prompt_fidelity_min=None, drift_max=drift, memorisation_max=None)
    limited = replace(
        job,
        trials=(replace(trial, trial_dir=tmp_path / "limited/t0"),),
        scoring=scoring.model_copy(update={"limits": limits}),
        keep_all_states=False,
    )
    assert run(limited)[0] is None
    kept = list_checkpoints(tmp_path / "limited/t0")
    assert [one.step for one in kept if one.has_state] == [nearest, 4]


def test_a_checkpoint_that_a_kill_left_unscored_is_scored_later(make_job: MakeJob) -> None:
    job = make_job(recipe(), scored=True)
    run(job)
    folder = job.trials[0].trial_dir / "step-000002"
    before = (folder / "scores.json").read_text()
    (folder / "scores.json").unlink()
    _, events = run(job)
    scored = [TrialStarted, CheckpointScored, TrialSucceeded]
    assert kinds(events) == [BaseScoring, BaseScoring, *scored]
    assert (folder / "scores.json").read_text() == before


def test_trained_text_encoders_speak_in_scoring_and_leave_the_others_alone(
    make_job: MakeJob, tmp_path: Path
) -> None:
    runs, plain = tmp_path / "runs", recipe(steps=2)
    trained = recipe(
        network={"rank": 2, "text_encoder": {}}, optimizer={"lr": 0.1}, steps=2, caption_dropout=0.0
    )
    problem, events = run(make_job(trained, plain, scored=True))
    assert problem is None and kinds(events).count(TrialSucceeded) == 2
    spoken, other = (Score.load(runs / f"{trial}/step-000002") for trial in ("t0", "t1"))
    assert spoken.identity_raw != other.identity_raw
    # From the file, as after a kill, it is the same; and the other's is as without company.
    (runs / "t0/step-000002/scores.json").unlink()
    run(make_job(trained, plain, scored=True))
    assert Score.load(runs / "t0/step-000002") == spoken
    runs.rename(tmp_path / "together")
    run(make_job(plain, scored=True))
    assert Score.load(runs / "t0/step-000002") == other


def test_other_prompts_are_scored_anew(make_job: MakeJob) -> None:
    job = make_job(recipe(), scored=True)
    run(job)
    assert job.scoring is not None
    other = SweepJob(
        **{**vars(job), "scoring": job.scoring.model_copy(update={"unrelated": ("a car",)})}
    )
    _, events = run(other)
    assert [event.step for event in events if isinstance(event, CheckpointScored)] == [2, 4]


def watch_predictions(
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> None:
    """Give every output of the worker's UNet, with its latents, to `change`."""
    import training.run.held_base as base_module

    load_quantised = base_module.load_quantised

    def load(*arguments: Any) -> Base:
        base = load_quantised(*arguments)
        predict = base.predict
        monkeypatch.setattr(base, "predict", lambda *a: change(a[0], predict(*a)))
        return base

    monkeypatch.setattr(base_module, "load_quantised", load)


def test_a_pack_that_does_not_fit_is_trained_in_halves(
    make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(recipe(), recipe(seed=1), recipe(seed=2))
    sizes = []

    def out_of_memory(latents: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        sizes.append(len(latents))
        if len(latents) > 2:
            raise torch.OutOfMemoryError("no memory left")
        return output

    watch_predictions(monkeypatch, out_of_memory)
    problem, events = run(job)
    assert problem is None
    assert sorted(e.trial for e in events if isinstance(e, TrialSucceeded)) == ["t0", "t1", "t2"]
    assert TrialFailed not in kinds(events)
    # Smaller micro-batches first; three trials do not fit even with a sample each.
    assert sizes == [6, 3, *[2] * 4, 4, *[2] * 8]


def test_the_job_bounds_the_pack(make_job: MakeJob) -> None:
    job = replace(make_job(recipe(), recipe(seed=1), recipe(seed=2)), trials_per_pack=2)
    _, events = run(job)
    packs = {e.trial: e.pack for e in events if isinstance(e, StepTaken)}
    assert packs == {"t0": 2, "t1": 2, "t2": 1}


def test_an_error_that_one_trial_has_ends_that_trial_only(
    make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    import training.scoring.scorer

    job = make_job(recipe(), recipe(seed=1), scored=True)
    score = training.scoring.scorer.score_checkpoint

    def failing(*arguments: Any) -> Score:
        if "t0/step-000004" in str(arguments[-1]):
            raise OSError("no space left")
        return score(*arguments)

    monkeypatch.setattr(training.scoring.scorer, "score_checkpoint", failing)
    problem, events = run(job)
    assert problem is None
    assert [(e.trial, e.error) for e in events if isinstance(e, TrialFailed)] == [
        ("t0", "no space left")
    ]
    assert [e.trial for e in events if isinstance(e, TrialSucceeded)] == ["t1"]


def test_a_failing_trial_does_not_lose_the_others(
    make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(recipe(), recipe(seed=1), recipe(seed=2))
    calls = 0

    def poisoned(latents: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 3:
            output[2:4] *= float("nan")  # step 3 of the second trial
        return output

    watch_predictions(monkeypatch, poisoned)
    problem, events = run(job)
    assert problem is None
    assert [e.trial for e in events if isinstance(e, TrialSucceeded)] == ["t0", "t2"]
    (failed,) = [e for e in events if isinstance(e, TrialFailed)]
    assert failed.trial == "t1"
    assert "trial t1, step 3" in failed.error
    record = json.loads((job.trials[1].trial_dir / FAILED_FILE).read_text())
    assert record["error"] == failed.error
    assert "TrainingDiverged" in record["traceback"]
    assert [c.step for c in list_checkpoints(job.trials[1].trial_dir)] == [2]
    # The worker that is started again after a death leaves the failed trial alone.
    _, again = run(job)
    assert [e.trial for e in again if isinstance(e, TrialStarted)] == ["t0", "t2"]


def test_what_keeps_all_from_starting_is_told(make_job: MakeJob, tmp_path: Path) -> None:
    problem, _ = run(make_job(recipe(), base=tmp_path / "nothing"))
    assert problem is not None
    assert str(tmp_path / "nothing") in problem.where
    assert problem.fix
    problem, _ = run(make_job(recipe(resolution=60)))
    assert problem is not None
    assert "60 px" in problem.found


def test_a_stop_ends_all_trials_and_the_next_run_goes_on(make_job: MakeJob, tmp_path: Path) -> None:
    job = make_job(recipe(), recipe(seed=1))
    seen: list[int] = []
    stopped = lambda: len(seen) >= 4  # noqa: E731  # after two steps of both
    _, events = run(
        job, stopped, on_event=lambda e: seen.append(1) if isinstance(e, StepTaken) else None
    )
    assert kinds(events)[-1] == TrialStopped
    assert [c.step for c in list_checkpoints(job.trials[1].trial_dir)] == [2]
    _, events = run(job)
    assert kinds(events)[-1] == TrialSucceeded
    resumed = (tmp_path / "runs/t1/step-000004/adapter.safetensors").read_bytes()
    (tmp_path / "runs").rename(tmp_path / "before")
    run(make_job(recipe(), recipe(seed=1)))
    assert (tmp_path / "runs/t1/step-000004/adapter.safetensors").read_bytes() == resumed


def test_a_trial_that_keeps_killing_its_worker_is_given_up(
    make_job: MakeJob, tmp_path: Path
) -> None:
    """As if the worker died whenever it trained the second: each death reads the ledger anew."""
    job = make_job(recipe(), recipe(seed=1), recipe(seed=2))
    file = tmp_path / "deaths.json"

    class Death(BaseException):
        """What no `except Exception` sees, like a SIGKILL."""

    def die(event: Event) -> None:
        if isinstance(event, StepTaken) and event.trial == "t1":
            raise Death

    # Twice each: the whole pack, then the half with the second and the third, then the second.
    for _ in range(6):
        with pytest.raises(Death):
            run(job, ledger=Ledger(file), on_event=die)
    problem, events = run(job, ledger=Ledger(file), on_event=die)
    assert problem is None
    assert [e.trial for e in events if isinstance(e, TrialSucceeded)] == ["t0", "t2"]
    (failed,) = [e for e in events if isinstance(e, TrialFailed)]
    assert "trial t1: its worker died 2 times" in failed.error


def test_dying_in_the_setup_ends_the_run(make_job: MakeJob, tmp_path: Path) -> None:
    file = tmp_path / "deaths.json"
    for _ in range(2):
        Ledger(file).enter(SETUP)
    problem, _ = run(make_job(recipe()), ledger=Ledger(file))
    assert problem is not None
    assert "died 2 times" in problem.found


def test_ledger_counts_by_phase(tmp_path: Path) -> None:
    file = tmp_path / "deaths.json"
    ledger = Ledger(file)
    assert ledger.deaths("t1") == 0
    ledger.enter(SETUP)
    ledger.enter("t1")
    ledger = Ledger(file)
    assert (ledger.deaths("t1"), ledger.deaths(SETUP)) == (1, 0)
    ledger.enter("t2")
    ledger = Ledger(file)
    assert (ledger.deaths("t1"), ledger.deaths("t2")) == (1, 1)


def test_a_missing_picture_stops_before_anything_is_trained(
    make_job: MakeJob, tmp_path: Path
) -> None:
    job = make_job(recipe())
    job = SweepJob(**{**vars(job), "dataset_path": str(tmp_path / "none")})
    problem, events = run(job)
    assert problem is not None
    assert "none" in problem.where
    assert kinds(events) == []
