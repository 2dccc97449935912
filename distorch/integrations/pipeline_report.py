"""What of a pipeline is where, part by part and in all."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from distorch._tables import html_table, human_bytes, text_table
from distorch.integrations.pipeline import models_of, state_of
from distorch.reporting import Report, report


@dataclass(frozen=True)
class PipelineReport:
    """`parts` name -> its report; `bytes` device -> bytes of all of them, measured; `problems` says
    where they differ from the plan, or are more than the budget.
    """

    parts: dict[str, Report]
    bytes: dict[str, int]
    problems: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether everything is where the plan says, and takes no more than it says."""
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON types."""
        parts = {name: part.to_dict() for name, part in self.parts.items()}
        return {"parts": parts, "bytes": self.bytes, "problems": self.problems, "ok": self.ok}

    def _title(self) -> str:
        state = "as planned" if self.ok else f"{len(self.problems)} differences from the plan"
        return f"measured placement of a pipeline: {state}"

    def _table(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        computes = {part.compute for part in self.parts.values()}
        heads = [f"{name} (compute)" if name in computes else name for name in self.bytes]
        rows = [
            (name, *(_size(part.bytes.get(device, 0)) for device in self.bytes),
             _size(sum(part.bytes.values())))
            for name, part in self.parts.items()
        ]  # fmt: skip
        total = (
            "in all",
            *(_size(n) for n in self.bytes.values()),
            _size(sum(self.bytes.values())),
        )
        return ("part", *heads, "in all"), [*rows, total]

    def __str__(self) -> str:
        return "\n".join([text_table(*self._table(), self._title()), *self.problems])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        lines = "".join(f"<p>{line}</p>" for line in self.problems)
        return html_table(*self._table(), self._title()) + lines


def _size(nbytes: int) -> str:
    return human_bytes(nbytes) if nbytes else ""


def pipeline_report(pipe: Any) -> PipelineReport:
    """Walks the tensors of every distributed model of a pipeline. PlacementError if none is."""
    state = state_of(pipe)
    parts = {name: report(module) for name, module in models_of(pipe).items()}
    held: dict[str, int] = {}
    for part in parts.values():
        for device, nbytes in part.bytes.items():
            held[device] = held.get(device, 0) + nbytes
    problems = [f"{name}: {line}" for name, part in parts.items() for line in part.problems]
    if over := state.plan.over_budget(held.get(state.plan.compute, 0)):
        problems.append(over)
    return PipelineReport(parts, held, problems)
