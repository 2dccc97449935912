# SPDX-License-Identifier: Apache-2.0
"""Draws the pictures of this folder.

    python docs/pictures/draw.py

step.svg is one step of a model, its operators and its copies. Its times are those of the simulated
accelerator, so the picture is the same on every machine; this needs a build with DISTORCH_SIM=1,
such as the one of `make dev`. interleaved.svg and sequential.svg are two plans for one model.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

import distorch
from distorch.display.picture import Picture
from distorch.display.timelines import COPY, FETCHED, RESIDENT, Panel, Piece, timeline_picture
from distorch.testing import sim

HERE = Path(__file__).parent
WIDTH, BLOCKS, TOKENS = 1024, 6, 640
LINK_BYTES_PER_SECOND = 16e9
# Title, spec, look-ahead.
CASES = (
    ("all weights resident", "sim:0,100%;cpu,*", 0),
    ("half of the weights in RAM, each fetched when it is asked for", "sim:0,50%;cpu,*", 0),
    ("the same with look-ahead, which is the default", "sim:0,50%;cpu,*", "32mb"),
)
LEGEND = (
    (RESIDENT, "operator on a resident weight"),
    (FETCHED, "operator on a fetched weight"),
    (COPY, "copy of a weight"),
)


class Block(nn.Module):
    """Two products, as a transformer's feed-forward part has them."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 4 * WIDTH, bias=False)
        self.down = nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(x)))


def one_step(spec: str, prefetch: str | int) -> tuple[list[Piece], list[Piece]]:
    """The operators and the copies of the third step of a model; it begins at 0."""
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
    return pieces(model, sim.timeline(), begin)


def pieces(
    model: nn.Module, spans: Sequence[sim.Span], begin: float
) -> tuple[list[Piece], list[Piece]]:
    """Operators on weights, and copies, that ran after `begin`."""
    place = distorch.report(model).placement
    colours = [RESIDENT if place[name] == "sim:0" else FETCHED for name in place]
    ran = [span for span in spans if span.start >= begin - 1e-9]
    products = [span for span in ran if span.label == "aten::mm"]
    operators = [
        Piece(span.start - begin, span.end - begin, colour, name)
        for span, colour, name in zip(products, colours, place, strict=True)
    ]
    end = operators[-1].end
    copies = [
        Piece(span.start - begin, span.end - begin, COPY)
        for span in ran
        if span.resource == "cpu->sim:0" and span.start - begin < end
    ]
    return operators, copies


def step() -> Picture:
    """The step that waits for every copy above the one that looks ahead."""
    panels = []
    for title, spec, prefetch in CASES:
        operators, copies = one_step(spec, prefetch)
        end = operators[-1].end
        rows = (("compute device", operators), ("link from RAM", copies))
        panels.append(Panel(f"{title}: {end * 1e3:.1f} ms", rows, mark=end))
    return timeline_picture(
        "One step of a model", panels, LEGEND, "milliseconds of one step (simulated)"
    )


def plan(order: str) -> Picture:
    """A strip of twelve blocks, of which four tenths leave the GPU. Nothing is allocated."""
    with torch.device("meta"):
        model = nn.Sequential(*(Block() for _ in range(2 * BLOCKS)))
    return distorch.plan(model, "sim:0,60%;cpu,*", order=order).plot()


def main() -> None:
    """Writes the pictures beside this file."""
    step().save(HERE / "step.svg")
    for order in ("interleaved", "sequential"):
        made = plan(order).svg().replace("sim:0", "cuda:0")
        (HERE / f"{order}.svg").write_text(made)


if __name__ == "__main__":
    main()
