# SPDX-License-Identifier: Apache-2.0
"""Decoded GGUF blocks against gguf-py, which says what the bits are."""

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants
from torch.library import opcheck

from distorch import _ops
from tests.accelerator import kernels

TYPES = [GGMLQuantizationType.F32, GGMLQuantizationType.F16, *quants._type_traits]
NAMES = [kind.name for kind in TYPES]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BITS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}


def random_bytes(kind, rows=37, blocks=3, seed=0):
    """Any byte anywhere: inf, NaN, zero and subnormal scales among them."""
    count = blocks * (256 if GGML_QUANT_SIZES[kind][0] == 1 else 1)
    shape = (rows, count * GGML_QUANT_SIZES[kind][1])
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def with_halves(kind, values):
    """Random blocks in which each aligned pair of bytes may be one of those float16 numbers."""
    random = np.random.default_rng(1)
    data = random_bytes(kind, rows=64)
    size = GGML_QUANT_SIZES[kind][1]
    blocks = data.reshape(-1, size // 2 * 2 if size % 2 == 0 else size)
    halves = np.array(values, np.float16).view(np.uint8).reshape(-1, 2)
    for start in range(0, size - 1, 2):
        chosen = random.random(len(blocks)) < 0.5
        blocks[chosen, start : start + 2] = halves[random.integers(0, len(halves), chosen.sum())]
    return data


def reference(data, kind):
    with np.errstate(all="ignore"):
        return torch.from_numpy(np.array(quants.dequantize(data, kind)))


def assert_same_bits(got, wanted):
    assert got.dtype == wanted.dtype
    assert got.shape == wanted.shape
    nan = wanted.isnan()
    assert torch.equal(got.isnan(), nan)
    same = got.view(BITS[got.dtype]) == wanted.view(BITS[got.dtype])
    assert bool((same | nan).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", TYPES, ids=NAMES)
def test_random_bytes(kind, dtype):
    data = random_bytes(kind)
    got = _ops.dequantise(torch.from_numpy(data), kind.name, dtype)
    assert_same_bits(got, reference(data, kind).to(dtype))


@pytest.mark.parametrize("kind", [GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q6_K])
def test_results_that_no_cache_holds_have_the_same_bits(kind):
    rows, elements = 9, 1 << 20  # 36 MB: written past the caches
    data = random_bytes(kind, rows, elements // GGML_QUANT_SIZES[kind][0])
    blocks = torch.from_numpy(data)
    whole = _ops.dequantise(blocks, kind.name, torch.float32)
    alone = [_ops.dequantise(row, kind.name, torch.float32) for row in blocks]
    assert_same_bits(whole, torch.stack(alone))


@pytest.mark.parametrize("kind", TYPES, ids=NAMES)
def test_hostile_scales(kind):
    data = with_halves(kind, [0.0, -0.0, 6e-8, -6e-5, 65504, np.inf, -np.inf, np.nan, 1e-4])
    for dtype in DTYPES:
        got = _ops.dequantise(torch.from_numpy(data), kind.name, dtype)
        assert_same_bits(got, reference(data, kind).to(dtype))


def quantisable():
    for kind in quants._type_traits:
        try:
            quants.quantize(np.zeros((1, 256), np.float32), kind)
        except NotImplementedError:
            continue
        yield kind


@pytest.mark.parametrize("kind", list(quantisable()), ids=lambda kind: kind.name)
def test_weights(kind):
    weights = np.random.default_rng(2).standard_normal((33, 512), dtype=np.float32) * 0.02
    data = np.ascontiguousarray(quants.quantize(weights, kind)).view(np.uint8)
    for dtype in DTYPES:
        got = _ops.dequantise(torch.from_numpy(data), kind.name, dtype)
        assert_same_bits(got, reference(data, kind).to(dtype))


@pytest.mark.parametrize("kind", TYPES, ids=NAMES)
def test_flushed_subnormals_change_nothing(kind):
    data = with_halves(kind, [6e-8, 6e-5, -3e-6])
    wanted = reference(data, kind)
    usual = ~(
        wanted.abs() < 2**-120
    )  # MXFP4's smallest scales are subnormals of float32 themselves
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    try:
        got = _ops.dequantise(torch.from_numpy(data), kind.name, torch.float32)
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(threads)
    assert_same_bits(got[usual], wanted[usual])


def test_many_rows_on_several_threads():
    kind = GGMLQuantizationType.Q4_K
    data = random_bytes(kind, rows=2000, blocks=2)
    got = _ops.dequantise(torch.from_numpy(data), kind.name, torch.bfloat16)
    assert_same_bits(got, reference(data, kind).bfloat16())


def test_into():
    kind = GGMLQuantizationType.Q6_K
    data = random_bytes(kind)
    into = torch.full((37, 768), 7.0, dtype=torch.float16)
    _ops.dequantise_into(into, torch.from_numpy(data), kind.name)
    assert_same_bits(into, reference(data, kind).half())


def test_empty():
    assert _ops.dequantise(torch.empty(0, 34, dtype=torch.uint8), "Q8_0", torch.half).shape == (
        0,
        32,
    )
    assert _ops.dequantise(torch.empty(5, 0, dtype=torch.uint8), "Q8_0", torch.half).shape == (5, 0)


@pytest.mark.parametrize(
    ("blocks", "kind", "dtype", "message"),
    [
        (torch.zeros(2, 33, dtype=torch.uint8), "Q8_0", torch.float32, "whole Q8_0 blocks"),
        (torch.zeros(2, 34), "Q8_0", torch.float32, "uint8"),
        (torch.zeros(2, 34, dtype=torch.uint8), "Q8_9", torch.float32, "no block type Q8_9"),
        (torch.zeros(2, 34, dtype=torch.uint8), "Q8_0", torch.float64, "float32, float16"),
        (torch.zeros((), dtype=torch.uint8), "Q8_0", torch.float32, "whole Q8_0 blocks"),
    ],
)
def test_refusals(blocks, kind, dtype, message):
    with pytest.raises(ValueError, match=message):
        _ops.dequantise(blocks, kind, dtype)


def test_target_of_another_shape_is_refused():
    with pytest.raises(ValueError, match="do not fill"):
        _ops.dequantise_into(torch.zeros(2, 31), torch.zeros(2, 34, dtype=torch.uint8), "Q8_0")


def test_opcheck():
    weights = np.linspace(-1, 1, 37 * 96, dtype=np.float32).reshape(37, 96)
    blocks = torch.from_numpy(quants.quantize(weights, GGMLQuantizationType.Q5_1))
    opcheck(torch.ops.distorch.dequantise.default, (blocks, "Q5_1", torch.bfloat16))
    into = torch.empty(37, 96)
    opcheck(torch.ops.distorch.dequantise_.default, (into, blocks, "Q5_1"))


def test_the_tables_of_the_accelerators_tests_are_those_of_gguf():
    """They must not import gguf, which may be missing on a machine with a GPU."""
    assert {kind.name: tuple(GGML_QUANT_SIZES[kind]) for kind in TYPES} == kernels.SIZES
