"""How long it takes to read a sweep of 64 trials, beside an earlier version of the farm.

    python tests/benchmarks/leaderboard_speed.py --before CHECKOUT [--trials 64] [--checkpoints 8]

Makes a home with that many trials, whose files have the shapes of rank-16 adapters of Stable
Diffusion 1.5 (12.8 MB, and 25.5 MB of optimiser state with the last two checkpoints of each trial)
and zeros for tensors. Then the code of this checkout and that of CHECKOUT take turns at

- reading the leaderboard (the sweep's plan, its checkpoints and scores, the winner), once with the
  manifests of today, which name sizes, and once with older ones,
- `lorafarm leaderboard`, `status` and `--help` as whole processes, and `status` once more without
  the list of adapters that the farm keeps, as after a change that another program made.

Shown are medians of wall time and of processor time; a busy machine stretches the first. Targets:
the leaderboard is read 20 times as fast, and each command answers within a second.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "services")]

from home_before import EXPECTED, copy_home, write_hollow  # noqa: E402

from services.farm.settings import open_home  # noqa: E402
from services.registry.listing import LISTED_FILE  # noqa: E402
from services.sweeps.files import AskedSweep, dataset_of, sweeps  # noqa: E402
from services.sweeps.plan import SweepConfig, plan_sweep  # noqa: E402
from training import Interval, Recipe, Score, checkpoint_dir  # noqa: E402

RANK = 16
# Channels of the transformer blocks of Stable Diffusion 1.5's UNet, and the width of its text.
BLOCKS = (
    *(("down_blocks", level, 2, width) for level, width in enumerate((320, 640, 1280))),
    ("mid_block", None, 1, 1280),
    *(("up_blocks", level, 3, width) for level, width in ((1, 1280), (2, 640), (3, 320))),
)
TEXT_WIDTH = 768
STATES_KEPT = 2  # of each trial: the best and the last
STEPS_APART = 100
TARGET_RATIO = 20.0
TARGET_S = 1.0
READ = """
import sys, time
from pathlib import Path
from services.farm.settings import open_home
{imported}
home = open_home(Path(sys.argv[1]))
wall, processor = time.perf_counter(), time.process_time()
{read}
print(time.perf_counter() - wall, time.process_time() - processor, len(winner.table))
"""
READ_AFTER = READ.format(
    imported="from services.sweeps.leaderboard import leaderboard",
    read='winner = leaderboard(home, "aya").winner',
)
READ_BEFORE = READ.format(
    imported="from services.sweep_files import newest_scored\nfrom training import choose_winner",
    read="""sweep = newest_scored(home.store, "aya", home.settings.workers)
winner = choose_winner(sweep.candidates, sweep.record.config.scoring.limits)""",
)
COMMAND = "import sys; sys.argv[0] = 'lorafarm'; from services.cli import main; main()"


@dataclass(frozen=True)
class Seconds:
    """How long a thing took."""

    wall: float
    processor: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--before", type=Path, required=True, help="a checkout to compare with")
    parser.add_argument("--trials", type=int, default=64)
    parser.add_argument("--checkpoints", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    checkout = given.before.resolve()
    with tempfile.TemporaryDirectory() as folder:
        home = make_home(Path(folder) / "home", given.trials, given.checkpoints)
        print(f"{given.trials} trials, {given.checkpoints} checkpoints each, {given.rounds} rounds")
        print(f"{'':32}{'before':>18}{'after':>18}{'ratio':>8}{'target':>10}")
        reading = []
        for name, has_sizes in (
            ("reading, manifests of today", True),
            ("  older manifests", False),
        ):
            write_manifests(home, has_sizes)
            rows = tuple(measured_reading(home, checkout) for _ in range(given.rounds))
            reading.append(show(name, rows, f"{TARGET_RATIO:g} x"))
        write_manifests(home, True)
        answers = [
            show(
                f"lorafarm {' '.join(arguments)}",
                tuple(measured_commands(home, checkout, arguments, given.rounds)),
                f"{TARGET_S:g} s",
            )
            for arguments in (("leaderboard", "aya"), ("status",), ("--help",))
        ]
        cold = tuple(measured_commands(home, checkout, ("status",), given.rounds, is_cold=True))
        show("  status, no list is kept", cold, "")
    ratio = reading[0][0].processor / reading[0][1].processor
    is_fast = all(after.processor < TARGET_S for _, after in answers)
    raise SystemExit(0 if ratio >= TARGET_RATIO and is_fast else 1)


def show(
    name: str, rows: Sequence[tuple[Seconds, Seconds]], target: str
) -> tuple[Seconds, Seconds]:
    """Print a row of the table, wall time and in brackets processor time; gives the medians."""
    before, after = (
        Seconds(
            statistics.median(one.wall for one in side),
            statistics.median(one.processor for one in side),
        )
        for side in zip(*rows, strict=True)
    )
    texts = (f"{one.wall:.2f} s ({one.processor:.2f})" for one in (before, after))
    ratio = f"{before.processor / after.processor:.1f}"
    print(f"{name:32}" + "".join(f"{text:>18}" for text in texts) + f"{ratio:>8}{target:>10}")
    sys.stdout.flush()
    return before, after


def measured_reading(home: Path, before: Path) -> tuple[Seconds, Seconds]:
    """Reading the leaderboard, imports left out: an earlier version, and then this one."""
    results = []
    for code, root in ((READ_BEFORE, before), (READ_AFTER, ROOT)):
        run = subprocess.run(
            [sys.executable, "-c", code, str(home)],
            cwd=root,  # which `-c` puts first on the path
            env=environment(home, root),
            capture_output=True,
            text=True,
            check=True,
        )
        wall, processor, _ = map(float, run.stdout.split())
        results.append(Seconds(wall, processor))
    return results[0], results[1]


def measured_commands(
    home: Path, before: Path, arguments: Sequence[str], rounds: int, is_cold: bool = False
) -> Iterator[tuple[Seconds, Seconds]]:
    """A whole command, in turns; the first round, which fills caches, is not counted.

    `is_cold`: the list of registered adapters is deleted before each round.
    """
    for number in range(rounds + 1):
        if is_cold:
            (home / LISTED_FILE).unlink(missing_ok=True)
        took = tuple(command_seconds(home, root, arguments) for root in (before, ROOT))
        if number:
            yield took[0], took[1]


def command_seconds(home: Path, root: Path, arguments: Sequence[str]) -> Seconds:
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, *arguments],
        cwd=root,
        env=environment(home, root),
        stdout=subprocess.DEVNULL,
    )
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"lorafarm {' '.join(arguments)} ended with {status}")
    return Seconds(time.perf_counter() - started, usage.ru_utime + usage.ru_stime)


def environment(home: Path, root: Path) -> Mapping[str, str]:
    """Both versions keep their compiled modules, as an installed one does."""
    kept = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    compiled = str(home.parent / f"compiled-{root.name}")
    return kept | {
        "PYTHONPATH": str(root),
        "PYTHONPYCACHEPREFIX": compiled,
        "LORAFARM_HOME": str(home),
    }


def make_home(path: Path, trials: int, checkpoints: int) -> Path:
    """An earlier home with one more sweep of `aya`, all of whose checkpoints are scored."""
    store = open_home(copy_home(path)).store
    [small] = sweeps(store, "aya")
    recipe = {
        "network": {"rank": RANK},
        "steps": checkpoints * STEPS_APART,
        "checkpoint_every": STEPS_APART,
    }
    scoring = small.config.scoring.model_dump(exclude_unset=True)
    config = SweepConfig.model_validate(
        {"recipe": recipe, "search": {"seed": list(range(trials))}, "scoring": scoring}
    )
    dataset = dataset_of(store, small)
    plan = plan_sweep(config, dataset, small.base_hash, small.family, "benchmark")
    asked = AskedSweep.model_validate(
        small.model_dump()
        | {
            "sweep": plan.sweep,
            "config": config,
            "trials": [planned.trial for planned in plan.trials],
            "started": "2027-01-01T00:00:00+00:00",
        }
    )
    folder = store.sweeps / "aya" / plan.sweep
    folder.mkdir()
    (folder / "sweep.json").write_text(asked.model_dump_json(exclude_unset=True))
    winner = EXPECTED["standings"][0]
    score = Score.load(checkpoint_dir(store.runs / winner["trial"], winner["step"]))
    heads = {"adapter.safetensors": head(adapter_shapes()), "state.safetensors": head(states())}
    for number, planned in enumerate(plan.trials):
        trial_dir = store.runs / planned.trial
        for place in range(checkpoints):
            step = (place + 1) * STEPS_APART
            checkpoint = checkpoint_dir(trial_dir, step)
            checkpoint.mkdir(parents=True)
            write_hollow(checkpoint / "adapter.safetensors", heads["adapter.safetensors"])
            if place >= checkpoints - STATES_KEPT:
                write_hollow(checkpoint / "state.safetensors", heads["state.safetensors"])
            write_recipe(checkpoint, planned.recipe)
            moved(score, 0.001 * number + 0.002 * place).save(checkpoint)
        rows = ({"step": step, "loss": 0.1} for step in range(1, planned.recipe.steps + 1))
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (trial_dir / "metrics.jsonl").write_text(text)
    return path


def write_recipe(checkpoint: Path, recipe: Recipe) -> None:
    text = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)
    (checkpoint / "recipe.yaml").write_text(text)


def write_manifests(home: Path, has_sizes: bool) -> None:
    """The manifests of the sweep's checkpoints as they are written today, or as they were."""
    known: dict[tuple[str, int], str] = {}  # files of one name and size are equal
    for checkpoint in home.glob("runs/*/step-*00"):  # those of the earlier sweep end otherwise
        files = {
            name: checkpoint / name
            for name in ("adapter.safetensors", "state.safetensors", "recipe.yaml")
            if (checkpoint / name).exists()
        }
        hashes = {}
        for name, file in files.items():
            size = file.stat().st_size
            if name == "recipe.yaml" or (name, size) not in known:
                known[name, size] = hashlib.sha256(file.read_bytes()).hexdigest()
            hashes[name] = known[name, size]
        manifest: dict[str, object] = {
            "format": 1,
            "step": int(checkpoint.name.removeprefix("step-")),
            "files": hashes,
        }
        if has_sizes:
            manifest["sizes"] = {name: file.stat().st_size for name, file in files.items()}
        if "state.safetensors" not in files:
            manifest["state_dropped"] = True
        (checkpoint / "manifest.json").write_text(json.dumps(manifest, indent=1))


def moved(score: Score, by: float) -> Score:
    """The score of a checkpoint that is a little better in every picture."""
    identity = Interval(
        value=score.identity.value + by, low=score.identity.low + by, high=score.identity.high + by
    )
    identities = tuple(value + by for value in score.identities)
    return score.model_copy(update={"identity": identity, "identities": identities})


def adapter_shapes() -> dict[str, tuple[int, ...]]:
    """The tensors of an adapter on all attention projections, as diffusers names their layers."""
    shapes: dict[str, tuple[int, ...]] = {}
    for block, level, attentions, width in BLOCKS:
        place = block if level is None else f"{block}.{level}"
        for number in range(attentions):
            layer = f"unet.{place}.attentions.{number}.transformer_blocks.0"
            for attention in ("attn1", "attn2"):
                for projection in ("to_q", "to_k", "to_v", "to_out.0"):
                    reads_text = attention == "attn2" and projection in ("to_k", "to_v")
                    name = f"{layer}.{attention}.{projection}"
                    inner = TEXT_WIDTH if reads_text else width
                    shapes[f"{name}.lora_A.weight"] = (RANK, inner)
                    shapes[f"{name}.lora_B.weight"] = (width, RANK)
    return shapes


def states() -> dict[str, tuple[int, ...]]:
    """AdamW's state of these tensors."""
    return {
        f"optimizer/{name}/{part}": () if part == "step" else shape
        for name, shape in adapter_shapes().items()
        for part in ("exp_avg", "exp_avg_sq", "step")
    }


def head(shapes: Mapping[str, tuple[int, ...]]) -> bytes:
    """The beginning of a safetensors file of fp32 tensors: the header's length, and the header."""
    tensors, end = {}, 0
    for name, shape in shapes.items():
        begin = end
        end += 4 * math.prod(shape)
        tensors[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}
    header = json.dumps(tensors).encode()
    return len(header).to_bytes(8, "little") + header


if __name__ == "__main__":
    main()
