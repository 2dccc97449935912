# SPDX-License-Identifier: Apache-2.0
"""What the programs of this folder share: a machine, models, and predicted against measured.

The simulator's clock is exact, so a prediction is right or wrong by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import distorch
from distorch.testing import sim

DTYPE = torch.bfloat16
RATE, LATENCY = 6.8e9, 10e-6
MB = 1 << 20
CPU = "cpu->sim:0"
ALL_AWAY = "sim:0,0b;cpu,*"


def configure(rate: float = RATE, latency: float = LATENCY, **settings: Any) -> None:
    links = {("cpu", "sim:0"): (rate, latency), **settings.pop("links", {})}
    settings = {"memory": "2tb", "flops": 35e12, "mode": "dry", **settings}
    sim.configure(links=links, **settings)


class Measured(NamedTuple):
    """Of one step in the long run: virtual seconds, and what each link (and the disk) carried."""

    seconds: float
    bytes: dict[str, float]


def measure(run: Callable[[], object], warm: int = 12, count: int = 8) -> Measured:
    """From one end of a step on the compute stream to another one, with nothing waited for in
    between: what the ring has at the beginning it has at the end. Bytes are those that the
    simulator's links carried in that time. (`stats` also counts what was given up on its way.)
    """
    if not sim.is_dry():
        warm, count = min(warm, 5), min(count, 4)  # real values take real time
    stream = torch.accelerator.current_stream(torch.device("sim:0"))
    marks = [torch.Event("sim:0", enable_timing=True) for _ in range(3)]
    run()
    sim.synchronize()
    known, zero = len(sim.timeline()), sim.now()
    marks[0].record(stream)
    for _ in range(warm):
        run()
    marks[1].record(stream)
    for _ in range(count):
        run()
    marks[2].record(stream)
    sim.synchronize()
    assert sim.races() == []
    begin, end = (zero + marks[0].elapsed_time(mark) / 1e3 for mark in marks[1:])
    carried: dict[str, float] = {}
    for span in sim.timeline()[known:]:
        if span.resource != "disk" and "->" not in span.resource:
            continue
        part = (min(span.end, end) - max(span.start, begin)) / max(span.end - span.start, 1e-12)
        if part > 0:
            nbytes = int(span.label.split()[1])
            carried[span.resource] = carried.get(span.resource, 0) + part * nbytes / count
    return Measured((end - begin) / count, carried)


def inference(module: nn.Module, *arguments: Any) -> Callable[[], object]:
    def run() -> object:
        with torch.no_grad():
            return module(*arguments)

    return run


def there(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=DTYPE, device="sim:0")


def record(module: nn.Module, run: Callable[[], object]) -> Any:
    with distorch.record_step(module) as step:
        run()
    return step


def check(
    module: nn.Module,
    run: Callable[[], object],
    spec: str,
    *,
    others: bool = False,
    within: float = 0.02,
    **options: Any,
) -> tuple[Any, Measured]:
    """Records where the module lies, predicts `spec`, goes there, measures, compares. Then
    predicts again from there, and from a step that was recorded there. `others`: not all that
    travels is weights. `within`: how far it may be off.
    """
    distorch.calibrate(progress=False)
    run()
    prediction = distorch.predict(module, record(module, run), spec, **options)
    if not any(distorch.is_sharded(p) for p in module.parameters()):
        compute = measure(run, 1, 3).seconds
        assert abs(prediction.compute_seconds / compute - 1) <= 0.02, "with all weights resident"
    distorch.redistribute(module, spec, **options)
    found = measure(run)
    agrees(prediction, found, others, within)
    agrees(distorch.predict(module, record(module, run)), found, others, within)  # as it lies now
    return prediction, found


def agrees(prediction: Any, found: Measured, others: bool = False, within: float = 0.02) -> None:
    off = abs(prediction.seconds / found.seconds - 1)
    assert off <= within, (prediction.seconds, found.seconds)
    # How the way from a disk is named, and what of it counts as RAM's link, is not promised.
    if not others and "disk" not in found.bytes:
        slack = 1.5 * within * sum(found.bytes.values()) + 64 * 1024  # rows, and their numbers
        for link in {*found.bytes, *prediction.links} - {"sim:0->cpu"}:
            said = prediction.links[link].bytes if link in prediction.links else 0
            assert abs(said - found.bytes.get(link, 0)) <= slack, link
    for name, link in prediction.links.items():
        assert 0 <= link.busy_seconds <= 1.02 * prediction.seconds, name
    assert all(seconds >= 0 for seconds in prediction.stalls.values())
    assert sum(prediction.stalls.values()) <= 1.02 * prediction.seconds
    assert prediction.binds in {"compute", "disk", "ring", "host", *prediction.links}


def linear(inputs: int, outputs: int, bias: bool = False) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=bias, dtype=DTYPE, device="meta")


def conv(inputs: int, outputs: int, size: int = 3) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, padding=size // 2, dtype=DTYPE, device="meta")


def chain(count: int, width: int = 2048) -> nn.Sequential:
    return nn.Sequential(*(linear(width, width) for _ in range(count)))


def resident(module: nn.Module) -> nn.Module:
    return distorch.distribute(module, "sim:0,*", min_bytes=0)


class Albert(nn.Module):
    """One block, run again and again."""

    def __init__(self, rounds: int = 12) -> None:
        super().__init__()
        self.rounds = rounds
        self.embed = linear(1024, 2048)
        self.block = nn.Sequential(linear(2048, 6144), linear(6144, 2048), linear(2048, 2048))
        self.head = linear(2048, 4096)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for _ in range(self.rounds):
            x = x + self.block(x)
        return self.head(x)


def ready(count: int = 6) -> tuple[nn.Module, Callable[[], object], Any]:
    """A placed module, how to run it, and a step of it."""
    distorch.calibrate(progress=False)
    module = resident(chain(count, 1024))
    run = inference(module, there(1024, 1024))
    run()
    return module, run, record(module, run)
