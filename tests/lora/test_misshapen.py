# SPDX-License-Identifier: Apache-2.0
"""Every kind of patch with one factor of a wrong shape: refused by name, and nothing is changed."""

import math

import pytest
import torch
from torch import nn

import distorch
from distorch import FormatError

ROWS, COLUMNS, RANK = 24, 16, 2
# The factors of a patch on [ROWS, COLUMNS], by kind.
KINDS = {
    "LoRA": {"lora_A.weight": (RANK, COLUMNS), "lora_B.weight": (ROWS, RANK)},
    "DoRA": {"lora_down.weight": (RANK, COLUMNS), "lora_up.weight": (ROWS, RANK),
             "dora_scale": (ROWS, 1)},
    "LoHa": {"hada_w1_a": (ROWS, RANK), "hada_w1_b": (RANK, COLUMNS), "hada_w2_a": (ROWS, RANK),
             "hada_w2_b": (RANK, COLUMNS)},
    "LoKr": {"lokr_w1": (4, 2), "lokr_w2_a": (ROWS // 4, RANK), "lokr_w2_b": (RANK, COLUMNS // 2)},
    "LoKr of two products": {"lokr_w1_a": (4, RANK), "lokr_w1_b": (RANK, 2),
                             "lokr_w2": (ROWS // 4, COLUMNS // 2)},
    "GLoRA": {"a1.weight": (COLUMNS, RANK), "a2.weight": (RANK, COLUMNS),
              "b1.weight": (ROWS, RANK), "b2.weight": (RANK, COLUMNS)},
    "OFT of rows": {"oft_blocks": (4, ROWS // 4, ROWS // 4), "rescale": (ROWS, 1)},
    "BOFT of rows": {"oft_blocks": (1, 4, ROWS // 4, ROWS // 4)},
    "OFT": {"oft_R.weight": (4, 6)},
    "BOFT": {"boft_R": (1, 4, 4, 4), "boft_s": (ROWS, 1)},
    "difference": {"diff": (ROWS, COLUMNS), "diff_b": (ROWS,)},
    "replacement": {"set_weight": (ROWS, COLUMNS)},
}  # fmt: skip


def others(shape):
    """One size more or less, a dimension more or less, none, and nothing."""
    for i, size in enumerate(shape):
        for new in (size + 1, size - 1, 0):
            yield (*shape[:i], new, *shape[i + 1 :])
    yield from ((), (1,), shape[1:], (*shape, 2), (2, *shape), (math.prod(shape) + 1,))


def net():
    torch.manual_seed(0)
    return nn.ModuleDict({"to_q": nn.Linear(COLUMNS, ROWS)}).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_a_factor_of_a_wrong_shape(kind):
    module = distorch.distribute(net(), "cpu,0b;disk,*", min_bytes=0)
    x = torch.ones(1, COLUMNS)
    before = module["to_q"](x)
    right = {f"to_q.{part}": torch.rand(shape) / 8 for part, shape in KINDS[kind].items()}
    distorch.set_loras(module, [(right, 1.0)])
    assert not torch.equal(module["to_q"](x), before)
    distorch.set_loras(module, [])
    refused = 0
    for part, shape in KINDS[kind].items():
        for wrong in dict.fromkeys(others(shape)):
            state = {**right, f"to_q.{part}": torch.rand(wrong) / 8}
            try:
                distorch.set_loras(module, [(state, 1.0)])
                module["to_q"](x)
                distorch.set_loras(module, [])
            except FormatError as error:
                refused += 1
                assert "to_q" in str(error), error
            assert torch.equal(module["to_q"](x), before), (part, wrong)
    assert refused >= 3 * len(KINDS[kind])
