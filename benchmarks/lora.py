# SPDX-License-Identifier: Apache-2.0
"""Load-Patch-Distribute of a large checkpoint with a LoRA on every linear layer.

Each measurement is a process of its own, in rotated order, medians of several; the page cache is
dropped before each (where that is allowed), and as much memory as it takes was touched just before.
`load` is held against the slower of its two parts: reading the file (into two buffers in turn, and
into memory that stays), and merging what is in memory already. Beside it the usual way: the whole
model into RAM by transformers' / accelerate's loader, then PEFT's merge.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _workers import drop_page_cache, touch_memory
from load_memory import model, status_bytes, write_checkpoint
from torch import Tensor

RANK = 64
BANDWIDTH = 900e9  # of the simulated device's memory, bytes per second


def lora_state(layers: int, width: int) -> dict[str, Tensor]:
    """Random factors for every layer of `load_memory.model`."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for i in range(layers):
        down = torch.randn(RANK, width, generator=generator) / width**0.5
        up = torch.randn(width, RANK, generator=generator) / RANK
        state[f"base_model.model.{i}.lora_A.weight"] = down.bfloat16()
        state[f"base_model.model.{i}.lora_B.weight"] = up.bfloat16()
    return state


class Clock:
    """Seconds and the growth of the peak of resident memory of a block, which will need so much
    `new_memory` (bytes).
    """

    def __init__(self, new_memory: int = 0) -> None:
        self._new_memory = new_memory

    def __enter__(self) -> Clock:
        touch_memory(self._new_memory)
        Path("/proc/self/clear_refs").write_text("5")
        self._before = status_bytes("VmRSS")
        self._start = time.perf_counter()
        return self

    def __exit__(self, *args: object) -> None:
        self.seconds = time.perf_counter() - self._start
        self.peak = status_bytes("VmHWM") - self._before

    def result(self) -> dict[str, float]:
        return {"seconds": self.seconds, "peak_bytes": self.peak}


def measure_read(options: argparse.Namespace) -> dict[str, Any]:
    """The file's bytes into two buffers in turn, as load reads them."""
    from distorch import _ops

    nbytes = 2 * options.width**2
    buffers = [torch.zeros(nbytes, dtype=torch.uint8) for _ in range(2)]
    start = options.checkpoint.stat().st_size - options.layers * nbytes
    with Clock() as clock:
        for i in range(options.layers):
            _ops.read_file(str(options.checkpoint), start + i * nbytes, buffers[i % 2])
    return clock.result()


def measure_read_into_new_memory(options: argparse.Namespace) -> dict[str, Any]:
    """The same into memory that stays, as whoever brings a model there has to."""
    from distorch import _ops

    shape = (options.width, options.width)
    nbytes = 2 * options.width**2
    start = options.checkpoint.stat().st_size - options.layers * nbytes
    path, kept = str(options.checkpoint), []
    with Clock(options.layers * nbytes) as clock:
        for i in range(options.layers):
            kept.append(_ops.read_tensor(path, start + i * nbytes, shape, torch.bfloat16))
    return clock.result()


def measure_merge(options: argparse.Namespace) -> dict[str, Any]:
    """Merges of weights that are in memory."""
    from distorch.lora import LoraReader, merge

    shapes = {f"{i}.weight": (options.width, options.width) for i in range(options.layers)}
    patches, _ = LoraReader(shapes).read([(lora_state(options.layers, options.width), 0.5)], True)
    weights = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    for weight in weights.values():
        weight.fill_(0.5)
    with Clock() as clock:
        for name, weight in weights.items():
            merge(patches.of([name]), weight, torch.bfloat16, in_place=True)
    return clock.result()


def measure_load(options: argparse.Namespace, mode: str = "merge") -> dict[str, Any]:
    """load with the LoRA, another strength, and what both took."""
    import distorch

    style = lora_state(options.layers, options.width)
    module = model(options.layers, options.width)
    arguments = {"lora_mode": mode, "progress": False, "prefetch": "128mb"}
    with Clock(options.checkpoint.stat().st_size) as clock:
        distorch.load(module, options.checkpoint, options.spec, loras=[(style, 0.5)], **arguments)
    found = {"load": clock.result()}
    for name, strength in (("first change", 0.7), ("second change", 0.3)):
        with Clock() as clock:
            distorch.set_loras(module, [(style, strength)], progress=False)
        found[name] = clock.result()
    half = {key: value for key, value in style.items() if int(key.split(".")[2]) % 4 == 0}
    distorch.set_loras(module, [(half, 0.5)], progress=False)
    with Clock() as clock:
        distorch.set_loras(module, [(half, 0.7)], progress=False)
    found["a quarter of the weights"] = clock.result()
    x = torch.ones(1, options.width, dtype=torch.bfloat16)
    with torch.no_grad(), Clock() as clock:
        module(x)
    found["step"] = clock.result()
    return found


def measure_fetch(options: argparse.Namespace) -> dict[str, Any]:
    """The same with patches at fetch."""
    return measure_load(options, "fetch")


def measure_background(options: argparse.Namespace) -> dict[str, Any]:
    """The same, merged while the model is used: `first step` begins at once,
    `merged` is from the start of the load or change until nothing is left to merge.
    """
    import distorch

    style = lora_state(options.layers, options.width)
    module = model(options.layers, options.width)
    x = torch.ones(1, options.width, dtype=torch.bfloat16)
    arguments = {"lora_mode": "background", "progress": False, "prefetch": "128mb"}
    changes: dict[str, Callable[[], object]] = {
        "load": lambda: distorch.load(
            module, options.checkpoint, options.spec, loras=[(style, 0.5)], **arguments
        ),
        "first change": lambda: distorch.set_loras(module, [(style, 0.7)], progress=False),
        "second change": lambda: distorch.set_loras(module, [(style, 0.3)], progress=False),
    }
    found = {}
    for name, change in changes.items():
        new_memory = options.checkpoint.stat().st_size if name == "load" else 0
        with Clock(new_memory) as merged:
            with Clock() as clock:
                change()
            found[name] = clock.result()
            if name == "second change":
                with torch.no_grad(), Clock() as clock:
                    module(x)
                found["first step"] = clock.result()
            distorch.finish_merging(module, progress=False)
        found[f"{name}, merged"] = merged.result()
    with torch.no_grad(), Clock() as clock:
        module(x)
    found["step"] = clock.result()
    return found


def measure_peft(options: argparse.Namespace) -> dict[str, Any]:
    """accelerate's loader into RAM, PEFT's adapters, merge_and_unload."""
    from accelerate import load_checkpoint_in_model
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

    style = lora_state(options.layers, options.width)
    module = model(options.layers, options.width).to_empty(device="cpu")
    names = [str(i) for i in range(options.layers)]
    with Clock(2 * options.checkpoint.stat().st_size) as clock:
        load_checkpoint_in_model(module, str(options.checkpoint))
        adapted = get_peft_model(module, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=names))
        set_peft_model_state_dict(adapted, style)
        adapted.merge_and_unload()
    return clock.result()


def zero_load() -> list[dict[str, float]]:
    """Everything in RAM, patched in fetches, on the simulated accelerator (virtual time, exact):
    a step against max(compute + patching, bytes / link), and against the step without LoRAs.
    """
    from overlap import LATENCY, RATE, flops_for, largest_block, steps, uniform

    import distorch
    from distorch.testing import sim

    def make() -> torch.nn.Module:
        return torch.nn.Sequential(*uniform())

    found = []
    for ratio in (0.25, 0.5, 1, 2, 4):
        weights = list(make().named_parameters())
        nbytes = sum(p.nbytes for _, p in weights)
        flops = flops_for(make, (1,), ratio * nbytes / RATE)
        sim.configure(
            memory="2tb", flops=flops, memory_bandwidth=BANDWIDTH, mode="dry",
            links={("cpu", "sim:0"): (RATE, LATENCY)},
        )  # fmt: skip
        compute = steps(distorch.distribute(make(), "sim:0,*"), (1,), 2, 1)
        style, patching = {}, 0.0
        for name, weight in weights:
            rows, columns = weight.shape
            stem = name.removesuffix(".weight")
            style[f"{stem}.lora_up.weight"] = torch.zeros(rows, RANK)
            style[f"{stem}.lora_down.weight"] = torch.zeros(RANK, columns)
            moved = (2 * weight.nbytes + 4 * RANK * (rows + columns)) / BANDWIDTH
            patching += max(2 * RANK * weight.numel() / flops, moved)
        ring = 4 * largest_block(make())
        module = distorch.distribute(make(), "sim:0,0b;cpu,*", min_bytes=0, prefetch=ring)
        bare = steps(module, (1,), 6, 3)
        distorch.set_loras(module, [(style, 1.0)], lora_mode="fetch")
        step = steps(module, (1,), 6, 3)
        found.append({
            "compute_to_transfer": ratio, "compute_s": compute, "patching_s": patching,
            "link_s": nbytes / RATE, "step_without_s": bare, "step_s": step,
            "over_floor": step / max(compute + patching, nbytes / RATE),
            "races": len(sim.races()),
        })  # fmt: skip
    return found


MEASUREMENTS = {
    "raw read": measure_read,
    "raw read into new memory": measure_read_into_new_memory,
    "merge alone": measure_merge,
    "distorch": measure_load,
    "distorch, at fetch": measure_fetch,
    "distorch, in the background": measure_background,
    "accelerate + PEFT": measure_peft,
}


def child(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """One measurement in a process of its own, from a cold file."""
    drop_page_cache()
    arguments = ["--layers", options.layers, "--width", options.width, "--spec", options.spec]
    command = [sys.executable, __file__, *map(str, arguments), "--measure", name]
    command += ["--checkpoint", str(options.checkpoint)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def median_of(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians of runs with the same keys, however deep."""
    return {
        key: median_of([run[key] for run in runs])
        if isinstance(value, dict)
        else statistics.median(run[key] for run in runs)
        for key, value in runs[0].items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=128)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--spec", default="cpu,*")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--folder", type=Path, help="where the checkpoint is written")
    parser.add_argument("--measure", choices=MEASUREMENTS, help=argparse.SUPPRESS)
    parser.add_argument("--checkpoint", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(MEASUREMENTS[options.measure](options)))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        options.checkpoint = Path(folder) / "model.safetensors"
        write_checkpoint(options.checkpoint, options.layers, options.width)
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in MEASUREMENTS}
        names = list(MEASUREMENTS)
        for turn in range(options.rounds):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                runs[name].append(child(name, options))
                print(name, json.dumps(runs[name][-1]), flush=True)
    medians = {name: median_of(found) for name, found in runs.items()}
    load, merging = medians["distorch"]["load"]["seconds"], medians["merge alone"]["seconds"]
    reading = {name: medians[name]["seconds"] for name in medians if name.startswith("raw read")}
    summary = {
        "checkpoint_bytes": 2 * options.layers * options.width**2,
        "rank": RANK,
        **{f"load / max({name}, merge)": load / max(s, merging) for name, s in reading.items()},
        "load / first change": load / medians["distorch"]["first change"]["seconds"],
        "medians": medians,
        "zero-load with LoRAs at fetch, simulated": zero_load(),
        "runs": runs,
    }
    print(json.dumps({k: v for k, v in summary.items() if k != "runs"}, indent=1))
    if options.out:
        options.out.write_text(json.dumps(summary, indent=1) + "\n")


if __name__ == "__main__":
    main()
