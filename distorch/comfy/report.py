# SPDX-License-Identifier: Apache-2.0
"""A distributed model in words and as a picture: what is where, what travelled, how fast."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

import distorch
from distorch.comfy import host, live
from distorch.comfy.patcher import placed
from distorch.planner import Plan
from distorch.runtime import distribution


@dataclass(frozen=True)
class Found:
    """A model: its report, or the plan of one that is not loaded yet; what travelled since the last
    report, and the `seconds` of sampling since.
    """

    title: str
    where: distorch.Report | Plan
    stats: distorch.Stats
    seconds: float
    way: str = ""  # how the host takes it, where it has dynamic VRAM

    @property
    def text(self) -> str:
        """Tables."""
        if isinstance(self.where, Plan):
            return f"{self.title}: not loaded yet\n{self.where}"
        lines = [str(self.where), "", str(self.stats), *self._travelled()]
        return "\n".join([*lines, *([self.way] if self.way else [])])

    @property
    def rates(self) -> dict[str, float]:
        """Link -> GB/s (10^9), over the time that was spent sampling."""
        return live.rates(self.stats.bytes, self.seconds)

    def _travelled(self) -> list[str]:
        return [
            f"{link}: {rate:.2f} GB/s over {self.seconds:.1f} s of sampling"
            for link, rate in self.rates.items()
        ]

    @property
    def problems(self) -> list[str]:
        """Where what was measured differs from the plan."""
        return [] if isinstance(self.where, Plan) else self.where.problems

    def picture(self) -> torch.Tensor:
        """An image [1, height, width, 3], float32 0..1: the picture of the report or the plan."""
        made = self.where.plot(notes=[self.title, *self._travelled()])
        return torch.from_numpy(np.asarray(made.image(), dtype=np.float32) / 255.0)[None]

    def _bar(self) -> str:
        """A small picture (SVG) for the node: the bar of all devices, and one sentence."""
        where, stats = self.where, self.stats
        loaded = not isinstance(where, Plan)
        travelled = live.sentence(stats.bytes, stats.stall_seconds, self.seconds)
        notes = [*self.problems, travelled if loaded else "not loaded yet"]
        return live.Bar(where.bytes, where.compute, notes[0], ok=not self.problems).svg()

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        found = self.where if isinstance(self.where, distorch.Report) else None
        return {
            "model": self.title,
            "spec": self.where.spec,
            "bytes": found.bytes if found is not None else {},
            "ring": found.ring if found is not None else 0,
            "ok": not self.problems,
            "problems": self.problems,
            "host": self.way,
            "fetches": self.stats.fetches,
            "hits": self.stats.hits,
            "stall_seconds": self.stats.stall_seconds,
            "travelled": self.stats.bytes,
            "gb_per_second": self.rates,
            "svg": self._bar(),
        }


def measured(patcher: Any) -> Found:
    """Measures the model of a placed patcher, and starts counting anew."""
    model = patcher.model
    title = type(model).__name__
    if not distribution.is_distributed(model):
        return Found(title, patcher.plan(None)[0], distorch.Stats(0, 0, 0.0, 0, {}), 0.0)
    found, stats = distorch.report(model), distorch.stats(model)
    state = placed(model)
    seconds, state.sampling_seconds = state.sampling_seconds, 0.0
    distorch.reset_stats(model)
    return Found(title, found, stats, seconds, _way(patcher))


def _way(patcher: Any) -> str:
    """See Note [Two ways into the host]."""
    if not host.dynamic_vram():
        return ""
    if host.is_dynamic(patcher):
        return (
            "ComfyUI: dynamic VRAM takes it for a dynamic model, as this version has no static path"
        )
    return "ComfyUI: loaded on the static path, beside dynamic VRAM"
