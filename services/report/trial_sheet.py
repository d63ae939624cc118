"""A trial's contact sheet: the bare base on top, a row per checkpoint, a column per prompt."""

from __future__ import annotations

from PIL.Image import Image

from captioning import DatasetVersion, Store
from services.report.pictures import SheetRow, contact_sheet
from services.sweeps.files import AskedSweep, base_scores, candidates
from services.sweeps.plan import PlannedTrial
from training import SUBJECT_SLOT, checkpoint_dir


def trial_sheet(
    store: Store,
    asked: AskedSweep,
    dataset: DatasetVersion,
    planned: PlannedTrial,
    workers: int,
) -> Image | None:
    """All checkpoints of one trial at the first seed; None when none was scored."""
    scored = candidates(store, asked, (planned,), dataset, workers)
    if not scored:
        return None
    base = base_scores(store, asked, scored[0].score)
    rows = [SheetRow("base model", base.row(base.folder))]
    for candidate in scored:
        folder = checkpoint_dir(store.runs / candidate.trial, candidate.step)
        rows.append(
            SheetRow(
                f"step {candidate.step}, {candidate.views:.0f} views", candidate.score.row(folder)
            )
        )
    subject = f"{dataset.trigger}, {dataset.class_word}"
    prompts = [prompt.replace(SUBJECT_SLOT, subject) for prompt in asked.config.scoring.prompts]
    return contact_sheet(rows, prompts, [sample.path for sample in dataset.train])
