"""The report's figures: identity over steps, trade-offs, loss, each for light and dark pages.

Results in, matplotlib figures and data URIs out. Colours are told apart by colour-blind people
(Okabe and Ito 2008), and never carry a meaning alone: the winner is also larger and named.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from services.report.data import CharacterReport, TrialResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# More trials than this share one grey: nobody tells nine lines apart.
MAX_COLOURED_TRIALS = 7
# Weight of the newest loss in the smoothed curve.
LOSS_SMOOTHING = 0.05
WIDTH_IN = 10.8
# Up to so many checkpoints each one has its own tick.
MAX_STEP_TICKS = 12
_SANS = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
_MARKERS = "osD^vPX"


@dataclass(frozen=True)
class Theme:
    """The colours of a page."""

    name: str
    text: str
    muted: str
    line: str
    surface: str
    winner: str
    others: tuple[str, ...]


LIGHT = Theme(
    name="light",
    text="#1f2328",
    muted="#666d78",
    line="#dfe2e6",
    surface="#ffffff",
    winner="#0072b2",
    others=("#d55e00", "#009e73", "#b8578c", "#8a6d00", "#3d9bd1", "#7a5cc7"),
)
DARK = Theme(
    name="dark",
    text="#e6e8eb",
    muted="#9aa2ad",
    line="#353b43",
    surface="#1b1f24",
    winner="#56b4e9",
    others=("#f08a4b", "#2fc29b", "#e39ac4", "#e0c34a", "#8ab6d6", "#b39cf0"),
)


@dataclass(frozen=True)
class _Look:
    color: str
    marker: str
    width: float
    label: str | None
    front: int


def identity_figure(character: CharacterReport, theme: Theme) -> Figure:
    """Identity over training steps, a line per trial with its 95 % interval as a band."""
    figure, [axes] = _figure(theme, 1, height_in=4.1)
    _reference_line(axes, theme, 0.0, "base model without adapter")
    _reference_line(axes, theme, 1.0, "the character's own pictures among themselves")
    lows, highs = [0.0], [1.0]
    for trial in _back_to_front(character):
        look = _look(character, trial, theme)
        scored = [(c.step, c.measures["identity"]) for c in _scored(trial)]
        if not scored:
            continue
        steps = [step for step, _ in scored]
        low, high = [i.low for _, i in scored], [i.high for _, i in scored]
        lows, highs = lows + low, highs + high
        axes.plot(
            steps,
            [interval.value for _, interval in scored],
            color=look.color,
            marker=look.marker,
            markersize=5,
            linewidth=look.width,
            label=look.label,
            zorder=look.front,
        )
        if look.label is None:  # the grey ones: many bands on top of each other say nothing
            continue
        axes.fill_between(steps, low, high, color=look.color, alpha=0.13, linewidth=0)
        if len(steps) == 1:  # a band of no width would be invisible
            axes.vlines(steps, low, high, color=look.color, alpha=0.5, linewidth=4)
    winner, checkpoint = character.winning_trial, character.winning_checkpoint
    if winner and checkpoint and checkpoint.measures:
        identity = checkpoint.measures["identity"]
        _mark_winner(
            axes,
            theme,
            checkpoint.step,
            identity.value,
            _word(character) + f", step {checkpoint.step}",
        )
    steps = sorted({c.step for trial in character.trials for c in _scored(trial)})
    if len(steps) <= MAX_STEP_TICKS:
        axes.set_xticks(steps)
    axes.set_ylim(min(lows) - 0.08, max(highs) + 0.12)
    axes.set_xlabel("training steps")
    axes.set_ylabel("identity (0 = base, 1 = ceiling)")
    _finish(figure, axes, theme)
    return figure


def trade_off_figure(character: CharacterReport, theme: Theme) -> Figure:
    """Identity against prompt fidelity and against drift, a point per checkpoint."""
    figure, panels = _figure(theme, 2, height_in=3.9)
    for axes, measure, title, limit_name in (
        (panels[0], "prompt_fidelity", "prompt fidelity (right is better)", "prompt_fidelity_min"),
        (panels[1], "drift", "drift (left is better)", "drift_max"),
    ):
        for trial in _back_to_front(character):
            look = _look(character, trial, theme)
            _scatter_trial(axes, trial, measure, look)
        checkpoint = character.winning_checkpoint
        if checkpoint and checkpoint.measures:
            place = checkpoint.measures[measure].value, checkpoint.measures["identity"].value
            _mark_winner(axes, theme, *place, _word(character))
        axes.margins(0.1, 0.16)
        limit = character.limits.get(limit_name)
        if limit is not None:
            _shade_beyond(axes, theme, limit, beyond="left" if measure != "drift" else "right")
        axes.set_xlabel(title)
        axes.set_ylabel("identity")
    _finish(figure, panels[0], theme)
    return figure


def loss_figure(character: CharacterReport, theme: Theme) -> Figure:
    """Training loss over steps: smoothed, and behind the winner's curve each step's value."""
    figure, [axes] = _figure(theme, 1, height_in=3.0)
    for trial in _back_to_front(character):
        if not trial.losses:
            continue
        look = _look(character, trial, theme)
        steps = [step for step, _ in trial.losses]
        losses = [loss for _, loss in trial.losses]
        if trial is character.winning_trial or len(character.trials) == 1:
            axes.plot(steps, losses, color=look.color, linewidth=0.6, alpha=0.25)
        smooth = smoothed(losses)
        axes.plot(
            steps,
            smooth,
            color=look.color,
            linewidth=look.width,
            label=look.label,
            zorder=look.front,
        )
    axes.set_xlabel("training steps")
    axes.set_ylabel("loss")
    _finish(figure, axes, theme)
    return figure


def smoothed(values: Sequence[float]) -> list[float]:
    """The exponential moving average with weight `LOSS_SMOOTHING`, corrected for its start.

    The correction is Adam's (Kingma and Ba 2015, section 3): the first value is not shrunk.
    """
    result, average = [], 0.0
    for count, value in enumerate(values, start=1):
        average += LOSS_SMOOTHING * (value - average)
        result.append(average / (1 - (1 - LOSS_SMOOTHING) ** count))
    return result


def svg_uri(figure: Figure) -> str:
    """The figure as an SVG data URI: text stays text, and nothing in it names an address."""
    import matplotlib

    buffer = io.BytesIO()
    settings: dict[str, Any] = {"svg.fonttype": "none", "svg.hashsalt": "lorafarm"}
    with matplotlib.rc_context(settings):
        metadata = {"Date": None, "Creator": None, "Format": None, "Type": None}
        figure.savefig(buffer, format="svg", transparent=True, metadata=metadata)
    svg = buffer.getvalue().decode("utf-8").replace("'DejaVu Sans', sans-serif", _SANS)
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode("utf-8")).decode("ascii")


def _figure(theme: Theme, panels: int, height_in: float) -> tuple[Figure, list[Any]]:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(WIDTH_IN, height_in), layout="constrained", facecolor=theme.surface)
    axes = [figure.add_subplot(1, panels, index + 1) for index in range(panels)]
    for one in axes:
        one.set_facecolor("none")
        one.grid(axis="y" if panels == 1 else "both", color=theme.line, linewidth=0.8)
        one.set_axisbelow(True)
        for side in ("top", "right", "left"):
            one.spines[side].set_visible(False)
        one.spines["bottom"].set_color(theme.line)
        one.tick_params(colors=theme.muted, labelsize=9, length=0)
        one.xaxis.label.set_color(theme.muted)
        one.yaxis.label.set_color(theme.muted)
        one.xaxis.label.set_fontsize(9.5)
        one.yaxis.label.set_fontsize(9.5)
        one.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=panels == 1))
    return figure, axes


def _finish(figure: Figure, axes: Any, theme: Theme) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        # The winner was drawn last, and is read first.
        figure.legend(
            handles[::-1],
            labels[::-1],
            loc="outside lower left",
            ncols=4,
            frameon=False,
            fontsize=9,
            labelcolor=theme.text,
        )


def _reference_line(axes: Any, theme: Theme, y: float, text: str) -> None:
    axes.axhline(y, color=theme.muted, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    axes.annotate(
        text,
        (0, y),
        xycoords=("axes fraction", "data"),
        xytext=(4, 4),
        textcoords="offset points",
        color=theme.muted,
        fontsize=8.5,
    )


def _mark_winner(axes: Any, theme: Theme, x: float, y: float, text: str) -> None:
    axes.plot(
        [x],
        [y],
        marker="*",
        markersize=17,
        color=theme.winner,
        markeredgecolor=theme.surface,
        markeredgewidth=1.2,
        linestyle="none",
        zorder=20,
    )
    axes.annotate(
        text,
        (x, y),
        xytext=(0, 11),
        textcoords="offset points",
        ha="center",
        color=theme.text,
        fontsize=9.5,
        fontweight="bold",
        zorder=21,
        bbox={"facecolor": theme.surface, "edgecolor": "none", "alpha": 0.8, "pad": 1.5},
    )


def _scatter_trial(axes: Any, trial: TrialResult, measure: str, look: _Look) -> None:
    for passed in (True, False):
        chosen = [c.measures for c in _scored(trial) if bool(c.failed_guards) != passed]
        if not chosen:
            continue
        axes.scatter(
            [measures[measure].value for measures in chosen],
            [measures["identity"].value for measures in chosen],
            s=34,
            marker=look.marker,
            facecolors=look.color if passed else "none",
            edgecolors=look.color,
            linewidths=1.2,
            label=look.label if passed else None,
            zorder=look.front,
        )


def _shade_beyond(axes: Any, theme: Theme, limit: float, beyond: str) -> None:
    first, last = axes.dataLim.intervalx
    # The margin is a share of all that is seen, so that no marker and no limit lies on the frame.
    room = 0.06 * (max(last, limit) - min(first, limit))
    left, right = axes.get_xlim()
    left, right = min(left, first - room, limit - room), max(right, last + room, limit + room)
    shaded = (left, limit) if beyond == "left" else (limit, right)
    axes.axvspan(*shaded, color=theme.muted, alpha=0.10, linewidth=0)
    axes.set_xlim(left, right)
    axes.axvline(limit, color=theme.muted, linewidth=1, linestyle=(0, (4, 3)))
    axes.annotate(
        "limit",
        (limit, 1),
        xycoords=("data", "axes fraction"),
        xytext=(0, 3),
        textcoords="offset points",
        ha="center",
        color=theme.muted,
        fontsize=8.5,
    )


def _word(character: CharacterReport) -> str:
    """A best checkpoint that fails a guard is not called a winner."""
    winner = character.winner
    return "winner" if winner is None or winner.passed_guards else "best"


def _scored(trial: TrialResult) -> list[Any]:
    return [checkpoint for checkpoint in trial.checkpoints if checkpoint.measures is not None]


def _back_to_front(character: CharacterReport) -> list[TrialResult]:
    """The trials with the winner last, which puts it on top."""
    return sorted(character.trials, key=lambda trial: trial is character.winning_trial)


def _look(character: CharacterReport, trial: TrialResult, theme: Theme) -> _Look:
    if trial is character.winning_trial:
        return _Look(theme.winner, "o", 2.6, f"{character.title(trial)} ({_word(character)})", 10)
    others = [other for other in character.trials if other is not character.winning_trial]
    place = others.index(trial)
    if place < MAX_COLOURED_TRIALS - 1:
        return _Look(theme.others[place], _MARKERS[1 + place], 1.5, character.title(trial), 5)
    first = place == MAX_COLOURED_TRIALS - 1
    return _Look(theme.muted, ".", 0.9, "other trials" if first else None, 3)
