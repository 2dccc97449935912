# SPDX-License-Identifier: Apache-2.0
"""Cost of the hook per operator, on a weight that is already there; and on plain tensors.

Small operands, so that the operator's own work is little. Plain and sharded are timed in turns of a
few thousand calls; the fastest turns are compared. Plain tensors are timed in two processes, one of
which has distorch imported and a sharded weight alive.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

Case = tuple[Tensor, Callable[[Tensor], Tensor]]  # a weight, and what is called with it


def hot(device: torch.device) -> dict[str, Case]:
    """Operators that have a path of their own."""
    x, ids, bias = torch.randn(8, 8), torch.tensor([1, 2, 3]), torch.randn(8)
    image, kernel, batch = torch.randn(1, 8, 4, 4), torch.randn(8, 8, 1, 1), torch.randn(2, 8, 8)
    x, ids, bias, image, batch = (t.to(device) for t in (x, ids, bias, image, batch))
    return {
        "mm": (torch.randn(8, 8), lambda w: torch.mm(x, w)),
        "addmm": (torch.randn(8, 8), lambda w: torch.addmm(bias, x, w)),
        "linear": (torch.randn(8, 8), lambda w: F.linear(x, w)),
        "bmm": (torch.randn(2, 8, 8), lambda w: torch.bmm(batch, w)),
        "embedding": (torch.randn(8, 8), lambda w: F.embedding(ids, w)),
        "layer_norm": (torch.randn(8), lambda w: F.layer_norm(x, (8,), w, bias)),
        "conv2d": (kernel, lambda w: F.conv2d(image, w)),
    }


def other(device: torch.device) -> dict[str, Case]:
    """Some of those that have none."""
    x = torch.randn(8, 8).to(device)
    return {
        "add": (torch.randn(8, 8), lambda w: torch.add(x, w)),
        "mul": (torch.randn(8, 8), lambda w: torch.mul(x, w)),
        "cat": (torch.randn(8, 8), lambda w: torch.cat((x, w))),
        "where": (torch.randn(8, 8), lambda w: torch.where(x > 0, x, w)),
        "sum": (torch.randn(8, 8), lambda w: w.sum()),
    }


CPU = torch.device("cpu")
HOT = hot(CPU)
OPS = {**HOT, **other(CPU)}


def microseconds(call: Callable[[Tensor], Tensor], weight: Tensor, calls: int) -> float:
    """Of one call, over `calls` in a row."""
    start = time.perf_counter()
    for _ in range(calls):
        call(weight)
    return 1e6 * (time.perf_counter() - start) / calls


def added(
    variants: dict[str, Tensor], call: Callable[[Tensor], Tensor], rounds: int, calls: int
) -> dict[str, float]:
    """Microseconds of the call with "plain", and what each other variant adds to them."""
    settle = getattr(torch.get_device_module(variants["plain"].device), "synchronize", None)
    times: dict[str, list[float]] = {variant: [] for variant in variants}
    for turn in range(rounds + 1):
        for variant, tensor in variants.items():
            if settle is not None:
                settle()  # a device that is behind would hold the host up
            spent = microseconds(call, tensor, calls)
            if turn > 0:  # the first warms up
                times[variant].append(spent)
    # The fastest turns: whatever else the machine did only adds.
    plain = min(times.pop("plain"))
    return {"plain_us": plain, **{f"{v}_added_us": min(t) - plain for v, t in times.items()}}


def sharded_ops(rounds: int, calls: int) -> list[dict]:
    """Every operator plain, on a donor that is used in place, and on a filled ring."""
    import distorch

    rows = []
    holder = distorch.distribute(torch.nn.Linear(8, 8), "disk,*", min_bytes=0, prefetch="1mib")
    for name, (weight, call) in OPS.items():
        variants = {
            "plain": weight,
            "in_place": distorch.shard(weight, "cpu"),
            "in_ring": distorch.shard(weight, "disk"),
        }
        row = {"op": name, "hot": name in HOT, **added(variants, call, rounds, calls)}
        rows.append(row)
        print(
            f"{name:10} plain {row['plain_us']:6.2f} us   "
            f"in place {row['in_place_added_us']:+.2f}   "
            f"in the ring {row['in_ring_added_us']:+.2f}",
            flush=True,
        )
    del holder
    return rows


def ops_on(device: torch.device, rounds: int, calls: int) -> list[dict]:
    """Every operator on an accelerator: the host's time, plain and on a filled ring."""
    import distorch

    holder = distorch.distribute(
        torch.nn.Linear(8, 8), f"{device},0b;cpu,*", min_bytes=0, prefetch="1mib"
    )
    rows = []
    fast = hot(device)
    for name, (weight, call) in {**fast, **other(device)}.items():
        variants = {
            "plain": weight.to(device),
            "in_ring": distorch.shard(weight, "cpu", device),
        }
        rows.append({"op": name, "hot": name in fast, **added(variants, call, rounds, calls)})
    del holder
    return rows


def plain_ops(rounds: int, calls: int, with_distorch: bool) -> dict[str, float]:
    """Every operator on plain tensors."""
    if with_distorch:
        import distorch

        alive = distorch.shard(torch.ones(4), "disk")
        assert distorch.is_sharded(alive)
    for weight, call in OPS.values():
        microseconds(call, weight, calls)
    return {
        name: min(microseconds(call, weight, calls) for _ in range(rounds))
        for name, (weight, call) in OPS.items()
    }


def compare_plain(rounds: int, calls: int, processes: int) -> list[dict]:
    """Plain tensors without and with distorch in the process, processes in turns."""
    times: dict[str, list[dict]] = {"without": [], "with": []}
    for _ in range(processes):
        for variant, found in times.items():
            child = [sys.executable, __file__, "--plain", variant]
            child += ["--rounds", str(rounds), "--calls", str(calls)]
            done = subprocess.run(child, stdout=subprocess.PIPE, text=True, check=True)
            found.append(json.loads(done.stdout))
    rows = []
    for name in OPS:
        without, with_ = (min(run[name] for run in times[v]) for v in ("without", "with"))
        rows.append({"op": name, "without_us": without, "with_us": with_})
        print(f"{name:10} without distorch {without:6.3f} us, with {with_:6.3f}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=60, help="turns (default 60)")
    parser.add_argument("--calls", type=int, default=3000, help="calls in a turn (default 3000)")
    parser.add_argument("--processes", type=int, default=5, help="pairs of processes (default 5)")
    parser.add_argument("--json", type=Path, help="write everything measured here")
    parser.add_argument("--plain", choices=["with", "without"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with torch.inference_mode():
        if options.plain:
            found = plain_ops(options.rounds, options.calls, options.plain == "with")
            print(json.dumps(found))
            return
        result = {
            "torch": torch.__version__,
            "sharded": sharded_ops(options.rounds, options.calls),
            "plain": compare_plain(options.rounds // 4, options.calls, options.processes),
        }
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
