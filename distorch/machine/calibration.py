# SPDX-License-Identifier: Apache-2.0
"""What the links and devices of a machine do in a second: as data, wherever it comes from."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from distorch.display.tables import html_table, text_table

_SLOWEST, _FASTEST = 1e3, 1e15  # bytes per second: no link has less or more
_HEADER = ("from", "to", "GB/s", "latency us", "GB/s with all others", "GB/s back")
_SPEED_HEADER = (
    "device", "GB/s in its memory", "TFLOP/s (float32)", "TFLOP/s (bfloat16)",
    "us to issue an operator",
)  # fmt: skip


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
class Speed:
    """How fast a device computes: bytes per second that it reads and writes in its own memory,
    operations per second in the product of two float32 matrices (`flops`) and of two bfloat16 ones
    (`half_flops`), and seconds that the host needs to issue it an operator and to record an event.
    """

    device: str
    memory: float
    flops: float
    half_flops: float
    issue: float
    event: float


def figures_of(speed: Speed) -> tuple[float, float, float]:
    """What decides how long an operator takes there."""
    return speed.memory, speed.flops, speed.half_flops


@dataclass(frozen=True)
class Calibration:
    """What was measured of every link and compute device of this machine. It prints as a table."""

    links: tuple[Link, ...]
    speeds: tuple[Speed, ...] = ()

    def rate(self, donor: str, compute: str) -> float | None:
        """Bytes per second from a donor to a compute device, if that was measured."""
        found = (k.rate for k in self.links if (k.donor, k.compute) == (donor, compute))
        return next(found, None)

    def speed(self, device: str) -> Speed | None:
        """What a compute device does in a second, if that was measured."""
        return next((speed for speed in self.speeds if speed.device == device), None)

    def to_dict(self) -> dict[str, Any]:
        """The links and devices as JSON types."""
        return {
            "links": [dataclasses.asdict(link) for link in self.links],
            "speeds": [dataclasses.asdict(speed) for speed in self.speeds],
        }

    def _rows(self) -> list[tuple[str, ...]]:
        return [
            (k.donor, k.compute, f"{k.rate / 1e9:.2f}", f"{k.latency * 1e6:.0f}",
             f"{k.together / 1e9:.2f}", "" if k.back is None else f"{k.back / 1e9:.2f}")
            for k in self.links
        ]  # fmt: skip

    def _speed_rows(self) -> list[tuple[str, ...]]:
        return [
            (k.device, f"{k.memory / 1e9:.1f}", f"{k.flops / 1e12:.3g}",
             f"{k.half_flops / 1e12:.3g}", f"{k.issue * 1e6:.2f}")
            for k in self.speeds
        ]  # fmt: skip

    def __str__(self) -> str:
        return "\n".join(
            (
                text_table(_HEADER, self._rows(), "measured links"),
                text_table(_SPEED_HEADER, self._speed_rows(), "measured devices"),
            )
        )

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return html_table(_HEADER, self._rows(), "measured links") + html_table(
            _SPEED_HEADER, self._speed_rows(), "measured devices"
        )


def believed(stored: Any) -> Calibration:
    """What `to_dict` wrote. ValueError, KeyError or TypeError if it can be none."""
    links = tuple(Link(**link) for link in stored["links"])
    for link in links:
        rates = [link.rate, link.together, *([] if link.back is None else [link.back])]
        named = isinstance(link.donor, str) and isinstance(link.compute, str)
        if not named or not all(_is_amount(r) and _SLOWEST <= r <= _FASTEST for r in rates):
            raise ValueError("a link that nobody measured")
        if not _is_amount(link.latency):
            raise ValueError("a latency that nobody measured")
    speeds = tuple(Speed(**speed) for speed in stored["speeds"])
    for speed in speeds:
        fast = (speed.memory, speed.flops, speed.half_flops)
        slow = (speed.issue, speed.event)
        known = all(_is_amount(value) for value in (*fast, *slow)) and all(fast)
        if not isinstance(speed.device, str) or not known:
            raise ValueError("a speed that nobody measured")
    return Calibration(links, speeds)


def _is_amount(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value) and value >= 0
