# SPDX-License-Identifier: Apache-2.0
"""Decoding GGUF blocks on one core: beside gguf-py, beside ggml's kernels, beside a memory copy.

Every block type, to float32 (all four), float16 and bfloat16 (ours only), in GB/s of output. Blocks
are random bytes with scales such as models have (no infinity, no NaN). Turns are interleaved and
medians compared. `cache`: the output fits the second cache; `memory`: it does not fit any. ggml is
the libggml-base.so that a package ships (--ggml; by default pywhispercpp's, where that is
installed); it is used here only.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.metadata
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from _timing import interleaved
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

from distorch import _ops

SIZES = {"cache": 1 << 17, "memory": 1 << 24}  # numbers
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
TYPES = [GGMLQuantizationType.F16, *quants._type_traits]


def installed_ggml() -> Path | None:
    """libggml-base.so of pywhispercpp, or None."""
    spec = importlib.util.find_spec("pywhispercpp")
    if spec is None or spec.origin is None:
        return None
    site = Path(spec.origin).parents[1]
    return next(iter(sorted(site.rglob("libggml-base*.so*"))), None)


def ggml_kernel(library: ctypes.CDLL | None, kind: GGMLQuantizationType) -> Callable | None:
    """(from, into, numbers) -> None: blocks to float32."""
    name = {"F16": "ggml_fp16_to_fp32_row", "BF16": "ggml_bf16_to_fp32_row"}.get(
        kind.name, f"dequantize_row_{kind.name.lower().replace('_k', '_K')}"
    )
    kernel = getattr(library, name, None)
    if kernel is not None:
        kernel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
        kernel.restype = None
    return kernel


def random_blocks(kind: GGMLQuantizationType, count: int) -> np.ndarray:
    """Random bytes; in place of blocks whose numbers no model has, the first that is like one."""
    elements, size = GGML_QUANT_SIZES[kind]
    blocks = np.random.default_rng(0).integers(0, 256, (count // elements, size), dtype=np.uint8)
    with np.errstate(all="ignore"):
        numbers = np.abs(quants.dequantize(blocks, kind)).reshape(-1, elements)
    usual = ((numbers == 0) | ((numbers > 1e-30) & (numbers < 1e30))).all(axis=1)
    blocks[~usual] = blocks[usual.argmax()]
    return blocks.reshape(-1)


def measure(kind: GGMLQuantizationType, count: int, library: ctypes.CDLL | None, rounds: int):
    """GB/s of output by who decodes, and to what."""
    data = random_blocks(kind, count)
    blocks = torch.from_numpy(data).clone()  # aligned as torch aligns
    into = {name: torch.zeros(count, dtype=dtype) for name, dtype in DTYPES.items()}
    source = torch.zeros(count)
    calls: dict[str, Callable[[], object]] = {
        f"distorch {name}": lambda target=target: _ops.dequantise_into(target, blocks, kind.name)
        for name, target in into.items()
    }
    calls["copy float32"] = lambda: into["float32"].copy_(source)
    kernel = ggml_kernel(library, kind)
    if kernel is not None:
        target = torch.zeros(count)
        calls["ggml float32"] = lambda: kernel(blocks.data_ptr(), target.data_ptr(), count)
    seconds = interleaved(calls, rounds)
    with np.errstate(all="ignore"):
        oracle = {"gguf-py float32": lambda: quants.dequantize(data, kind)}
        seconds |= interleaved(oracle, 3 if count < 1 << 20 else 1)
    width = {"float32": 4, "float16": 2, "bfloat16": 2}
    return {name: count * width[name.split()[-1]] / value / 1e9 for name, value in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ggml", type=Path, default=installed_ggml(), help="a libggml-base.so")
    parser.add_argument("--ggml-version", default="", help="what to write down about it")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    library = ctypes.CDLL(str(options.ggml)) if options.ggml else None
    rows = []
    for where, count in SIZES.items():
        for kind in TYPES:
            speeds = measure(kind, count, library, options.rounds)
            ratio = speeds["distorch float32"] / speeds.get("ggml float32", float("nan"))
            rows.append({"type": kind.name, "where": where, "numbers": count, "GB/s": speeds,
                         "distorch / ggml": ratio})  # fmt: skip
            told = "  ".join(f"{name} {value:6.2f}" for name, value in speeds.items())
            print(f"{where:6} {kind.name:8} x{ratio:5.2f} of ggml | {told}", flush=True)
    if options.json:
        facts = {"torch": torch.__version__, "gguf": importlib.metadata.version("gguf"),
                 "ggml": options.ggml_version, "cpu": torch.backends.cpu.get_cpu_capability(),
                 "rounds": options.rounds, "unit": "GB/s of output, one core"}  # fmt: skip
        options.json.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
