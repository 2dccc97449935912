# SPDX-License-Identifier: Apache-2.0
"""`distorch demo`: digits from a transformer whose weights are on donors, and the proof."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from distorch.api import distribute, undistribute
from distorch.demo.model import DigitConfig, DigitTransformer
from distorch.demo.sampling import sample, save_png, sheet
from distorch.display.progress import progress_of
from distorch.loading import init_empty_weights, load
from distorch.machine.machine import default_compute
from distorch.reporting import Report, Stats, report, reset_stats, stats
from distorch.runtime.options import PlacementOptions

# Small enough that this small model really streams: a few weights at a time.
RING_BYTES = 2 << 20
WEIGHTS = Path(__file__).parent / "weights"
_EMULATED = 4  # how much slower products of bfloat16 are than those of float32, then
BASE = WEIGHTS / "digits-dit-bf16.safetensors"
LORA = WEIGHTS / "digits-negative-lora.safetensors"


@dataclass(frozen=True)
class Outcome:
    """One comparison: seconds of sampling resident and distributed, and whether all bits agree."""

    title: str
    resident_seconds: float
    distributed_seconds: float
    same_bits: bool
    images: Tensor
    report: Report
    stats: Stats


def _config() -> DigitConfig:
    with safe_open(BASE, framework="pt") as file:
        return DigitConfig(**json.loads(file.metadata()["config"]))


def quick_dtype(device: torch.device) -> torch.dtype:
    """bfloat16, as the file has it; float32 on a CPU that only emulates bfloat16 products."""
    if device.type != "cpu":
        return torch.bfloat16

    def seconds(dtype: torch.dtype) -> float:
        a, b = (torch.ones(256, 256, dtype=dtype) for _ in range(2))
        took = []
        for _ in range(3):
            start = time.perf_counter()
            a @ b
            took.append(time.perf_counter() - start)
        return min(took)

    emulated = seconds(torch.bfloat16) > _EMULATED * seconds(torch.float32)
    return torch.float32 if emulated else torch.bfloat16


def resident_model(strength: float, device: torch.device) -> DigitTransformer:
    """The reference, in plain PyTorch: merged in fp32, rounded once to bfloat16."""
    weights = load_file(BASE)
    if strength:
        factors = load_file(LORA)
        with safe_open(LORA, framework="pt") as file:
            scale = strength * float(file.metadata()["lora_alpha"]) / int(file.metadata()["r"])
        for key, down in factors.items():
            if not key.endswith(".lora_A.weight"):
                continue
            up = factors[key.replace(".lora_A.", ".lora_B.")]
            name = key.removeprefix("base_model.model.").replace(".lora_A.weight", ".weight")
            merged = weights[name].float() + scale * (up.float() @ down.float())
            weights[name] = merged.to(weights[name].dtype)
    with init_empty_weights():
        model = DigitTransformer(_config())
    model.load_state_dict(weights, assign=True)
    return model.to(device).eval()


def default_spec() -> str:
    """A quarter resident, the rest on donors: RAM beside an accelerator, else the disk."""
    compute = default_compute(())
    return "cpu,25%;disk,75%" if compute == "cpu" else f"{compute},25%;cpu,75%"


def _timed(model: DigitTransformer, labels: Tensor, steps: int, title: str) -> tuple[Tensor, float]:
    with progress_of(None, steps, title, "steps") as done:
        start = time.perf_counter()
        images = sample(model, labels, steps=steps, on_step=lambda: done(1))
        return images, time.perf_counter() - start


def distributed_model(strength: float, spec: str, dtype: torch.dtype) -> DigitTransformer:
    """The same on donors: from the file to its places, or in another dtype from memory."""
    with init_empty_weights():
        model = DigitTransformer(_config())
    loras = [(LORA, strength)] if strength else []
    options: PlacementOptions = {"min_bytes": 0, "prefetch": RING_BYTES}
    if dtype == torch.bfloat16:
        return load(model, BASE, spec, loras=loras, progress=False, **options).eval()
    load(model, BASE, f"{default_compute(())},*", loras=loras, progress=False)
    wide = undistribute(model).to(dtype)
    return distribute(wide, spec, progress=False, **options).eval()


def compare(spec: str, strength: float, *, count: int, steps: int, dtype: torch.dtype) -> Outcome:
    """Samples the same digits with the resident and with the distributed model."""
    labels = torch.arange(count) % 10
    model = distributed_model(strength, spec, dtype)
    plain = resident_model(strength, torch.device(report(model).compute)).to(dtype)
    for warm_up in (plain, model):
        sample(warm_up, labels, steps=2)
    reset_stats(model)
    title = f"LoRA {strength:g}" if strength else "no LoRA"
    wanted, resident_seconds = _timed(plain, labels, steps, f"{title}, resident")
    images, seconds = _timed(model, labels, steps, f"{title}, distributed")
    same = torch.equal(images.view(torch.int32), wanted.view(torch.int32))
    return Outcome(title, resident_seconds, seconds, same, images, report(model), stats(model))


def run_demo(
    out: Path, *, spec: str | None = None, count: int = 50, steps: int = 24,
    strengths: Sequence[float] = (0.0, 1.0),
) -> bool:  # fmt: skip
    """Runs the demo, writes the picture, prints the tables. True when every bit agrees."""
    chosen = spec or default_spec()
    dtype = quick_dtype(torch.device(default_compute(())))
    why = ", as bfloat16 is emulated on this CPU" if dtype == torch.float32 else ""
    print(f"placement {chosen!r}; {count} digits, {steps} steps, two passes a step, {dtype}{why}\n")
    outcomes = [
        compare(chosen, strength, count=count, steps=steps, dtype=dtype) for strength in strengths
    ]
    last = outcomes[-1]
    print(last.report, last.stats, sep="\n\n")
    print()
    for outcome in outcomes:
        verdict = "every bit the same" if outcome.same_bits else "BITS DIFFER"
        print(
            f"{outcome.title:8}  resident {outcome.resident_seconds:6.2f} s   "
            f"distributed {outcome.distributed_seconds:6.2f} s   {verdict}"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    save_png(out, sheet(torch.cat([outcome.images for outcome in outcomes])))
    print(f"picture: {out}")
    return all(outcome.same_bits and outcome.report.ok for outcome in outcomes)
