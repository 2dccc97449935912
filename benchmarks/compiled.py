# SPDX-License-Identifier: Apache-2.0
"""Step time of compiled models: distributed beside resident, where no link is the bottleneck.

A stack of transformer blocks, compiled whole and block by block, forward and with backward. All
of its weights are on donors: in RAM (used in place), or on disk with a batch so large that reading
ahead is never waited for. Rounds are interleaved; figures are medians of rounds, and ratios to the
compiled resident model in the same round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import distorch

PLACEMENTS = {"resident": None, "RAM": "cpu,*", "disk": "cpu,0b;disk,*"}


class Block(nn.Module):
    """The half of a transformer block that holds most of its weights."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


def make(options: argparse.Namespace, spec: str | None, regional: bool) -> nn.Module:
    """The same model each time, placed and compiled."""
    torch.manual_seed(0)
    model = nn.Sequential(*(Block(options.width) for _ in range(options.blocks)))
    if spec is not None:
        distorch.distribute(model, spec, min_bytes=0)
    for part in model if regional else (model,):
        part.compile(fullgraph=True)
    return model


def forward(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """One inference step."""
    with torch.no_grad():
        return model(x)


def train(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Forward and backward; gives a gradient."""
    model.zero_grad()
    model(x).square().mean().backward()
    grad = next(model.parameters()).grad
    assert grad is not None
    return grad


def measure(
    step: Callable[[nn.Module, torch.Tensor], torch.Tensor],
    options: argparse.Namespace,
    regional: bool,
) -> dict[str, object]:
    """Medians of interleaved rounds, after two steps to compile and to learn the order."""
    models = {name: make(options, spec, regional) for name, spec in PLACEMENTS.items()}
    x = torch.randn(options.tokens, options.width)
    wanted = step(models["resident"], x)
    for model in models.values():
        for _ in range(2):
            assert torch.equal(step(model, x), wanted), "not the bits of the resident model"
    seconds: dict[str, list[float]] = {name: [] for name in models}
    stalled: dict[str, float] = {}
    for name in ("RAM", "disk"):
        distorch.reset_stats(models[name])
    for _ in range(options.rounds):
        for name, model in models.items():
            begin = time.perf_counter()
            step(model, x)
            seconds[name].append(time.perf_counter() - begin)
    for name in ("RAM", "disk"):
        stalled[name] = distorch.stats(models[name]).stall_seconds / options.rounds
    ratios = {
        name: statistics.median(
            a / b for a, b in zip(seconds[name], seconds["resident"], strict=True)
        )
        for name in models
    }
    return {
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "ratios": ratios,
        "stall_seconds": stalled,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=6, help="(default 6)")
    parser.add_argument("--width", type=int, default=512, help="(default 512: 50 MB of weights)")
    parser.add_argument("--tokens", type=int, default=2048, help="rows of a step (default 2048)")
    parser.add_argument("--rounds", type=int, default=15, help="(default 15)")
    parser.add_argument("--json", type=Path, help="write everything measured here")
    options = parser.parse_args()
    rows = []
    for title, step in (("forward", forward), ("forward and backward", train)):
        for regional in (False, True):
            torch._dynamo.reset()
            found = measure(step, options, regional)
            row = {"step": title, "compiled": "by block" if regional else "whole", **found}
            rows.append(row)
            times = ", ".join(f"{k} {1e3 * v:.1f} ms" for k, v in found["seconds"].items())
            print(f"{title}, {row['compiled']}: {times}")
            print("    ratio to resident: ", {k: round(v, 4) for k, v in found["ratios"].items()})
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        result = {"torch": torch.__version__, "options": vars(options) | {"json": None}}
        options.json.write_text(json.dumps(result | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
