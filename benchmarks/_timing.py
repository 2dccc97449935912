"""Clocks of devices, and turns of several calls."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

Now = Callable[[], float]


def clock_of(device: torch.device) -> Now:
    """Seconds when all that was issued to a device has ended; virtual ones of a simulated one."""
    if device.type == "cpu":
        return time.perf_counter
    module = torch.get_device_module(device)
    if device.type == "sim":
        from distorch.testing import sim

        clock: Now = sim.now
    else:
        clock = time.perf_counter

    def now() -> float:
        module.synchronize()
        return clock()

    return now


def interleaved(
    calls: dict[str, Callable[[], object]], rounds: int, now: Now = time.perf_counter
) -> dict[str, float]:
    """Median seconds of each call, one after the other, `rounds` times; once before to warm up."""
    for call in calls.values():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = now()
            call()
            seconds[name].append(now() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}
