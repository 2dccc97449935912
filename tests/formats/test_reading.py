# SPDX-License-Identifier: Apache-2.0
"""Tensors read from safetensors files: right bytes, memory of exactly their size."""

import pytest
import torch
from safetensors.torch import save_file

import distorch
from distorch.errors import FormatError
from distorch.formats.safetensors import read_header

# Below and above what is read straight into place, of every kind of alignment.
TENSORS = {
    "bfloat16": torch.randn(700, 900).bfloat16(),
    "float32": torch.randn(300, 901),
    "float8": torch.randn(800, 900).to(torch.float8_e4m3fn),
    "bytes": torch.randint(0, 256, (600_001,), dtype=torch.uint8),
    "small": torch.randn(10).half(),
    "several parts": torch.randn(1500, 3001).bfloat16(),
    "nothing": torch.empty(0, 3),
    "scalar": torch.tensor(3.5),
}


@pytest.fixture
def file(tmp_path):
    # An odd name moves all that follows.
    save_file(TENSORS, tmp_path / "x.safetensors", {"a": "b" * 13})
    return tmp_path / "x.safetensors"


def test_new_memory_holds_exactly_the_tensor(file):
    stored, _ = read_header(file)
    for name, expected in TENSORS.items():
        read = stored[name].read()
        assert read.dtype == expected.dtype and read.shape == expected.shape
        assert torch.equal(read.view(-1).view(torch.uint8), expected.view(-1).view(torch.uint8))
        assert read.untyped_storage().nbytes() == expected.nbytes
        assert read.is_contiguous() and read.storage_offset() == 0
        if expected.dtype == torch.float32:  # see Note [Alignment and last bits] of core/file.h
            assert read.data_ptr() % 64 == 0


def test_such_memory_is_ordinary(file):
    read = read_header(file)[0]["several parts"].read()
    kept = read[7]
    read.resize_(3000, 3001)
    assert torch.equal(read[7], TENSORS["several parts"][7])
    assert torch.equal(kept, TENSORS["several parts"][7])
    shared = read_header(file)[0]["several parts"].read().share_memory_()
    assert torch.equal(shared, TENSORS["several parts"])


def test_buffers_are_used_again(file):
    stored, _ = read_header(file)
    buffer = torch.empty(max(entry.room for entry in stored.values()), dtype=torch.uint8)
    for name, expected in TENSORS.items():
        read = stored[name].read(buffer)
        assert torch.equal(read.view(-1).view(torch.uint8), expected.view(-1).view(torch.uint8))
        inside = read.untyped_storage().data_ptr() == buffer.data_ptr()
        assert inside or expected.numel() == 0


def test_a_file_cut_short(file):
    stored, _ = read_header(file)
    size = file.stat().st_size
    with file.open("r+b") as opened:
        opened.truncate(size - 100)
    last = max(stored.values(), key=lambda entry: entry.offset + entry.nbytes)
    with pytest.raises(FormatError, match="cut short"):
        last.read()


def test_torch_files_add_nothing_to_a_cache_of_the_process(tmp_path):
    """A server may open thousands of them."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    for number in range(3):
        path = tmp_path / f"{number}.pt"
        torch.save({"weight": torch.ones(3, number + 2), "bias": torch.ones(3)}, path)
        before = FakeTensorMode.cache_info().size
        distorch.load(torch.nn.Linear(number + 2, 3), path, "disk,*", min_bytes=0)
        assert FakeTensorMode.cache_info().size == before
