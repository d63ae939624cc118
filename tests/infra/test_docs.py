"""The documentation points at things that exist: pages, headings, pictures, files of this repo."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

FENCE = re.compile(r"(?ms)^```.*?^```$")
LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"(?m)^#+ +(.+?) *$")
# A file or folder of the repo as the text names it, such as training/loop.py or captioning/.
NAMED_PATH = re.compile(r"(?<![\w./-])(?:captioning|infra|services|tests|training)/[\w./-]*")


def anchors(page: Path) -> set[str]:
    """The names under which GitHub links to the headings of a page."""
    headings = HEADING.findall(FENCE.sub("", page.read_text("utf-8")))
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.replace(" ", "-") for heading in plain}


def broken_links(page: Path) -> list[str]:
    """The relative links of a page that lead nowhere."""
    broken = []
    for link in LINK.findall(FENCE.sub("", page.read_text("utf-8"))):
        path, _, anchor = link.partition("#")
        if "://" in path:
            continue
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    return broken


def missing_paths(page: Path) -> list[str]:
    """The files and folders that a page names and that are not in the repo."""
    named = (path.rstrip(".") for path in NAMED_PATH.findall(page.read_text("utf-8")))
    return [path for path in named if not (ROOT / path).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_to_a_page_and_a_heading(page: Path) -> None:
    assert broken_links(page) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_the_docs_name_is_there(page: Path) -> None:
    assert missing_paths(page) == []


def test_a_wrong_link_anchor_or_file_is_found(tmp_path: Path) -> None:
    other = tmp_path / "other.md"
    other.write_text("# A base in 8 or 4 bits\n\n```sh\n# not a heading\n```\n", "utf-8")
    page = tmp_path / "page.md"
    page.write_text(
        "[right](other.md#a-base-in-8-or-4-bits) [web](https://example.org/x)\n"
        "[gone](gone.md) [moved](other.md#not-a-heading)\n"
        "`training/loop.py` `training/no_such_file.py`\n",
        "utf-8",
    )
    assert broken_links(page) == ["gone.md", "other.md#not-a-heading"]
    assert missing_paths(page) == ["training/no_such_file.py"]


def test_every_page_can_be_reached_from_the_readme() -> None:
    reached, waiting = set(), [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        if page in reached:
            continue
        reached.add(page)
        for link in LINK.findall(page.read_text("utf-8")):
            target = (page.parent / link.partition("#")[0]).resolve()
            if target in PAGES:
                waiting.append(target)
    assert set(PAGES) == reached
