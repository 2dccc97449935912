# SPDX-License-Identifier: Apache-2.0
"""What copies, reads, decoding and issuing take on this machine, from what `calibrate` measured."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from distorch import _native
from distorch.errors import PlacementError
from distorch.machine.calibration import Calibration, Link, Speed
from distorch.machine.links import is_simulated
from distorch.machine.supposed import supposed

READ_PART = 4 << 20  # bytes; see csrc/engine/reads.cpp
READERS = 6  # threads that read, unless DISTORCH_IO_THREADS says otherwise
_HALVINGS = 40
_SHARED = 0.9  # links that together carry less than this part of their sum share hardware


class Rates:
    """The links to one compute device and its speed, as they were measured.

    Its methods raise PlacementError where something was not measured that they need.
    """

    def __init__(self, compute: str, measured: Calibration) -> None:
        self.compute = compute
        self._links = {link.donor: link for link in measured.links if link.compute == compute}
        self._speed = measured.speed(compute)

    def rate_and_latency(self, place: str) -> tuple[float, float]:
        """Of the link from there."""
        link = self._link(place)
        return link.rate, link.latency

    def knows(self, place: str) -> bool:
        """Whether the link from there was measured."""
        return place in self._links

    def _link(self, place: str) -> Link:
        found = self._links.get(place)
        if found is None:
            raise _not_known(f"what the link from {place!r} to {self.compute!r} carries")
        return found

    def _known_speed(self) -> Speed:
        if self._speed is None:
            raise _not_known(f"the speed of computing on {self.compute!r}")
        return self._speed

    def operator_seconds(self, flops: float, nbytes: int, *, is_half: bool) -> float:
        """Of one operator on the compute device: its arithmetic, or its bytes in memory.
        `is_half`: the numbers have 16 bits or fewer.
        """
        speed = self._known_speed()
        return max(flops / (speed.half_flops if is_half else speed.flops), nbytes / speed.memory)

    def costs(self) -> tuple[float, float]:
        """What the host pays for each operator or copy that it issues, and for each event."""
        if self.compute == "cpu":
            return 0.0, 0.0  # operators take the host's time anyway
        speed = self._known_speed()
        return speed.issue, speed.event

    def readers(self) -> tuple[int, int]:
        """How many reads the host makes at once: ahead of a use, and for somebody who waits."""
        if is_simulated(self.compute):
            return 2, 1  # csrc/sim/machine.h
        if supposed() is not None:
            return READERS, READERS
        return _native.io_threads(), _native.io_threads()

    def without_issuing(self, seconds: float, idle: float) -> float:
        """Seconds of the device alone. `idle`: for how many operators it waited for the host."""
        return max(0.0, seconds - idle * self.costs()[0])

    def links_for(
        self, places: Collection[str]
    ) -> tuple[list[tuple[str, float, float, int]], list[float]]:
        """(from, bytes per second, latency, group) of each link in use, and the groups' rates.
        `places`: where bytes come from.
        """
        if self.compute == "cpu":
            return [], []
        if "disk" in places:  # what is read from a disk goes on over the host's link
            places = {*places, "cpu"} - {"disk"}
        found, groups = [], []
        others = [self._link(place) for place in sorted(places) if place != self.compute]
        capacity = _shared_capacity(others)
        group = -1
        if capacity is not None:
            group = 0
            groups.append(capacity)
        for link in others:
            found.append((link.donor, link.rate, link.latency, group))
        if self.compute in places:  # copies within the device read and write
            found.append((self.compute, self._known_speed().memory / 2, 0.0, -1))
        return found, groups

    def disk_for(self, places: Collection[str]) -> tuple[float, float]:
        """Bytes per second and latency of reads, if any bytes come from a disk.

        If the CPU computes, what comes from accelerators is read, too: all as from the slowest one.
        """
        if self.compute == "cpu":
            sources = [self._link(place) for place in sorted(places) if place != "cpu"]
            slowest = min(sources, key=lambda link: link.rate, default=None)
            return (slowest.rate, slowest.latency) if slowest is not None else (1.0, 0.0)
        if "disk" not in places:
            return 1.0, 0.0
        disk = self._link("disk")
        # It was measured from the file to the device, in parts that each have the latency. What is
        # left is the read.
        up = self._link("cpu")
        latency = max(0.0, disk.latency - up.latency)
        at_once = self.readers()[1]
        seconds = max(1 / disk.rate - 1 / up.rate - latency / READ_PART / at_once, 1e-15)
        return 1 / seconds, latency

    def row_seconds(self, place: str, nbytes: int) -> float:
        """Of bringing rows of a table."""
        if self.compute == "cpu" and place != "disk":
            return 0.0
        link = self._link(place.split("+", maxsplit=1)[0])
        # Their numbers go to the host, and the rows come back with their new numbers.
        return 3 * link.latency + nbytes / link.rate

    def decode_seconds(
        self, stored: int, decoded: int, factors: int, rows: int, elements: int
    ) -> float:
        """Of decoding a matrix on the compute device: memory traffic, or products of patches."""
        speed = self._known_speed()
        columns = max(elements // max(rows, 1), 1)
        rank = factors / (4 * (rows + columns)) if stored == decoded else 0.0
        return max((stored + decoded + factors) / speed.memory, 2 * elements * rank / speed.flops)


def _not_known(what: str) -> PlacementError:
    if (other := supposed()) is not None:
        return PlacementError(
            f"{what} is not known of the machine {other.name!r}: it has figures for "
            f"{', '.join(sorted(other.devices))}, and computes on "
            f"{', '.join(speed.device for speed in other.calibration.speeds) or 'none of them'}"
        )
    return PlacementError(
        f"{what} is not known; measure it with distorch.calibrate() (on a machine with an "
        "accelerator it measures only what computes there)"
    )


def _shared_capacity(links: Sequence[Link]) -> float | None:
    """Bytes per second of the hardware that these links share; None: they share none.

    `together` was measured with bytes in proportion to the links' own rates, and all links that are
    busy share alike. The capacity is found with which that takes as long as it took.
    """
    whole, together = sum(k.rate for k in links), sum(k.together for k in links)
    if len(links) < 2 or together >= _SHARED * whole:
        return None
    low, high = max(link.rate for link in links), whole  # each alone has its own rate
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if _seconds_together(links, middle) < whole / together:
            high = middle
        else:
            low = middle
    return high


def _seconds_together(links: Sequence[Link], capacity: float) -> float:
    """Until all have brought what each alone brings in a second."""
    left = {link.donor: link.rate for link in links}
    seconds = 0.0
    while left:
        rates = {k.donor: min(k.rate, capacity / len(left)) for k in links if k.donor in left}
        first = min(left[donor] / rates[donor] for donor in left)
        seconds += first
        left = {
            donor: left[donor] - first * rates[donor]
            for donor in left
            if left[donor] > first * rates[donor] * (1 + 1e-9)
        }
    return seconds
