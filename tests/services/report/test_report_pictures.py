"""Pictures and figures of the report: crisp, upright, right numbers."""

from __future__ import annotations

import base64
import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas
import pytest
import report_examples as examples
from PIL import Image

from services.report.pictures import (
    SheetRow,
    character_sheet,
    contact_sheet,
    open_picture,
    web_picture,
)
from services.report.plots import (
    DARK,
    LIGHT,
    LOSS_SMOOTHING,
    identity_figure,
    loss_figure,
    smoothed,
    trade_off_figure,
)


def decoded(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))


def noise(side: int) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_small_picture_is_kept_pixel_for_pixel_and_enlarged_by_whole_pixels() -> None:
    original = noise(48)
    web = web_picture(original)
    assert web.pixelated
    assert (web.width, web.height) == (96, 96)
    assert np.array_equal(np.asarray(decoded(web.uri)), np.asarray(original))


def test_large_picture_becomes_a_small_one_of_the_same_shape() -> None:
    web = web_picture(Image.new("RGB", (1600, 800), "navy"))
    assert not web.pixelated
    assert (web.width, web.height) == (128, 64)
    stored = decoded(web.uri)
    assert stored.format == "JPEG"
    assert stored.size == (288, 144)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "I;16", "1", "CMYK"])
def test_every_kind_of_picture_is_opened(mode: str) -> None:
    assert open_picture(Image.new(mode, (4, 4))).mode == "RGB"


def test_transparency_is_shown_on_white() -> None:
    assert open_picture(Image.new("RGBA", (1, 1), (0, 0, 0, 0))).getpixel((0, 0)) == (255,) * 3


def test_turned_photo_stands_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by 90 degrees
    Image.new("RGB", (200, 100)).save(tmp_path / "photo.jpg", exif=exif)
    assert open_picture(tmp_path / "photo.jpg").size == (100, 200)


def test_contact_sheet_has_crisp_cells_in_rows_and_columns() -> None:
    first, second = noise(8), noise(16)
    sheet = np.asarray(
        contact_sheet([SheetRow("base", (first, second))], ("one", "two"), side_px=64)
    )
    for picture, factor in ((first, 8), (second, 4)):
        enlarged = np.kron(np.asarray(picture), np.ones((factor, factor, 1), np.uint8))
        windows = np.lib.stride_tricks.sliding_window_view(sheet, enlarged.shape)[:, :, 0]
        candidates = np.argwhere((windows[:, :, 0, 0] == enlarged[0, 0]).all(axis=2))
        assert any(np.array_equal(windows[y, x], enlarged) for y, x in candidates)


def test_contact_sheet_grows_by_rows_columns_and_training_pictures() -> None:
    row = SheetRow("base", (examples.picture("red"),))
    one = contact_sheet([row], ("prompt",))
    assert contact_sheet([row, row], ("prompt",)).height > one.height
    two = SheetRow("base", (examples.picture("red"), examples.picture("red")))
    assert contact_sheet([two], ("prompt", "prompt")).width > one.width
    assert contact_sheet([row], ("prompt",), [examples.picture("teal")]).width > one.width


def test_contact_sheet_marks_the_winner() -> None:
    row = SheetRow("step 10", (examples.picture("white"),), winner=True)
    plain = contact_sheet([replace(row, winner=False)], ("prompt",))
    assert contact_sheet([row], ("prompt",)).tobytes() != plain.tobytes()


def test_contact_sheet_refuses_shifted_columns_and_no_rows() -> None:
    with pytest.raises(ValueError, match="1 pictures for 2 columns"):
        contact_sheet([SheetRow("base", (examples.picture("red"),))], ("one", "two"))
    with pytest.raises(ValueError, match="at least one row"):
        contact_sheet([], ("one",))


def test_characters_sheet_shows_the_base_and_the_winning_trial() -> None:
    whole = examples.character()
    three_rows = character_sheet(whole)  # base, step 10, step 20
    first_trial = replace(whole, trials=whole.trials[:1], winner=None)
    assert three_rows.height > character_sheet(first_trial).height


def test_smoothed_loss_equals_pandas_bias_corrected_average() -> None:
    values = np.random.default_rng(0).normal(1.0, 0.3, 200)
    expected = pandas.Series(values).ewm(alpha=LOSS_SMOOTHING, adjust=True).mean()
    np.testing.assert_allclose(smoothed(values.tolist()), expected, rtol=1e-9)


def test_figures_draw_every_trial_with_the_measured_values() -> None:
    whole = examples.character()
    figure = identity_figure(whole, LIGHT)
    lines = {line.get_label(): line for line in figure.axes[0].get_lines()}
    assert list(lines["rank 8 DoRA (winner)"].get_ydata()) == [0.6, 0.9]
    assert list(lines["rank 4 LoRA"].get_xdata()) == [10]
    stars = [line for line in figure.axes[0].get_lines() if line.get_marker() == "*"]
    assert [(s.get_xdata()[0], s.get_ydata()[0]) for s in stars] == [(10, 0.6)]


def test_many_trials_share_grey_and_one_entry_in_the_legend() -> None:
    whole = examples.character()
    many = tuple(replace(whole.trials[0], trial=f"t{n}", variant=f"trial {n}") for n in range(20))
    figure = identity_figure(replace(whole, trials=(*many, whole.trials[1])), DARK)
    [legend] = figure.legends
    labels = [text.get_text() for text in legend.get_texts()]
    assert labels[0] == "rank 8 DoRA (winner)"
    assert labels.count("other trials") == 1
    assert len(labels) == 8


def test_no_point_lies_on_the_frame_however_near_it_is_to_a_limit() -> None:
    first, second = examples.character().trials
    close = [examples.measures(0.6 + n / 100, drift=0.11 + n / 1000) for n in range(2)]
    points = [replace(first.checkpoints[0], measures=own) for own in close]
    trials = replace(first, checkpoints=tuple(points)), replace(second, checkpoints=())
    limits = {"drift_max": 0.5, "prompt_fidelity_min": 0.4}
    figure = trade_off_figure(
        replace(examples.character(), trials=trials, winner=None, limits=limits), LIGHT
    )
    for axes, limit, values in zip(
        figure.axes, (0.4, 0.5), ((0.5, 0.5), (0.11, 0.111)), strict=True
    ):
        left, right = axes.get_xlim()
        room = 0.04 * (right - left)
        assert left + room <= min(*values, limit)
        assert max(*values, limit) <= right - room


@pytest.mark.parametrize("draw", [identity_figure, trade_off_figure, loss_figure])
@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_figure_as_a_picture_is_not_blank(draw, theme) -> None:
    buffer = io.BytesIO()
    draw(examples.character(), theme).savefig(buffer, format="png")
    picture = Image.open(buffer).convert("RGB")
    assert picture.getcolors(maxcolors=10) is None
