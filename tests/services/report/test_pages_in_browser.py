"""The pages as a person opens them: from the disk, without a network, wide and narrow."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import report_examples as examples

from services.report.page import build_report

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed"),
]


@pytest.fixture
def browser() -> Iterator:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(
            executable_path=CHROMIUM,
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
        )
        yield started
        started.close()


@pytest.mark.parametrize("width_px", [1400, 420])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_report_opens_offline_without_an_error(
    browser, tmp_path: Path, width_px: int, scheme: str
) -> None:
    page_file = build_report(examples.report(examples.character()), tmp_path / "report.html")
    context = browser.new_context(
        offline=True, viewport={"width": width_px, "height": 900}, color_scheme=scheme
    )
    page = context.new_page()
    problems: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(page_file.as_uri())
    assert not problems
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    assert page.get_by_role("heading", name="Leaderboard").is_visible()
    broken = "imgs => imgs.filter(i => !(i.complete && i.naturalWidth)).length"
    assert page.eval_on_selector_all("img", broken) == 0
    assert page.evaluate("document.documentElement.scrollWidth") <= width_px, "no sideways scroll"
