# SPDX-License-Identifier: Apache-2.0
"""Peak memory of `distorch.load`: all weights on disk, a quarter in RAM, all in RAM.

Each placement is loaded in a process of its own; its peak resident size (VmHWM) above the size
before the load is held against what stays in RAM + ring + two of the largest tensors.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import nn

MIB = 1 << 20
SPECS = {
    "all on disk": "cpu,0b;disk,*",
    "a quarter in RAM": "cpu,25%;disk,75%",
    "all in RAM": "cpu,*",
}


def model(layers: int, width: int) -> nn.Module:
    """`layers` square bf16 weights, on the meta device."""
    with torch.device("meta"):
        stack = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))
    return stack.bfloat16()


def write_checkpoint(path: Path, layers: int, width: int) -> None:
    """A safetensors file, written layer by layer."""
    nbytes = 2 * width * width
    header = {}
    for layer, (name, p) in enumerate(model(layers, width).named_parameters()):
        span = [layer * nbytes, (layer + 1) * nbytes]
        header[name] = {"dtype": "BF16", "shape": list(p.shape), "data_offsets": span}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # as the safetensors library pads it
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for layer in range(layers):
            values = torch.randn(width, width, generator=torch.Generator().manual_seed(layer))
            file.write(values.bfloat16().view(torch.uint8).numpy().tobytes())


def status_bytes(field: str) -> int:
    """A memory field of this process: VmRSS (resident now), VmHWM (most so far)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise LookupError(field)


def load_once(options: argparse.Namespace) -> None:
    """In a child: loads, runs one step, prints what it took."""
    import distorch

    with torch.no_grad():
        x = torch.ones(1, options.width, dtype=torch.bfloat16)
        distorch.shard(torch.zeros(64, 64), "disk").sum()  # code that is paged in by first use
        nn.functional.linear(x, torch.zeros(64, options.width, dtype=torch.bfloat16))
        module = model(options.layers, options.width)
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
        before = status_bytes("VmRSS")
        distorch.load(
            module, options.checkpoint, options.spec, prefetch=options.ring, progress=False
        )
        after_load = status_bytes("VmHWM")
        module(x)
    report = distorch.report(module)
    assert report.ok, report
    print(
        json.dumps(
            {
                "spec": options.spec,
                "stays": report.bytes["cpu"],
                "ring": options.ring,
                "two_largest": 2 * 2 * options.width**2,
                "peak_load": after_load - before,
                "peak_with_step": status_bytes("VmHWM") - before,
            }
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=48, help="weights (default 48: 1.6 GB)")
    parser.add_argument("--width", type=int, default=4096, help="side of a weight (default 4096)")
    parser.add_argument("--ring", type=int, default=128 * MIB, help="bytes (default 128 MiB)")
    parser.add_argument("--folder", help="where the checkpoint goes (default: a temporary folder)")
    parser.add_argument("--json", type=Path, help="write everything measured here")
    parser.add_argument("--checkpoint", help=argparse.SUPPRESS)
    parser.add_argument("--spec", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.checkpoint:
        load_once(options)
        return
    rows = []
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path = Path(folder) / "stack.safetensors"
        write_checkpoint(path, options.layers, options.width)
        size = path.stat().st_size
        print(f"file: {size / MIB:.0f} MiB")
        shape = [f"--{name}={getattr(options, name)}" for name in ("layers", "width", "ring")]
        for title, spec in SPECS.items():
            child = [sys.executable, __file__, *shape, f"--checkpoint={path}", f"--spec={spec}"]
            done = subprocess.run(child, stdout=subprocess.PIPE, text=True, check=True)
            row = {"title": title, "file": size, **json.loads(done.stdout)}
            row["allowed"] = row["stays"] + row["ring"] + row["two_largest"]
            rows.append(row)
            print(
                f"{title:17} peak of load {row['peak_load'] / MIB:7.1f} MiB, with a step "
                f"{row['peak_with_step'] / MIB:7.1f}, allowed {row['allowed'] / MIB:7.1f}"
            )
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(
            json.dumps({"torch": torch.__version__, "rows": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
