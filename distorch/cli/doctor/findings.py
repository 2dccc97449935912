# SPDX-License-Identifier: Apache-2.0
"""What a check found, and all of it as text and as JSON."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from distorch.display.tables import human_bytes, text_table
from distorch.machine.calibration import Calibration

State = Literal["ok", "slow", "NO", "--"]  # "--": this machine does not need it


@dataclass(frozen=True)
class Check:
    """One thing that was looked at, and what was `found` there, in words.

    Where it is not ok, `command` is a line for a shell that mends it ("" if there is none), and
    `hint` is what else there is to say.
    """

    name: str
    state: State
    found: str
    command: str = ""
    hint: str = ""


def tried(name: str, try_it: Callable[[], str], command: str = "", hint: str = "") -> Check:
    """Runs `try_it`, which returns what it found. If it raises, the check has failed."""
    try:
        return Check(name, "ok", try_it())
    except Exception as error:
        return Check(name, "NO", first_line(error), command, hint)


def first_line(error: Exception) -> str:
    """An error for a table: the messages of CUDA have several lines."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:160]


@dataclass(frozen=True)
class Findings:
    """Versions, devices (total and free bytes), checks, and links that were measured."""

    versions: dict[str, str]
    devices: dict[str, tuple[int, int]]
    scratch: str
    checks: list[Check]
    links: Calibration | None = None

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong. What is only slow is not wrong."""
        return all(check.state != "NO" for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """The findings as JSON types."""
        links = self.links.to_dict()["links"] if self.links is not None else None
        return {**asdict(replace(self, links=None)), "links": links, "ok": self.ok}

    def __str__(self) -> str:
        devices = [
            (name, human_bytes(total), human_bytes(free))
            for name, (total, free) in self.devices.items()
        ]
        checks = [(check.state, check.name, check.found) for check in self.checks]
        return "\n\n".join(
            [
                text_table(("what", "version"), list(self.versions.items())),
                text_table(("device", "total", "free"), devices),
                f"donor files go to {self.scratch}",
                str(self.links or "links were not measured yet: distorch calibrate"),
                text_table(("", "check", "found"), checks),
                self._advice(),
            ]
        )

    def _advice(self) -> str:
        """What to do. What is wrong comes before what is slow."""
        lines = []
        for state, words in (("NO", "Wrong:"), ("slow", "Works, but slowly:")):
            these = [check for check in self.checks if check.state == state]
            lines += [words] * bool(these)
            for check in these:
                lines.append(f"  {check.name}: {check.found}")
                lines += [f"      {check.command}"] * bool(check.command)
                lines += [f"      ({check.hint})"] * bool(check.hint)
        return "\n".join(lines) or "Nothing is wrong."
