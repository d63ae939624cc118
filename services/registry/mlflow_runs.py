"""One MLflow experiment per character, one run per sweep, one nested run per trial.

Folders of trials in, runs out. Every call compares with what MLflow holds and adds only what is
missing, so that a command killed between any two calls is repeated without a duplicate.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from captioning import UserError
from services.farm.states import State
from services.registry.bundle import file_sha256
from services.registry.trial_facts import (
    DatasetReference,
    Point,
    TrialFacts,
    dotted_params,
    public_tags,
    trial_points,
)
from training import saved_hashes, step_folders

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient
    from PIL.Image import Image

SWEEP_TAG = "lorafarm.sweep"
TRIAL_TAG = "lorafarm.trial"
STATE_TAG = "lorafarm.state"
PUSHED_TAG = "lorafarm.pushed."
PARENT_TAG = "mlflow.parentRunId"
# Limits of MLflow's log_batch (mlflow/utils/validation.py).
METRICS_PER_BATCH = 1000
PARAMS_PER_BATCH = 100
# The files that tell whether a checkpoint was uploaded as it is. The manifest is none of them: it
# is written again when the checkpoint's state is dropped.
IDENTIFYING_FILES = ("adapter.safetensors", "recipe.yaml", "scores.json")
CHECKPOINT_MANIFEST = "manifest.json"
# What a checkpoint folder gives to its run. The optimiser's state stays in the store: it is
# twice the adapter's size and of use to nobody but a resumed trial.
CHECKPOINT_FILES = (*IDENTIFYING_FILES, CHECKPOINT_MANIFEST)

log = logging.getLogger(__name__)

# The state of a sweep or a trial in MLflow's words; the tag STATE_TAG of its run holds our own.
RUN_STATUS: dict[State, str] = {
    "queued": "SCHEDULED",
    "running": "RUNNING",
    "verifying": "RUNNING",
    "succeeded": "FINISHED",
    "failed": "FAILED",
    "cancelled": "KILLED",
}


class MlflowRuns:
    """Sweeps and trials as MLflow runs."""

    def __init__(self, client: MlflowClient, artifacts: Path | None) -> None:
        self._client = client
        self._artifacts = artifacts
        # The points (key, step) that runs under way have, so that they are not read at each score.
        self._points: dict[str, set[tuple[str, int]]] = {}

    def open_sweep(self, character: str, sweep: str, tags: Mapping[str, str] | None = None) -> str:
        """Return the run id of the sweep, made or, after a kill or a second start, found again."""
        experiment = self._experiment(character)
        run = self._find(experiment, SWEEP_TAG, sweep)
        if run is None:
            run = self._client.create_run(
                experiment,
                run_name=f"sweep {sweep}",
                tags={**public_tags(tags or {}), SWEEP_TAG: sweep, "lorafarm.kind": "sweep"},
            )
        self._set_state(run, "running")
        return str(run.info.run_id)

    def set_state(self, run_id: str, state: State) -> None:
        """Bring a sweep's or a trial's run to a state; what has succeeded stays so."""
        self._set_state(self._client.get_run(run_id), state)

    def record_trial(self, sweep_run: str, trial: TrialFacts) -> str:
        """Bring the trial's run up to what its folder holds, and return the run id.

        A trial that several sweeps share keeps the run of the first one. Raises ValueError for a
        malformed `metrics.jsonl` and KeyError for an unknown state.
        """
        if trial.state not in RUN_STATUS:
            raise KeyError(trial.state)
        experiment = self._experiment(trial.dataset.character)
        run = self._find(experiment, TRIAL_TAG, trial.trial)
        if run is None:
            tags = {PARENT_TAG: sweep_run, TRIAL_TAG: trial.trial, "lorafarm.kind": "trial"}
            run = self._client.create_run(experiment, run_name=trial.trial, tags=tags)
        run_id = str(run.info.run_id)
        self._set_state(run, "running")
        dataset = trial.dataset
        self._add_tags(
            run,
            {
                **public_tags(trial.tags),
                "lorafarm.dataset": f"{dataset.character}/{dataset.version}",
                "lorafarm.dataset.manifest_sha256": dataset.manifest_sha256,
            },
        )
        self._add_params(run, dict(dotted_params(trial.recipe)))
        self._add_input(run, dataset)
        self._add_points(run_id, trial_points(trial, int(run.info.start_time)))
        pushed = self._tags(run_id)
        self._push(run_id, "dataset", {"dataset/manifest.json": dataset.manifest}, pushed)
        for folder in step_folders(trial.trial_dir).values():
            self._push_checkpoint(run_id, folder, pushed)
        self._set_state(run, trial.state)
        if trial.state != "running":
            self._points.pop(run_id, None)
        return run_id

    def log_picture(self, run_id: str, name: str, picture: Image) -> None:
        """Keep `picture` as `pictures/<name>.png` of the run; equal pixels are not sent again."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / f"{name}.png"
            picture.save(file)
            self._push(
                run_id, f"picture.{name}", {f"pictures/{name}.png": file}, self._tags(run_id)
            )

    def push_folder(self, run_id: str, folder: str, files: Mapping[str, Path]) -> None:
        """Keep `files` (relative path to local file) as artifacts below `folder` of the run."""
        targets = {f"{folder}/{path}": file for path, file in files.items()}
        self._push(run_id, folder, targets, self._tags(run_id))

    def artifact_uri(self, run_id: str, path: str) -> str:
        """Where the run's artifact `path` lies."""
        return f"{self._client.get_run(run_id).info.artifact_uri}/{path}"

    def _tags(self, run_id: str) -> Mapping[str, str]:
        tags: Mapping[str, str] = self._client.get_run(run_id).data.tags
        return tags

    def _experiment(self, character: str) -> str:
        found = self._client.get_experiment_by_name(character)
        if found is None:
            location = (
                f"{self._artifacts.resolve().as_uri()}/{character}" if self._artifacts else None
            )
            return str(self._client.create_experiment(character, artifact_location=location))
        if found.lifecycle_stage != "active":
            raise UserError(
                f"MLflow experiment {character}",
                "it was deleted",
                f"restore it: `mlflow experiments restore -x {found.experiment_id}`, or purge it "
                "with `mlflow gc`",
            )
        return str(found.experiment_id)

    def _find(self, experiment: str, tag: str, value: str) -> Run | None:
        """The oldest run with the tag: always the same one, whoever asks."""
        runs = self._client.search_runs(
            [experiment],
            filter_string=f"tags.`{tag}` = '{value}'",
            order_by=["attributes.start_time ASC"],
            max_results=1,
        )
        return runs[0] if runs else None

    def _set_state(self, run: Run, state: State) -> None:
        """Bring the run's status and its state tag to `state`; what has succeeded stays so."""
        run_id, status = run.info.run_id, RUN_STATUS[state]
        current = self._client.get_run(run_id)
        if current.info.status == "FINISHED" and status != "FINISHED":
            return
        if current.data.tags.get(STATE_TAG) != state:
            self._client.set_tag(run_id, STATE_TAG, state)
        if current.info.status == status:
            return
        if status in ("SCHEDULED", "RUNNING"):
            self._client.update_run(run_id, status=status)
        else:
            self._client.set_terminated(run_id, status=status)

    def _add_tags(self, run: Run, tags: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        missing = [RunTag(k, v) for k, v in tags.items() if run.data.tags.get(k) != v]
        if missing:
            self._client.log_batch(run.info.run_id, tags=missing)

    def _add_params(self, run: Run, params: Mapping[str, str]) -> None:
        from mlflow.entities import Param

        missing = [Param(k, v) for k, v in params.items() if k not in run.data.params]
        for start in range(0, len(missing), PARAMS_PER_BATCH):
            batch = missing[start : start + PARAMS_PER_BATCH]
            self._client.log_batch(run.info.run_id, params=batch)

    def _add_input(self, run: Run, dataset: DatasetReference) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        reference = f"{dataset.character}/{dataset.version}"
        logged = run.inputs.dataset_inputs if run.inputs else []
        if any(known.dataset.name == reference for known in logged):
            return
        entity = Dataset(
            name=reference,
            digest=dataset.manifest_sha256[:36],  # MLflow's limit; the whole hash is a tag
            source_type="lorafarm",
            source=f'{{"dataset": "{reference}"}}',
        )
        tag = InputTag("mlflow.data.context", "training")
        self._client.log_inputs(run.info.run_id, [DatasetInput(entity, [tag])])

    def _add_points(self, run_id: str, points: Iterable[Point]) -> None:
        from mlflow.entities import Metric

        wanted = list(points)
        if run_id not in self._points:
            self._points[run_id] = {
                (key, metric.step)
                for key in {point.key for point in wanted}
                for metric in self._client.get_metric_history(run_id, key)
            }
        present = self._points[run_id]
        missing = [
            Metric(point.key, point.value, point.timestamp, point.step)
            for point in wanted
            if (point.key, point.step) not in present
        ]
        for start in range(0, len(missing), METRICS_PER_BATCH):
            batch = missing[start : start + METRICS_PER_BATCH]
            self._client.log_batch(run_id, metrics=batch)
            present.update((metric.key, metric.step) for metric in batch)

    def _push_checkpoint(self, run_id: str, folder: Path, pushed: Mapping[str, str]) -> None:
        """Upload a checkpoint's files unless they are there; what is there is not read again.

        The manifest says the hashes of the large files. One whose bytes are others is damaged, and
        is logged and not uploaded. Tags of earlier versions are hashes over the manifest's bytes
        too; where such a tag holds, it is replaced and nothing is uploaded.
        """
        present = [folder / name for name in CHECKPOINT_FILES if (folder / name).exists()]
        said = saved_hashes(folder)
        hashes = {file: said.get(file.name) or file_sha256(file) for file in present}
        files = {f"checkpoints/{folder.name}/{file.name}": file for file in present}
        identifying = {path: f for path, f in files.items() if f.name != CHECKPOINT_MANIFEST}
        digest, known = _digest(identifying, hashes), pushed.get(PUSHED_TAG + folder.name)
        if known == digest:
            return
        if known == _digest(files, hashes):
            self._client.set_tag(run_id, PUSHED_TAG + folder.name, digest)
            return
        damaged = [file for file in present if file_sha256(file) != hashes[file]]
        if damaged:
            log.warning("not recorded: %s: its content does not match the manifest", damaged[0])
            return
        self._upload(run_id, folder.name, files, digest)

    def _push(
        self, run_id: str, group: str, files: Mapping[str, Path], pushed: Mapping[str, str]
    ) -> None:
        """Upload files (artifact path to local file) unless a tag in `pushed` has their hash."""
        digest = _digest(files, {file: file_sha256(file) for file in files.values()})
        if pushed.get(PUSHED_TAG + group) != digest:
            self._upload(run_id, group, files, digest)

    def _upload(self, run_id: str, group: str, files: Mapping[str, Path], digest: str) -> None:
        """Upload the files, and set their tag last: a torn upload is done again."""
        if not files:
            return
        for path, file in sorted(files.items()):
            target = PurePosixPath(path)
            folder = None if target.parent == PurePosixPath(".") else str(target.parent)
            with _named(file, target.name) as upload:
                self._client.log_artifact(run_id, str(upload), folder)
        self._client.set_tag(run_id, PUSHED_TAG + group, digest)


def _digest(files: Mapping[str, Path], hashes: Mapping[Path, str]) -> str:
    """One hash over the names and contents of files (artifact path to local file)."""
    digest = hashlib.sha256()
    for path, file in sorted(files.items()):
        digest.update(f"{path}\0{hashes[file]}\n".encode())
    return digest.hexdigest()


@contextmanager
def _named(file: Path, name: str) -> Iterator[Path]:
    """`file` under the name it shall have as an artifact: MLflow keeps the local one."""
    if file.name == name:
        yield file
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / name
        shutil.copyfile(file, copy)
        yield copy
