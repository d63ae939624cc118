"""Builds the report: one HTML file with everything inside it, no script and no address.

`ReportData` in, a written file out. All text is escaped by the template; a content policy in the
page forbids it to load or run anything, whatever a caption says.
"""

from __future__ import annotations

import importlib.resources
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from captioning import write_atomic
from services.farm.durations import duration
from services.report.data import CharacterReport, ExportedFile, ReportData, TrialResult
from services.report.leaderboard import LeaderboardRow, leaderboard_rows
from services.report.pictures import WebPicture, web_picture
from services.report.plots import (
    DARK,
    LIGHT,
    Theme,
    identity_figure,
    loss_figure,
    svg_uri,
    trade_off_figure,
)
from training import FAMILY_FACTS, Interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Measure, its heading, which way is better, and what it says in a few words.
MEASURE_HEADINGS = (
    ("identity", "identity", "higher", "0 = base model without adapter, 1 = the character's own "
     "pictures among themselves (CLIP image similarity)"),
    ("prompt_fidelity", "fidelity", "higher", "how well pictures follow their own prompt: 1 = as "
     "well as the base model, 0 = not at all"),
    ("drift", "drift", "lower", "how far pictures of unrelated prompts moved away from the base "
     "model's"),
    ("leak", "leak", "lower", "how far the class word alone, without the trigger, moved towards "
     "the character"),
    ("memorisation", "memorised", "lower", "share of pictures closer to one training picture than "
     "training pictures are to each other"),
    ("diversity", "diversity", "higher", "mean distance between the pictures of the character"),
)  # fmt: skip
TRAINING_PICTURES_BESIDE = 6
TORCH_TYPES = {"fp16": "torch.float16", "bf16": "torch.bfloat16"}


@dataclass(frozen=True)
class _Figure:
    title: str
    note: str
    alt: str
    light: str
    dark: str


@dataclass(frozen=True)
class _Snippet:
    tool: str
    steps: tuple[str, ...]
    code: str
    wide: bool = False


@dataclass(frozen=True)
class _SheetRow:
    title: str
    step: int | None
    won: bool
    pictures: tuple[WebPicture, ...]


def build_report(data: ReportData, out: Path) -> Path:
    """Write the report to `out` (made whole, then renamed) and return it.

    Raises ValueError when a picture's columns do not fit, OSError when a picture cannot be read.
    """
    environment = Environment(
        loader=PackageLoader("services.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": lambda value: f"{value:.2f}",
        "duration": duration,
        "size": file_size,
        "range_bar": range_bar,
        "web": web_picture,
    }
    style = importlib.resources.files("services.report").joinpath("templates/style.css")
    page = environment.get_template("page.html.j2").render(
        data=data,
        characters=[_character(character) for character in data.characters],
        headings=MEASURE_HEADINGS,
        style=Markup(style.read_text(encoding="utf-8")),
    )
    write_atomic(out, page.encode("utf-8"))
    return out


def file_size(size_bytes: int) -> str:
    """Bytes in decimal units, as file managers show them."""
    if size_bytes < 1000:
        return f"{size_bytes} B"
    size = float(size_bytes)
    for unit in ("kB", "MB", "GB"):
        size /= 1000
        if size < 999.95 or unit == "GB":
            break
    return f"{size:.1f} {unit}"


def range_bar(interval: Interval, low: float, high: float) -> Markup:
    """A small drawing of the interval on the axis low..high: a band with a dot at the value."""

    def place(value: float) -> float:
        return 3 + 94 * (min(max(value, low), high) - low) / (high - low)

    left, middle, right = place(interval.low), place(interval.value), place(interval.high)
    return Markup(
        '<svg class="range" viewBox="0 0 100 12" preserveAspectRatio="none" aria-hidden="true">'
        '<line class="axis" x1="0" x2="100" y1="6" y2="6"/>'
        '<line class="zero" x1="{0:.1f}" x2="{0:.1f}" y1="1" y2="11"/>'
        '<line class="band" x1="{1:.1f}" x2="{2:.1f}" y1="6" y2="6"/>'
        '<line class="dot" x1="{3:.1f}" x2="{3:.1f}" y1="1" y2="11"/></svg>'
    ).format(place(0.0), left, right, middle)


def _character(character: CharacterReport) -> dict[str, object]:
    """What the template needs beyond the plain data."""
    rows = leaderboard_rows(character)
    intervals = [row.checkpoint.measures["identity"] for row in rows if row.checkpoint.measures]
    has_scores = bool(intervals)
    return {
        "facts": character,
        "rows": rows,
        "axis": (
            min([0.0, *(interval.low for interval in intervals)]),
            max([1.0, *(interval.high for interval in intervals)]),
        ),
        "spent": sum(trial.seconds for trial in character.trials),
        "identity_figure": _identity(character) if has_scores else None,
        "trade_off_figure": _trade_off(character) if has_scores else None,
        "loss_figure": _loss(character) if any(t.losses for t in character.trials) else None,
        "base_row": _SheetRow(
            "base model", None, False, tuple(map(web_picture, character.base_pictures))
        ),
        "sheets": _sheets(character),
        "beside": character.dataset.train[:TRAINING_PICTURES_BESIDE],
        "hero": _hero(character),
        "snippets": _snippets(character),
        "scored": sum(row.checkpoint.measures is not None for row in rows),
        "passed": sum(_passed(row) for row in rows),
    }


def _passed(row: LeaderboardRow) -> bool:
    return row.checkpoint.measures is not None and not row.checkpoint.failed_guards


def _identity(character: CharacterReport) -> _Figure:
    return _themed(
        character,
        identity_figure,
        "Identity over steps",
        "The band is the 95 % interval over prompts and seeds.",
    )


def _trade_off(character: CharacterReport) -> _Figure:
    return _themed(
        character,
        trade_off_figure,
        "What identity costs",
        "Each point is a checkpoint; hollow ones fail a guard, the shaded side is beyond its "
        "limit.",
    )


def _loss(character: CharacterReport) -> _Figure:
    return _themed(
        character,
        loss_figure,
        "Training loss",
        "A falling loss says that training runs, not that pictures are good: the scores decide.",
    )


def _themed(
    character: CharacterReport,
    draw: Callable[[CharacterReport, Theme], Figure],
    title: str,
    note: str,
) -> _Figure:
    light, dark = (svg_uri(draw(character, theme)) for theme in (LIGHT, DARK))
    return _Figure(title, note, f"{title} of {character.name}", light, dark)


def _sheets(character: CharacterReport) -> list[tuple[TrialResult, list[_SheetRow]]]:
    """The contact sheet's rows by trial, the winning trial first."""
    trials = sorted(character.trials, key=lambda trial: trial is not character.winning_trial)
    sheets = []
    for trial in trials:
        rows = [
            _SheetRow(
                character.title(trial),
                checkpoint.step,
                checkpoint is character.winning_checkpoint,
                tuple(map(web_picture, checkpoint.pictures)),
            )
            for checkpoint in trial.checkpoints
            if checkpoint.pictures
        ]
        if rows:
            sheets.append((trial, rows))
    return sheets


def _hero(character: CharacterReport) -> list[tuple[str, WebPicture]]:
    """Three pictures that tell the story: who it is, the base model, the winner."""
    winner = character.winning_checkpoint
    if winner is None or not (winner.pictures and character.base_pictures):
        return []
    story = [("base model", character.base_pictures[0]), ("with the adapter", winner.pictures[0])]
    if character.dataset.train:
        story.insert(0, ("training picture", character.dataset.train[0].picture))
    return [(label, web_picture(picture)) for label, picture in story]


def _snippets(character: CharacterReport) -> list[_Snippet]:
    """How each tool loads the exported files; a tool whose format was not exported is left out."""
    winner = character.winning_trial
    kohya = _first(character.exports, "kohya")
    peft = _first(character.exports, "diffusers")
    prompt = f"{character.trigger}, {character.class_word}, portrait, smiling"
    weight = f"{character.recommended_weight:g}"
    snippets = []
    if kohya is not None:
        stem = PurePosixPath(kohya.name).stem
        snippets.append(
            _Snippet(
                "ComfyUI",
                (
                    _placed(character, kohya, "ComfyUI/models/loras"),
                    "Put a “Load LoRA” node after “Load Checkpoint”, choose the file and set "
                    f"strength_model to {weight}.",
                    "Start the positive prompt with the trigger and the class word.",
                ),
                prompt,
            )
        )
        snippets.append(
            _Snippet(
                "A1111 and Forge",
                (
                    f"{_placed(character, kohya, 'models/Lora')} Refresh the Lora tab.",
                    "Use this prompt; the part in angle brackets loads the adapter:",
                ),
                f"{prompt} <lora:{stem}:{weight}>",
            )
        )
    # From a DoRA in kohya's naming diffusers leaves the magnitudes out, or reads nothing at all.
    loadable = peft or (kohya if winner is None or winner.method == "lora" else None)
    # A single-file checkpoint is opened by its family's own pipeline, which a page cannot know.
    if loadable is not None and ".safetensors" not in character.base:
        path = PurePosixPath(loadable.name)
        # Else every part has the type that it was saved in, and parts of two cannot compute.
        dtype = TORCH_TYPES[FAMILY_FACTS[character.family].half]
        lines = [
            "import torch",
            "from diffusers import DiffusionPipeline",
            "",
            f"pipe = DiffusionPipeline.from_pretrained({character.base!r}, torch_dtype={dtype})",
            f"pipe.load_lora_weights({str(path.parent)!r}, weight_name={path.name!r}, "
            f"adapter_name={character.name!r})",
            f"pipe.set_adapters({character.name!r}, {weight})",
            f"image = pipe({prompt!r}).images[0]",
        ]
        steps = (_placed(character, loadable, "."),)
        snippets.append(_Snippet("diffusers", steps, "\n".join(lines), wide=True))
    return snippets


def _placed(character: CharacterReport, export: ExportedFile, folder: str) -> str:
    """How an exported file gets into the folder in which the next step looks for it."""
    if character.reference:
        command = f"lorafarm export {character.reference} --format {export.format} --to {folder}"
        return f"Run “{command}”, which writes {export.name}."
    return f"Copy {export.name} into {folder}."


def _first(exports: tuple[ExportedFile, ...], format: str) -> ExportedFile | None:
    return next((export for export in exports if export.format == format), None)
