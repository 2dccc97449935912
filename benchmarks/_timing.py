# SPDX-License-Identifier: Apache-2.0
"""Clocks of devices, and turns of several calls."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

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


class Times(NamedTuple):
    """Seconds of some work."""

    device: float  # between two events of the current stream
    wall: float  # of the host, until the device had ended


def times_of(device: torch.device, work: Callable[[], object]) -> Times:
    """Of one run, from an idle device on. Where the host computes, both are the same."""
    now = clock_of(device)
    start = now()
    if device.type == "cpu":
        work()
        wall = now() - start
        return Times(wall, wall)
    stream = torch.accelerator.current_stream(device)
    first, last = (torch.Event(device, enable_timing=True) for _ in range(2))
    first.record(stream)
    work()
    last.record(stream)
    wall = now() - start
    return Times(first.elapsed_time(last) / 1e3, wall)


def interleaved_on(
    device: torch.device, calls: dict[str, Callable[[], object]], rounds: int
) -> dict[str, float]:
    """`interleaved`, in seconds of the device."""
    return _in_turns(calls, rounds, lambda call: times_of(device, call).device)


def interleaved(
    calls: dict[str, Callable[[], object]], rounds: int, now: Now = time.perf_counter
) -> dict[str, float]:
    """Median seconds of each call, one after the other, `rounds` times; once before to warm up."""

    def timed(call: Callable[[], object]) -> float:
        start = now()
        call()
        return now() - start

    return _in_turns(calls, rounds, timed)


def _in_turns(
    calls: dict[str, Callable[[], object]],
    rounds: int,
    seconds_of: Callable[[Callable[[], object]], float],
) -> dict[str, float]:
    for call in calls.values():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            seconds[name].append(seconds_of(call))
    return {name: statistics.median(times) for name, times in seconds.items()}
