"""How long re-rendering takes after a change of threshold: no model, one core.

    python tests/benchmarks/render_speed.py [--pictures 5000] [--tags 45]

Makes observations like a WD tagger's (scores from 0.05 up, words of the lexicon and of none), then
times reading them back, rendering at two thresholds, and linting. Processor time counts: a
busy machine gives the same answer. The target: 5,000 captions in under 2 s.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import tempfile
import time
from pathlib import Path

from captioning import Character, Fixed, Observation, Replace, Rules, Seen, Store, render_all
from captioning.lexicon import lexicon
from captioning.lint import Captioned, lint
from captioning.observations import load_observations

TARGET_S = 2.0
UNKNOWN_TAGS = 4000  # beside the lexicon's: a WD v3 tagger has about 10,000 tags


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--pictures", type=int, default=5000)
    arguments.add_argument("--tags", type=int, default=45, help="per picture, from 0.05 up")
    given = arguments.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    seen = observations(given.pictures, given.tags)
    print(f"{given.pictures} pictures, {given.tags} tags each, one core")
    with tempfile.TemporaryDirectory() as folder:
        print(f"  reading observations  {reading_s(Store(Path(folder)), seen):6.2f} s")
    rules = Rules(
        replace=(Replace(all=("long hair", "ponytail"), remove=("ponytail",), add=("hair bun",)),),
        fixed=(Fixed(tag="hair ornament"),),
    )
    first = rendering_s(seen, rules)
    again = rendering_s(seen, rules.model_copy(update={"threshold": 0.5}))
    print(f"  rendering             {first:6.2f} s")
    print(f"  at another threshold  {again:6.2f} s   target {TARGET_S} s")
    aya = character(rules)
    done = render_all(seen, aya, {})
    captions = [Captioned(image, done[image], seen[image]) for image in seen]
    started = time.process_time()
    findings = lint(captions, aya)
    print(
        f"  lint                  {time.process_time() - started:6.2f} s   {len(findings)} findings"
    )
    longest = max(len(caption.text) for caption in done.values())
    lost = sum(bool(caption.lost) for caption in done.values())
    print(f"  longest caption {longest} characters; {lost} did not fit into {75} tokens")
    raise SystemExit(0 if max(first, again) < TARGET_S else 1)


def observations(pictures: int, tags: int) -> dict[str, Seen]:
    draw = random.Random(0)
    words = [tag for group in lexicon().groups for tag in group.tags]
    colours = lexicon().words.colours
    words += [f"{colour} {noun}" for colour in colours for noun in ("hair", "eyes", "shirt", "hat")]
    single = sorted({word for tag in words for word in tag.split() if word.isalpha()})
    words += [" ".join(draw.sample(single, 2)) for _ in range(UNKNOWN_TAGS)]
    return {
        hashlib.sha256(str(number).encode()).hexdigest(): Seen(
            {
                tag: round(draw.betavariate(0.6, 1.2) * 0.95 + 0.05, 4)
                for tag in draw.sample(words, tags)
            },
            tagger="wd-swinv2-tagger-v3",
        )
        for number in range(pictures)
    }


def character(rules: Rules) -> Character:
    return Character(name="aya", trigger="ayatok", class_word="woman", rules=rules)


def rendering_s(seen: dict[str, Seen], rules: Rules) -> float:
    started = time.process_time()
    render_all(seen, character(rules), {})
    return time.process_time() - started


def reading_s(store: Store, seen: dict[str, Seen]) -> float:
    for sha256, one in seen.items():
        folder = store.observations / sha256
        folder.mkdir(parents=True)
        said = Observation(
            image=sha256, kind="tags", model=one.tagger, revision="1", tags=one.tags, milliseconds=1
        )
        (folder / f"{one.tagger}@1.json").write_text(said.model_dump_json(exclude_none=True))
    started = time.process_time()
    for sha256 in seen:
        load_observations(store, sha256)
    return time.process_time() - started


if __name__ == "__main__":
    main()
