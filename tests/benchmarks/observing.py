"""Pictures per second of tagger + CLIP + quality: served, one at a time, and as three scripts.

    python tests/benchmarks/observing.py [pictures] [side in px] [--profile]

The same starter models in all. (a) is a plain loop that decodes each picture and hands it to the
three one after the other; (a') the same loop, written by somebody who knows that tagger and CLIP
look at 64 px and shrinks the picture once for both, as the served run does; (b) is three batched
loops, each of which decodes every picture itself. Their models have a thread for each core, which
is torch's own default; as small models lose by that, (a) and (a') run with one thread as well.
Served figures leave out the start of Serve, as those of the loops leave out loading the models.
With --profile the client's own functions are listed by the time spent in them, and the CPU time
that each kind of process took for a picture.
"""

from __future__ import annotations

import cProfile
import hashlib
import io
import os
import pstats
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

from captioning import (
    STARTER_CLIP,
    STARTER_TAGGER,
    EmbedderConfig,
    QualityConfig,
    TaggerConfig,
    serve_observers,
    upright_rgb,
)
from captioning.observers.embedder import Embedder
from captioning.observers.quality import QualityMeter
from captioning.observers.shrink import Shrink
from captioning.observers.tagger import Tagger
from services.farm.engine import running_ray
from services.farm.settings import Home, Settings

KINDS = ("tags", "embedding", "quality")
BATCHES, REPLICAS, LOOP_BATCH = (1, 8, 32), (1, 2), 32
CORES = os.cpu_count() or 1
DEMO = sorted((Path(__file__).parents[2] / "services/cli/demo/pictures").glob("*/*.png"))


def pictures(count: int, side: int) -> list[bytes]:
    """JPEGs of the demo's drawings at `side` px, no two alike."""
    random = np.random.default_rng(0)
    made = []
    for number in range(count):
        drawing = Image.open(DEMO[number % len(DEMO)]).convert("RGB")
        pixels = np.asarray(drawing.resize((side, side), Image.Resampling.LANCZOS), np.int16)
        grain = random.integers(-6, 7, (side, side, 1), np.int16)
        buffer = io.BytesIO()
        Image.fromarray((pixels + grain).clip(0, 255).astype(np.uint8)).save(
            buffer, "JPEG", quality=92
        )
        made.append(buffer.getvalue())
    return made


def loop(contents: list[bytes], observers: list, batch: int, decode_each: bool) -> list[float]:
    """Seconds for each batch; with `decode_each` every observer decodes all pictures itself."""
    seconds = []
    passes = [[observer] for observer in observers] if decode_each else [observers]
    for together in passes:
        for start in range(0, len(contents), batch):
            began = time.perf_counter()
            decoded = [upright_rgb(data) for data in contents[start : start + batch]]
            for observer in together:
                observer.observe(decoded)
            seconds.append(time.perf_counter() - began)
    return seconds


def loop_shrinking_once(contents: list[bytes], observers: list) -> list[float]:
    """Seconds for each picture of a loop that shrinks it itself, once for all that shrink alike."""
    seconds = []
    for data in contents:
        began = time.perf_counter()
        picture = upright_rgb(data)
        made: dict[Shrink | None, Image.Image] = {None: picture}
        for observer in observers:
            how = observer.shrink.on(picture) if observer.shrink else None
            if how not in made:
                made[how] = how(picture)
            observer.observe([made[how]])
        seconds.append(time.perf_counter() - began)
    return seconds


def print_parts(contents: list[bytes]) -> None:
    """What each part costs a picture on one core, alone and in a batch: what the cores can give."""
    observers = [Tagger(STARTER_TAGGER, 1), Embedder(STARTER_CLIP, 1), QualityMeter()]
    began = time.perf_counter()
    decoded = [upright_rgb(data) for data in contents]
    parts = [f"decoding {(time.perf_counter() - began) * 1000 / len(contents):.1f}"]
    began = time.perf_counter()
    for picture in decoded:
        observers[0].shrink.on(picture)(picture)
    parts.append(f"shrinking {(time.perf_counter() - began) * 1000 / len(decoded):.1f}")
    for observer, kind in zip(observers, KINDS, strict=True):
        for batch in (1, LOOP_BATCH):
            began = time.perf_counter()
            for start in range(0, len(decoded), batch):
                observer.observe(decoded[start : start + batch])
            each = (time.perf_counter() - began) * 1000 / len(decoded)
            parts.append(f"{kind} {each:.1f} (batch {batch})")
    print(f"ms per picture on one core: {', '.join(parts)}\n")


def cpu_seconds() -> Counter[str]:
    """CPU seconds so far of this process and all below it, by kind of process."""
    taken: Counter[str] = Counter()
    here = psutil.Process()
    for process in [here, *here.children(recursive=True)]:
        try:
            name = "client" if process == here else (process.cmdline() or [process.name()])[0]
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        kind = next((f"{kind} replicas" for kind in KINDS if f"lorafarm-{kind}" in name), name)
        taken[kind.removeprefix("ray::").split("/")[-1]] += times.user + times.system
    return taken


def print_cpu(before: Counter[str], after: Counter[str], count: int, seconds: float) -> None:
    """Milliseconds of CPU for a picture, the process that took most first."""
    taken = after - before
    parts = [f"{kind} {took * 1000 / count:.1f}" for kind, took in taken.most_common(8)]
    total = sum(taken.values())
    print(f"CPU ms per picture: {', '.join(parts)}; all {total * 1000 / count:.1f}")
    print(f"{total / seconds:.2f} of {CORES} cores were busy with it\n")


def served(
    contents: list[bytes], batch: int, replicas: int, profile: bool
) -> tuple[float, list[float], int]:
    """(seconds, milliseconds between a picture's first answer asked for and its last, decoded)."""
    how = {"batch_size": batch, "min_replicas": replicas, "max_replicas": replicas, "cpus": 0.1}
    observers = [
        TaggerConfig(source=str(STARTER_TAGGER), **how),
        EmbedderConfig(source=str(STARTER_CLIP), **how),
        QualityConfig(**how),
    ]
    named = [(hashlib.sha256(data).hexdigest(), data) for data in contents]
    with serve_observers(observers) as client:
        warm = [(str(row), kind, contents[0]) for row in range(8 * replicas) for kind in KINDS]
        assert all(seen.error is None for seen in client.ask(warm))
        before, asked, last = client.decoded, {}, {}

        def requests():
            for sha256, data in named:
                asked[sha256] = time.perf_counter()
                yield from ((sha256, kind, data) for kind in KINDS)

        profiler = cProfile.Profile()
        if profile:
            profiler.enable()
        cpu = cpu_seconds()
        began = time.perf_counter()
        count = 0
        for seen in client.ask(requests()):
            assert seen.error is None, seen.error
            last[seen.image] = time.perf_counter()
            count += 1
        seconds = time.perf_counter() - began
        profiler.disable()
        if profile:
            pstats.Stats(profiler).sort_stats("tottime").print_stats(12)
            print_cpu(cpu, cpu_seconds(), count // len(KINDS), seconds)
        assert count == len(KINDS) * len(contents)
        waits = [(last[sha256] - asked[sha256]) * 1000 for sha256, _ in named]
        return seconds, waits, client.decoded - before


def row(name: str, count: int, seconds: float, waits_ms: list[float], decoded: int, base: float):
    p50, p95 = np.percentile(waits_ms, [50, 95])
    rate = count / seconds
    print(
        f"| {name} | {rate:.1f} | {rate / base:.2f} | {p50:.0f} | {p95:.0f} | {decoded} |",
        flush=True,
    )


def main() -> None:
    numbers = [int(word) for word in sys.argv[1:] if word.isdigit()]
    count, side = (numbers + [384, 1024][len(numbers) :])[:2]
    contents = pictures(count, side)
    print(f"{count} JPEGs of {side} px, {CORES} cores, load {os.getloadavg()[0]:.1f}\n")
    print_parts(contents[:32])
    print("| | pictures/s | × (a) | p50 ms | p95 ms | decodes |\n|---|---|---|---|---|---|")
    base = 0.0
    for threads in (CORES, 1):
        observers = [Tagger(STARTER_TAGGER, threads), Embedder(STARTER_CLIP, threads)]
        observers += [QualityMeter()]
        loop(contents[:8], observers, 8, decode_each=False)  # warm
        alone = loop(contents, observers, 1, decode_each=False)
        shrunk = loop_shrinking_once(contents, observers)
        base = base or count / sum(alone)
        for name, taken in (("(a) loop", alone), ("(a') loop, shrinking once", shrunk)):
            waits = [s * 1000 for s in taken]
            row(
                f"{name}, {threads} thread{'s' * (threads > 1)}",
                count,
                sum(taken),
                waits,
                count,
                base,
            )
        if threads == CORES:
            scripts = loop(contents, observers, LOOP_BATCH, decode_each=True)
            waits = [s * 1000 for s in scripts]
            name = f"(b) three scripts, batch {LOOP_BATCH}"
            row(name, count, sum(scripts), waits, 3 * count, base)
    with tempfile.TemporaryDirectory() as folder:
        home = Home(Path(folder), Settings(cpus_per_worker=CORES))
        with running_ray(home):
            for replicas in REPLICAS:
                for batch in BATCHES:
                    profile = "--profile" in sys.argv
                    seconds, waits, decoded = served(contents, batch, replicas, profile)
                    name = f"served, batch {batch}, {replicas} replica{'s' * (replicas > 1)}"
                    row(name, count, seconds, waits, decoded, base)


if __name__ == "__main__":
    main()
