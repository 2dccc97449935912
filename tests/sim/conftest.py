# SPDX-License-Identifier: Apache-2.0
"""Every test of this folder starts with a fresh simulated machine and must end without races."""

import gc

import pytest
import torch

from distorch.testing import sim
from tests.accelerator.machines import Simulated


@pytest.fixture(autouse=True)
def _machine():
    with torch.autograd.set_multithreading_enabled(False):
        sim.configure(devices=2)
        yield
        gc.collect()
        sim.synchronize()
        assert sim.races() == []
        sim.configure(devices=2)


@pytest.fixture
def machine(_machine):
    sim.configure(devices=2, memory="64mb", links={("sim:1", "sim:0"): (50e9, 5e-6)})
    return Simulated()
