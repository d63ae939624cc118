"""Runs a command and prints its wall time and the peak memory of it and all its processes.

usage: python tests/benchmarks/peak_memory.py lorafarm demo --out demo-out

Memory is the sum of proportional set sizes (shared pages counted once), sampled; Linux only.
"""

from __future__ import annotations

import sys
import time

import psutil

SAMPLE_INTERVAL_S = 2.0
GIB = 1024**3


def tree_pss_bytes(process: psutil.Process) -> int:
    """The proportional set size of a process and its descendants; those just gone count nothing."""
    total = 0
    for member in [process, *process.children(recursive=True)]:
        try:
            total += member.memory_full_info().pss
        except psutil.NoSuchProcess:
            continue
    return total


def main() -> int:
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    started, peak = time.monotonic(), 0
    process = psutil.Popen(sys.argv[1:])
    while process.poll() is None:
        try:
            peak = max(peak, tree_pss_bytes(process))
        except psutil.NoSuchProcess:
            break
        time.sleep(SAMPLE_INTERVAL_S)
    code = process.wait()
    print(f"wall time {time.monotonic() - started:.0f} s, peak memory {peak / GIB:.2f} GiB")
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
