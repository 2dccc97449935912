# SPDX-License-Identifier: Apache-2.0
"""Quantised weights on donors: on the simulated accelerator, and from a cold file on this machine.

Simulated (virtual time, exact): a step against max(compute + decode, quantised bytes / link).
Cold file: all weights of a GGUF on disk, a step against max(resident compute + decode, raw read of
the quantised bytes), in one run, page cache dropped before each, medians. Each is timed several
times in a row: reads go past the page cache, where the file system has such reads, so that it stays
cold.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from _workers import drop_page_cache
from overlap import DTYPE, LATENCY, RATE, flops_for, largest_block, steps, uniform
from torch import Tensor, nn

import distorch
from distorch import _donors, _ops
from distorch._behaviour import replace_data
from distorch.runtime import placing
from distorch.testing import sim

BANDWIDTH = 900e9  # of the simulated device's memory
BLOCKS = {"Q8_0": (32, 34), "Q4_K": (256, 144)}  # elements, bytes
# What is read ahead for the first step, before the clock starts, counts little.
IN_A_ROW = 3


def quantise(module: nn.Module, kind: str) -> tuple[int, float]:
    """Gives every weight quantised bytes in RAM instead of its own: (bytes, decode seconds)."""
    compute = torch.device("sim:0")
    elements, nbytes = BLOCKS[kind]
    total, seconds = 0, 0.0
    for name, parameter in module.named_parameters():
        count = parameter.numel() // elements * nbytes
        blocks = torch.empty(count, dtype=torch.uint8, device="meta")
        stored = _donors.shard_on("cpu", blocks, compute, name)
        replace_data(parameter, _ops.decoded(stored, kind, DTYPE, parameter.shape, name=name))
        total += count
        seconds += (count + parameter.numel() * DTYPE.itemsize) / BANDWIDTH
    placing.refresh(module)
    return total, seconds


def simulated() -> Iterator[dict[str, Any]]:
    """Uniform blocks, everything offloaded, compute-to-transfer ratios from 0.25 to 4."""
    make: Callable[[], nn.Module] = lambda: nn.Sequential(*uniform())  # noqa: E731
    for kind, (elements, nbytes) in BLOCKS.items():
        wide = sum(p.numel() for p in make().parameters())
        for ratio in (0.25, 0.5, 1, 2, 4):
            seconds = ratio * wide / elements * nbytes / RATE
            flops = flops_for(make, (1,), seconds)
            sim.configure(
                memory="2tb", flops=flops, memory_bandwidth=BANDWIDTH, mode="dry",
                links={("cpu", "sim:0"): (RATE, LATENCY)},
            )  # fmt: skip
            module = distorch.distribute(make(), "sim:0,*")
            compute = steps(module, (1,), 2, 1)
            block = largest_block(module)
            ring = round(2 * block * (1 + nbytes / elements / DTYPE.itemsize))
            distorch.redistribute(module, "sim:0,0b;cpu,*", min_bytes=0, prefetch=ring)
            stored, decode = quantise(module, kind)
            step = steps(module, (1,), 6, 3)
            floor = max(compute + decode, stored / RATE)
            yield {
                "type": kind, "compute_to_transfer": ratio, "compute_s": compute,
                "decode_s": decode, "link_s": stored / RATE, "step_s": step,
                "over_floor": step / floor, "races": len(sim.races()),
            }  # fmt: skip


# ---- from a cold file ---------------------------------------------------------------


class Stack(nn.Module):
    """Square linears, `tokens` at a time."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Linear(width, width, bias=False, dtype=DTYPE, device="meta") for _ in range(layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def write_file(path: Path, kind: str, layers: int, width: int) -> None:
    """Random blocks with small scales."""
    import gguf
    import numpy as np

    elements, nbytes = BLOCKS[kind]
    generator = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "benchmark", use_temp_file=True)
    for i in range(layers):
        blocks = generator.integers(0, 256, (width, width // elements, nbytes), dtype=np.uint8)
        blocks[:, :, :2] = np.float16(1e-6 if kind == "Q4_K" else 1e-3).reshape(1).view(np.uint8)
        blocks[:, :, 2:4] = 0 if kind == "Q4_K" else blocks[:, :, 2:4]
        raw = blocks.reshape(width, -1)
        writer.add_tensor(f"layers.{i}.weight", raw, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def timed(work: Callable[[], object]) -> float:
    drop_page_cache()
    start = time.perf_counter()
    for _ in range(IN_A_ROW):
        work()
    return (time.perf_counter() - start) / IN_A_ROW


def raw_read(tensors: dict[str, Any], buffer: Tensor) -> None:
    """All bytes to a buffer, without a copy on the way."""
    for tensor in tensors.values():
        tensor.read(buffer)


def decode_all(stored: dict[str, Tensor], kind: str, into: Tensor) -> None:
    for blocks in stored.values():
        _ops.decode(into, blocks, kind)


def cold(kind: str, layers: int, width: int, tokens: int, rounds: int) -> dict[str, Any]:
    """Medians of steps from a cold file, and of what they are held against."""
    from distorch.formats.checkpoint import open_checkpoint

    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        path = Path(folder) / "model.gguf"
        write_file(path, kind, layers, width)
        tensors = open_checkpoint(path).tensors
        on_disk = distorch.load(Stack(layers, width), path, "cpu,0b;disk,*", progress=False)
        resident = distorch.load(
            Stack(layers, width), path, "cpu,*", resident="dequantised", progress=False
        )
        stored = {name: tensor.read() for name, tensor in tensors.items()}
        x = torch.randn(tokens, width, dtype=DTYPE)
        buffer = torch.zeros(max(t.room for t in tensors.values()), dtype=torch.uint8)
        into = torch.zeros(width, width, dtype=DTYPE)
        assert torch.equal(on_disk(x), resident(x))
        work: dict[str, Callable[[], object]] = {
            "step from the file": lambda: on_disk(x),
            "resident step": lambda: resident(x),
            "raw read": lambda: raw_read(tensors, buffer),
            "decode": lambda: decode_all(stored, kind, into),
        }
        times: dict[str, list[float]] = {name: [] for name in work}
        for _ in range(rounds):
            for name, run in work.items():
                times[name].append(timed(run))
    found = {name: statistics.median(values) for name, values in times.items()}
    floor = max(found["resident step"] + found["decode"], found["raw read"])
    size = sum(tensor.nbytes for tensor in tensors.values())
    return {"type": kind, "bytes": size, "tokens": tokens, **found,
            "over_floor": found["step from the file"] / floor}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    found: dict[str, Any] = {"simulated": list(simulated()), "cold": []}
    for row in found["simulated"]:
        print(json.dumps(row))
    for kind in BLOCKS:
        for tokens in (8, 512):
            found["cold"].append(cold(kind, options.layers, options.width, tokens, options.rounds))
            print(json.dumps(found["cold"][-1]), flush=True)
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
