# SPDX-License-Identifier: Apache-2.0
"""Another machine in place of this one, while something is planned or predicted for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from distorch import _donors
from distorch.machine.calibration import Calibration
from distorch.planner import DeviceInfo, DevicesElsewhere

_NOT_FREE = {"cpu": 4 << 30, "disk": 0}  # what the system and its programs hold
_NOT_FREE_OF_A_GPU = 1 << 30


@dataclass(frozen=True, repr=False)
class Supposed:
    """A machine as numbers: see `distorch.Machine`."""

    name: str
    devices: Mapping[str, int]
    calibration: Calibration

    def memory(self) -> DevicesElsewhere:
        """Every tier, with what is free if no other program computes there."""
        found = DevicesElsewhere(self.name, {})
        for name, total in self.devices.items():
            held = min(_NOT_FREE.get(name, _NOT_FREE_OF_A_GPU), total // 2)
            found[name] = DeviceInfo(name, total, total - held)
        return found


# Of this thread alone: what others plan meanwhile is for the machine that is there.
_now: ContextVar[Supposed | None] = ContextVar("supposed", default=None)


def supposed() -> Supposed | None:
    """The machine that stands for this one now. None: this one itself."""
    return _now.get()


@contextmanager
def supposing(machine: Supposed | None) -> Iterator[None]:
    """Inside of the block, devices, links and speeds are those of `machine`. None: as before."""
    if machine is None:
        yield
        return
    before = _now.set(machine)
    rates = {(link.donor, link.compute): link.rate for link in machine.calibration.links}
    try:
        with _donors.other_link_rates(rates):
            yield
    finally:
        _now.reset(before)
