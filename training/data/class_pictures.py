"""The samples of a set of class pictures, with the captions that a recipe gives them.

A set, a prompt and the character's dataset version in, samples out. Refuses what would undo prior
preservation: the character's own pictures, and captions with its trigger.
"""

from __future__ import annotations

from dataclasses import replace

from captioning import ClassPictures, DatasetVersion, Sample, UserError
from training.data.captions import without_trigger


def class_samples(
    pictures: ClassPictures, prompt: str | None, dataset: DatasetVersion
) -> tuple[Sample, ...]:
    """The set's pictures captioned with `prompt`, or as they came when that is None.

    Raises UserError for a picture without a caption when there is no prompt, for one that is also
    in `dataset`, held out or not, and for a caption that has the dataset's trigger in it.
    """
    samples = pictures.samples
    if prompt is not None:
        samples = tuple(replace(sample, caption=prompt) for sample in samples)
    bare = [sample.source for sample in samples if not sample.caption]
    if bare:
        raise UserError(
            "recipe: class_pictures",
            f"{len(bare)} of {len(samples)} pictures have no caption beside them ({bare[0]})",
            f"set class_prompt, such as {dataset.class_word}, or write captions beside them",
        )
    own = {sample.sha256 for sample in (*dataset.train, *dataset.holdout)}
    both = [sample.source for sample in samples if sample.sha256 in own]
    if both:
        raise UserError(
            "recipe: class_pictures",
            f"{len(both)} of {len(samples)} pictures are pictures of {dataset.character} too "
            f"({both[0]})",
            "take them out: class pictures show others of the class",
        )
    called = [
        one for one in samples if without_trigger(one.caption, dataset.trigger) != one.caption
    ]
    if called:
        raise UserError(
            "recipe: class_pictures" if prompt is None else "recipe: class_prompt",
            f"the caption {called[0].caption!r} has the trigger {dataset.trigger} in it",
            "take it out: class pictures show others of the class",
        )
    return samples
