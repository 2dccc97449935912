# SPDX-License-Identifier: Apache-2.0
"""Predicted steps against measured ones.

On the simulated accelerator, whose virtual time is exact: the grid of overlap.py, quantised and
patched weights, several donors, random models, and the published measurements of DisTorch 2.
In real time: a model on the CPU with its weights in a file that no cache holds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from _timing import clock_of
from overlap import (
    DATA,
    DTYPE,
    LATENCY,
    MODELS,
    RATE,
    RATIOS,
    SHARES,
    Chain,
    cell_of_grid,
    configure,
    disk_model,
    flops_for,
    largest_block,
    show,
    uniform,
)
from quantised import BANDWIDTH, BLOCKS, quantise
from torch import nn

import distorch
from distorch.testing import sim

USES = 4000  # that are played before anything is measured: some steps settle late
WAITED = 6  # steps


def recorded(module: nn.Module, *inputs: torch.Tensor) -> distorch.Step:
    """A step of the module where it lies now."""
    with torch.no_grad():
        module(*inputs)
        with distorch.record_step(module) as step:
            module(*inputs)
    return step


def measured(module: nn.Module, uses: int, *inputs: torch.Tensor) -> tuple[float, float]:
    """Virtual seconds of a step of so many uses: in a row, and if the host waits for its end."""
    warm, counted = (min(max(12, total // uses), 100) for total in (USES, USES // 2))
    stream = torch.accelerator.current_stream(inputs[0].device)

    def mark() -> torch.Event:
        event = torch.Event(inputs[0].device, enable_timing=True)
        event.record(stream)
        return event

    with torch.no_grad():
        for _ in range(WAITED):  # the order is learned, and the host is not behind
            module(*inputs)
            mark().synchronize()
        for _ in range(warm):
            module(*inputs)
        first = mark()
        for _ in range(counted):
            module(*inputs)
        last = mark()
        last.synchronize()
        for _ in range(WAITED):
            module(*inputs)
            mark().synchronize()
        start = sim.now()
        for _ in range(WAITED):
            module(*inputs)
            mark().synchronize()
        waited = (sim.now() - start) / WAITED
        return first.elapsed_time(last) / 1e3 / counted, waited


def compared(
    module: nn.Module, step: distorch.Step, spec: str, *inputs: torch.Tensor, **options: Any
) -> dict[str, Any]:
    """A step with that placement, predicted before it is there and measured then."""
    start = time.perf_counter()
    predicted = distorch.predict(module, step, spec, **options)
    took = time.perf_counter() - start
    distorch.redistribute(module, spec, progress=False, **options)
    seconds, waited = measured(module, len(step.uses), *inputs)
    return {
        "predicted_s": predicted.seconds, "measured_s": seconds,
        "error": predicted.seconds / seconds - 1,
        "waited_predicted_s": predicted.waited_seconds, "waited_s": waited,
        "waited_error": predicted.waited_seconds / waited - 1,
        "binds": predicted.binds, "took_s": took, "races": len(sim.races()),
    }  # fmt: skip


def cell(name: str, share: int, ratio: float) -> dict[str, Any]:
    """One cell of overlap.py's grid."""
    module, shape, spec, ring = cell_of_grid(name, share, ratio)
    distorch.calibrate(progress=False)
    x = torch.empty(shape, dtype=DTYPE, device="sim:0")
    found = compared(module, recorded(module, x), spec, x, prefetch=ring, min_bytes=0)
    return {"model": name, "offloaded_percent": share, "compute_to_transfer": ratio, **found}


def grid() -> Iterator[dict[str, Any]]:
    """All cells."""
    for name in MODELS:
        for share in SHARES:
            for ratio in RATIOS:
                yield cell(name, share, ratio)


def narrow() -> Iterator[dict[str, Any]]:
    """Quantised weights in RAM: a step recorded with a ring that is too small, predicted for one
    that is not.
    """
    make: Callable[[], nn.Module] = lambda: nn.Sequential(*uniform())  # noqa: E731
    for kind, (elements, nbytes) in BLOCKS.items():
        wide = sum(p.numel() for p in make().parameters())
        for ratio in RATIOS:
            flops = flops_for(make, (1,), ratio * wide / elements * nbytes / RATE)
            sim.configure(
                memory="2tb", flops=flops, memory_bandwidth=BANDWIDTH, mode="dry",
                links={("cpu", "sim:0"): (RATE, LATENCY)},
            )  # fmt: skip
            module = distorch.distribute(make(), "sim:0,0b;cpu,*", min_bytes=0, prefetch="32mb")
            ring = round(2 * largest_block(module) * (1 + nbytes / elements / DTYPE.itemsize))
            distorch.calibrate(progress=False)
            quantise(module, kind)
            x = torch.empty(1, dtype=DTYPE, device="sim:0")
            found = compared(
                module, recorded(module, x), "sim:0,0b;cpu,*", x, prefetch=ring, min_bytes=0
            )
            yield {"type": kind, "compute_to_transfer": ratio, **found}


def patched() -> Iterator[dict[str, Any]]:
    """LoRAs of several ranks on all weights, applied when they are fetched."""
    width, layers, tokens = 1024, 12, 512
    for rank, rate in itertools.product((4, 64, 256), (RATE, 10 * RATE)):
        sim.configure(
            memory="24gb", flops=20e12, memory_bandwidth=BANDWIDTH, mode="eager",
            links={("cpu", "sim:0"): (rate, LATENCY)},
        )  # fmt: skip
        module = nn.Sequential(
            *(nn.Linear(width, width, bias=False, dtype=DTYPE) for _ in range(layers))
        )
        distorch.distribute(module, "sim:0,0b;cpu,*", min_bytes=0, prefetch="4mb")
        distorch.calibrate(progress=False)
        lora = {}
        for index in range(layers):
            lora[f"{index}.lora_A.weight"] = torch.randn(rank, width) * 0.01
            lora[f"{index}.lora_B.weight"] = torch.randn(width, rank) * 0.01
        distorch.set_loras(module, [(lora, 1.0)], lora_mode="fetch", progress=False)
        x = torch.empty(tokens, width, dtype=DTYPE, device="sim:0")
        step = recorded(module, x)
        for ring in ("6mb", "12mb"):
            found = compared(module, step, "sim:0,0b;cpu,*", x, prefetch=ring, min_bytes=0)
            yield {"rank": rank, "link_GB_per_s": rate / 1e9, "ring": ring, **found}


class Uneven(nn.Module):
    """Layers of all sizes, in an order of their own, some of them twice."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        scale = rng.choice((64, 256, 1024))
        sizes = [scale * rng.randint(1, 12) for _ in range(4)]
        count = rng.randint(3, 40)
        self.layers = nn.ModuleList(
            nn.Linear(rng.choice(sizes), rng.choice(sizes), bias=rng.random() < 0.2,
                      dtype=DTYPE, device="meta")
            for _ in range(count)
        )  # fmt: skip
        self.order = list(range(count))
        if rng.random() < 0.4:
            rng.shuffle(self.order)
        if rng.random() < 0.3:
            self.order += rng.sample(self.order, rng.randint(1, count))
        if rng.random() < 0.3:  # some are never used
            self.order = self.order[: max(2, len(self.order) // 2)]
        self.tokens = [rng.choice((1, 64, 512, 4096)) for _ in self.order]
        self.between = [rng.randint(0, 3) for _ in self.order]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for index, tokens, others in zip(self.order, self.tokens, self.between, strict=True):
            layer = self.layers[index]
            y = layer(x.new_empty(tokens, layer.in_features))
            for _ in range(others):
                y = y + y
        return x


def uneven(seed: int) -> dict[str, Any]:
    """A random model on a random machine with a random placement."""
    rng = random.Random(seed)  # noqa: S311 - a model to try, no secret
    rates = {"cpu": rng.uniform(2e9, 30e9), "sim:1": rng.uniform(2e9, 60e9)}
    links = {(place, "sim:0"): (rate, rng.uniform(0, 30e-6)) for place, rate in rates.items()}
    shared = [set(links)] if rng.random() < 0.25 else []
    sim.configure(
        devices=2, memory="2tb", flops=rng.uniform(5e12, 200e12), memory_bandwidth=900e9,
        links=links, shared=shared, mode="dry",
    )  # fmt: skip
    module = Uneven(rng)
    distorch.distribute(module, "sim:0,*")
    distorch.calibrate(progress=False)
    x = torch.empty(1, dtype=DTYPE, device="sim:0")
    step = recorded(module, x)
    share = rng.choice((0, 10, 30, 50, 70, 90))
    donors = rng.choice(("cpu,*", "cpu,*", "sim:1,*", "cpu,10%;sim:1,*", "cpu+sim:1,*"))
    spec = f"sim:0,{share}%;{donors}" if share else f"sim:0,0b;{donors}"
    largest = max(p.nbytes for p in module.parameters())
    options = {
        "min_bytes": rng.choice((0, 0, 1 << 16)),
        "prefetch": rng.choice(("auto", int(largest * rng.uniform(0.5, 6)))),
        "order": rng.choice(("interleaved", "interleaved", "sequential")),
    }
    return {"seed": seed, "spec": spec, **compared(module, step, spec, x, **options)}


def disk() -> Iterator[dict[str, Any]]:
    """overlap.py's weights in files, read through pinned memory."""
    for ratio in RATIOS:
        module, shape, _ = disk_model(ratio)
        ring = 2 * max(p.nbytes for p in module.parameters())
        distorch.distribute(module, "sim:0,*", progress=False)
        distorch.calibrate(progress=False)
        x = torch.zeros(shape, dtype=DTYPE, device="sim:0")
        step = recorded(module, x)
        found = compared(module, step, "sim:0,0b;disk,*", x, min_bytes=0, prefetch=ring)
        yield {"compute_to_read": ratio, **found}


def published() -> Iterator[dict[str, Any]]:
    """The published table of DisTorch 2 from its own rates: theirs by adding up, ours by rehearsal.

    Theirs is what they measured. Their way adds the time of all copies to the computation. Ours
    is what this library would take on the same links.
    """
    data = json.loads(DATA.read_text())
    width, blocks = 4096, 57
    for name, known in data["models"].items():
        amounts, passes = known["GB_offloaded"], known["streams_per_iteration"]
        if amounts[0] != 0:
            continue  # no resident time was published
        outputs = round(amounts[-1] * 1e9 / (blocks * 4 * width * DTYPE.itemsize))

        def make(outputs: int = outputs) -> nn.Module:
            return nn.Sequential(*(Chain([(4096, width, outputs)] * 4) for _ in range(blocks)))

        for link, times in known["s_per_it"].items():
            rate = data["link_rates_GB_per_s"][link] * 1e9
            configure(flops_for(make, (1,), times[0] / passes), rate)
            module = distorch.distribute(make(), "sim:0,*")
            distorch.calibrate(progress=False)
            x = torch.empty(1, dtype=DTYPE, device="sim:0")
            step = recorded(module, x)
            for amount, theirs in zip(amounts[1:], times[1:], strict=True):
                if theirs is None:
                    continue
                keep = max(0, round((amounts[-1] - amount) * 1e9))
                spec = f"sim:0,{keep}b;cpu,*"
                found = compared(module, step, spec, x, min_bytes=0)
                added = times[0] + passes * amount * 1e9 / rate
                yield {
                    "model": name, "link": link, "GB": amount, "published_s": theirs,
                    "added_s": added, "added_error": added / theirs - 1,
                    "ours_predicted_s": passes * found["predicted_s"],
                    "ours_s": passes * found["measured_s"], "error": found["error"],
                }  # fmt: skip


# ---- in real time -------------------------------------------------------------------


def on_disk(rounds: int = 5) -> Iterator[dict[str, Any]]:
    """The CPU computes, and weights come from a file. Medians of interleaved rounds."""
    distorch.calibrate(progress=False)
    width, layers = 2048, 24
    now = clock_of(torch.device("cpu"))
    for tokens in (1, 64, 512):
        module = nn.Sequential(
            *(nn.Linear(width, width, bias=False) for _ in range(layers))
        ).requires_grad_(False)
        x = torch.randn(tokens, width)
        distorch.distribute(module, "cpu,*", progress=False)
        step = recorded(module, x)
        predicted = {}
        seconds: dict[str, list[float]] = {}
        specs = {"resident": "cpu,*", "half": "cpu,50%;disk,*", "all": "cpu,0b;disk,*"}
        for what, spec in specs.items():
            predicted[what] = distorch.predict(module, step, spec, min_bytes=0)
        for _ in range(rounds):
            for what, spec in specs.items():
                distorch.redistribute(module, spec, min_bytes=0, progress=False)
                for _ in range(2):
                    module(x)
                start = now()
                for _ in range(3):
                    module(x)
                seconds.setdefault(what, []).append((now() - start) / 3)
        for what, found in predicted.items():
            median = statistics.median(seconds[what])
            yield {
                "tokens": tokens, "weights": what, "predicted_s": found.seconds,
                "measured_s": median, "error": found.seconds / median - 1, "binds": found.binds,
            }  # fmt: skip


def worst(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """How far predictions are off, over many."""
    errors = sorted(abs(row["error"]) for row in rows)
    return {
        "cases": len(rows), "median": statistics.median(errors), "worst": errors[-1],
        "over_2_percent": sum(error > 0.02 for error in errors),
        "median_took_s": statistics.median(row.get("took_s", 0.0) for row in rows),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    parser.add_argument("--models", type=int, default=500, help="how many random ones")
    parser.add_argument("--only", nargs="*", metavar="PART", help="some of the parts, by name")
    arguments = parser.parse_args()
    start = time.perf_counter()
    parts: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {
        "grid": grid, "quantised": narrow, "patched": patched, "disk": disk,
        "random models": lambda: map(uneven, range(arguments.models)),
        "published": published, "CPU and disk": on_disk,
    }  # fmt: skip
    found: dict[str, Any] = {}
    for name in arguments.only or parts:
        part = parts[name]
        found[name] = list(part())
        print(name)
        show(found[name] if name != "random models" else [worst(found[name])])
    found["summary"] = {name: worst(rows) for name, rows in found.items()}
    print("summary")
    show([{"part": name, **row} for name, row in found["summary"].items()])
    print(f"{time.perf_counter() - start:.0f} s on this machine's clock")
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"torch": torch.__version__, **found}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
