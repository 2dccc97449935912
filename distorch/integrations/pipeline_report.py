# SPDX-License-Identifier: Apache-2.0
"""What of a pipeline is where, part by part and in all."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from distorch.display.picture import Picture
from distorch.display.placements import part_bars
from distorch.display.tables import html_table, human_bytes, paragraphs, text_table
from distorch.integrations.pipeline import models_of, state_of
from distorch.reporting import Report, bytes_of, first_of, report, verdict
from distorch.runtime.distribution import is_distributed


@dataclass(frozen=True)
class PipelineReport:
    """What of a pipeline is where. It prints as a table, in a notebook too.

    Attributes:
        parts: Name of a part -> its report.
        plain: Name -> device -> bytes, of models that are not distributed.
        bytes: Device -> bytes of all models, measured.
        problems: Where they differ from the plan, or are more than the budget.
    """

    parts: dict[str, Report]
    plain: dict[str, dict[str, int]]
    bytes: dict[str, int]
    problems: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether everything is where the plan says, and takes no more than it says."""
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON types."""
        parts = {name: part.to_dict() for name, part in self.parts.items()}
        return {**self.__dict__, "parts": parts, "ok": self.ok}

    def _title(self) -> str:
        return f"measured placement of a pipeline: {verdict(self.problems)}"

    def _computes(self) -> set[str]:
        return {part.compute for part in self.parts.values()}

    def _held(self) -> dict[str, dict[str, int]]:
        """Model -> device -> bytes."""
        held = {name: part.bytes for name, part in self.parts.items()}
        return held | {f"{name} (not distributed)": own for name, own in self.plain.items()}

    def _table(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        computes = self._computes()
        heads = [f"{name} (compute)" if name in computes else name for name in self.bytes]
        rows = [
            (
                name,
                *(_size(found.get(device, 0)) for device in self.bytes),
                _size(sum(found.values())),
            )
            for name, found in {**self._held(), "in all": self.bytes}.items()
        ]
        return ("part", *heads, "in all"), rows

    def _notes(self) -> list[str]:
        return [*self._facts(), *first_of(self.problems)]

    def _facts(self) -> list[str]:
        loras = [
            f"{name}: LoRA {row['lora']} x {row['strength']:g}, {row['weights']} weights"
            for name, part in self.parts.items()
            for row in part.loras
        ]
        ring = max((part.ring for part in self.parts.values()), default=0)
        ahead = f"look-ahead: up to {human_bytes(ring)} more on the compute device (prefetch)"
        return [*[ahead] * bool(ring), *loras]

    def __str__(self) -> str:
        return "\n".join([text_table(*self._table(), self._title()), *self._notes()])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        table = html_table(*self._table(), self._title())
        return table + self.plot().svg() + paragraphs(self._notes())

    def plot(
        self, path: str | os.PathLike[str] | None = None, *, notes: Sequence[str] = ()
    ) -> Picture:
        """A bar for each model, coloured by device; below, LoRAs and problems in words.

        With a `path` it is also saved there, with the errors of `Picture.save`. `notes` are more
        lines below.
        """
        made = part_bars(
            self._title(), self._held(), self.bytes, self._computes(),
            notes=[*notes, *self._facts()], problems=first_of(self.problems),
        )  # fmt: skip
        return made if path is None else made.saved(path)


def _size(nbytes: int) -> str:
    return human_bytes(nbytes) if nbytes else ""


def pipeline_report(pipe: Any) -> PipelineReport:
    """Walks the tensors of every model of a pipeline and says where their bytes are now.

    Returns:
        A `PipelineReport`.

    Raises:
        PlacementError: No model is distributed.
    """
    state = state_of(pipe)
    parts: dict[str, Report] = {}
    plain: dict[str, dict[str, int]] = {}
    for name, module in models_of(pipe).items():
        if is_distributed(module):
            parts[name] = report(module)
        else:
            plain[name] = bytes_of(module)
    held: dict[str, int] = {}
    for found in (*(part.bytes for part in parts.values()), *plain.values()):
        for device, nbytes in found.items():
            held[device] = held.get(device, 0) + nbytes
    problems = [f"{name}: {line}" for name, part in parts.items() for line in part.problems]
    if over := state.plan.over_budget(held.get(state.plan.compute, 0)):
        problems.append(over)
    return PipelineReport(parts, plain, held, problems)
