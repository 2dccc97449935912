# SPDX-License-Identifier: Apache-2.0
"""Links between donors and compute devices: what they carry, measured once and remembered."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from distorch import _donors, _native, _ops
from distorch._small_files import is_own, read_json, write_atomically
from distorch.display.progress import Progress, check_progress, progress_of
from distorch.display.tables import html_table, human_bytes, text_table
from distorch.errors import PlacementError
from distorch.machine import machine
from distorch.machine.calibration import Calibration, Link, Speed, believed
from distorch.machine.supposed import supposed
from distorch.planner import DeviceInfo

_SMALL, _LARGE = 256 << 10, 64 << 20  # bytes of the two fetches that give latency and rate
_REPEATS = 3
_IN_A_ROW = 16  # small copies on one stream: what each of them costs beside its bytes
_TINY = 200  # operators or events in a row, for which the device waits
# Sides of square matrices, whose two products give the speed of a device.
_SIDES = (1024, 1536)
_HALF_SIDES = (3072, 4096)  # of bfloat16: a GPU is done with small ones before it is told
# A processor may have to emulate it, and then does less than 1e9 operations in a second.
_HALF_SIDES_ON_HOST = (128, 256)
_CACHE_VERSION = 3  # of what the cache file says; a file of another one is not believed


_known: dict[str, Calibration] = {}  # by machine


def _remember(found: Calibration) -> Calibration:
    """For this process; stripes are cut by it from now on."""
    _known[_machine_key()] = found
    _donors.link_rates.update({(k.donor, k.compute): k.rate for k in found.links})
    return found


def _machine_key() -> str:
    parts = [platform.node(), torch.__version__, *sorted(machine.devices())]
    return hashlib.sha256("|".join(parts).encode()).hexdigest()[:16]


def _cache_file() -> Path:
    return _native.cache_folder() / f"links-{_machine_key()}.json"


def is_simulated(device: str) -> bool:
    return device.partition(":")[0] == torch._C._get_privateuse1_backend_name()


def known_links() -> Calibration | None:
    """What `calibrate` measured on this machine, in this process or an earlier one. While another
    machine is supposed: what is known of that.
    """
    if (other := supposed()) is not None:
        return other.calibration
    key = _machine_key()
    if key in _known:
        return _known[key]
    try:
        file = _cache_file()
        if not is_own(file):
            return None
        stored = read_json(file)
        if stored["version"] != _CACHE_VERSION:
            return None
        return _remember(believed(stored))
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return None  # `calibrate` writes it anew


def measured_links() -> Calibration:
    """The same. PlacementError if nothing was measured."""
    found = known_links()
    if found is None:
        raise PlacementError(
            "the links of this machine were not measured: call distorch.calibrate() once"
        )
    return found


class Devices(dict[str, DeviceInfo]):
    """Name of a device -> `name`, `total_bytes`, `free_bytes` and `links` (compute device -> bytes
    per second). It prints as a table.
    """

    def to_dict(self) -> dict[str, Any]:
        """The devices as JSON types."""
        return {name: dataclasses.asdict(device) for name, device in self.items()}

    def _rows(self) -> list[tuple[str, ...]]:
        return [
            (
                name,
                human_bytes(device.total_bytes),
                human_bytes(device.free_bytes),
                ", ".join(f"{rate / 1e9:.1f} GB/s to {to}" for to, rate in device.links.items()),
            )
            for name, device in self.items()
        ]

    def __str__(self) -> str:
        return text_table(("device", "total", "free", "measured"), self._rows())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return html_table(("device", "total", "free", "measured"), self._rows())


def devices() -> Devices:
    """The devices of this machine: their memory, and what their links were measured to carry.

    Returns:
        A dict that prints as a table: name -> `total_bytes`, `free_bytes`, and `links` (compute
        device -> bytes per second; empty before `calibrate`).
    """
    known = known_links()
    measured = known.links if known is not None else ()
    return Devices(
        (name, dataclasses.replace(
            device, links={link.compute: link.rate for link in measured if link.donor == name}
        ))
        for name, device in machine.devices().items()
    )  # fmt: skip


def calibrate(*, progress: Progress = None) -> Calibration:
    """Measures every link of this machine: alone, together, and back. Takes seconds.

    It also measures how fast each device computes. The result is remembered for this process, and
    in the user's cache folder if that can be written to. It decides how stripes are cut, and
    `predict` goes by it.

    Args:
        progress: As in `distribute`. A function is called with the number of links that are done.

    Returns:
        A `Calibration`.

    Raises:
        SpecError: `progress` is none of these.
    """
    check_progress(progress)
    places = machine.devices()
    computes = [name for name in places if name not in ("cpu", "disk")] or ["cpu"]
    pairs = [(d, c) for c in computes for d in places if d not in (c, _unmeasured(c))]
    links = []
    with progress_of(progress, len(pairs), "measuring", "links") as done:
        for donor, compute in pairs:
            links.append(_measure(donor, compute))
            done(1)
    speeds = tuple(_speed(compute) for compute in computes)
    found = _remember(Calibration(tuple(_with_others(links)), speeds))
    if not any(is_simulated(compute) for compute in computes):
        with suppress(OSError):  # there is no home folder, or it cannot be written to
            _native.made_cache_folder()
            content = {"version": _CACHE_VERSION, **found.to_dict()}
            write_atomically(_cache_file(), json.dumps(content, indent=1), private=True)
    return found


def _unmeasured(compute: str) -> str:
    # A dry run reads nothing.
    return "" if machine.needs_values(torch.device(compute)) else "disk"


class _Clock:
    """Seconds on a device: by its events, or by the host where the host computes."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[Any] = []

    def mark(self) -> None:
        if self._device.type == "cpu":
            self._marks.append(time.perf_counter())
            return
        event = torch.Event(self._device, enable_timing=True)
        event.record(torch.accelerator.current_stream(self._device))
        self._marks.append(event)

    def seconds(self) -> float:
        start, end = self._marks
        if self._device.type == "cpu":
            return float(end - start)
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3


def _fetch_seconds(nbytes: int, tier: str, compute: torch.device) -> float:
    """The best of a few fetches of so many bytes. Each is of a new weight, since the ring of a
    model that is there may keep one. A file that was just written is read once before: the first
    read waits until the bytes are on the disk.
    """
    times = []
    place = "cpu" if machine.needs_values(compute) else "meta"
    for _ in range(1 + _REPEATS):
        data = torch.empty(nbytes, dtype=torch.uint8, device=place)
        weight = _donors.shard_on(tier, data, compute, "calibration")
        if tier == "disk":
            _ops.read_donor(weight, 0, torch.empty(nbytes, dtype=torch.uint8))
        times.append(_seconds_of(lambda weight=weight: weight[:1].clone(), compute))  # type: ignore[misc]
    return min(times[1:])  # the first one warms up


def _measure(donor: str, compute: str) -> Link:
    device = torch.device(compute)
    small, large = (_fetch_seconds(nbytes, donor, device) for nbytes in (_SMALL, _LARGE))
    rate = (_LARGE - _SMALL) / max(large - small, 1e-9)
    each = small if donor == "disk" else _small_copy_seconds(donor, device)
    return Link(donor, compute, rate, max(0.0, each - _SMALL / rate), rate, _back(donor, device))


def _small_copy_seconds(donor: str, compute: torch.device) -> float:
    """Of one small copy among several that follow each other on one stream."""
    if donor == "cpu":
        source = _ops.pinned_memory(_SMALL, compute)
    else:
        source = torch.empty(_SMALL, dtype=torch.uint8, device=donor)
    target = torch.empty(_SMALL, dtype=torch.uint8, device=compute)

    def copies() -> None:
        for _ in range(_IN_A_ROW):
            target.copy_(source, non_blocking=True)

    return _best_seconds(copies, compute) / _IN_A_ROW


def _speed(compute: str) -> Speed:
    """What a device does in a second, from large copies and products of matrices."""
    device = torch.device(compute)
    source = torch.zeros(_LARGE, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def copies(count: int) -> float:
        return _best_seconds(lambda: [target.copy_(source) for _ in range(count)], device)

    # The smaller work is taken off each time: both wait alike for the host to issue them. Noise may
    # make the rest too small, but not smaller than half of the whole.
    def flops(sides: tuple[int, int], dtype: torch.dtype) -> float:
        small, large = (
            _best_seconds(lambda square=square: square @ square, device)  # type: ignore[misc]
            for square in (torch.zeros(side, side, dtype=dtype, device=device) for side in sides)
        )
        return 2 * (sides[1] ** 3 - sides[0] ** 3) / max(large - small, large / 2)

    four = copies(4)
    memory = 2 * 3 * _LARGE / max(four - copies(1), four / 2)
    single = half = flops(_SIDES, torch.float32)
    if not is_simulated(compute):  # which computes in all dtypes alike (csrc/sim/call.cpp)
        sides = _HALF_SIDES_ON_HOST if compute == "cpu" else _HALF_SIDES
        half = flops(sides, torch.bfloat16)
    speeds = memory, single, half
    if compute == "cpu":
        return Speed(compute, *speeds, issue=0.0, event=0.0)
    one = torch.zeros(1, dtype=torch.float32, device=device)
    event = torch.Event(device, enable_timing=True)
    stream = torch.accelerator.current_stream(device)

    def operators() -> None:
        for _ in range(_TINY):
            one.add_(1)

    def events() -> None:
        for _ in range(_TINY):
            event.record(stream)

    issue, record = (_best_seconds(work, device) / _TINY for work in (operators, events))
    return Speed(compute, *speeds, issue=issue, event=record)


def _best_seconds(work: Callable[[], object], device: torch.device) -> float:
    """The best of a few runs, after one to warm up. Each begins when the one before has ended."""
    return min([_seconds_of(work, device) for _ in range(1 + _REPEATS)][1:])


def _seconds_of(work: Callable[[], object], device: torch.device) -> float:
    clock = _Clock(device)
    clock.mark()
    work()
    clock.mark()
    return clock.seconds()


def measure_disk() -> float:
    """Bytes per second of one weight that is read from the folder of donor files into RAM."""
    return _measure("disk", "cpu").rate


def _back(donor: str, compute: torch.device) -> float | None:
    """Bytes per second from the compute device to a donor in memory."""
    if donor == "disk" or compute.type == "cpu":
        return None
    source = torch.empty(_LARGE, dtype=torch.uint8, device=compute)
    if donor == "cpu":
        target = _ops.pinned_memory(_LARGE, compute)
    else:
        target = torch.empty(_LARGE, dtype=torch.uint8, device=donor)
    return _LARGE / _best_seconds(lambda: target.copy_(source, non_blocking=True), compute)


def _with_others(links: list[Link]) -> list[Link]:
    """The rate of each link while all to the same device are busy: one weight striped over them."""
    result = []
    for link in links:
        peers = [k for k in links if k.compute == link.compute and k.donor != "disk"]
        if len(peers) < 2 or link not in peers:
            result.append(link)
            continue
        # Cut so that all would end together if they did not disturb each other.
        _donors.link_rates.update({(k.donor, k.compute): k.rate for k in peers})
        donors = [k.donor for k in peers]
        device = torch.device(link.compute)
        seconds = _fetch_seconds(_LARGE, "+".join(donors), device)
        own = _donors.stripe_sizes(_LARGE, donors, link.compute)[donors.index(link.donor)]
        together = min(link.rate, own / max(seconds - link.latency, 1e-9))
        result.append(dataclasses.replace(link, together=together))
    return result
