# SPDX-License-Identifier: Apache-2.0
"""What a planner knows: weights and devices as numbers."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal


@dataclass(frozen=True)
class WeightInfo:
    """One weight: all names of one piece of memory.

    `nbytes` in bytes, `shape` in elements, `dtype` a torch dtype's name. `floating` is true for
    floating and quantised dtypes, the ones that may leave the compute device. `aliases` are the
    other names of tied weights. `in_file`: its bytes lie in the model's own file, so that
    on a disk it takes no more room.
    """

    name: str
    nbytes: int
    shape: tuple[int, ...]
    dtype: str
    kind: Literal["parameter", "buffer"] = "parameter"
    floating: bool = True
    aliases: tuple[str, ...] = ()
    in_file: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """All names, the first one first."""
        return (self.name, *self.aliases)


@dataclass(frozen=True)
class Inventory:
    """The weights of a model in the order of its definition (which stands for execution)."""

    weights: tuple[WeightInfo, ...]

    @property
    def total_bytes(self) -> int:
        """Bytes of all weights, tied ones once."""
        return sum(weight.nbytes for weight in self.weights)

    def in_files(self, names: Collection[str]) -> Inventory:
        """The same, where the bytes of these weights lie in the model's own files."""
        return Inventory(tuple(replace(w, in_file=w.name in names) for w in self.weights))


@dataclass(frozen=True)
class DeviceInfo:
    """A device or tier and its memory, in bytes; `links`: bytes per second that it was measured
    to send to each compute device.
    """

    name: str
    total_bytes: int
    free_bytes: int
    links: Mapping[str, float] = field(default_factory=dict)


class DevicesElsewhere(dict[str, DeviceInfo]):
    """Devices of another machine than this one; `machine` is its name."""

    def __init__(self, machine: str, known: Mapping[str, DeviceInfo]) -> None:
        super().__init__(known)
        self.machine = machine
