"""Review: honest bounds, a seeded sample, and tables that come back without losing a word."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path

import numpy as np
import pytest
from captioning_examples import Answers, png
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image as Pillow

from captioning import (
    Character,
    Image,
    Observation,
    Store,
    UserError,
    caption_all,
    load_captions,
    observe,
    take_in,
)
from captioning.caption_match import least_alike
from captioning.curation.observed import Observed
from captioning.review import (
    Item,
    Queue,
    Review,
    bad_rate_bound,
    draw_sample,
    import_table,
    load_reviews,
    read_table,
    record_reviews,
    review_queue,
    to_table,
)

TEXT = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0\r"), max_size=40)


@pytest.fixture
def captioned(pictures, store: Store, aya: Character) -> Character:
    observe(list(take_in(pictures, store, aya).images), store, Answers())
    caption_all(store, aya)
    return aya


def item(number: int, **changed: object) -> Item:
    values = {
        "image": f"{number:064x}", "source": f"{number}.png", "caption": "ayatok, woman",
        "risk": 0.0, "why": "", "stratum": "full plain",
    } | changed  # fmt: skip
    return Item.model_validate(values)


@pytest.mark.parametrize(
    ("total", "read", "percent"), [(30, 6, 33), (50, 10, 22), (76, 16, 14), (200, 40, 6)]
)
def test_the_bound_of_a_fifth_without_a_bad_one(total: int, read: int, percent: int) -> None:
    assert round(100 * bad_rate_bound(total, read)) == percent


def test_the_bound_tightens_with_reading_and_loosens_with_bad_ones() -> None:
    assert bad_rate_bound(100, 0) == 1
    assert bad_rate_bound(100, 100) == 0
    assert bad_rate_bound(100, 100, 7) == 0.07
    assert bad_rate_bound(100, 20) < bad_rate_bound(100, 20, 1) < bad_rate_bound(100, 10, 1)
    # Among captions without end, 0 bad ones of n bound the rate by 1 - 0.05 ** (1 / n) (Clopper and
    # Pearson 1934).
    assert bad_rate_bound(10_000, 20) == pytest.approx(1 - 0.05 ** (1 / 20), abs=1e-3)


def test_under_50_all_are_read_and_above_a_fifth_of_every_stratum() -> None:
    few = [item(number) for number in range(49)]
    assert draw_sample(few) == [one.image for one in few]
    many = [item(n, stratum="full risky" if n < 3 else "full plain") for n in range(103)]
    drawn = draw_sample(many, seed=1)
    assert len(drawn) == 21 and len(set(drawn) & {one.image for one in many[:3]}) == 1
    assert set(draw_sample(many[::-1], seed=1)) == set(drawn)
    assert draw_sample(many, seed=2) != drawn


def test_the_riskiest_caption_comes_first(store: Store, captioned: Character) -> None:
    items = review_queue(store, captioned).items
    assert len(items) == 6
    assert [one.risk for one in items] == sorted((one.risk for one in items), reverse=True)


class Blind:
    """An embedder to which every text is the same."""

    id, revision = "clip", "r1"

    def __init__(self) -> None:
        self.read: list[str] = []

    def embed_texts(self, texts: list[str]) -> np.ndarray:
        self.read += texts
        return np.array([[1.0, 0.0]] * len(texts), np.float32)


def embedded(number: int, angle: float, by: str = "clip@r1") -> Observed:
    image = Image(
        sha256=f"{number:064x}", source=f"{number}.png", width=64, height=64, format="PNG"
    )
    return Observed(image, embedding=(math.cos(angle), math.sin(angle)), embedder=by)


def test_the_tenth_that_fits_its_pictures_least_is_found(aya: Character) -> None:
    pictures = [embedded(number, number / 20) for number in range(20)]
    other = embedded(20, 3.0, by="another@r1")
    captions = {one.where: "ayatok, woman, smile" for one in [*pictures, other]}
    clip = Blind()
    found = least_alike([other, *pictures], captions, aya, clip)
    assert found == {
        pictures[19].where: round(math.cos(19 / 20), 3),
        pictures[18].where: round(math.cos(18 / 20), 3),
    }
    assert clip.read == ["woman, smile"] * 20, "no CLIP knows the trigger"
    assert least_alike(pictures[:9], captions, aya, clip) == {}


class Embeds(Answers):
    """Tags, and embeddings of which one points elsewhere."""

    def models(self):
        return {"tags": ("tagger", "r1"), "embedding": ("clip", "r1")}

    def ask(self, requests):
        for sha256, kind, data in requests:
            if kind == "tags":
                yield from super().ask([(sha256, kind, data)])
                continue
            far = Pillow.open(io.BytesIO(data)).getpixel((0, 0))[2] > 0
            yield Observation(
                image=sha256, kind="embedding", model="clip", revision="r1", milliseconds=1,
                embedding=(0.0, 1.0) if far else (1.0, 0.0),
            )  # fmt: skip


def test_a_caption_unlike_its_picture_is_read_before_those_alike(
    store: Store, aya: Character, tmp_path: Path
) -> None:
    for number in range(12):
        colour = (20 * number, 0, 200 * (number == 7))
        (tmp_path / f"{number}.png").write_bytes(png(colour))
    observe(list(take_in(tmp_path, store, aya).images), store, Embeds())
    caption_all(store, aya)
    plain = {one.source: one for one in review_queue(store, aya).items}
    queue = review_queue(store, aya, embedder=Blind())
    assert queue.items[0].source == "7.png"
    assert "fit their picture least (CLIP 0.00)" in queue.items[0].why
    changed = {one.source for one in queue.items if one != plain[one.source]}
    assert changed == {"7.png"}
    # What was read comes back the same way, compared or not.
    assert import_table(store, aya, to_table(queue)).conflicts == ()


def test_a_review_of_another_caption_is_open_again(store: Store, captioned: Character) -> None:
    first, second = review_queue(store, captioned).items[:2]
    record_reviews(store, "aya", [
        Review(image=first.image, state="approved", caption=first.caption),
        Review(image=second.image, state="approved", caption="ayatok, of old"),
    ])  # fmt: skip
    states = {one.image: one.state for one in review_queue(store, captioned).items}
    assert (states[first.image], states[second.image]) == ("approved", "open")
    assert load_reviews(store, "aya")[first.image].by


def test_a_table_brings_back_states_notes_and_changed_captions(
    store: Store, captioned: Character
) -> None:
    table = to_table(review_queue(store, captioned))
    rows = list(csv.DictReader(io.StringIO(table.decode("utf-8-sig"), newline="")))
    rows[0] |= {"state": "approved", "note": "good"}
    rows[1] |= {"caption": "ayatok, woman, red hat"}
    done = import_table(store, captioned, written(rows))
    assert (done.reviews, done.edits, done.conflicts) == (2, 1, ())
    assert caption_all(store, captioned)[rows[1]["sha256"]] == "ayatok, woman, red hat"
    assert load_captions(store, "aya")[rows[0]["sha256"]] == rows[0]["caption"]
    assert load_reviews(store, "aya")[rows[0]["sha256"]].note == "good"


def test_what_changed_meanwhile_is_a_conflict_and_nothing_of_it_is_taken(
    store: Store, captioned: Character
) -> None:
    queue = review_queue(store, captioned)
    table = to_table(queue)
    first = queue.items[0]
    record_reviews(
        store, "aya", [Review(image=first.image, state="rejected", caption=first.caption)]
    )
    rows = [row | {"state": "approved"} for row in read_table(table)]
    rows[1]["state"] = "fine"
    rows.append(rows[2] | {"note": "again"})
    done = import_table(store, captioned, written(rows))
    assert done.reviews == 4
    assert [one.reason for one in done.conflicts] == [
        "its caption or review changed since the export",
        "state 'fine' is none of open, approved, rejected",
        "the picture stands in the table twice",
    ]
    assert load_reviews(store, "aya")[first.image].state == "rejected"


def test_a_table_without_our_columns_is_refused(store: Store, captioned: Character) -> None:
    with pytest.raises(UserError, match="row"):
        import_table(store, captioned, b"picture,caption\n1.png,hello\n")
    with pytest.raises(UserError, match="UTF-8"):
        import_table(store, captioned, "sha256,row".encode("utf-16"))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(TEXT, TEXT, TEXT), max_size=8))
def test_a_table_comes_back_as_it_went(texts: list[tuple[str, str, str]]) -> None:
    items = tuple(
        item(number, source=source, caption=caption, note=note)
        for number, (source, caption, note) in enumerate(texts)
    )
    rows = read_table(to_table(Queue(items=items, sample=tuple(one.image for one in items))))
    assert [(row["picture"], row["caption"], row["note"]) for row in rows] == texts
    assert [row["sha256"] for row in rows] == [one.image for one in items]


def written(rows: list[dict[str, str]]) -> bytes:
    stream = io.StringIO(newline="")
    writer = csv.DictWriter(stream, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue().encode()
