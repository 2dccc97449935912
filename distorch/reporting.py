# SPDX-License-Identifier: Apache-2.0
"""What is where, measured on the tensors themselves and held against the plan; and what moved."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from distorch import _native
from distorch.display.picture import Picture
from distorch.display.placements import part_bars, part_of
from distorch.display.tables import html_table, human_bytes, paragraphs, text_table
from distorch.planner import Plan
from distorch.runtime.changes import alone
from distorch.runtime.distribution import distribution_of
from distorch.runtime.groups import byte_extent, group_members, parts_of, unique_buffers
from distorch.runtime.staging import current_place
from distorch.runtime.wrapped import is_wrapper, stays


@dataclass(frozen=True)
class Report:
    """Where the bytes of a module are, measured on its tensors. It prints as a table.

    Attributes:
        compute: The device that runs the model.
        bytes: Device -> bytes that were found there.
        planned: Device -> bytes that the plan has there.
        placement: Name of a weight -> device.
        layers: Top-level part -> device -> bytes.
        plan: The plan that is in force.
        problems: Where what was found differs from the plan.
        loras: A dict for each LoRA: `lora` its name, `strength`, `weights` the number of weights
            that it changes, `unmatched` its keys that fit nothing, `for other models` the number of
            its keys for other parts of a pipeline. If it makes layers wider, `wider` has their
            weights, each with its own number of columns and the present one.
        merging: How many weights are still to be merged in the background.
        merge_error: What ended the merging.
        ring: Bytes of look-ahead on the compute device, beyond its share.
        floor: Bytes of its share that cannot leave it.
        spec: The placement that was asked for.
    """

    compute: str
    bytes: dict[str, int]
    planned: dict[str, int]
    placement: dict[str, str]
    layers: dict[str, dict[str, int]]
    plan: Plan = field(repr=False)
    problems: list[str] = field(default_factory=list)
    loras: list[dict[str, Any]] = field(default_factory=list)
    merging: int = 0
    merge_error: str = ""
    ring: int = 0
    floor: int = 0
    spec: str = ""

    @property
    def ok(self) -> bool:
        """Whether everything is where the plan says, and takes no more than it says."""
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON types."""
        told = {name: value for name, value in self.__dict__.items() if name != "plan"}
        return {**told, "ok": self.ok}

    def explain(self, name: str) -> str:
        """Says in a sentence why a weight lies where it lies, as `Plan.explain`.

        Raises:
            SpecError: The plan has no weight of that name.
        """
        return self.plan.explain(name)

    def _devices(self) -> list[str]:
        return list(dict.fromkeys([self.compute, *self.planned, *self.bytes]))

    def _rows(self) -> list[tuple[str, ...]]:
        total = max(sum(self.bytes.values()), 1)
        rows: list[tuple[str, ...]] = []
        for device in self._devices():
            measured, wanted = self.bytes.get(device, 0), self.planned.get(device, 0)
            role = " (compute)" if device == self.compute else ""
            rows.append(
                (
                    device + role,
                    str(measured),
                    str(wanted),
                    human_bytes(measured),
                    f"{100 * measured / total:.1f}%",
                )
            )
        return rows

    def _title(self) -> str:
        return f"measured placement: {verdict(self.problems)}"

    def _layer_rows(self) -> list[tuple[str, ...]]:
        devices = self._devices()
        return [
            (layer, *(human_bytes(held[d]) if held.get(d) else "" for d in devices))
            for layer, held in self.layers.items()
        ]

    def __str__(self) -> str:
        parts = [
            text_table(_HEADER, self._rows(), self._title()),
            "",
            text_table(("part", *self._devices()), self._layer_rows()),
            *self._notes(),
        ]
        return "\n".join(parts)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        parts = html_table(("part", *self._devices()), self._layer_rows())
        return (
            html_table(_HEADER, self._rows(), self._title())
            + self.plot().svg()
            + paragraphs(self._notes())  # web pages that show no SVG show these
            + f"<details><summary>each part in bytes</summary>{parts}</details>"
        )

    def _notes(self) -> list[str]:
        return [*self._facts(), *first_of(self.problems)]

    def _facts(self) -> list[str]:
        lines = []
        if self.floor and (len(self.bytes) > 1 or ";" in self.spec):
            lines.append(
                f"{human_bytes(self.floor)} cannot leave {self.compute} (buffers, what is kept, "
                "tensors below min_bytes)"
            )
        if self.ring:
            lines.append(self._look_ahead())
        lines += _lora_lines(self.loras)
        if self.merge_error:
            lines.append(
                f"merging ended with {self.merging} weights left, which are patched when fetched: "
                f"{self.merge_error}"
            )
        elif self.merging:
            lines.append(
                f"{self.merging} weights are being merged; until then they are patched when fetched"
            )
        return lines

    def _look_ahead(self) -> str:
        said = f"look-ahead: up to {human_bytes(self.ring)} more on {self.compute} (prefetch)"
        travelling = sum(self.bytes.values()) - self.bytes.get(self.compute, 0)
        if 0 < travelling <= self.ring:
            said += ". All that travels fits in, so it is fetched once and stays there"
        return said

    def plot(
        self, path: str | os.PathLike[str] | None = None, *, notes: Sequence[str] = ()
    ) -> Picture:
        """A bar for each part, coloured by device; below, LoRAs and problems in words.

        With a `path` it is also saved there, with the errors of `Picture.save`. `notes` are more
        lines below.
        """
        held = {device: self.bytes.get(device, 0) for device in self._devices()}
        made = part_bars(
            f"{self.spec}   ({self._title()})", self.layers, held, {self.compute},
            notes=[*notes, *self._facts()], problems=first_of(self.problems),
        )  # fmt: skip
        return made if path is None else made.saved(path)


def verdict(problems: list[str]) -> str:
    """What a report says first."""
    count = len(problems)
    return "as planned" if not count else f"{count} problem{'s' * (count > 1)}"


def first_of(problems: list[str]) -> list[str]:
    """As many problems as somebody reads, and how many there are beside them."""
    more = len(problems) - _SHOWN
    return problems if more <= 0 else [*problems[:_SHOWN], f"and {more} more problems"]


def _lora_lines(loras: list[dict[str, Any]]) -> list[str]:
    return [
        f"LoRA {row['lora']} x {row['strength']:g}: {row['weights']} weights"
        + (f", {len(row['unmatched'])} keys that fit nothing" if row["unmatched"] else "")
        + "".join(
            f", {name} has {columns} columns in place of {own}"
            for name, (own, columns) in row.get("wider", {}).items()
        )
        for row in loras
    ]


_SHOWN = 8
_HEADER = ("device", "bytes", "planned", "size", "share")


def report(module: nn.Module) -> Report:
    """Walks a module's tensors and says where their bytes are now.

    While another thread changes the module, this waits. (`stats` does not.)

    Returns:
        A `Report`.

    Raises:
        PlacementError: The module is not distributed.
    """
    distribution_of(module)  # the usual mistake, before it waits for anything
    with alone(module, nested=True):
        return _report(module)


def _report(module: nn.Module) -> Report:
    state = distribution_of(module)
    plan = state.plan
    measured: dict[str, int] = {plan.compute: 0}
    placement: dict[str, str] = {}
    layers: dict[str, dict[str, int]] = {}

    def count(names: list[str], tensor: torch.Tensor, nbytes: int) -> None:
        part = layers.setdefault(part_of(names[0]), {})
        home, *elsewhere = held = _held(tensor, nbytes)
        for device, there in held.items():
            measured[device] = measured.get(device, 0) + there
            part[device] = part.get(device, 0) + there
        placement.update(dict.fromkeys(names, home))
        problems.extend(f"{names[0]}: parts of it are on {device}" for device in elsewhere)

    problems: list[str] = []
    sizes: dict[str, int] = {}
    merging = state.merging
    pending = set(merging.left) if merging is not None else set()
    for names, tensor, nbytes in _tensors(module):
        count(names, tensor, nbytes)
        sizes[names[0]] = nbytes
    problems += [
        f"{name}: planned on {plan.placement[name]}, found on {device}"
        for name, device in placement.items()
        if name in plan.placement and plan.placement[name] != device and name not in pending
    ]
    problems += [
        f"{name}: planned {plan.sizes[name]} bytes, found {nbytes} (converted since?); "
        "distorch.redistribute plans anew"
        for name, nbytes in sizes.items()
        if nbytes > plan.sizes.get(name, nbytes)
    ]
    if over := plan.over_budget(measured[plan.compute]):
        problems.append(over)
    problems += [f"{name}: not in the plan" for name in placement if name not in plan.placement]
    problems += [f"{name}: in the plan, gone" for name in plan.placement if name not in placement]
    loras = state.patching.rows() if state.patching is not None else []
    error = str(merging.error) if merging is not None and merging.error is not None else ""
    return Report(
        plan.compute, measured, plan.bytes, placement, layers, plan, problems, loras, len(pending),
        error, state.ring_bytes, plan.floor, plan.spec,
    )  # fmt: skip


def bytes_of(module: nn.Module) -> dict[str, int]:
    """Device -> bytes of any module's tensors, as they lie now; tied ones once."""
    found: dict[str, int] = {}
    for _, tensor, nbytes in _tensors(module):
        for device, there in _held(tensor, nbytes).items():
            found[device] = found.get(device, 0) + there
    return found


def _tensors(module: nn.Module) -> Iterator[tuple[list[str], torch.Tensor, int]]:
    """(names, tensor, bytes) of every parameter and buffer, each piece of memory once."""
    for group in group_members(module):
        yield [member.name for member in group.members], group.first, group.nbytes
    for buffer in unique_buffers(module):
        begin, end = byte_extent(buffer.tensor)
        yield [buffer.name], buffer.tensor, end - begin


def _held(tensor: torch.Tensor, nbytes: int) -> dict[str, int]:
    """place -> bytes of a tensor, its own place first; others are of parts that strayed."""
    home = current_place(tensor)
    held = {home: nbytes}
    for part in parts_of(tensor) if is_wrapper(tensor) else ():
        place = current_place(part)
        if place != home and not stays(part):
            size = part.numel() * part.element_size()
            held[home] -= size
            held[place] = held.get(place, 0) + size
    return held


@dataclass(frozen=True)
class Stats:
    """What operators asked of the donors since `reset_stats`. It prints as a table.

    Attributes:
        fetches: How often a sharded weight was made real for an operator.
        hits: How many of these found it in the ring, there or on its way.
        stall_seconds: How long operators waited, by the clock of their device. Asking waits for the
            device, unless `wait` is False.
        overflows: Fetches for which the ring had no room.
        bytes: Link, such as "cpu->cuda:0" -> bytes that travelled.
    """

    fetches: int
    hits: int
    stall_seconds: float
    overflows: int
    bytes: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        """The numbers as JSON types."""
        return dict(self.__dict__)

    def _rows(self) -> list[tuple[str, str]]:
        return [
            ("fetches", str(self.fetches)),
            ("found ready", str(self.hits)),
            ("stall", f"{self.stall_seconds:.3f} s"),
            ("no room in the ring", str(self.overflows)),
            *((link, human_bytes(nbytes)) for link, nbytes in self.bytes.items()),
        ]

    def __str__(self) -> str:
        return text_table(("since reset_stats", "value"), self._rows())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return html_table(("since reset_stats", "value"), self._rows())


def stats(module: nn.Module, *, wait: bool = True) -> Stats:
    """Says what the module's weights travelled since `reset_stats`, or since it was placed.

    Args:
        module: A distributed module.
        wait: For the devices, so that every stall is counted. Without it only stalls whose end is
            known are: so another thread may watch a model while it runs, and not slow it down.

    Returns:
        `Stats`.

    Raises:
        PlacementError: The module is not distributed.
    """
    state = distribution_of(module)
    fetches, hits, stall, overflows, travelled = _native.read_counters(state.counters, wait)
    links = {f"{tier}->{state.plan.compute}": nbytes for tier, nbytes in travelled.items()}
    return Stats(fetches, hits, stall, overflows, links)


def reset_stats(module: nn.Module) -> None:
    """Starts counting anew.

    Raises:
        PlacementError: The module is not distributed.
    """
    _native.reset_counters(distribution_of(module).counters)
