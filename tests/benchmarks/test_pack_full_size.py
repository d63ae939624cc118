"""The benchmark for GPUs, on small networks and a CPU: it runs, and counts what a step computes."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable

import pack_full_size
import pytest
import torch
from pack_full_size import Step, build, count_operations, main, pack_step, peft_step

from training.pack.adapters import detach

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def test_it_prints_a_row_of_numbers_for_every_variant(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pack_full_size, "WARM_UP_STEPS", 0)
    options = "--device cpu --small --px 64 --slots 2 --rank 2 --steps 1"
    monkeypatch.setattr(sys, "argv", ["pack_full_size.py", *options.split()])
    main()
    printed = capsys.readouterr().out
    rows = re.findall(r"(?m)^\| (.+?) \| ([\d.]+) \| ([\d.]+) \|  \| (\d+)% \|$", printed)
    assert [name for name, *_ in rows] == 2 * [
        "PEFT LoRA",
        "PEFT DoRA",
        "LoRA K=2",
        "DoRA input K=2",
    ]
    assert all(float(step) > 0 and float(gain) > 0 for _, step, gain, _ in rows)
    assert "sdxl, 64 px" in printed and "flux, 64 px" in printed


@pytest.mark.parametrize("model", ["sdxl", "flux"])
def test_a_pack_s_operations_are_all_counted(model: str) -> None:
    base = build(model, small=True, device=CPU)

    def count(make_step: Callable[..., Step], *arguments: object) -> int:
        found = count_operations(make_step(base, 64, *arguments))
        detach(base)
        return found

    peft = count(peft_step, 4, False)
    one, two = (count(pack_step, {"rank": 4}, slots) for slots in (1, 2))
    # The same products, whether a layer's update is added in place or not.
    assert one == peft
    assert two == 2 * one
