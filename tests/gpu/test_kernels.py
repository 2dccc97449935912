"""The kernels on a GPU against the host's: the same bits."""

import pytest
import torch

import distorch
from distorch import _native, _ops

PLAIN = ["float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int8", "uint8"]
BLOCKS = ["Q4_0", "Q8_0", "Q2_K", "Q4_K", "Q6_K", "IQ4_XS", "MXFP4"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ROWS, COLUMNS = 129, 512


def stored(code):
    """Rows of random numbers without NaN and inf where the code is a plain number's."""
    generator = torch.Generator().manual_seed(1)
    if code in PLAIN:
        dtype = getattr(torch, code)
        numbers = torch.randn(ROWS, COLUMNS, generator=generator) * 8
        return numbers.to(torch.float32).to(dtype)
    if code == "Q8_0":
        scales = torch.rand(ROWS * COLUMNS // 32, 1, generator=generator).half().view(torch.uint8)
        numbers = torch.randint(0, 256, (ROWS * COLUMNS // 32, 32), generator=generator)
        blocks = torch.cat([scales.view(-1, 2), numbers.to(torch.uint8)], 1)
        return blocks.view(ROWS, -1)
    bytes_of_row = _bytes_of_row(code)
    return torch.randint(0, 256, (ROWS, bytes_of_row), generator=generator).to(torch.uint8)


def _bytes_of_row(code):
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    elements, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType[code]]
    return COLUMNS // elements * nbytes


def terms():
    generator = torch.Generator().manual_seed(2)
    made = _ops.Terms()
    for rank, first, rows in ((4, 0, ROWS), (7, 30, 50)):
        up = torch.randn(rows, rank, generator=generator)
        made.add(up, torch.randn(rank, COLUMNS, generator=generator), 0.3, first)
    return made


@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("code", PLAIN + BLOCKS)
def test_decode(code, dtype, patched):
    assert _native.has_cuda_kernels()
    rows = stored(code)
    scales = torch.rand(5, 4, generator=torch.Generator().manual_seed(3)) if code in PLAIN else None
    options = {"scales": scales, "block": (32, 128), "terms": terms() if patched else None}
    wanted = torch.empty(ROWS, COLUMNS, dtype=dtype)
    _ops.decode(wanted, rows, code, **options)
    got = torch.empty(ROWS, COLUMNS, dtype=dtype, device="cuda")
    _ops.decode(got, rows.cuda(), code, **options)
    got = got.cpu()
    assert torch.equal(got.isnan(), wanted.isnan())
    assert torch.equal(got.nan_to_num(), wanted.nan_to_num())


def test_pinned_memory_has_its_size():
    slab = _ops.pinned_memory(12345, torch.device("cuda:0"))
    assert slab.untyped_storage().nbytes() == 12345
    assert slab.is_pinned()


def test_errors_of_the_device_are_told():
    with pytest.raises(RuntimeError, match="CUDA says"):
        _ops.pinned_memory(1 << 50, torch.device("cuda:0"))
    assert distorch.shard(torch.ones(3), "cpu", "cuda:0").sum().item() == 3
