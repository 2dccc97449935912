# SPDX-License-Identifier: Apache-2.0
"""order="optimal" on random models: predicted steps beside the lower bound, and beside interleaved.

Models, machines and placements are those of prediction.py and some more: as many as are asked for.
It also says how long a search takes for 1,000 weights and four tiers, on this machine's clock.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from overlap import DTYPE, Chain, show
from prediction import Uneven, recorded
from torch import nn

import distorch
from distorch import _native
from distorch.testing import sim

_DONORS = (
    "cpu,*", "cpu,*", "sim:1,*", "cpu,10%;sim:1,*", "sim:1,10%;cpu,*", "cpu+sim:1,*",
)  # fmt: skip


def case(seed: int) -> dict[str, Any]:
    """A random model on a random machine with a random placement."""
    rng = random.Random(seed)  # noqa: S311 - a model to try, no secret
    links = {
        (place, "sim:0"): (rng.uniform(*rates), rng.uniform(0, 30e-6))
        for place, rates in {"cpu": (2e9, 30e9), "sim:1": (2e9, 60e9)}.items()
    }
    sim.configure(
        devices=2, memory="2tb", flops=rng.uniform(5e12, 200e12), memory_bandwidth=900e9,
        links=links, mode="dry",
    )  # fmt: skip
    module = Uneven(rng)
    distorch.distribute(module, "sim:0,*")
    distorch.calibrate(progress=False)
    step = recorded(module, torch.empty(1, dtype=DTYPE, device="sim:0"))
    spec = f"sim:0,{rng.choice((1, 10, 30, 50, 70, 90))}%;{rng.choice(_DONORS)}"
    largest = max(p.nbytes for p in module.parameters())
    options = {"min_bytes": 0, "prefetch": rng.choice(("auto", int(largest * rng.uniform(2, 6))))}
    start = time.perf_counter()
    found = distorch.predict(module, step, spec, order="optimal", **options)
    took = time.perf_counter() - start
    usual = distorch.predict(module, step, spec, order="interleaved", **options)
    return {
        "seed": seed, "spec": spec, "weights": len(list(module.parameters())),
        "optimal_s": found.seconds, "interleaved_s": usual.seconds, "bound_s": found.bound_seconds,
        "gap": found.gap, "of_interleaved": found.seconds / usual.seconds, "took_s": took,
    }  # fmt: skip


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """How near to the bound, and what is gained, over many."""
    gaps = sorted(row["gap"] for row in rows)
    could = [row for row in rows if row["bound_s"] <= 0.9 * row["interleaved_s"]]
    return {
        "cases": len(rows),
        "within_1_percent": sum(gap <= 0.01 for gap in gaps) / len(gaps),
        "within_5_percent": sum(gap <= 0.05 for gap in gaps) / len(gaps),
        "median_gap": statistics.median(gaps), "worst_gap": gaps[-1], "least_gap": gaps[0],
        "worse_than_interleaved": sum(row["of_interleaved"] > 1 + 1e-9 for row in rows),
        "could_gain_10_percent": len(could),
        "gain_10_percent": sum(row["of_interleaved"] <= 0.9 for row in could),
        "median_took_s": statistics.median(row["took_s"] for row in rows),
    }  # fmt: skip


def thousand() -> Iterator[dict[str, Any]]:
    """1,000 weights and four tiers: the search and the bound alone, and the whole plan."""
    sim.configure(
        devices=3, memory="2tb", flops=35e12, mode="dry",
        links={("cpu", "sim:0"): (7e9, 1e-5), ("sim:1", "sim:0"): (20e9, 1e-5),
               ("sim:2", "sim:0"): (3e9, 1e-5)},
    )  # fmt: skip
    rng = random.Random(0)  # noqa: S311
    layers = [
        (rng.choice((1, 64, 4096)), rng.randint(100, 900), rng.randint(100, 900))
        for _ in range(1000)
    ]
    module = nn.Sequential(*(Chain([layer]) for layer in layers))
    distorch.distribute(module, "sim:0,*", min_bytes=0)
    distorch.calibrate(progress=False)
    step = recorded(module, torch.empty(1, dtype=DTYPE, device="sim:0"))
    search, bound = _native.find_placements, _native.step_bound
    took = {"search": 0.0, "bound": 0.0}

    def timed(name: str, function: Any) -> Any:
        def call(**arguments: Any) -> Any:
            start = time.perf_counter()
            found = function(**arguments)
            took[name] = time.perf_counter() - start
            return found

        return call

    _native.find_placements = timed("search", search)
    _native.step_bound = timed("bound", bound)
    try:
        for spec in ("sim:0,25%;sim:1,25%;sim:2,25%;cpu,*", "sim:0,50%;sim:2,10%;sim:1,10%;cpu,*"):
            start = time.perf_counter()
            distorch.plan(module, spec, order="optimal", step=step, min_bytes=0, prefetch="16mb")
            whole = time.perf_counter() - start
            yield {"spec": spec, "search_s": took["search"], "bound_s": took["bound"],
                   "plan_s": whole}  # fmt: skip
    finally:
        _native.find_placements, _native.step_bound = search, bound


def _short(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    parser.add_argument("--cases", type=int, default=1000, help="how many random ones")
    arguments = parser.parse_args()
    large = list(thousand())
    show(large)
    rows = [case(seed) for seed in range(arguments.cases)]
    found = summary(rows)
    for name, value in found.items():
        print(f"{name}: {value:.4g}")
    if arguments.json:
        content = {"torch": torch.__version__, "summary": found, "thousand": large}
        table = [list(rows[0]), *([_short(value) for value in row.values()] for row in rows)]
        text = json.dumps({**content, "cases": table})
        arguments.json.write_text(text.replace("], [", "],\n[") + "\n")


if __name__ == "__main__":
    main()
