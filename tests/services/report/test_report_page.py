"""The report's page: whole, offline, escaped, and honest when there is no winner."""

from __future__ import annotations

import base64
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import report_examples as examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.farm.durations import duration
from services.report.data import CheckpointResult, ReportData, WinnerChoice
from services.report.page import build_report, file_size, range_bar
from training import Interval

VOID = {"meta", "img", "source", "line"}


class Page(HTMLParser):
    """Collects what a browser would see, and fails on tags that do not match."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.addresses: list[str] = []
        self.events: list[str] = []
        self.texts: list[str] = []
        self.alternatives: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            if name in ("src", "srcset", "href", "action", "data", "xlink:href"):
                self.addresses.append(value or "")
            if name == "alt":
                self.alternatives.append(value or "")
            if name.startswith("on"):
                self.events.append(name)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def build(data: ReportData, folder: Path) -> tuple[str, Page]:
    html = build_report(data, folder / "report.html").read_text(encoding="utf-8")
    return html, Page(html)


def test_page_says_who_won_why_and_with_what(tmp_path: Path) -> None:
    _, page = build(examples.report(), tmp_path)
    for words in (
        "★ winner rank 8 DoRA, step 10",
        "rank 8 DoRA at step 10: highest identity 0.60.",
        "aya.sd15/1",
        "2 min 05 s",
        "[0.55, 0.65]",
        "✕ drift 0.31 is above 0.25",
        "ayachar, person, smiling",
        "not a picture: its bytes are text",
        "cd" * 32,
        "3.4 MB",
        "starter-clip@1",
        "<lora:aya:0.8>",
        "DiffusionPipeline.from_pretrained('stabilityai/sd', torch_dtype=torch.float16)",
        "pipe.load_lora_weights('diffusers', weight_name='w.safetensors', adapter_name='aya')",
        "“lorafarm export aya.sd15/1 --format kohya --to ComfyUI/models/loras”",
        "“lorafarm export aya.sd15/1 --format diffusers --to .”, which writes diffusers/w.safe",
    ):
        assert words in page.text, words
    rows = re.findall(r"(t00000000000\d) ", page.text.split("Every checkpoint")[1])
    assert rows[:3] == ["t000000000002", "t000000000001", "t000000000002"]  # the failed one last


def test_page_loads_and_runs_nothing(tmp_path: Path) -> None:
    html, page = build(
        examples.report(examples.character("aya"), examples.character("ben")), tmp_path
    )
    inside = [address for address in page.addresses if address.startswith(("data:image/", "#"))]
    assert inside == page.addresses
    assert page.tags.isdisjoint({"script", "iframe", "object", "embed", "link", "form", "base"})
    assert page.events == []
    assert "default-src 'none'" in html
    for forbidden in ("http:", "https:", "//", "@import", "url("):
        assert forbidden not in re.sub(r"base64,[A-Za-z0-9+/=]+", "", html), forbidden


def test_figures_in_the_page_name_no_address(tmp_path: Path) -> None:
    _, page = build(examples.report(), tmp_path)
    figures = [a for a in page.addresses if a.startswith("data:image/svg+xml;base64,")]
    assert len(figures) == 6  # three figures, each light and dark
    for figure in figures:
        svg = base64.b64decode(figure.partition(",")[2]).decode()
        assert "<text" in svg
        references = re.findall(r"(?:href|src)=\"([^\"]*)\"|url\(([^)]*)\)", svg)
        assert all((a or b).startswith("#") for a, b in references)
        assert "<script" not in svg


@pytest.mark.parametrize(
    "evil",
    [
        "<script>alert(1)</script>",
        '"><img src=x onerror=alert(1)>',
        "</code></pre><iframe src=//evil.example>",
        "{{ 7 * 7 }} {% raw %}",
    ],
)
def test_text_from_people_stays_text_everywhere(tmp_path: Path, evil: str) -> None:
    whole = examples.with_caption(evil)
    whole = replace(
        whole,
        name=evil,
        trigger=evil,
        base=evil,
        prompts=(evil, evil),
        winner=WinnerChoice("t000000000002", 10, evil),
        provenance={evil: evil},
        trials=tuple(replace(trial, variant=evil) for trial in whole.trials),
    )
    _, page = build(replace(examples.report(whole), title=evil), tmp_path)
    assert page.tags.isdisjoint({"script", "iframe"})
    assert page.events == []
    assert all(address.startswith(("data:image/", "#")) for address in page.addresses)
    assert " ".join(evil.split()) in page.text
    assert any(evil in alternative for alternative in page.alternatives)


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(caption=st.text(alphabet=st.characters(exclude_categories=["Cs", "Cc"]), max_size=40))
def test_any_caption_is_shown_as_it_is(tmp_path: Path, caption: str) -> None:
    whole = replace(examples.with_caption(caption), trials=(), winner=None, base_pictures=())
    _, page = build(examples.report(whole), tmp_path)
    assert caption in page.texts or not caption.strip()


def test_same_data_gives_the_same_bytes(tmp_path: Path) -> None:
    first = build_report(examples.report(), tmp_path / "a.html").read_bytes()
    assert build_report(examples.report(), tmp_path / "b.html").read_bytes() == first


def test_best_checkpoint_that_fails_the_guards_is_not_called_a_winner(tmp_path: Path) -> None:
    choice = WinnerChoice("t000000000002", 20, "All others look nothing like aya.", False)
    _, page = build(examples.report(replace(examples.character(), winner=choice)), tmp_path)
    assert "best, but it fails a guard rank 8 DoRA, step 20" in page.text
    assert "★ winner" not in page.text


def test_sweep_without_scores_still_has_a_page(tmp_path: Path) -> None:
    whole = examples.character()
    unscored = replace(whole.trials[0], checkpoints=(CheckpointResult(10, None),), losses=())
    bare = replace(
        whole,
        trials=(unscored,),
        winner=None,
        prompts=(),
        base_pictures=(),
        exports=(),
        reference="",
    )
    _, page = build(examples.report(bare), tmp_path)
    assert "No winner." in page.text
    assert "not scored" in page.text


def test_dora_without_a_diffusers_file_gets_no_diffusers_snippet(tmp_path: Path) -> None:
    whole = examples.character()
    only_kohya = replace(whole, exports=whole.exports[:1])
    assert "load_lora_weights" not in build(examples.report(only_kohya), tmp_path)[1].text
    lora = replace(only_kohya, winner=WinnerChoice("t000000000001", 10, "Smallest."))
    assert "load_lora_weights('.', weight_name='aya.safetensors'" in (
        build(examples.report(lora), tmp_path)[1].text
    )


def test_a_single_file_base_gets_no_snippet_that_could_not_open_it(tmp_path: Path) -> None:
    whole = examples.character()
    assert "load_lora_weights" in build(examples.report(whole), tmp_path)[1].text
    single = replace(whole, base="/models/illustrious.safetensors")
    assert "load_lora_weights" not in build(examples.report(single), tmp_path)[1].text


def test_shifted_columns_and_an_unknown_winner_are_refused() -> None:
    whole = examples.character()
    with pytest.raises(ValueError, match="2 pictures for 1 prompts"):
        replace(whole, prompts=("one",))
    with pytest.raises(ValueError, match="not among the trials"):
        replace(whole, winner=WinnerChoice("t000000000002", 11, ""))


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.42, "0.4 s"),
        (48.2, "48 s"),
        (59.9, "1 min 00 s"),
        (725, "12 min 05 s"),
        (12_000, "3 h 20 min"),
    ],
)
def test_duration_as_people_say_it(seconds: float, said: str) -> None:
    assert duration(seconds) == said


@pytest.mark.parametrize(
    ("size_bytes", "said"),
    [(812, "812 B"), (3_412_992, "3.4 MB"), (999_999, "1.0 MB"), (2 * 10**9, "2.0 GB")],
)
def test_file_size_as_file_managers_show_it(size_bytes: int, said: str) -> None:
    assert file_size(size_bytes) == said


@given(value=st.floats(-5, 5), low=st.floats(-5, 5), high=st.floats(-5, 5))
def test_range_bar_never_leaves_its_box(value: float, low: float, high: float) -> None:
    drawn = range_bar(Interval(value=value, low=low, high=high), 0.0, 1.0)
    places = [float(place) for place in re.findall(r'x[12]="([\d.-]+)"', drawn)]
    assert all(0 <= place <= 100 for place in places)
