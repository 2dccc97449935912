# SPDX-License-Identifier: Apache-2.0
"""A part of the operator sweep: the first samples of every operator in one dtype."""

import pytest
import torch

from tests.amount import ALL

from .compare import DifferentError, assert_same
from .operators import OPS, check, check_sparse, names

FLOATS = names(torch.float32)
INTEGERS = [name for name in names(torch.int64) if name not in FLOATS]


@pytest.mark.parametrize("name", FLOATS)
def test_float32(name):
    check(name, torch.float32, samples=2, without_grad=2 if ALL else 1)


@pytest.mark.parametrize("name", INTEGERS)
def test_int64(name):
    check(name, torch.int64, samples=2, without_grad=2 if ALL else 1)


@pytest.mark.parametrize(
    "name", ["add", "sub", "mul", "mm", "addmm", "addmv", "inner", "__rmatmul__"]
)
def test_beside_sparse_arguments(name):
    assert check_sparse(name) > 0


def test_there_are_many():
    assert len(OPS) > 600


def test_a_difference_is_seen():
    a = torch.ones(3)
    assert_same(a, a.clone(), "same")
    for other in (torch.nextafter(a, a + 1), a.double(), ValueError("no")):
        with pytest.raises(DifferentError):
            assert_same(a, other, "other")
