# SPDX-License-Identifier: Apache-2.0
"""Merges in a thread that flushes subnormal numbers."""

import pytest
import torch

from distorch.lora import LoraReader, merge


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_bits_do_not_depend_on_the_mode_of_the_thread(dtype):
    base = torch.full((256, 64), 3 * torch.finfo(dtype).smallest_normal / 64, dtype=dtype)
    lora = {"x.lora_A.weight": torch.zeros(1, 64), "x.lora_B.weight": torch.zeros(256, 1)}
    patches, _ = LoraReader({"x.weight": tuple(base.shape)}).read([(lora, 1.0)], True)

    def merged():
        return merge(patches.of(["x.weight"]), base, dtype)

    wanted = merged()
    assert torch.equal(wanted, base) and bool(base.view(-1)[0] != 0)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor does not flush")
    try:
        found = merged()
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(found.view(torch.uint8), wanted.view(torch.uint8))
