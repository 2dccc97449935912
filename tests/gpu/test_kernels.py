# SPDX-License-Identifier: Apache-2.0
"""The kernels on a GPU against the host's: the same bits."""

import pytest
import torch

import distorch
from distorch import _ops
from tests.accelerator.kernels import *  # noqa: F403


def test_errors_of_the_device_are_told(machine):
    with pytest.raises(RuntimeError, match="CUDA says"):
        _ops.pinned_memory(1 << 50, machine.device)
    assert distorch.shard(torch.ones(3), "cpu", machine.device).sum().item() == 3


def test_unaligned_memory_is_refused(machine):
    memory = torch.empty(33 * 4 + 1, dtype=torch.uint8, device=machine.device)
    into = memory[4 : 4 + 32 * 4].view(torch.float32)
    blocks = torch.zeros(34, dtype=torch.uint8, device=machine.device)
    with pytest.raises(ValueError, match="aligned to 16 bytes"):
        _ops.dequantise_into(into, blocks, "Q8_0")


def test_pinned_memory_has_its_size(machine):
    slab = _ops.pinned_memory(12345, machine.device)
    assert slab.untyped_storage().nbytes() == 12345
    assert slab.is_pinned()
