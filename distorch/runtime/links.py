# SPDX-License-Identifier: Apache-2.0
"""Links between donors and compute devices: what they carry, measured once and remembered."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import platform
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from distorch import _donors, _native, _ops
from distorch._small_files import is_own, read_json, write_atomically
from distorch.display.progress import Progress, check_progress, progress_of
from distorch.display.tables import html_table, human_bytes, text_table
from distorch.planner import DeviceInfo
from distorch.runtime import machine

_SLOWEST, _FASTEST = 1e3, 1e15  # bytes per second: no link has less or more
_SMALL, _LARGE = 256 << 10, 64 << 20  # bytes of the two fetches that give latency and rate
_REPEATS = 3
_CACHE_VERSION = 1  # of what the cache file says; a file of another one is not believed
_HEADER = ("from", "to", "GB/s", "latency us", "GB/s with all others", "GB/s back")


@dataclass(frozen=True)
class Link:
    """What a link carries: bytes per second alone, while all other links to the same device are
    busy, and in the other direction (None where weights cannot go back); latency in seconds.
    """

    donor: str
    compute: str
    rate: float
    latency: float
    together: float
    back: float | None


@dataclass(frozen=True)
class Calibration:
    """What was measured of every link of this machine. It prints as a table."""

    links: tuple[Link, ...]

    def rate(self, donor: str, compute: str) -> float | None:
        """Bytes per second from a donor to a compute device, if that was measured."""
        found = (k.rate for k in self.links if (k.donor, k.compute) == (donor, compute))
        return next(found, None)

    def to_dict(self) -> dict[str, Any]:
        """The links as JSON types."""
        return {"links": [dataclasses.asdict(link) for link in self.links]}

    def _rows(self) -> list[tuple[str, ...]]:
        return [
            (k.donor, k.compute, f"{k.rate / 1e9:.2f}", f"{k.latency * 1e6:.0f}",
             f"{k.together / 1e9:.2f}", "" if k.back is None else f"{k.back / 1e9:.2f}")
            for k in self.links
        ]  # fmt: skip

    def __str__(self) -> str:
        return text_table(_HEADER, self._rows(), "measured links")

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return html_table(_HEADER, self._rows(), "measured links")


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


def _is_simulated(device: str) -> bool:
    return device.partition(":")[0] == torch._C._get_privateuse1_backend_name()


def known_links() -> Calibration | None:
    """What `calibrate` measured on this machine, in this process or an earlier one."""
    key = _machine_key()
    if key in _known:
        return _known[key]
    try:
        file = _cache_file()
        if not is_own(file):
            return None
        return _remember(_believed(read_json(file)))
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return None  # `calibrate` writes it anew


def _believed(stored: Any) -> Calibration:
    """A calibration from the cache. ValueError, KeyError or TypeError if it can be none."""
    if stored["version"] != _CACHE_VERSION:
        raise ValueError("of another version")
    links = tuple(Link(**link) for link in stored["links"])
    for link in links:
        rates = [link.rate, link.together, *([] if link.back is None else [link.back])]
        named = isinstance(link.donor, str) and isinstance(link.compute, str)
        if not named or not all(_is_amount(r) and _SLOWEST <= r <= _FASTEST for r in rates):
            raise ValueError("a link that nobody measured")
        if not _is_amount(link.latency):
            raise ValueError("a latency that nobody measured")
    return Calibration(links)


def _is_amount(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value) and value >= 0


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

    The result is remembered for this process, and in the user's cache folder if that can be written
    to. It decides how stripes are cut.

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
    found = _remember(Calibration(tuple(_with_others(links))))
    if not any(_is_simulated(compute) for compute in computes):
        with suppress(OSError):  # there is no home folder, or it cannot be written to
            _native.made_cache_folder()
            content = {"version": _CACHE_VERSION, **found.to_dict()}
            write_atomically(_cache_file(), json.dumps(content, indent=1), private=True)
    return found


def _unmeasured(compute: str) -> str:
    # A real disk has no speed in virtual time.
    return "disk" if _is_simulated(compute) else ""


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


def _fetch_seconds(sharded: torch.Tensor, device: torch.device) -> float:
    """The best of a few fetches of a weight that no ring keeps."""
    times = []
    for _ in range(_REPEATS):
        clock = _Clock(device)
        clock.mark()
        sharded[:1].clone()
        clock.mark()
        times.append(clock.seconds())
    return min(times)


def _weight(nbytes: int, tier: str, compute: torch.device) -> torch.Tensor:
    return _donors.shard_on(tier, torch.empty(nbytes, dtype=torch.uint8), compute, "calibration")


def _measure(donor: str, compute: str) -> Link:
    device = torch.device(compute)
    small = _fetch_seconds(_weight(_SMALL, donor, device), device)
    large = _fetch_seconds(_weight(_LARGE, donor, device), device)
    rate = (_LARGE - _SMALL) / max(large - small, 1e-9)
    latency = max(0.0, small - _SMALL / rate)
    return Link(donor, compute, rate, latency, rate, _back(donor, device))


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
    times = []
    for _ in range(_REPEATS):
        clock = _Clock(compute)
        clock.mark()
        target.copy_(source, non_blocking=True)
        clock.mark()
        times.append(clock.seconds())
    return _LARGE / min(times)


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
        seconds = _fetch_seconds(_weight(_LARGE, "+".join(donors), device), device)
        own = _donors.stripe_sizes(_LARGE, donors, link.compute)[donors.index(link.donor)]
        together = min(link.rate, own / max(seconds - link.latency, 1e-9))
        result.append(dataclasses.replace(link, together=together))
    return result
