"""One Ray Train worker: it encodes once, then trains and scores the sweep's trials pack by pack.

A `SweepJob` in; checkpoints, scores and `failed.json` files in the trials' folders out, events to
the driver. Every step finds out from the disk what is done already, so a worker that was killed
and started again just goes on. One trial's failure never ends the others.
"""

from __future__ import annotations

import functools
import json
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from captioning import UserError, write_atomic
from training.checkpoint_files import is_whole
from training.checkpoints import (
    Checkpoint,
    begun_with,
    last_with_state,
    list_checkpoints,
    load_checkpoint,
)
from training.data.views import samples_per_step
from training.events import (
    BaseScoring,
    CheckpointSaved,
    CheckpointScored,
    Event,
    OnEvent,
    TrialFailed,
    TrialStarted,
    TrialStopped,
    TrialSucceeded,
)
from training.frozen.quantised import BASE_PRECISIONS
from training.frozen.zero import import_deepspeed
from training.group import Group, Ledger, Workers
from training.loop import Callbacks, train_pack
from training.pack.adapters import cut_at, detach, load_adapter
from training.pack.nested import write_cut
from training.pack.pack import shared_by_a_pack
from training.pack.plan import plan_packs
from training.pack.slot import Trial
from training.recipe import Recipe
from training.run.encoded import Encoded
from training.run.held_base import HeldBase
from training.run.job import SweepJob, TrialSpec
from training.run.lockstep import in_step
from training.run.retention import drop_other_states
from training.trial_files import FAILED_FILE

SETUP = "setup"

T = TypeVar("T")


@dataclass(frozen=True)
class SetupError:
    """Why no trial could be started; `fix` is None when a person cannot fix it."""

    where: str
    found: str
    fix: str | None


def _tried(act: Callable[[], object]) -> SetupError | None:
    try:
        act()
    except UserError as error:
        return SetupError(error.where, error.found, error.fix)
    except Exception:
        # The driver is told with the traceback; a restart would only meet the same error.
        return SetupError("training worker", traceback.format_exc(), None)
    return None


class Worker:
    """One member of the group, with the base and the encoded dataset in memory."""

    def __init__(
        self,
        job: SweepJob,
        group: Group,
        device: torch.device,
        on_event: OnEvent,
        stopped: Callable[[], bool],
        ledger: Ledger | None,
        max_deaths: int,
    ) -> None:
        """`on_event` and `ledger` are used on rank 0 only; `stopped` must be cheap to ask."""
        self.job = job
        self.group = group
        self.device = device
        self.on_event = on_event
        self.stopped = stopped
        self.ledger = ledger
        self.max_deaths = max_deaths
        self._base = HeldBase(job, device, group.world_size)  # here, where all workers are together
        self._encoded = Encoded(job, self._base, self._send)
        self._embedder: Any = None
        self._base_scores: Any = None
        self._finished: set[str] = set()  # trials whose `TrialSucceeded` was sent

    def run(self) -> SetupError | None:
        """Train and score every trial that is not done; returns why none could start, if so."""
        problem = self._load_together()
        if problem is None:
            problem = self.group.rank_0_says(lambda: self._set_up(self._encode))
        if problem is None:
            reference = self._reference()
            problem = self._on_rank_0(
                reference, lambda: self._set_up(lambda: self._score_bare_base(reference))
            )
        if problem is not None:
            return problem
        for specs, trials_per_pack in self.group.rank_0_says(self._packs):
            if not self._run_pack(specs, trials_per_pack):
                return None
        return None

    def _packs(self) -> list[tuple[list[TrialSpec], int]]:
        """Trials that can share a pack, with the number of those that train at a time.

        It is the size of the largest planned pack: a trial that leaves early gives its slot to the
        next one. Trials that began with other samples per step stand apart.
        """
        workers = self.job.batch_workers or self.group.world_size
        alike: dict[tuple[object, ...], list[TrialSpec]] = {}
        for spec in self.job.trials:
            samples = begun_with(spec.trial_dir) or samples_per_step(spec.recipe, workers)
            alike.setdefault((*shared_by_a_pack(spec.recipe), samples), []).append(spec)
        packs = []
        for specs in alike.values():
            planned = plan_packs([spec.recipe for spec in specs], self.job.trials_per_pack)
            in_order = [specs[index] for pack in planned for index in pack]
            packs.append((in_order, max(len(pack) for pack in planned)))
        return packs

    def _set_up(self, act: Callable[[], None]) -> SetupError | None:
        """On rank 0, do once what all trials need; returns why it cannot be done."""
        self._enter(SETUP)
        if self._died_too_often(SETUP):
            return SetupError(
                "training worker",
                f"it died {self.max_deaths} times while it loaded the base and encoded the "
                "dataset (out of memory, most often)",
                "free memory, use a smaller base, or fewer workers on one machine",
            )
        return _tried(act)

    def _load_together(self) -> SetupError | None:
        """Do what each worker has to do by itself; returns to all of them why one cannot.

        That is to compile, or to load a base by DeepSpeed, whose workers exchange weights while
        they load.
        """
        if not (self.job.compile or self.job.strategy == "deepspeed"):
            return None
        # The workers may have died of it before.
        problem = self.group.rank_0_says(lambda: self._set_up(lambda: None))
        if problem is None and self.job.strategy == "deepspeed":
            problem = self._all_try(import_deepspeed)
        if problem is None:
            problem = self._all_try(lambda: self._base.for_training(self._reference()))
        return problem

    def _all_try(self, act: Callable[[], object]) -> SetupError | None:
        problems = self.group.all_say(_tried(act))
        return next((problem for problem in problems if problem is not None), None)

    def _encode(self) -> None:
        for spec in self.job.trials:
            self._encoded.pictures(spec.recipe)
            self._encoded.class_pictures(spec.recipe)

    def _on_rank_0(self, recipe: Recipe, act: Callable[[], T]) -> T:
        """Compute `act()`, which may sample, on rank 0 and give its value to every rank."""
        if not self.job.is_shared_out:
            return self.group.rank_0_says(act)
        return in_step(self.group, self._base.for_training(recipe), act)

    def _run_pack(self, planned: Sequence[TrialSpec], trials_per_pack: int) -> bool:
        """Train and score the trials, so many at a time; False when the driver asked to stop.

        A pack that keeps killing its worker, or fails as a whole, is tried again in halves. Most
        often it was too large; otherwise the trial that makes it fail is alone in the end.
        """
        specs, too_deadly = self.group.rank_0_says(lambda: self._admit(planned))
        if too_deadly:
            return self._run_halves(planned, trials_per_pack)
        if not specs:
            return True
        # With several workers only errors that all of them meet may be caught by all of them.
        survivable = Exception if self.group.world_size == 1 else UserError
        try:
            return self._train_and_score(specs, trials_per_pack)
        except survivable as error:
            if self.job.is_shared_out:
                self._base.release()  # a forward pass that broke off leaves blocks gathered
            if len(planned) == 1:
                self._fail(planned[0], error)
                return True
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return self._run_halves(planned, trials_per_pack)

    def _run_halves(self, planned: Sequence[TrialSpec], trials_per_pack: int) -> bool:
        middle, fewer = len(planned) // 2, (trials_per_pack + 1) // 2
        return all(self._run_pack(half, fewer) for half in (planned[:middle], planned[middle:]))

    def _admit(self, planned: Sequence[TrialSpec]) -> tuple[list[TrialSpec], bool]:
        """On rank 0: the trials that have not failed, and whether they must be tried in halves."""
        specs = [spec for spec in planned if not (spec.trial_dir / FAILED_FILE).exists()]
        # The phase names failed and finished trials too, so that it stays the same pack.
        phase = " ".join(spec.trial for spec in planned)
        if specs and self._died_too_often(phase):
            if len(planned) > 1:
                return specs, True
            found = f"its worker died {self.max_deaths} times (out of memory, most often)"
            fix = "lower batch_size or resolution, and raise accumulation instead"
            self._fail(planned[0], UserError(f"trial {planned[0].trial}", found, fix))
            return [], False
        self._enter(phase)
        return specs, False

    def _train_and_score(self, specs: Sequence[TrialSpec], trials_per_pack: int) -> bool:
        """Train and score trials that share packs; False when the driver asked to stop."""
        trials = {spec.trial: self._encoded_trial(spec) for spec in specs}
        by_trial = {spec.trial: spec for spec in specs}
        base = self._base.for_training(specs[0].recipe)
        base.release_encoders()
        # Wait before the first gradients are exchanged: loading may take one worker much longer.
        self.group.wait_for_all()
        for spec in specs:
            last = last_with_state(spec.trial_dir)
            self._send(TrialStarted(spec.trial, last.step if last else 0, spec.recipe.steps))
        callbacks = Callbacks(
            on_failure=lambda trial, error: self._fail(by_trial[trial.id], error),
            on_event=self.on_event,
            on_checkpoint=lambda t, step, path: self._after_checkpoint(by_trial[t.id], step, path),
            stop=self.stopped,
        )
        workers = Workers(
            self.group.rank,
            self.group.world_size,
            self.job.batch_workers,
            self.group if self.job.share_optimizers else None,
        )
        done = train_pack(
            base,
            list(trials.values()),
            callbacks,
            workers,
            trials_per_pack=trials_per_pack,
            compiled=self._base.compiled,
        )
        for spec in specs:
            if spec.trial not in done:
                continue
            if done[spec.trial] < spec.recipe.steps or not self._score_the_rest(spec):
                self._send(TrialStopped(spec.trial))
                return False
            self._finish(spec)
        return True

    def _encoded_trial(self, spec: TrialSpec) -> Trial:
        recipe = spec.recipe
        pictures, of_class = self._encoded.pictures(recipe), self._encoded.class_pictures(recipe)
        return Trial(spec.trial_dir, recipe, pictures, of_class)

    def _after_checkpoint(self, spec: TrialSpec, step: int, path: Path) -> None:
        self._send(CheckpointSaved(spec.trial, step, str(path)))
        whole = Checkpoint(step, path)
        self._raise_together(spec, lambda: self._score(spec, whole))
        for cut in spec.cuts:
            with cut_at(self._base.for_training(spec.recipe), cut.recipe.network.rank):
                self._raise_together(cut, functools.partial(self._cut_and_score, cut, whole))
        # Finish it now, and not when the last of the trials that take its slot is done.
        if step >= spec.recipe.steps and self._all_scored(spec):
            self._finish(spec)
        if self.group.rank == 0 and not self.job.keep_all_states:
            drop_other_states(spec.trial_dir, spec.recipe, self.job.scoring, self._base_scores)

    def _all_scored(self, spec: TrialSpec) -> bool:
        if self.job.scoring is None or self.group.rank != 0:
            return True
        from training.scoring.scorer import existing_score

        checkpoints = [
            one for each in (spec, *spec.cuts) for one in list_checkpoints(each.trial_dir)
        ]
        return all(existing_score(one.path, self._base_scores) is not None for one in checkpoints)

    def _finish(self, spec: TrialSpec) -> None:
        for one in (spec, *spec.cuts):
            if one.trial not in self._finished:
                self._finished.add(one.trial)
                self._send(TrialSucceeded(one.trial, one.recipe.steps))

    def _score_the_rest(self, spec: TrialSpec) -> bool:
        """Cut and score checkpoints that a killed worker left; False when asked to stop."""
        if spec.cuts:
            self._raise_together(spec, lambda: self._cut_the_rest(spec))
        if self.job.scoring is None:
            return not self.group.rank_0_says(self.stopped)
        base = self._base.for_training(spec.recipe)
        try:
            for one in (spec, *spec.cuts):
                for checkpoint in self.group.rank_0_says(functools.partial(self._unscored, one)):
                    if self.group.rank_0_says(self.stopped):
                        return False
                    adapter = load_checkpoint(checkpoint.path).adapter
                    load_adapter(base, adapter, one.recipe.network)
                    self._raise_together(one, functools.partial(self._score, one, checkpoint))
        finally:
            detach(base)
        return not self.group.rank_0_says(self.stopped)

    def _cut_and_score(self, cut: TrialSpec, whole: Checkpoint) -> None:
        """On rank 0, save the cut of a checkpoint and score it; the base acts with the cut now."""
        self._score(cut, write_cut(whole, cut.trial_dir, cut.recipe))

    def _cut_the_rest(self, spec: TrialSpec) -> None:
        """On rank 0, save the cuts of checkpoints that have none yet."""
        wholes = list_checkpoints(spec.trial_dir)
        for cut in spec.cuts:
            kept = {checkpoint.step for checkpoint in list_checkpoints(cut.trial_dir)}
            for whole in wholes:
                if whole.step not in kept and is_whole(whole):
                    write_cut(whole, cut.trial_dir, cut.recipe)

    def _unscored(self, spec: TrialSpec) -> list[Checkpoint]:
        from training.scoring.scorer import existing_score

        return [
            checkpoint
            for checkpoint in list_checkpoints(spec.trial_dir)
            if existing_score(checkpoint.path, self._base_scores) is None and is_whole(checkpoint)
        ]

    def _score(self, spec: TrialSpec, checkpoint: Checkpoint) -> None:
        """On rank 0, score the adapter that is on the base now as `checkpoint`."""
        if self.job.scoring is None:
            return
        from training.scoring.scorer import score_checkpoint

        base = self._base.for_training(spec.recipe)
        started = time.perf_counter()
        try:
            score = score_checkpoint(
                base,
                self._encoded.dataset,
                self.job.scoring,
                self._embedder,
                self._base_scores,
                checkpoint.path,
            )
        finally:
            base.release_encoders()
        seconds = time.perf_counter() - started
        self._send(CheckpointScored(spec.trial, checkpoint.step, score, seconds))

    def _reference(self) -> Recipe:
        """The recipe whose base, without adapters, all are compared with: the least rounded one."""
        recipes = [spec.recipe for spec in self.job.trials]
        return min(recipes, key=lambda recipe: BASE_PRECISIONS.index(recipe.base_precision))

    def _score_bare_base(self, reference: Recipe) -> None:
        if self.job.scoring is None:
            return
        from captioning import STARTER_CLIP, Embedder
        from training.scoring.scorer import score_base

        self._send(BaseScoring("running"))
        self._embedder = Embedder(self.job.scoring.embedder or STARTER_CLIP)
        self._base_scores = score_base(
            self._base.for_training(reference),
            self._encoded.dataset,
            self.job.scoring,
            self._embedder,
            Path(self.job.score_dir),
            reference.base_precision,
        )
        self._send(BaseScoring("succeeded"))

    def _raise_together(self, spec: TrialSpec, act: Callable[[], None]) -> None:
        """Let rank 0 act; if that fails, every rank raises, so that none waits for another."""
        if self.group.world_size == 1:
            return act()

        def attempt() -> tuple[str, str, str] | None:
            try:
                act()
            except UserError as error:
                return error.where, error.found, error.fix
            except Exception as error:
                return "scoring", f"{type(error).__name__}: {error}", traceback.format_exc()
            return None

        failure = self._on_rank_0(spec.recipe, attempt)
        if failure is not None:
            raise UserError(*failure)

    def _fail(self, spec: TrialSpec, error: BaseException) -> None:
        """On rank 0, write down why the trial has failed, and send the event."""
        if self.group.rank != 0:
            return
        content = {
            "trial": spec.trial,
            "error": str(error) or type(error).__name__,
            "traceback": "".join(traceback.format_exception(error)),
        }
        write_atomic(spec.trial_dir / FAILED_FILE, json.dumps(content, indent=1).encode())
        self._send(TrialFailed(spec.trial, content["error"]))

    def _send(self, event: Event) -> None:
        if self.group.rank == 0:
            self.on_event(event)

    def _enter(self, phase: str) -> None:
        if self.ledger is not None:
            self.ledger.enter(phase)

    def _died_too_often(self, phase: str) -> bool:
        return self.ledger is not None and self.ledger.deaths(phase) >= self.max_deaths
