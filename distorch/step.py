# SPDX-License-Identifier: Apache-2.0
"""What a step does: its operators in their order, their times, and the weights that each uses."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from distorch._small_files import MOST_TRACE, read_json, write_atomically
from distorch.display.tables import html_table, text_table
from distorch.errors import FormatError, SpecError

_VERSION = 1
_WRITER = "distorch step"
_SHOWN = 8
_LONGEST = 1e9  # seconds: no operator takes longer


class Use(NamedTuple):
    """One operator on weights, or a run of operators on none.

    Attributes:
        seconds: Of the compute device, without what it waits for weights.
        operators: How many operators these are.
        weights: Their first names, each one once.
        rows: How many rows an embedding looks up in its table; 0 for all other operators.
        copied: Bytes that the operator itself brings from RAM to the compute device.
        idle: For how many of them the device had nothing to do when they were issued; half of one,
            if it ran dry meanwhile. Their `seconds` have what the host took to issue them, too.
        host_waits: The host then waits for the device, because it needs a result.
    """

    seconds: float
    operators: int = 1
    weights: tuple[str, ...] = ()
    rows: int = 0
    copied: int = 0
    idle: float = 0.0
    host_waits: bool = False


@dataclass(repr=False)
class Step:
    """One pass over a model, from `record_step` or `estimate_step`. It prints as a table.

    Attributes:
        compute: The device that ran it.
        uses: A `Use` for each operator on weights, and for each run of other operators between
            them. `record_step` fills the list when its block ends.
        forms: Weight -> its dtype and shape ("float32 [4, 4]"), for those that are used.
        decodes: Weight -> seconds for each stored byte that the host took to decode it, if it did
            so in the step.
        machine: The name of the machine for which it was estimated; "" if it was recorded, or
            estimated for the machine at hand.
        speed: Of the device for which it was estimated: bytes per second in its memory, and
            operations per second in float32 and in bfloat16. Empty if it was recorded.
    """

    compute: str = ""
    uses: list[Use] = field(default_factory=list)
    forms: dict[str, str] = field(default_factory=dict)
    decodes: dict[str, float] = field(default_factory=dict)
    machine: str = ""
    speed: tuple[float, ...] = ()

    @property
    def seconds(self) -> float:
        """What the step takes when it waits for no weight."""
        return math.fsum(use.seconds for use in self.uses)

    @property
    def weights(self) -> tuple[str, ...]:
        """The weights that are used, in the order of their first use."""
        return tuple(dict.fromkeys(name for use in self.uses for name in use.weights))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the step as JSON, atomically.

        Raises:
            OSError: The file cannot be written. An older one is unchanged.
        """
        write_atomically(Path(path), json.dumps(self.to_dict()) + "\n")

    def to_dict(self) -> dict[str, Any]:
        """The step as JSON types."""
        return {
            "writer": _WRITER, "version": _VERSION, "compute": self.compute,
            "machine": self.machine, "speed": list(self.speed),
            "uses": [list(use) for use in self.uses],
            "forms": self.forms,
            "decodes": self.decodes,
        }  # fmt: skip

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Step:
        """Reads what `save` wrote.

        Raises:
            FormatError: The file is not there, damaged, or something else.
        """
        try:
            content = read_json(path, MOST_TRACE)
        except (OSError, ValueError) as error:
            raise FormatError(f"cannot read the step {str(path)!r}: {error}") from error
        told = content if isinstance(content, dict) else {}
        if (told.get("writer"), told.get("version")) != (_WRITER, _VERSION):
            raise FormatError(
                f"{str(path)!r}: expected a step that Step.save wrote (version {_VERSION}), found "
                "something else; record it again with distorch.record_step"
            )
        try:
            return _believed(told)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise FormatError(
                f"the step {str(path)!r} is damaged; record it again with distorch.record_step "
                f"({type(error).__name__}: {error})"
            ) from error

    def check(self) -> None:
        """SpecError if any number of it can be none that was recorded."""
        try:
            _believed(self.to_dict())
        except (TypeError, ValueError, OverflowError) as error:
            raise SpecError(
                f"predict: expected a step as distorch.record_step makes it, found {error}"
            ) from error

    def _rows(self) -> list[tuple[str, str, str]]:
        """The weights whose operators take longest: name, milliseconds, uses."""
        seconds: dict[str, list[float]] = {}
        for use in self.uses:
            for name in use.weights:
                seconds.setdefault(name, []).append(use.seconds)
        longest = sorted(seconds.items(), key=lambda item: -sum(item[1]))[:_SHOWN]
        return [(name, f"{sum(own) * 1e3:.3f}", str(len(own))) for name, own in longest]

    def _title(self) -> str:
        if not self.uses:
            return "no operator was recorded: nothing ran, or the block has not ended"
        operators = sum(use.operators for use in self.uses)
        device = f"{self.compute} of {self.machine}" if self.machine else self.compute
        return (
            f"step of {operators} operators on {device}: "
            f"{self.seconds * 1e3:.3f} ms without waiting, {len(self.weights)} weights. The "
            "longest operators on weights:"
        )

    def __str__(self) -> str:
        if not self.uses:
            return self._title()
        return text_table(("weight", "ms", "uses"), self._rows(), self._title())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return html_table(("weight", "ms", "uses"), self._rows(), self._title())


def _believed(told: dict[str, Any]) -> Step:
    """A step from a file. KeyError, TypeError, ValueError or OverflowError if it can be none."""
    if not isinstance(told["compute"], str):
        raise TypeError("compute is no name")
    uses = []
    for seconds, operators, weights, rows, copied, idle, host_waits in told["uses"]:
        if not all(isinstance(name, str) for name in weights):
            raise TypeError("a weight without a name")
        uses.append(
            Use(_seconds(seconds), _count(operators, 1), tuple(dict.fromkeys(weights)),
                _count(rows), _count(copied), _seconds(idle), _flag(host_waits))
        )  # fmt: skip
    forms = {str(name): str(form) for name, form in told["forms"].items()}
    decodes = {str(name): _seconds(value) for name, value in told["decodes"].items()}
    return Step(
        told["compute"],
        uses,
        forms,
        decodes,
        str(told.get("machine", "")),
        tuple(map(_amount, told.get("speed", ()))),
    )


def _seconds(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{value!r} seconds")
    if not 0 <= value <= _LONGEST:
        raise ValueError(f"{value!r} seconds")
    return float(value)


def _amount(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e18:
        raise ValueError(f"a speed of {value!r}")
    return float(value)


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{value!r} instead of true or false")
    return value


def _count(value: Any, least: int = 0) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{value!r} instead of a number of them")
    if not least <= value < 1 << 40:
        raise ValueError(f"{value!r} of them")
    return value
