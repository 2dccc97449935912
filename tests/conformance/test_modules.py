# SPDX-License-Identifier: Apache-2.0
"""The module sweep: the first samples of every module."""

import pytest

from .modules import MODULES, check, dtype_of

NAMES = [name for name in sorted(MODULES) if dtype_of(name) is not None]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", NAMES)
def test_module(name, training):
    check(name, training, samples=2)


def test_there_are_many():
    assert len(NAMES) > 100
