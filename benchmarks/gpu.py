# SPDX-License-Identifier: Apache-2.0
"""A GPU measured: links, kernels, hook, overlap, and other libraries' offloading beside ours.

  links     pinned host memory to the device through the engine, beside the best plain copy of the
            same bytes (non_blocking, from torch's pinned memory and from ours), and other devices
  kernels   a copy on the device, then decoding and merging: bytes read and written per second, in
            turn on as many buffers as four times the L2 cache
  hook      what an operator costs the host on a weight in the ring, beside a plain one
  overlap   a FLUX transformer's step / max(compute, bytes / link), 25 to 100 % of it offloaded
  systems   the same transformer resident, with distorch, with diffusers' group offloading (blocks
            and leaves, on streams), accelerate's cpu_offload, blocks moved by hand with .to(), and
            NVIDIA's FlexTensor where it is installed: step, peak memory, same bits

Rates and steps are timed by the device's events; steps by the host's clock, too ("wall_s").

FLUX's blocks have their full size. There are 4 double and 8 single ones (5 GB), with --full 19 and
38 (22 GB), or as many as the device's memory and the host's hold. Weights are made on the device,
anew and the same for each system.

--json FILE is written anew, in one go, after every row: a run that is killed leaves what it has
measured. A file that is there already keeps its other sections, so that several runs with --only
fill one file; overlap takes the link's rate from it, or measures it.

Meant to take less than 70 s for links, kernels and hook, and less than 100 s for overlap and
systems, on an H100. That is an estimate: it has not run on one yet.

With --device sim, or cpu (systems only), all runs tiny on the simulated accelerator, in its virtual
time, or on the host: to see that it runs. These figures say nothing about any GPU. Group offloading
is left out on the simulated one: it puts device memory into the host's tensors, which PyTorch
refuses for devices that were registered at run time.
"""

# The estimate: 15 s to start a process. links: 3 kinds of copies of 2 GB, 16 times, at 25 GB/s, 4
# s, and 4 s to pin and fill memory. kernels: 9 of them and a copy, 3 s. hook: 12 operators, plain
# and in the ring, 61 turns of 300 calls of 20 us, 9 s. That is 35 s. overlap: 5 GB pinned and
# filled 4 times, 8 s; 4 shares, 2 steps to begin with and 15 more, or as many as 2 s hold, 10 s.
# systems: 8 of them, for each 1 s to make the weights, 3 s to offload and pin them, 4 steps beside
# those that count, and 15 of these, or as many as 2 s hold (3 at least). A step takes 50 ms
# resident, 0.2 s at the link's rate, 0.5 to 1.5 s through memory that is not pinned: 7 s each on
# average, 56 s. That is 89 s. FlexTensor would add about 8 s.

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import importlib
import importlib.util
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import _flux
import hook_overhead
import torch
from _flux import FULL, TINY, Size
from _results import Results
from _timing import Times, clock_of, interleaved_on, times_of
from torch import Tensor, nn
from tqdm import tqdm

import distorch
from distorch import _donors, _ops

MB = 1 << 20
SHARES = (25, 50, 75, 100)  # percent of the model that is offloaded
CODES = ("float8_e4m3fn", "int8", "Q8_0", "Q4_0", "Q4_K", "Q6_K", "IQ4_XS")
RANKS = (16, 64)
BLOCKS = (4, 8)  # double and single ones, unless more are asked for
BEYOND_L2 = 4  # times its size
STEPS_S = 2.0  # no more steps of a system than take so long
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

    l2: int  # bytes of the device's cache

    def interleaved(self, calls: dict[str, Callable[[], object]]) -> dict[str, float]:
        """Median seconds of each on the device."""
        return interleaved_on(self.device, calls, self.rounds)

    def steps(self, step: Callable[[], object]) -> Row:
        """Median seconds of a step, on the device and by the host's clock, of as many as there is
        time for; after one that warms up.
        """
        step()
        end = time.perf_counter() + STEPS_S
        found: list[Times] = []
        while len(found) < min(3, self.rounds) or (
            len(found) < self.rounds and time.perf_counter() < end
        ):
            found.append(times_of(self.device, step))
        device, wall = (statistics.median(times) for times in zip(*found, strict=True))
        return {"step_s": device, "wall_s": wall, "steps": len(found)}

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


def links(bench: Bench) -> Iterator[Row]:
    """From the host, and from every other device: bytes per second."""
    module = torch.get_device_module(bench.device)
    others = [f"{bench.device.type}:{i}" for i in range(module.device_count())]
    return (_link(bench, donor) for donor in ("cpu", *others) if donor != str(bench.device))


def best_plain(row: Row) -> float:
    """Of a link: the rate of the fastest plain copy."""
    rates: dict[str, float] = row["bytes_per_s"]
    return max(rate for name, rate in rates.items() if name != "engine")


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
    row = {"from": donor, "to": str(bench.device), "bytes": total, "bytes_per_s": rates}
    return {**row, "engine_over_best_plain": rates["engine"] / best_plain(row)}


# ---- kernels ---------------------------------------------------------------


def kernels(bench: Bench) -> Iterator[Row]:
    """A copy, then every code to bfloat16, and merges into bfloat16."""
    if not _ops.can_decode(bench.device):
        yield {"error": "distorch was built without kernels for CUDA: DISTORCH_CUDA=1 says why"}
        return
    rows, columns = bench.matrix
    into = torch.empty(rows, columns, dtype=torch.bfloat16, device=bench.device)
    copied = _kernel(bench, "copy on the device", into, torch.empty_like(into), None)
    yield {**copied, "over_copy": 1.0}
    base = torch.randn(rows, columns, device=bench.device).bfloat16()
    every = [(code, _stored(bench, code), None) for code in CODES]
    every += [(f"merge, rank {rank}", base, _terms(bench, rank)) for rank in RANKS]
    for name, stored, terms in tqdm(every, desc="kernels"):
        row = _kernel(bench, name, into, stored, terms)
        yield {**row, "over_copy": row["bytes_per_s"] / copied["bytes_per_s"]}


def _stored(bench: Bench, code: str) -> Tensor:
    rows, columns = bench.matrix
    elements = _ops.block_elements(code)
    if elements == 1:
        return torch.randn(rows, columns, device=bench.device).to(getattr(torch, code))
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    nbytes = GGML_QUANT_SIZES[GGMLQuantizationType[code]][1]
    shape = (rows, columns // elements * nbytes)
    return torch.randint(0, 256, shape, dtype=torch.uint8, device=bench.device)


def _terms(bench: Bench, rank: int) -> Any:
    """Factors on the device already, as fetches have them."""
    rows, columns = bench.matrix
    up, down = torch.randn(rows, rank), torch.randn(rank, columns)
    return _ops.Terms([up.to(bench.device)], [down.to(bench.device)], [0.5], [0])


def _kernel(bench: Bench, name: str, into: Tensor, stored: Tensor, terms: Any) -> Row:
    """Seconds of a call among many, each on the buffers that were used longest ago."""
    moved = stored.nbytes + into.nbytes
    pairs = [(into, stored)]
    for _ in range(-(-BEYOND_L2 * bench.l2 // moved)):
        pairs.append((torch.empty_like(into), stored.clone()))

    def call(target: Tensor, source: Tensor) -> object:
        if name in CODES:
            return _ops.decode(target, source, name)
        if terms is not None:
            return _ops.decode(target, source, "bfloat16", terms=terms)
        return target.copy_(source)

    def calls() -> None:
        for pair in itertools.chain(pairs, pairs):
            call(*pair)

    seconds = bench.interleaved({name: calls})[name] / (2 * len(pairs))
    return {"kernel": name, "bytes": moved, "buffers": len(pairs), "seconds": seconds,
            "bytes_per_s": moved / seconds}  # fmt: skip


def hook(bench: Bench) -> list[Row]:
    """Host time of operators on tiny tensors, plain and on weights in the ring."""
    with torch.inference_mode():
        return hook_overhead.ops_on(bench.device, 4 * bench.rounds, bench.calls)


# ---- a FLUX transformer ----------------------------------------------------


def overlap(bench: Bench, rate: float) -> Iterator[Row]:
    """Shares of the model offloaded to RAM, all with a ring of two blocks, against the floor.

    `rate` is the link's, in bytes per second. One module is placed anew for each share.
    """
    arguments = _flux.inputs(bench.size, bench.device)
    module = _flux.transformer(bench.size, bench.device)
    ring = 2 * _flux.largest_block(module)
    with torch.no_grad():
        wanted = module(**arguments)[0]
        resident = bench.steps(lambda: module(**arguments))
        compute = resident["step_s"]
        distorch.distribute(module, f"{bench.device},*", min_bytes=_flux.MATRICES)
        for share in tqdm(SHARES, desc="overlap"):
            spec = f"{bench.device},{100 - share}%;cpu,*"
            distorch.redistribute(module, spec, prefetch=ring)
            report = distorch.report(module)
            assert report.ok, report.problems
            assert torch.equal(module(**arguments)[0], wanted), "not the bits of the resident model"
            times = bench.steps(lambda: module(**arguments))
            link = report.bytes["cpu"] / rate
            yield {
                "offloaded_percent": share, "bytes": report.bytes["cpu"], "ring": ring, **times,
                "compute_s": compute, "compute_wall_s": resident["wall_s"], "link_s": link,
                "over_floor": times["step_s"] / max(compute, link),
            }  # fmt: skip


def systems(bench: Bench) -> Iterator[Row]:
    """One after the other, each on weights of its own; resident first and last.

    A system that fails has a row that says how; the others are measured all the same.
    """
    ring = 2 * _flux.largest_block(_flux.transformer(bench.size, "meta"))
    wanted, row = _system(bench, "resident", _flux.resident, None)
    yield row

    def other(name: str, offload: _flux.Offloader, warm: int = 1) -> Row:
        tqdm.write(f"  {name} ...")
        try:
            return _system(bench, name, offload, wanted, warm)[1]
        except Exception as error:
            return {"system": name, "error": f"{type(error).__name__}: {error}"[:2000]}

    yield (ours := other("distorch", _flux.streamed(ring)))
    yield other("accelerate cpu_offload", _flux.accelerate_offloading)
    yield other(".to() per block", _flux.moved_by_hand)
    if bench.device.type != "sim":
        streams = bench.device.type == "cuda"
        how = "on streams" if streams else "without streams"
        for groups in ("blocks", "leaves"):
            offload = _flux.group_offloading(leaves=groups == "leaves", streams=streams)
            theirs = other(f"diffusers group offloading, {groups}, {how}", offload)
            yield theirs
            if groups == "blocks" and "error" not in {**theirs, **ours}:
                spare = max(0, theirs["peak_bytes"] - ours["peak_bytes"])
                equal = other("distorch, memory of group offloading", _flux.streamed(ring, spare))
                if "error" not in equal:
                    equal["over_group_offloading"] = equal["step_s"] / theirs["step_s"]
                yield equal
    yield _flextensor(bench, other)
    yield other("resident, again", _flux.resident)


def _flextensor(bench: Bench, other: Callable[..., Row]) -> Row:
    name = "FlexTensor"
    if bench.device.type != "cuda":
        return {"system": name, "error": "needs CUDA"}
    if importlib.util.find_spec("flextensor") is None:
        return {"system": name, "error": "not installed (PyPI has it as flextensor)"}
    row = other(name, _flux.flextensor_offloading, 1 + sum(_flux.FLEX_STEPS))
    with contextlib.suppress(Exception):  # whatever is left of it, the row stays
        importlib.import_module("flextensor").release(preserve_model=False)
    return row


def _system(
    bench: Bench, name: str, offload: _flux.Offloader, wanted: Tensor | None, warm: int = 1
) -> tuple[Tensor, Row]:
    """The result, on the host, and the row. `warm` steps are taken before the result is."""
    bench.settle()
    module = offload(_flux.transformer(bench.size, bench.device), bench.device)
    arguments = _flux.inputs(bench.size, bench.device)
    with torch.no_grad():
        for _ in range(warm):
            module(**arguments)
        result = module(**arguments)[0].cpu()
        if wanted is not None:
            assert torch.equal(result, wanted), "not the bits of the resident model"
        times = bench.steps(lambda: module(**arguments))
        peak = bench.peak(lambda: module(**arguments))
    return result, {"system": name, **times, "peak_bytes": peak}


# ---- the program -----------------------------------------------------------


def fitting(device: torch.device, wanted: Size) -> Size:
    """A FLUX with as many of its blocks as fit: in the same proportion, one of each at least."""
    import psutil

    free = torch.get_device_module(device).mem_get_info(device)[0]
    room = min(free * OF_DEVICE, psutil.virtual_memory().available * OF_HOST)
    double, single = _flux.block_bytes(FULL)
    share = min(1.0, room / (wanted.double * double + wanted.single * single))
    return dataclasses.replace(
        wanted,
        double=max(1, int(wanted.double * share)), single=max(1, int(wanted.single * share)),
    )  # fmt: skip


def bench_on(options: argparse.Namespace) -> Bench:
    device = torch.device("cpu") if options.device == "cpu" else torch.device(options.device, 0)
    if device.type != "cuda":
        return Bench(device, options.rounds, TINY, 1 << 16, 8, (96, 512), 20, 1 << 16)
    double, single = (FULL.double, FULL.single) if options.full else BLOCKS
    size = fitting(device, dataclasses.replace(FULL, double=double, single=single))
    given = {"double": options.double, "single": options.single}
    size = dataclasses.replace(size, **{k: v for k, v in given.items() if v is not None})
    l2 = torch.cuda.get_device_properties(device).L2_cache_size
    return Bench(device, options.rounds, size, 64 * MB, 32, (12288, 3072), 300, l2)


def card(device: torch.device) -> Row:
    """What all this was measured on."""
    if device.type != "cuda":
        return {"card": f"none: {device.type}"}
    facts = torch.cuda.get_device_properties(device)
    return {"card": facts.name, "memory": facts.total_memory, "l2": facts.L2_cache_size,
            "cuda": torch.version.cuda, "capability": f"{facts.major}.{facts.minor}"}  # fmt: skip


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
    torch.cuda.set_device(0)


SECTIONS = ("links", "kernels", "hook", "overlap", "systems")


def measure(bench: Bench, chosen: list[str], results: Results) -> None:
    """Every section that was chosen, into the results as it comes."""
    for name, section in (("links", links), ("kernels", kernels), ("hook", hook)):
        if name in chosen:
            results.section(name, section(bench))
    if {"overlap", "systems"} & set(chosen):
        results.put("model", {
            "blocks": [bench.size.double, bench.size.single],
            "bytes": _flux.nbytes(_flux.transformer(bench.size, "meta")),
            "tokens": [bench.size.image, bench.size.text],
        })  # fmt: skip
    if "overlap" in chosen:
        if "links" not in results.found:
            quick = dataclasses.replace(bench, rounds=min(3, bench.rounds))
            results.add("links", iter([_link(quick, "cpu")]))
        results.section("overlap", overlap(bench, best_plain(results.found["links"][0])))
        bench.settle()
    if "systems" in chosen:
        results.section("systems", systems(bench))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--device", choices=["cuda", "sim", "cpu"], default="cuda", help="(default cuda)"
    )
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--rounds", type=int, default=15, help="of each measurement (default 15)")
    parser.add_argument("--full", action="store_true", help="19 double and 38 single blocks")
    parser.add_argument("--double", type=int, help="double blocks (default: 4, or what fits)")
    parser.add_argument("--single", type=int, help="single blocks (default: 8, or what fits)")
    parser.add_argument("--json", type=Path, help="write what was measured to this file, or add it")
    options = parser.parse_args()
    prepare(parser, options)
    bench = bench_on(options)
    facts = {"torch": torch.__version__, "distorch": distorch.__version__, **card(bench.device)}
    try:
        results = Results(options.json, facts)
    except ValueError as error:
        parser.error(str(error))
    results.put("rounds", bench.rounds)
    measure(bench, options.only, results)


if __name__ == "__main__":
    main()
