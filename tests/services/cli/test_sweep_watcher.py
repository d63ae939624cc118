"""What the person sees of the workers' events, and what is recorded of them."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from captioning import DatasetVersion, parse_config
from services.cli import progress
from services.cli.progress import Display
from services.cli.watching import Watcher, pack_line
from services.sweeps.plan import PlannedTrial, SweepConfig, SweepPlan, plan_sweep

DATASET = DatasetVersion("v0001-00000000", Path(), "aya", "ayachar", "person", (), (), "0" * 64)


@pytest.fixture
def plan() -> SweepPlan:
    config = parse_config(SweepConfig, {"recipe": {"steps": 10}}, "test")
    return plan_sweep(config, DATASET, "b" * 64, "sd15", "test")


def watch(plan: SweepPlan, *events: dict) -> tuple[str, list[tuple[PlannedTrial, str]]]:
    """What is written to a log, and what is recorded."""
    stream, recorded = io.StringIO(), []
    with Display(Console(file=stream, width=200)) as display, display.step("trained") as step:
        record = lambda planned, state: recorded.append((planned, state))  # noqa: E731
        watcher = Watcher(plan, {}, record, display, step)
        for event in events:
            watcher(event)
        watcher.tell_memory()
    return stream.getvalue(), recorded


def step_event(plan: SweepPlan, step: int) -> dict:
    return {
        "kind": "step",
        "trial": plan.trials[0].trial,
        "step": step,
        "loss": 0.125,
        "pack_images_per_s": 12.34,
    }


def test_a_pack_is_told_with_its_memory(plan: SweepPlan):
    event = {
        "kind": "pack",
        "trials": ["t0", "t1"],
        "slot_bytes": [1_200_000, 1_200_000],
        "base_bytes": 46_000_000,
        "text_encoder_bytes": 0,
    }
    written, _ = watch(plan, event)
    assert "pack of 2: 1.2 MB each on a base of 46 MB" in written
    uneven = event | {"slot_bytes": [2_000_000, 1_200_000]}
    assert pack_line(uneven).startswith("pack of 2: 1.2 to 2.0 MB each")
    trained = event | {"text_encoder_bytes": 7_000_000}
    assert pack_line(trained).endswith("on a base of 46 MB and text encoders of 7 MB")


def test_the_largest_memory_of_all_steps_is_told_once(plan: SweepPlan):
    sizes = (1_700_000_000, 2_048_000_000, 1_900_000_000)
    for name, words in (
        ("peak_device_bytes", "peak memory of a step: 2048 MB of tensors on the"),
        ("resident_bytes", "largest memory after a step: 2048 MB resident in the"),
    ):
        steps = [{**step_event(plan, n), name: size} for n, size in enumerate(sizes, start=1)]
        written, _ = watch(plan, *steps)
        assert written.count(words) == written.count("memory") == 1
    assert "memory" not in watch(plan, step_event(plan, 1))[0]


def test_the_buckets_are_told_with_their_pictures(plan: SweepPlan):
    written, _ = watch(plan, {"kind": "buckets", "buckets": [(832, 1216, 3), (1024, 1024, 12)]})
    assert "(width × height): 1216 × 832: 3, 1024 × 1024: 12" in written


def test_the_progress_line_tells_loss_and_pictures_per_second(
    plan: SweepPlan, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(progress, "LOG_INTERVAL_S", 0.0)
    written, recorded = watch(plan, step_event(plan, 1), step_event(plan, 2))
    assert "2/10" in written
    assert "loss 0.125, 12.3 images/s" in written
    assert not recorded


def test_who_goes_on_and_that_ctrl_c_was_heard_are_told(plan: SweepPlan):
    trial = {"kind": "trial", "trial": plan.trials[0].trial, "steps": 10}
    written, _ = watch(plan, trial | {"step": 5}, {"kind": "stopping"})
    assert "goes on from step 5" in written and "stopping" in written
    for step in (0, 10):
        assert "goes on" not in watch(plan, trial | {"step": step})[0]


def test_a_failure_is_told_and_recorded(plan: SweepPlan):
    trial = plan.trials[0]
    written, recorded = watch(
        plan, {"kind": "failed", "trial": trial.trial, "error": "no space left"}
    )
    assert "no space left" in written
    assert recorded == [(trial, "failed")]


def test_a_lack_of_memory_is_told(plan: SweepPlan):
    event = {
        "kind": "out_of_memory",
        "trials": ["t0", "t1", "t2"],
        "effective_batch_size": 2,
        "effective_accumulation": 4,
        "found": "no room",
    }
    written, _ = watch(plan, event)
    assert "pack of 3 goes on with batches of 2, 4 in each step" in written


def test_what_tells_trials_apart_is_said_and_text_with_brackets_stays_whole():
    recipe = {"class_pictures": "people", "prior_weight": 0.5}
    search = {"class_prompt": ["a [red] person", "a person"]}
    config = parse_config(SweepConfig, {"search": search, "recipe": recipe}, "test")
    plan = plan_sweep(config, DATASET, "b" * 64, "sd15", "test")
    failed = {"kind": "failed", "trial": plan.trials[0].trial, "error": "[/] in the way"}
    written, _ = watch(plan, failed)
    assert "lora r16 (class_prompt a [red] person) failed: [/] in the way" in written


def test_compiled_blocks_are_told_to_agree_or_not(plan: SweepPlan):
    event = {"kind": "compiled", "difference": 2.5e-7, "kept": True, "error": None}
    assert "compiled blocks checked: gradients differ by 2.5e-07" in watch(plan, event)[0]
    written, _ = watch(plan, {**event, "difference": 0.04, "kept": False})
    assert "by 4.0e-02 of themselves); going on without them" in written
    broken = {**event, "difference": None, "kept": False, "error": "InductorError: no [room]"}
    assert "going on without: InductorError: no [room]" in watch(plan, broken)[0]
