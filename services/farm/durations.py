"""Seconds as a person says them."""

from __future__ import annotations


def duration(seconds: float, estimated: bool = False) -> str:
    """What was measured: "0.4 s", "48 s", "12 min 05 s", "3 h 20 min".

    An estimate is worth two figures: "0 s", "89 s", "12 min", "3 h 20 min".
    """
    if estimated:
        return _estimate(seconds)
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return _hours(minutes)


def _estimate(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else _hours(minutes)


def _hours(minutes: int) -> str:
    return f"{minutes // 60} h {minutes % 60:02d} min"
