"""`lorafarm estimate`: measured once, shown before the sweep, and the change that makes it fit."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from captioning import DatasetVersion, UserError, load_config
from services.cli.sweep import print_prepared
from services.farm.durations import duration
from services.farm.machine import GIB
from services.farm.settings import Home, Settings, open_home
from services.sweeps.estimate_text import known_line
from services.sweeps.estimates import (
    Estimator,
    PackEstimate,
    change_that_fits,
)
from services.sweeps.measurements import MeasurementStore
from services.sweeps.measuring import quantised_forms
from services.sweeps.plan import SweepConfig, plan_sweep
from services.sweeps.prepare import plan_config, prepare_sweep
from training import STARTER_BASE, BaseFacts, Measurement, ProbeRequest, Recipe, base_facts

SWEEP = """
recipe: {steps: 20, checkpoint_every: 10, batch_size: 2, resolution: 32}
search: {network.method: [lora, dora], network.rank: [4]}
scoring:
  prompts: ["{subject}, smile", "{subject}, hat"]
  unrelated: ["a house"]
  seeds: 2
  steps: 2
  bootstrap: 100
"""


@pytest.fixture
def sweep_file(tmp_path: Path) -> Path:
    file = tmp_path / "sweep.yaml"
    file.write_text(SWEEP)
    return file


@pytest.fixture(scope="module")
def base() -> BaseFacts:
    return base_facts(STARTER_BASE)


def request(base: BaseFacts, **changes) -> ProbeRequest:
    recipe = Recipe.model_validate({"steps": 20, "resolution": 32, **changes})
    return ProbeRequest(base.source, (recipe,), use_gpu=False, threads=1)


def counted(peaks: dict[tuple, int]):
    """Answers as a machine would on which settings have these peaks; and what was asked."""
    asked: list[tuple] = []

    def measure(request: ProbeRequest) -> Measurement | None:
        recipe = request.recipes[0]
        settings = (recipe.batch_size, request.gradient_checkpointing, recipe.network.rank)
        asked.append(settings)
        assert recipe.batch_size * recipe.accumulation == 8  # the same samples per step
        return Measurement(1.0, peaks[settings]) if settings in peaks else None

    return measure, asked


def test_changes_are_tried_in_order_until_one_fits(base: BaseFacts):
    asked_for = request(base, batch_size=8, network={"rank": 16})
    every = [
        (4, False, 16),
        (2, False, 16),
        (1, False, 16),
        (1, True, 16),
        (1, True, 8),
        (1, True, 4),
        (1, True, 2),
        (1, True, 1),
    ]
    for count in range(1, len(every) + 1):
        measure, asked = counted({every[count - 1]: 100})
        change = change_that_fits(asked_for, 100, measure)
        assert change is not None
        assert asked == every[:count]
    assert change.text == (
        "batch_size: 1, accumulation: 8 in the recipe; gradient_checkpointing: true in "
        "settings.yaml; network.rank: 1 at most"
    )
    measure, asked = counted(dict.fromkeys(every, 101))
    assert change_that_fits(asked_for, 100, measure) is None
    assert asked == every


def test_the_ranks_of_text_encoders_are_lowered_too(base: BaseFacts):
    network = {"rank": 1, "text_encoder": {"rank": 4}}
    ranks = []

    def measure(request: ProbeRequest) -> Measurement | None:
        ranks.append(request.recipes[0].network.text_encoder.rank)
        return Measurement(1.0, 100 if ranks[-1] == 2 else 101)

    change = change_that_fits(request(base, batch_size=1, network=network), 100, measure)
    assert change is not None and ranks == [4, 2]
    assert change.text.endswith("network.rank and text_encoder.rank: 2 at most")


def test_a_quantised_base_is_tried_before_a_lower_rank(base: BaseFacts):
    asked: list[tuple[str, int]] = []

    def measure(request: ProbeRequest) -> Measurement:
        (recipe,) = request.recipes
        asked.append((recipe.base_precision, recipe.network.rank))
        fits = asked[-1] == ("nf4", 8)
        return Measurement(1.0, 100 if fits else 101)

    asked_for = request(base, batch_size=1)
    change = change_that_fits(asked_for, 100, measure, ("int8", "nf4"))
    assert change is not None and change.text == (
        "gradient_checkpointing: true in settings.yaml; base_precision: nf4 in the recipe; "
        "network.rank: 8 at most"
    )
    assert asked == [("auto", 16), ("int8", 16), ("nf4", 16), ("nf4", 8)]
    asked.clear()
    # Whoever asks for a form has it already.
    change_that_fits(request(base, batch_size=1, base_precision="int8"), 100, measure, ("nf4",))
    assert {form for form, _ in asked} == {"int8"}


def test_quantised_forms_are_for_an_accelerator_that_holds_the_whole_base():
    on_gpu = Settings(use_gpu=True)
    assert quantised_forms(on_gpu) == ("int8", "nf4")
    assert quantised_forms(on_gpu.model_copy(update={"use_gpu": False})) == ()
    assert quantised_forms(on_gpu.model_copy(update={"strategy": "fsdp"})) == ()


def test_a_quantised_base_cannot_be_shared_out(tmp_path: Path):
    home = Home(tmp_path, Settings(strategy="fsdp", use_gpu=False))
    dataset = DatasetVersion("v1-0", Path(), "aya", "ayachar", "person", (), (), "0" * 64)
    config = SweepConfig.model_validate({"search": {"base_precision": ["auto", "nf4"]}})
    with pytest.raises(UserError, match=r"base_precision[\s\S]*nf4[\s\S]*`strategy`"):
        plan_config(home, dataset, config, "test")


def test_a_measurement_is_for_one_composition_on_one_base(tmp_path: Path, base: BaseFacts):
    home = Home(tmp_path, Settings(cpus_per_worker=1, use_gpu=False))
    dataset = DatasetVersion("v1-0", Path(), "aya", "ayachar", "person", (), (), "0" * 64)

    def packs(recipe: dict, home: Home = home, base: BaseFacts = base) -> list[PackEstimate]:
        config = SweepConfig.model_validate({"recipe": recipe})
        plan = plan_sweep(config, dataset, base.content_hash, base.family, "test")
        return Estimator(home, base).packs(plan.trials, {})

    plain = {"steps": 20, "network": {"rank": 4}}
    (estimate,) = packs(plain)
    assert estimate.measured is None
    facts = Estimator(home, base).facts(estimate.request)
    MeasurementStore(home).keep_pack(facts, Measurement(0.5, 10**9))
    (again,) = packs(plain)
    assert again.measured == Measurement(0.5, 10**9)
    assert again.seconds == 10.0
    # What changes no step's time may differ: it is the same measurement.
    assert packs({**plain, "steps": 40, "seed": 5, "caption_dropout": 0.3})[0].seconds == 20.0
    others = [
        packs({**plain, **changes})
        for changes in (
            {"network": {"rank": 8}},
            {"network": {"rank": 4, "method": "dora"}},
            {"network": {"rank": 4, "text_encoder": {}}},
            {"batch_size": 2},
            {"accumulation": 2},
            {"resolution": 32},
            {"precision": "bf16"},
            {"aspect_buckets": True, "bucket_step_px": 8},
            {"base_precision": "nf4"},
        )
    ]
    others.append(packs(plain, base=BaseFacts(base.source, "other", base.family)))
    for changes in ({"gradient_checkpointing": True}, {"compile": True}, {"cpus_per_worker": 2}):
        settings = home.settings.model_copy(update=changes)
        others.append(packs(plain, home=Home(tmp_path, settings)))
    assert all(other.measured is None for (other,) in others)
    stored = json.loads((tmp_path / "measurements.json").read_text())
    assert len(stored["packs"]) == 1


def test_the_line_before_a_sweep(base: BaseFacts):
    known = PackEstimate((), request(base), Measurement(2.0, 3 * 10**9), 100)
    unknown = PackEstimate((), request(base), None, 100)
    said = known_line([known, unknown], 4, 10.0, None) or ""
    assert "never measured here for 1 of 2 packs: `lorafarm estimate`" in said
    assert "never measured here for this sweep" in (known_line([unknown], 4, 10.0, None) or "")
    line = known_line([known, known], 4, 10.0, 2 * 10**9)
    assert line is not None
    assert "7 min of training (2 packs one after the other, 3.00 GB" in line
    assert "40 s of scoring (4 checkpoints)" in line
    assert "only 2.00 GB of memory are there" in line
    assert "scoring 4 checkpoints not included" in (known_line([known], 4, None, None) or "")
    for measured in (Measurement(2.0, 3 * 10**9), None):
        done = PackEstimate((), request(base), measured, 0)
        assert known_line([done], 0, 10.0, None) is None


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.4, "0 s"), (89, "89 s"), (600, "10 min"), (7500, "2 h 05 min")]
)
def test_durations_are_said_as_people_say_them(seconds: float, said: str):
    assert duration(seconds, estimated=True) == said


def test_a_sweep_begins_with_what_is_known(
    dataset: DatasetVersion, home_path: Path, base: BaseFacts
):
    home = Home(home_path, Settings(cpus_per_worker=1, use_gpu=False))
    config = SweepConfig.model_validate(yaml.safe_load(SWEEP))

    def said() -> str:
        stream = io.StringIO()
        prepared = prepare_sweep(home, dataset, config, "test")
        print_prepared(prepared, Console(file=stream, width=200))
        return stream.getvalue()

    assert "estimated" not in said()
    estimator = Estimator(home, base)
    plan = plan_sweep(config, dataset, base.content_hash, base.family, "test")
    (estimate,) = estimator.packs(plan.trials, {})
    store = MeasurementStore(home)
    store.keep_pack(estimator.facts(estimate.request), Measurement(6.0, 10**9))
    assert "estimated: 2 min of training (1 pack, 1.00 GB of memory)" in said()
    estimator.keep_scoring_seconds(config.scoring, 5.0)
    assert "20 s of scoring (4 checkpoints)" in said()
    # Half of the first trial is done, and the other one is not begun: the longest counts.
    (home.store.runs / plan.trials[0].trial / "step-000010").mkdir(parents=True)
    assert "2 min of training" in said() and "15 s of scoring (3 checkpoints)" in said()


@pytest.mark.slow
def test_measured_once_and_what_does_not_fit_is_said_with_the_change_that_fits(
    lorafarm, dataset: DatasetVersion, sweep_file: Path, home_path: Path
):
    larger = SWEEP.replace("batch_size: 2, resolution: 32", "batch_size: 16, resolution: 64")
    sweep_file.write_text(larger)
    home = open_home(home_path)
    base, plan, _ = plan_config(home, dataset, load_config(SweepConfig, sweep_file), "test")
    estimator = Estimator(home, base)
    (estimate,) = estimator.packs(plan.trials, {})
    store = MeasurementStore(home)
    store.keep_pack(estimator.facts(estimate.request), Measurement(10_000.0, 1))  # a bad day
    command = ("estimate", "aya", "--config", sweep_file)
    code, out, _ = lorafarm(*command)
    assert code == 0
    assert "training: 55 h 33 min" in out
    assert "steps of each pack measured" not in out  # it was known

    code, out, _ = lorafarm(*command, "--again")
    assert code == 0
    assert "a few steps of each pack measured" in out
    assert re.search(r"training: \d+ (s|min); scoring 4 checkpoints not included", out)
    (row,) = [line for line in out.splitlines() if "lora r4, dora r4" in line]
    (entry,) = json.loads((home_path / "measurements.json").read_text())["packs"].values()
    # A little less than it takes: half the batch needs some hundred MB less.
    limit_gib = (entry["peak_bytes"] - 20_000_000) / GIB
    code, out, _ = lorafarm(*command, "--memory", limit_gib)
    assert code == 2
    assert row in out.splitlines()
    assert "lora r4, dora r4: does not fit" in out
    assert "it fits with batch_size: 8, accumulation: 2 in the recipe\n" in out
    stored = json.loads((home_path / "measurements.json").read_text())["packs"]
    assert [value["facts"]["batch_size"] for value in stored.values()] == [16, 8]
