"""Observers and workers in the settings: what is taken, and what a mistake is answered with."""

from __future__ import annotations

from pathlib import Path

import pytest

from captioning import CaptionerConfig, UserError
from services.farm.settings import open_home

GOOD = """
observers:
  - {type: tagger, source: /models/wd, batch_size: 32, gpus: 0.25}
  - type: captioner
    source: org/model
    min_replicas: 0
    max_replicas: 4
    prompt: {text: "What is it?", do_not_mention: [red hair], max_new_tokens: 60}
  - {type: quality}
"""


def written(home: Path, text: str) -> Path:
    (home / "settings.yaml").write_text(text)
    return home


def test_the_list_is_read(tmp_path: Path):
    observers = open_home(written(tmp_path, GOOD)).settings.observers
    assert observers is not None
    assert [one.type for one in observers] == ["tagger", "captioner", "quality"]
    assert (observers[0].batch_size, observers[0].gpus) == (32, 0.25)
    assert isinstance(observers[1], CaptionerConfig) and observers[1].prompt is not None
    assert observers[1].prompt.rendered() == "What is it? Do not mention red hair."
    assert (observers[1].min_replicas, observers[1].max_replicas) == (0, 4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("observers: [{type: tagger, sorce: /x}]", "did you mean 'source'"),
        ("observers: [{type: ragger, source: /x}]", "observers.0"),
        ("observers: []", "observers"),
        ("observers: [{type: quality, min_replicas: 3}]", "min_replicas 3 is over 1"),
        ("observers: [{type: endpoint, url: 'http://k@host', model: m}]", "url"),
        ("tagger: /x\nobservers: [{type: quality}]", "name it in `observers`"),
        ("workers: 2\nmin_workers: 3", "`min_workers` is 3, and `workers` 2"),
        ("workers: 2\ngpus_per_worker: 0.5", "needs `workers: 1`"),
        ("gpus_per_worker: 0", "gpus_per_worker"),
        ("offload_base: true", "needs `strategy: fsdp` or `deepspeed`"),
        ("compile: true\nstrategy: fsdp", "`compile` needs `strategy: ddp`"),
        ("compile: true\nstrategy: deepspeed", "`compile` needs `strategy: ddp`"),
        ("strategy: megatron", "strategy"),
        ("share_optimizers: true", "`share_optimizers` needs `workers` of 2 or more"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, message: str):
    with pytest.raises(UserError, match=message):
        open_home(written(tmp_path, text))
