# SPDX-License-Identifier: Apache-2.0
"""Machines by name or from a file: for plans and predictions of what is not at hand."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distorch._small_files import read_json, write_atomically
from distorch.display.tables import html_table, human_bytes, text_table
from distorch.errors import FormatError, SpecError
from distorch.machine import machine, parts
from distorch.machine.calibration import Calibration, Link, Speed, believed
from distorch.machine.links import measured_links
from distorch.machine.rates import READ_PART, READERS
from distorch.machine.supposed import Supposed

_WRITER, _VERSION = "distorch machine", 1
_GPU = re.compile(r"(?:([2-8])x)?(\w+)")
_PCIE = re.compile(r"pcie(\d+)x(\d+)")
_RAM = re.compile(r"(\d{1,5})gb")
_HEADER = ("device", "memory")


@dataclass(frozen=True, repr=False)
class Machine(Supposed):
    """A machine as numbers, which need not be at hand. It prints as tables.

    Attributes:
        name: For messages.
        devices: Name ("cuda:0", "cpu", "disk") -> all its bytes. Of a GPU a plan leaves 1 GiB to
            others, and 4 GiB of the RAM.
        calibration: What its links and devices do in a second, as `calibrate` would measure it.
    """

    @classmethod
    def named(cls, name: str) -> Machine:
        """A machine of usual parts, from data sheets: "rtx3090-pcie4x16-64gb".

        The parts are a GPU ("2xrtx3090": two of them), the PCIe link of each ("pcie4x16":
        generation 4, 16 lanes), and the RAM. A disk ("nvme4", "sata") and "nvlink" between the GPUs
        may follow.

        Raises:
            SpecError: There is no such part. The message lists those that are known.
        """
        if not isinstance(name, str):
            raise SpecError(f"machine={name!r}: expected a name, such as 'rtx3090-pcie4x16-64gb'")
        found = _parts_of(name)
        return cls(name.lower(), *_assembled(found))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Machine:
        """Reads what `save` wrote.

        Raises:
            FormatError: The file is not there, damaged, or something else.
        """
        try:
            told = read_json(path)
        except (OSError, ValueError) as error:
            raise FormatError(f"cannot read the machine {str(path)!r}: {error}") from error
        found = told if isinstance(told, dict) else {}
        if (found.get("writer"), found.get("version")) != (_WRITER, _VERSION):
            raise FormatError(
                f"{str(path)!r}: expected a machine that Machine.save wrote (version {_VERSION}), "
                "found something else"
            )
        try:
            devices = {str(place): _bytes(place, n) for place, n in found["devices"].items()}
            return cls(str(found["name"]), devices, believed(found))
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
            raise FormatError(
                f"the machine {str(path)!r} is damaged: {type(error).__name__}: {error}"
            ) from error

    @classmethod
    def here(cls) -> Machine:
        """This machine, as `calibrate` measured it: to be saved, and planned for elsewhere.

        Raises:
            PlacementError: It was not measured.
        """
        devices = {name: device.total_bytes for name, device in machine.devices().items()}
        return cls("this machine", devices, measured_links())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the machine as JSON, atomically.

        Raises:
            OSError: The file cannot be written. An older one is unchanged.
        """
        write_atomically(Path(path), json.dumps(self.to_dict(), indent=1) + "\n")

    def to_dict(self) -> dict[str, Any]:
        """The machine as JSON types."""
        return {
            "writer": _WRITER, "version": _VERSION, "name": self.name,
            "devices": dict(self.devices), **self.calibration.to_dict(),
        }  # fmt: skip

    def _rows(self) -> list[tuple[str, str]]:
        return [(name, human_bytes(total)) for name, total in self.devices.items()]

    def __str__(self) -> str:
        return f"{text_table(_HEADER, self._rows(), self.name)}\n{self.calibration}"

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return html_table(_HEADER, self._rows(), self.name) + self.calibration._repr_html_()


def machine_of(given: Machine | str | os.PathLike[str] | None) -> Machine | None:
    """From what a user gives: a machine, its name, or the path of its file. SpecError, FormatError.

    None is this machine.
    """
    if given is None or isinstance(given, Machine):
        return given
    if isinstance(given, os.PathLike) or (isinstance(given, str) and given.endswith(".json")):
        return Machine.load(given)
    return Machine.named(given)


def _bytes(place: object, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= 1 << 60:
        raise ValueError(f"{value!r} bytes of {place!r}")
    return value


@dataclass(frozen=True)
class _Parts:
    """What a name says."""

    gpu: parts.Gpu
    gpus: int
    link: float  # bytes per second of a GPU's PCIe link
    ram: int
    disk: parts.Disk | None
    nvlink: bool


def _parts_of(name: str) -> _Parts:
    first, *others = name.lower().split("-")
    gpu = _GPU.fullmatch(first)
    if gpu is None or gpu[2] not in parts.GPUS:
        raise _unknown(name, first, "a GPU", parts.GPUS)
    link, ram, disk, nvlink = list[float](), list[int](), list[parts.Disk](), False
    for part in others:
        if found := _PCIE.fullmatch(part):
            link.append(_link_rate(name, part, int(found[1]), int(found[2])))
        elif found := _RAM.fullmatch(part):
            ram.append(int(found[1]) << 30)
        elif part in parts.DISKS:
            disk.append(parts.DISKS[part])
        elif part == "nvlink" and _has_nvlink(parts.GPUS[gpu[2]], int(gpu[1] or 1)):
            nvlink = True
        else:
            others_known = ["pcie3x16", "pcie4x8", "64gb", *parts.DISKS]
            linked = [known for known, its in parts.GPUS.items() if its.nvlink]
            raise _unknown(
                name,
                part,
                "a part of it",
                [*others_known, f"nvlink (between two or more of {', '.join(linked)})"],
            )
    if len(link) != 1 or len(ram) != 1 or len(disk) > 1 or not ram[0]:
        raise SpecError(
            f"machine={name!r}: expected a GPU, its link and the RAM, each once, and at most one "
            "disk, such as 'rtx3090-pcie4x16-64gb-nvme4'"
        )
    return _Parts(
        parts.GPUS[gpu[2]], int(gpu[1] or 1), link[0], ram[0], disk[0] if disk else None, nvlink
    )


def _has_nvlink(gpu: parts.Gpu, count: int) -> bool:
    """Boards that go into a PCIe slot link two of them at most."""
    return gpu.nvlink > 0 and 2 <= count <= (8 if gpu.nvlink > parts.BRIDGE else 2)


def _link_rate(name: str, part: str, generation: int, lanes: int) -> float:
    if generation not in parts.PCIE_LANE or lanes not in parts.PCIE_LANES:
        generations = ", ".join(map(str, parts.PCIE_LANE))
        raise SpecError(
            f"machine={name!r}: there is no {part!r}; expected pcieGxN with a generation G of "
            f"{generations} and {', '.join(map(str, parts.PCIE_LANES))} lanes"
        )
    return parts.PCIE_LANE[generation] * lanes * parts.LINK_SHARE


def _unknown(name: str, part: str, what: str, known: Iterable[str]) -> SpecError:
    return SpecError(
        f"machine={name!r}: {part!r} is not known as {what}; expected a name such as "
        f"'rtx3090-pcie4x16-64gb' or a file that ends in .json. Known: {', '.join(known)}"
    )


def _assembled(found: _Parts) -> tuple[dict[str, int], Calibration]:
    """The devices, and what they do in a second.

    All that comes to a GPU over its PCIe link shares that link, also what another GPU sends. A disk
    is read into RAM first.
    """
    gpus = [f"cuda:{index}" for index in range(found.gpus)]
    devices = dict.fromkeys(gpus, found.gpu.memory) | {"cpu": found.ram}
    if found.disk is not None:
        devices["disk"] = found.disk.size
    links = []
    over_pcie = 1 if found.nvlink else found.gpus
    for gpu in gpus:
        for donor in ["cpu", *(other for other in gpus if other != gpu)]:
            if found.nvlink and donor != "cpu":
                rate = together = found.gpu.nvlink * parts.MEMORY_SHARE
            else:
                rate, together = found.link, found.link / over_pcie
            links.append(Link(donor, gpu, rate, parts.LINK_LATENCY, together, rate))
        if found.disk is not None:
            links.append(_from_disk(found.disk, gpu, found.link))
    known = found.gpu
    speeds = [
        Speed(
            name, known.bandwidth * parts.MEMORY_SHARE, known.flops * parts.ARITHMETIC_SHARE,
            known.half_flops * parts.ARITHMETIC_SHARE, parts.ISSUE, parts.EVENT,
        )
        for name in gpus
    ]  # fmt: skip
    return devices, Calibration(tuple(links), tuple(speeds))


def _from_disk(disk: parts.Disk, gpu: str, up: float) -> Link:
    """As it would be measured, from the file to the GPU: see Rates.disk_for."""
    seconds = 1 / (disk.rate * parts.DISK_SHARE) + 1 / up + disk.latency / READ_PART / READERS
    latency = disk.latency + parts.LINK_LATENCY
    return Link("disk", gpu, 1 / seconds, latency, 1 / seconds, None)
