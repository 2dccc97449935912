"""A GPU measured: links, kernels, hook, overlap, and other libraries' offloading beside ours.

  links     pinned host memory to the device through the engine, beside the best plain copy of the
            same bytes (non_blocking, from torch's pinned memory and from ours), and other devices
  kernels   decoding and merging, in bytes read and written, beside a copy on the device
  hook      what an operator costs the host on a weight in the ring, beside a plain one
  overlap   a FLUX transformer's step / max(compute, bytes / link), 25 to 100 % of it offloaded
  systems   the same transformer resident, with distorch, with diffusers' group offloading (blocks
            and leaves, on streams) and accelerate's cpu_offload: step, peak memory, same bits

FLUX's blocks have their full size; there are as many as the device's memory and the host's hold.
With --device sim, or cpu (systems only), all runs tiny on the simulated accelerator, in its virtual
time, or on the host: to see that it runs. These figures say nothing about any GPU. Group offloading
is left out on the simulated one: it puts device memory into the host's tensors, which PyTorch
refuses for devices that were registered at run time.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import gc
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _flux
import hook_overhead
import torch
from _flux import FULL, TINY, Size
from _timing import clock_of, interleaved
from torch import Tensor, nn
from tqdm import tqdm

import distorch
from distorch import _donors, _ops

MB = 1 << 20
SHARES = (25, 50, 75, 100)  # percent of the model that is offloaded
CODES = ("float8_e4m3fn", "int8", "Q8_0", "Q4_0", "Q4_K", "Q6_K", "IQ4_XS")
RANKS = (16, 64)
# Of the device's memory, and of the host's, for a model's weights.
OF_DEVICE, OF_HOST = 0.6, 0.25
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Bench:
    """What is measured on, and how much."""

    device: torch.device
    rounds: int
    size: Size
    weight: int  # bytes of a weight whose travel is measured
    weights: int
    matrix: tuple[int, int]  # that kernels decode
    calls: int  # of an operator, in a turn

    def interleaved(self, calls: dict[str, Callable[[], object]]) -> dict[str, float]:
        """Median seconds of each."""
        return interleaved(calls, self.rounds, clock_of(self.device))

    def settle(self) -> None:
        """Everything that was let go is gone."""
        gc.collect()
        clock_of(self.device)()
        if self.device.type != "cpu":
            torch.accelerator.empty_cache()

    def peak(self, work: Callable[[], object]) -> int:
        """The most bytes on the device while something runs."""
        module = torch.get_device_module(self.device)
        if self.device.type == "cpu":
            return 0  # nobody counts there
        clock_of(self.device)()
        module.reset_peak_memory_stats(self.device)
        work()
        clock_of(self.device)()
        return int(module.max_memory_allocated(self.device))


# ---- links -----------------------------------------------------------------


def links(bench: Bench) -> list[Row]:
    """From the host, and from every other device: bytes per second."""
    module = torch.get_device_module(bench.device)
    others = [f"{bench.device.type}:{i}" for i in range(module.device_count())]
    return [_link(bench, donor) for donor in ("cpu", *others) if donor != str(bench.device)]


def _link(bench: Bench, donor: str) -> Row:
    total = bench.weight * bench.weights
    blank = torch.zeros(bench.weight, dtype=torch.uint8)
    sharded = [_donors.shard_on(donor, blank, bench.device, "weight") for _ in range(bench.weights)]
    ring = distorch.distribute(
        nn.Linear(2, 2), f"{bench.device},0b;cpu,*", min_bytes=0, prefetch=2 * bench.weight
    )
    target = torch.empty(bench.weight, dtype=torch.uint8, device=bench.device)
    sources = {"plain copy": blank.to(donor)}
    if donor == "cpu":
        sources = {
            "plain copy, torch's pinned memory": blank.pin_memory(),
            "plain copy, exact pinned memory": _ops.pinned_memory(bench.weight, bench.device),
        }

    def fetches() -> None:
        for weight in sharded:
            weight[:1].clone()

    def copies(source: Tensor) -> None:
        for _ in range(bench.weights):
            target.copy_(source, non_blocking=True)

    for _ in range(2):
        fetches()  # so that the order is known
    calls: dict[str, Callable[[], object]] = {
        name: lambda source=source: copies(source) for name, source in sources.items()
    }
    rates = {
        name: total / seconds
        for name, seconds in bench.interleaved({"engine": fetches, **calls}).items()
    }
    del ring
    best = max(rate for name, rate in rates.items() if name != "engine")
    return {"from": donor, "to": str(bench.device), "bytes": total, "bytes_per_s": rates,
            "engine_over_best_plain": rates["engine"] / best}  # fmt: skip


# ---- kernels ---------------------------------------------------------------


def kernels(bench: Bench) -> list[Row]:
    """Every code to bfloat16, and merges into bfloat16: bytes read and written per second."""
    rows, columns = bench.matrix
    into = torch.empty(rows, columns, dtype=torch.bfloat16, device=bench.device)
    found = []
    for code in tqdm(CODES, desc="kernels"):
        stored = _stored(code, rows, columns).to(bench.device)
        found.append(_kernel(bench, code, into, stored, None))
    base = torch.randn(rows, columns).bfloat16().to(bench.device)
    for rank in RANKS:
        terms = _ops.Terms()
        terms.add(torch.randn(rows, rank), torch.randn(rank, columns), 0.5, 0)
        found.append(_kernel(bench, f"merge, rank {rank}", into, base, terms))
    return found


def _stored(code: str, rows: int, columns: int) -> Tensor:
    elements = _ops.block_elements(code)
    if elements == 1:
        return torch.randn(rows, columns).to(getattr(torch, code))
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    nbytes = GGML_QUANT_SIZES[GGMLQuantizationType[code]][1]
    return torch.randint(0, 256, (rows, columns // elements * nbytes), dtype=torch.uint8)


def _kernel(bench: Bench, name: str, into: Tensor, stored: Tensor, terms: Any) -> Row:
    moved = stored.nbytes + into.nbytes
    source = torch.empty(moved // 2, dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    code = name if terms is None else "bfloat16"
    call = _decoding(into, stored, code, terms)
    seconds = bench.interleaved({"kernel": call, "copy": lambda: target.copy_(source)})
    return {"kernel": name, "bytes": moved,
            "bytes_per_s": {who: moved / value for who, value in seconds.items()},
            "over_copy": seconds["copy"] / seconds["kernel"]}  # fmt: skip


def _decoding(into: Tensor, stored: Tensor, code: str, terms: Any) -> Callable[[], object]:
    """The operator with its factors on the device already, as fetches have them."""
    if terms is None:
        return lambda: _ops.decode(into, stored, code)
    there = _ops.Terms(
        [up.to(into.device) for up in terms.ups], [down.to(into.device) for down in terms.downs],
        terms.strengths, terms.first_rows,
    )  # fmt: skip
    return lambda: _ops.decode(into, stored, code, terms=there)


def hook(bench: Bench) -> list[Row]:
    """Host time of operators on tiny tensors, plain and on weights in the ring."""
    with torch.inference_mode():
        return hook_overhead.ops_on(bench.device, 4 * bench.rounds, bench.calls)


# ---- a FLUX transformer ----------------------------------------------------


def step_seconds(bench: Bench, step: Callable[[], object]) -> float:
    """Median seconds, after two steps that warm up and learn the order."""
    now = clock_of(bench.device)
    for _ in range(2):
        step()
    seconds = []
    for _ in range(bench.rounds):
        start = now()
        step()
        seconds.append(now() - start)
    return statistics.median(seconds)


def overlap(bench: Bench, base: nn.Module, rate: float) -> list[Row]:
    """Shares of the model offloaded to RAM, all with a ring of two blocks, against the floor."""
    arguments = _flux.inputs(bench.size, bench.device)
    ring = 2 * _flux.largest_block(base)
    module = _flux.resident(copy.deepcopy(base), bench.device)
    rows = []
    with torch.no_grad():
        wanted = module(**arguments)[0]
        compute = step_seconds(bench, lambda: module(**arguments))
        distorch.distribute(module, f"{bench.device},*", min_bytes=_flux.MATRICES)
        for share in tqdm(SHARES, desc="overlap"):
            spec = f"{bench.device},{100 - share}%;cpu,*"
            distorch.redistribute(module, spec, prefetch=ring)
            report = distorch.report(module)
            assert report.ok, report.problems
            assert torch.equal(module(**arguments)[0], wanted), "not the bits of the resident model"
            step = step_seconds(bench, lambda: module(**arguments))
            link = report.bytes["cpu"] / rate
            rows.append({
                "offloaded_percent": share, "bytes": report.bytes["cpu"], "ring": ring,
                "step_s": step, "compute_s": compute, "link_s": link,
                "over_floor": step / max(compute, link),
            })  # fmt: skip
    return rows


def systems(bench: Bench, base: nn.Module) -> list[Row]:
    """Each on its own copy of the model, one after the other; resident first and last."""
    ring = 2 * _flux.largest_block(base)
    rows = {"resident": _system(bench, base, "resident", _flux.resident, None)}
    wanted = rows["resident"].pop("result")

    def add(name: str, offload: _flux.Offloader) -> Row:
        rows[name] = _system(bench, base, name, offload, wanted)
        return rows[name]

    ours = add("distorch", _flux.streamed(ring))
    add("accelerate cpu_offload", _flux.accelerate_offloading)
    if bench.device.type != "sim":
        streams = bench.device.type == "cuda"
        how = "on streams" if streams else "without streams"
        theirs = add(f"diffusers group offloading, blocks, {how}",
                     _flux.group_offloading(leaves=False, streams=streams))  # fmt: skip
        add(f"diffusers group offloading, leaves, {how}",
            _flux.group_offloading(leaves=True, streams=streams))  # fmt: skip
        spare = max(0, theirs["peak_bytes"] - ours["peak_bytes"])
        equal = add("distorch, memory of group offloading", _flux.streamed(ring, spare))
        equal["over_group_offloading"] = equal["step_s"] / theirs["step_s"]
    add("resident, again", _flux.resident)
    return list(rows.values())


def _system(
    bench: Bench, base: nn.Module, name: str, offload: _flux.Offloader, wanted: Tensor | None
) -> Row:
    tqdm.write(f"  {name} ...")
    bench.settle()
    module = offload(copy.deepcopy(base), bench.device)
    arguments = _flux.inputs(bench.size, bench.device)
    with torch.no_grad():
        result = module(**arguments)[0].cpu()
        if wanted is not None:
            assert torch.equal(result, wanted), f"{name}: not the bits of the resident model"
        step = step_seconds(bench, lambda: module(**arguments))
        peak = bench.peak(lambda: module(**arguments))
    row = {"system": name, "step_s": step, "peak_bytes": peak}
    return row if wanted is not None else {**row, "result": result}


# ---- the program -----------------------------------------------------------


def fitting(device: torch.device) -> Size:
    """FLUX, with as many blocks as fit: in the same proportion, one of each at least."""
    import psutil

    free = torch.get_device_module(device).mem_get_info(device)[0]
    room = min(free * OF_DEVICE, psutil.virtual_memory().available * OF_HOST)
    double, single = _flux.block_bytes(FULL)
    share = min(1.0, room / (FULL.double * double + FULL.single * single))
    return dataclasses.replace(
        FULL,
        double=max(1, int(FULL.double * share)), single=max(1, int(FULL.single * share)),
    )  # fmt: skip


def bench_on(options: argparse.Namespace) -> Bench:
    device = torch.device("cpu") if options.device == "cpu" else torch.device(options.device, 0)
    if device.type != "cuda":
        return Bench(device, options.rounds, TINY, 1 << 16, 8, (96, 512), 20)
    size = fitting(device)
    given = {"double": options.double, "single": options.single}
    size = dataclasses.replace(size, **{k: v for k, v in given.items() if v is not None})
    return Bench(device, options.rounds, size, 64 * MB, 32, (12288, 3072), 300)


def card(device: torch.device) -> Row:
    """What all this was measured on."""
    if device.type != "cuda":
        return {"card": f"none: {device.type}"}
    facts = torch.cuda.get_device_properties(device)
    return {"card": facts.name, "memory": facts.total_memory, "cuda": torch.version.cuda,
            "capability": f"{facts.major}.{facts.minor}"}  # fmt: skip


def prepare(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Ends with an error where there is nothing to measure on."""
    if options.device == "sim":
        from distorch.testing import sim

        sim.configure(devices=2, memory="256mb", links={("sim:1", "sim:0"): (50e9, 5e-6)},
                      mode="eager")  # fmt: skip
        return
    if options.device == "cpu":
        if options.only != ["systems"]:
            parser.error("--device cpu: expected --only systems")
        return
    if not torch.cuda.is_available():
        parser.error(
            f"there is no CUDA device here (torch {torch.__version__}, built for CUDA "
            f"{torch.version.cuda}): expected a GPU, its driver, and a torch for CUDA. To see "
            "this program run without one: --device sim"
        )
    if not _ops.can_decode(torch.device("cuda")):
        parser.error("distorch was built without kernels for CUDA: DISTORCH_CUDA=1 says why")
    torch.cuda.set_device(0)


SECTIONS = ("links", "kernels", "hook", "overlap", "systems")


def measure(bench: Bench, chosen: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if {"links", "overlap"} & set(chosen):
        found["links"] = _told("links", links(bench))
    for name, section in (("kernels", kernels), ("hook", hook)):
        if name in chosen:
            found[name] = _told(name, section(bench))
    if not {"overlap", "systems"} & set(chosen):
        return found
    base = _flux.transformer(bench.size)
    found["model"] = {
        "blocks": [bench.size.double, bench.size.single], "bytes": _flux.nbytes(base),
        "tokens": [bench.size.image, bench.size.text],
    }  # fmt: skip
    if "overlap" in chosen:
        rates = found["links"][0]["bytes_per_s"]
        best = max(rate for name, rate in rates.items() if name != "engine")
        found["overlap"] = _told("overlap", overlap(bench, base, best))
    if "systems" in chosen:
        found["systems"] = _told("systems", systems(bench, base))
    return found


def _told(name: str, rows: list[Row]) -> list[Row]:
    for row in rows:
        tqdm.write(f"{name}: {json.dumps(row)}")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--device", choices=["cuda", "sim", "cpu"], default="cuda", help="(default cuda)"
    )
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--rounds", type=int, default=15, help="of each measurement (default 15)")
    parser.add_argument("--double", type=int, help="double blocks (default: what fits, up to 19)")
    parser.add_argument("--single", type=int, help="single blocks (default: what fits, up to 38)")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    options = parser.parse_args()
    prepare(parser, options)
    bench = bench_on(options)
    facts = {"torch": torch.__version__, "distorch": distorch.__version__, **card(bench.device)}
    tqdm.write(json.dumps(facts))
    found = {**facts, "rounds": bench.rounds, **measure(bench, options.only)}
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
