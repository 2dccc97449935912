# SPDX-License-Identifier: Apache-2.0
"""The kernels of an accelerator against the host's: the same bits."""

import pytest
import torch

from distorch import _ops
from distorch.formats.block_types import GGUF_TYPES, PACKED_TYPES

# Elements and bytes of a block. The package gguf is not asked: it may be missing beside a GPU, and
# tests/kernels compares this table with it.
SIZES = {name: (elements, nbytes) for name, elements, nbytes in GGUF_TYPES.values()}
SIZES |= {"F32": (1, 4), "F16": (1, 2), "BF16": (1, 2)}
PLAIN = ["float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int8", "uint8"]
BLOCKS = sorted(name for name, (elements, _) in SIZES.items() if elements > 1)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ROWS, COLUMNS = 129, 512


def blocks_of(name):
    """Rows of random bytes: inf, NaN, zero and subnormal scales among them."""
    elements, nbytes = SIZES[name]
    generator = torch.Generator().manual_seed(1)
    shape = (ROWS, COLUMNS // elements * nbytes)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


def stored(code):
    if code in BLOCKS:
        return blocks_of(code)
    numbers = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(1)) * 8
    return numbers.to(getattr(torch, code))


TURNED = {"int8": 256, "I4x16": 64, "W4x16": 256, "W6x16": 16, "FP4x16": 0, "FP8x32": 0}


def turned(code):
    """Random rows of a packed type, and what they are decoded with."""
    elements, nbytes = PACKED_TYPES.get(code, (1, 1))
    generator = torch.Generator().manual_seed(4)
    shape = (ROWS, COLUMNS // elements * nbytes)
    rows = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    entries = {"W4x16": 16, "FP4x16": 1}.get(code)
    table = torch.randn(entries, generator=generator) if entries else None
    scales = torch.rand(ROWS, 1, generator=generator) if TURNED[code] else None
    return rows, {"scales": scales, "block": (1, COLUMNS), "table": table, "rotation": TURNED[code]}


def terms():
    generator = torch.Generator().manual_seed(2)
    made = _ops.Terms()
    for rank, first, rows in ((4, 0, ROWS), (7, 30, 50)):
        up = torch.randn(rows, rank, generator=generator)
        made.add(up, torch.randn(rank, COLUMNS, generator=generator), 0.3, first)
    ups, downs = (torch.randn(3, *size, generator=generator) for size in ((20, 5), (5, COLUMNS)))
    made.add(ups, downs, 0.3, 15)  # a stack of products
    return made


def assert_same_numbers(got, wanted):
    got = got.cpu()
    assert torch.equal(got.isnan(), wanted.isnan())
    bits = torch.int32 if wanted.dtype == torch.float32 else torch.int16
    assert torch.equal(got.nan_to_num(0).view(bits), wanted.nan_to_num(0).view(bits))


@pytest.mark.parametrize("patched", [False, True], ids=["plain", "patched"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("code", PLAIN + BLOCKS)
def test_decode(machine, code, dtype, patched):
    assert _ops.can_decode(machine.device)
    rows = stored(code)
    scales = torch.rand(5, 4, generator=torch.Generator().manual_seed(3)) if code in PLAIN else None
    options = {"scales": scales, "block": (32, 128), "terms": terms() if patched else None}
    wanted = torch.empty(ROWS, COLUMNS, dtype=dtype)
    _ops.decode(wanted, rows, code, **options)
    got = torch.empty(ROWS, COLUMNS, dtype=dtype, device=machine.device)
    _ops.decode(got, rows.to(machine.device), code, **options)
    assert_same_numbers(got, wanted)


@pytest.mark.parametrize("patched", [False, True], ids=["plain", "patched"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("code", TURNED)
def test_blocks_with_tables_and_rotations(machine, code, dtype, patched):
    rows, options = turned(code)
    options["terms"] = terms() if patched else None
    wanted = torch.empty(ROWS, COLUMNS, dtype=dtype)
    _ops.decode(wanted, rows, code, **options)
    got = torch.empty(ROWS, COLUMNS, dtype=dtype, device=machine.device)
    _ops.decode(got, rows.to(machine.device), code, **options)
    assert_same_numbers(got, wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["F32", "F16", "BF16", *BLOCKS])
def test_dequantise(machine, name, dtype):
    blocks = blocks_of(name)
    wanted = _ops.dequantise(blocks, name, dtype)
    there = blocks.to(machine.device)
    got = _ops.dequantise(there, name, dtype)
    assert got.device == machine.device
    assert got.dtype == dtype
    assert_same_numbers(got, wanted)
    into = torch.zeros_like(got)
    _ops.dequantise_into(into, there, name)
    assert_same_numbers(into, wanted)
    assert _ops.dequantise(there[:0], name, dtype).shape == (0, COLUMNS)


def test_dequantise_runs_on_the_current_stream(machine):
    """Behind what that stream has been given, and no other."""
    blocks = blocks_of("Q8_0")
    wanted = _ops.dequantise(blocks, "Q8_0", torch.float32)
    there = torch.zeros_like(blocks, device=machine.device)
    stream = torch.Stream(device=machine.device)
    stream.wait_stream(torch.accelerator.current_stream(machine.device))
    with stream:
        there.copy_(blocks.pin_memory(), non_blocking=True)
        got = _ops.dequantise(there, "Q8_0", torch.float32)
        got = got.cpu()
    assert_same_numbers(got, wanted)


def test_blocks_elsewhere_are_refused(machine):
    into = torch.empty(ROWS, COLUMNS, device=machine.device)
    with pytest.raises((ValueError, RuntimeError), match="on (one|the same) device"):
        _ops.dequantise_into(into, blocks_of("Q8_0"), "Q8_0")
