# SPDX-License-Identifier: Apache-2.0
"""How far a step is from max(compute, bytes / link), in the simulator's exact virtual time.

Nothing here depends on this machine: the same figures come out everywhere. Shapes, times, memory
and races are real, values are not (the simulator's dry mode).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import distorch
from distorch.testing import sim

DTYPE = torch.bfloat16
RATE, LATENCY = 6.8e9, 10e-6  # the published slow link: bytes per second, seconds
SHARES = (25, 50, 75, 100)  # percent of the model that is offloaded
RATIOS = (0.25, 0.5, 1, 2, 4)  # compute / transfer
DATA = Path(__file__).parent / "data" / "distorch2_published.json"


def linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False, dtype=DTYPE, device="meta")


class Chain(nn.Module):
    """Linears one after the other, each on so many tokens."""

    def __init__(self, layers: list[tuple[int, int, int]]) -> None:
        super().__init__()
        self.tokens = [tokens for tokens, _, _ in layers]
        self.layers = nn.ModuleList(linear(i, o) for _, i, o in layers)

    def forward(self, x: Tensor) -> Tensor:
        for tokens, layer in zip(self.tokens, self.layers, strict=True):
            layer(x.new_empty(tokens, layer.in_features))
        return x


def uniform() -> list[nn.Module]:
    return [Chain([(4096, 2048, 2048)] * 4) for _ in range(24)]


def flux_like() -> list[nn.Module]:
    """19 double and 38 single blocks, hidden size 3072, 4096 image and 512 text tokens."""
    d, text, image = 3072, 512, 4096
    stream = [(3 * d, d), (d, d), (4 * d, d), (d, 4 * d)]
    double = [(1, d, 6 * d)] * 2 + [(t, i, o) for t in (image, text) for o, i in stream]
    single = [(1, d, 3 * d), (image + text, d, 7 * d), (image + text, 5 * d, d)]
    return [Chain(double) for _ in range(19)] + [Chain(single) for _ in range(38)]


def wan_like() -> list[nn.Module]:
    """40 blocks, hidden size 5120, 8192 video and 512 text tokens."""
    d, hidden, text, video = 5120, 13824, 512, 8192
    own = [(video, d, d)] * 4
    cross = [(video, d, d), (text, d, d), (text, d, d), (video, d, d)]
    return [Chain([*own, *cross, (video, d, hidden), (video, hidden, d)]) for _ in range(40)]


class UNet(nn.Module):
    """Convolutions down and up: at the top much compute and few bytes, at the bottom neither."""

    def __init__(self, widths: tuple[int, ...] = (64, 128, 320, 640, 1280, 1280)) -> None:
        super().__init__()
        conv = lambda i, o: nn.Conv2d(i, o, 3, padding=1, bias=False, dtype=DTYPE, device="meta")  # noqa: E731
        steps = list(zip(widths, widths[1:], strict=False))
        self.down = nn.ModuleList(m for i, o in steps for m in (conv(i, i), conv(i, o)))
        self.up = nn.ModuleList(m for i, o in reversed(steps) for m in (conv(o, o), conv(o, i)))

    def forward(self, x: Tensor) -> Tensor:
        for index, layer in enumerate(self.down):
            x = layer(x)
            x = F.max_pool2d(x, 2) if index % 2 else x
        for index, layer in enumerate(self.up):
            x = F.interpolate(x, scale_factor=2) if index % 2 == 0 else x
            x = layer(x)
        return x


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "uniform blocks": (lambda: nn.Sequential(*uniform()), (1,)),
    "FLUX-like": (lambda: nn.Sequential(*flux_like()), (1,)),
    "Wan-like": (lambda: nn.Sequential(*wan_like()), (1,)),
    "U-Net": (UNet, (1, 64, 256, 256)),
}


def configure(flops: float = 35e12, rate: float = RATE, **settings: Any) -> None:
    links = {("cpu", "sim:0"): (rate, LATENCY)}
    links |= settings.pop("links", {})
    sim.configure(
        memory="2tb", flops=flops, memory_bandwidth=1e15, links=links, mode="dry", **settings
    )


def steps(module: nn.Module, shape: tuple[int, ...], count: int, warm: int) -> float:
    """Virtual seconds of one of `count` steps in a row, after `warm` others."""
    x = torch.empty(shape, dtype=DTYPE, device="sim:0")
    with torch.no_grad():
        for _ in range(warm):
            module(x)
        sim.synchronize()
        start = sim.now()
        for _ in range(count):
            module(x)
        sim.synchronize()
    return (sim.now() - start) / max(count, 1)


def flops_for(make: Callable[[], nn.Module], shape: tuple[int, ...], seconds: float) -> float:
    """The speed at which the resident model takes so long for a step."""
    configure(flops=1e12)
    module = distorch.distribute(make(), "sim:0,*")
    return 1e12 * steps(module, shape, 1, 1) / seconds


def largest_block(module: nn.Module) -> int:
    """Bytes of the largest part that runs as a whole."""
    blocks = (
        list(module.children()) if isinstance(module, nn.Sequential) else list(module.modules())
    )
    return max(
        sum(p.nbytes for p in b.parameters()) for b in blocks if isinstance(b, (Chain, nn.Conv2d))
    )


def operators(module: nn.Module, shape: tuple[int, ...]) -> list[tuple[float, str | None]]:
    """(seconds, weight or None) of every operator of the resident model, in order."""
    steps(module, shape, 0, 1)
    sim.reset()
    steps(module, shape, 1, 0)
    names = iter(name for name, _ in module.named_parameters())
    heavy = ("aten::mm", "aten::addmm", "aten::convolution_overrideable")
    return [
        (span.end - span.start, next(names) if span.label in heavy else None)
        for span in sim.timeline()
        if span.resource == "sim:0"
    ]


def bound(
    order: list[tuple[float, str | None]], sizes: dict[str, int], ring: int, rate: float
) -> float:
    """Seconds of a step below which no schedule with this ring can come that brings every
    offloaded byte in every step (one that keeps some there all the time has made them resident).

    Bytes arrive in the order of use, at the link's rate, any fraction at a time; at no moment are
    more than `ring` of them there whose operator has not ended. Latency costs nothing. This knows
    nothing of slots, prediction or streams.

    Why it is a bound: an operator starts when the one before has ended and all bytes of its weight
    are there, so by its start at least the bytes of all weights up to its own have arrived; and a
    byte takes room from its arrival to its operator's end, so arrived bytes never exceed the ring
    plus the bytes of operators that have ended. Both conditions count bytes, not which; give the
    k-th byte to arrive, in any schedule, the place of the k-th byte to be used, and both still
    hold. So the order of use is as good as any, and taking each byte as early as the link and the
    ring allow, and each operator as early as its bytes do, ends every operator no later than any
    schedule: by induction over operators, each of these times only grows with the earlier ones.
    """
    if sum(sizes.values()) <= ring:  # nothing has to travel
        return sum(seconds for seconds, _ in order)
    passes, warm = 8, 2
    now = arrived = 0.0
    ended: list[tuple[float, int]] = []  # (end, bytes given back before it) of recent operators
    asked = given = 0
    marks = []
    for _ in range(passes):
        for seconds, name in order:
            if name in sizes:
                asked += sizes[name]
                arrived += sizes[name] / rate
                # What does not fit beside bytes still held comes after their operator's end.
                late = [
                    end + (asked - before - ring) / rate
                    for end, before in ended
                    if asked > before + ring
                ]
                arrived = max(arrived, *late, 0.0)
                now = max(now, arrived)
            now += seconds
            if name in sizes:
                ended.append((now, given))
                given += sizes[name]
                ended = [(end, before) for end, before in ended if before > asked - 3 * ring]
        marks.append(now)
    # In the long run, what travels in a step takes the link's time.
    return max((marks[-1] - marks[warm - 1]) / (passes - warm), sum(sizes.values()) / rate)


def cell_of_grid(
    name: str, share: int, ratio: float
) -> tuple[nn.Module, tuple[int, ...], str, int]:
    """The model of a cell, resident on the cell's machine; the shape of its input; the placement
    that is asked for, and the bytes of its ring.
    """
    make, shape = MODELS[name]
    total = sum(p.nbytes for p in make().parameters())
    configure(flops_for(make, shape, ratio * total * share / 100 / RATE))
    module = distorch.distribute(make(), "sim:0,*")
    return module, shape, f"sim:0,{100 - share}%;cpu,*", 2 * largest_block(module)


def overlap(name: str, share: int, ratio: float) -> dict[str, Any]:
    """One cell of the grid."""
    module, shape, spec, ring = cell_of_grid(name, share, ratio)
    total = sum(p.nbytes for p in module.parameters())
    compute = steps(module, shape, 2, 1)
    order = operators(module, shape)
    distorch.redistribute(module, spec, prefetch=ring, min_bytes=0)
    report = distorch.report(module)
    assert report.ok, report.problems
    sizes = {n: p.nbytes for n, p in module.named_parameters() if report.placement[n] == "cpu"}
    link = sum(sizes.values()) / RATE
    step = steps(module, shape, 6, 3)
    peak = torch.sim.max_memory_allocated()
    best = max(bound(order, sizes, ring, RATE), compute)
    return {
        "model": name, "offloaded_percent": share, "compute_to_transfer": ratio,
        "GB": total / 1e9, "step_s": step, "compute_s": compute, "link_s": link,
        "over_floor": step / max(compute, link), "over_bound": step / best,
        "serial_over_floor": (compute + link) / max(compute, link),
        "peak_bytes": peak, "races": len(sim.races()),
    }  # fmt: skip


def grid() -> Iterator[dict[str, Any]]:
    for name in MODELS:
        for share in SHARES:
            for ratio in RATIOS:
                yield overlap(name, share, ratio)


def published() -> Iterator[dict[str, Any]]:
    """The published DisTorch 2 measurements, on the same sizes, compute times and links."""
    data = json.loads(DATA.read_text())
    for name, known in data["models"].items():
        amounts, passes = known["GB_offloaded"], known["streams_per_iteration"]
        if amounts[0] != 0:
            continue  # no resident time was published
        for link, times in known["s_per_it"].items():
            if not link.endswith("cpu"):
                continue
            yield replayed(name, link, data["link_rates_GB_per_s"][link] * 1e9,
                           amounts[-1], passes, times[0], times[-1])  # fmt: skip


def replayed(  # noqa: PLR0917
    name: str, link: str, rate: float, size: float, passes: int, resident: float, theirs: float
) -> dict[str, Any]:
    width, blocks = 4096, 57
    outputs = round(size * 1e9 / (blocks * 4 * width * DTYPE.itemsize))

    def make() -> nn.Module:
        return nn.Sequential(*(Chain([(4096, width, outputs)] * 4) for _ in range(blocks)))

    flops = flops_for(make, (1,), resident / passes)
    configure(flops, rate)
    module = distorch.distribute(make(), "sim:0,0b;cpu,*", min_bytes=0)
    moved = distorch.report(module).bytes["cpu"] * passes
    return {
        "model": name, "link": link, "GB_per_iteration": moved / 1e9, "resident_s": resident,
        "published_s": theirs, "serial_s": resident + moved / rate,
        "ours_s": passes * steps(module, (1,), 3 * passes, passes),
        "floor_s": max(resident, moved / rate), "races": len(sim.races()),
    }  # fmt: skip


def two_donors() -> Iterator[dict[str, Any]]:
    """RAM and another device, each over its own link: bytes per second together (Wan-like)."""
    rates = {"cpu": 6.8e9, "sim:1": 20e9}
    links = {(place, "sim:0"): (rate, LATENCY) for place, rate in rates.items()}
    configure(flops=1e18, devices=2, links=links)
    distorch.calibrate(progress=False)
    share = 100 * rates["cpu"] / sum(rates.values())
    for how, spec in {
        "weights apart": f"sim:0,0b;cpu,{share:.6f}%;sim:1,*",
        "weights striped": "sim:0,0b;cpu+sim:1,*",
    }.items():
        module = nn.Sequential(*wan_like())
        distorch.distribute(module, spec, prefetch=2 * largest_block(module))
        total = sum(p.nbytes for p in module.parameters())
        rate = total / steps(module, (1,), 6, 3)
        yield {"how": how, "GB_per_s": rate / 1e9, "sum_GB_per_s": sum(rates.values()) / 1e9,
               "of_sum": rate / sum(rates.values()), "races": len(sim.races())}  # fmt: skip


def bounce() -> dict[str, Any]:
    """A device without peer access: down one link, up the other, both busy (Wan-like)."""
    down, up = 12e9, 6.8e9
    links = {("sim:1", "cpu"): (down, LATENCY), ("cpu", "sim:0"): (up, LATENCY)}
    configure(flops=1e18, devices=2, links=links)
    module = distorch.distribute(nn.Sequential(*wan_like()), "sim:0,0b;sim:1,*")
    total = sum(p.nbytes for p in module.parameters())
    rate = total / steps(module, (1,), 6, 3)
    return {"GB_per_s": rate / 1e9, "slower_leg_GB_per_s": up / 1e9, "of_slower_leg": rate / up,
            "races": len(sim.races())}  # fmt: skip


def disk_model(ratio: float) -> tuple[nn.Module, tuple[int, int], float]:
    """A model, the shape of its input, and the seconds in which a simulated disk reads all of it.
    The machine computes in `ratio` times as long.
    """
    width, blocks, rate, tokens = 2048, 12, 3e9, 16
    module = nn.Sequential(
        *(nn.Linear(width, width, bias=False, dtype=DTYPE) for _ in range(blocks))
    )
    seconds = sum(p.nbytes for p in module.parameters()) / rate
    flops = 2 * tokens * width * width * blocks / (ratio * seconds)
    sim.configure(flops=flops, memory_bandwidth=1e15, links={("cpu", "sim:0"): (RATE, LATENCY)},
                  disk=(rate, 80e-6), mode="eager")  # fmt: skip
    return module, (tokens, width), seconds


def disk() -> Iterator[dict[str, Any]]:
    """All weights in files, read through pinned memory: real bytes at a simulated disk's rate."""
    for ratio in RATIOS:
        module, shape, link = disk_model(ratio)
        total = sum(p.nbytes for p in module.parameters())
        ring = 2 * max(p.nbytes for p in module.parameters())
        distorch.distribute(module, "sim:0,0b;disk,*", min_bytes=0, prefetch=ring)
        step = steps(module, shape, 6, 3)
        yield {
            "compute_to_read": ratio, "GB": total / 1e9, "step_s": step, "compute_s": ratio * link,
            "read_s": link, "over_floor": step / max(ratio * link, link),
            "serial_over_floor": (1 + ratio) / max(ratio, 1), "races": len(sim.races()),
        }  # fmt: skip


def learning() -> dict[str, Any]:
    """The first pass against a learned one, and passes after the order has changed."""
    make, shape = MODELS["uniform blocks"]
    total = sum(p.nbytes for p in make().parameters())
    configure(flops_for(make, shape, total / RATE))
    module = make()
    distorch.distribute(module, "sim:0,0b;cpu,*", prefetch=2 * largest_block(module))
    first, learned = steps(module, shape, 1, 0), steps(module, shape, 3, 2)
    blocks = list(module)
    other = nn.Sequential(*blocks[1::2], *blocks[::2])
    changed = [steps(other, shape, 1, 0) for _ in range(3)]
    return {
        "first_s": first, "learned_s": learned, "first_over_learned": first / learned,
        "changed_order_over_learned": [seconds / learned for seconds in changed],
    }  # fmt: skip


def show(rows: list[dict[str, Any]]) -> None:
    keys = list(rows[0])
    text = [[f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    widths = [max(len(k), *(len(r[i]) for r in text)) for i, k in enumerate(keys)]
    for line in (keys, *text):
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    arguments = parser.parse_args()
    start = time.perf_counter()
    found: dict[str, Any] = {
        "grid": list(grid()), "published": list(published()), "two_donors": list(two_donors()),
        "bounce": bounce(), "disk": list(disk()), "learning": learning(),
    }  # fmt: skip
    for key, value in found.items():
        print(key)
        show(value if isinstance(value, list) else [value])
    print(f"{time.perf_counter() - start:.0f} s on this machine's clock")
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"torch": torch.__version__, **found}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
