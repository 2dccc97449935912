# SPDX-License-Identifier: Apache-2.0
"""Draws docs/pictures/step.svg: one step of a model, its operators and its copies.

    python docs/pictures/draw.py

The times are those of the simulated accelerator, so the picture is the same on every machine. It
needs a build with DISTORCH_SIM=1, such as the one of `make dev`, and matplotlib.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import nn

import distorch
from distorch.testing import sim

WIDTH, BLOCKS, TOKENS = 1024, 6, 640
LINK_BYTES_PER_SECOND = 16e9
RESIDENT, FETCHED, COPY = "#4477aa", "#ee7733", "#f3b48a"
Bar = tuple[float, float, str]  # begin, length (milliseconds), colour
# Title, spec, look-ahead.
CASES = (
    ("all weights resident", "sim:0,100%;cpu,*", 0),
    ("half of the weights in RAM, each fetched when it is asked for", "sim:0,50%;cpu,*", 0),
    ("the same with look-ahead, which is the default", "sim:0,50%;cpu,*", "32mb"),
)


class Block(nn.Module):
    """Two products, as a transformer's feed-forward part has them."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 4 * WIDTH, bias=False)
        self.down = nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(x)))


def one_step(spec: str, prefetch: str | int) -> tuple[nn.Module, list[Bar], list[Bar]]:
    """The model, and the operators and copies of its third step."""
    sim.configure(flops=5e12, links={("cpu", "sim:0"): (LINK_BYTES_PER_SECOND, 10e-6)})
    model = nn.Sequential(*(Block() for _ in range(BLOCKS)))
    distorch.distribute(model, spec, min_bytes=0, prefetch=prefetch)
    x = torch.ones(TOKENS, WIDTH).to("sim:0")
    for _ in range(2):  # the first one learns the order of the weights
        model(x)
    sim.synchronize()
    begin = sim.now()
    model(x)
    sim.synchronize()
    return model, *bars(model, sim.timeline(), begin)


def bars(model: nn.Module, spans: Sequence[sim.Span], begin: float) -> tuple[list[Bar], list[Bar]]:
    """Operators on weights, and copies, that ran after `begin`."""
    place = distorch.report(model).placement
    colours = [RESIDENT if place[name] == "sim:0" else FETCHED for name in place]
    ran = [span for span in spans if span.start >= begin - 1e-9]
    products = [span for span in ran if span.label == "aten::mm"]
    copies = [span for span in ran if span.resource == "cpu->sim:0"]

    def bar(span: sim.Span, colour: str) -> Bar:
        return (span.start - begin) * 1e3, (span.end - span.start) * 1e3, colour

    operators = [bar(span, colour) for span, colour in zip(products, colours, strict=True)]
    end = max(start + length for start, length, _ in operators)
    return operators, [bar(span, COPY) for span in copies if (span.start - begin) * 1e3 < end]


def draw(axes: Axes, title: str, operators: list[Bar], copies: list[Bar]) -> float:
    """One step as two rows; returns its milliseconds."""
    for row, found in ((1.0, operators), (0.0, copies)):
        for start, length, colour in found:
            axes.broken_barh([(start, length)], (row, 0.8), color=colour, edgecolor="white")
    end = max(start + length for start, length, _ in operators)
    axes.axvline(end, color="#555555", linestyle=":")
    axes.set_title(f"{title}: {end:.1f} ms", loc="left", fontsize=10)
    axes.set_ylim(-0.15, 1.95)
    axes.set_yticks([0.4, 1.4], ["link from RAM", "compute device"])
    axes.spines[["top", "right", "left"]].set_visible(False)
    return end


def main() -> None:
    """Draws the step that waits for every copy above the one that looks ahead."""
    mpl.rcParams["svg.hashsalt"] = "distorch"  # the same file each time
    mpl.rcParams["svg.fonttype"] = "none"  # letters, not outlines: small, and can be searched
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    rows = figure.subplots(3, sharex=True)
    for axes, (title, spec, prefetch) in zip(rows, CASES, strict=True):
        _, operators, copies = one_step(spec, prefetch)
        draw(axes, title, operators, copies)
    rows[-1].set_xlabel("milliseconds of one step (simulated)")
    kinds = ((RESIDENT, "operator on a resident weight"), (FETCHED, "operator on a fetched weight"),
             (COPY, "copy of a weight"))  # fmt: skip
    figure.legend(
        handles=[Patch(color=colour, label=label) for colour, label in kinds],
        loc="outside lower center", ncols=3, frameon=False,
    )  # fmt: skip
    figure.savefig(Path(__file__).with_name("step.svg"), metadata={"Date": None})


if __name__ == "__main__":
    main()
