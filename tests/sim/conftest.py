"""Every test of this folder starts with a fresh simulated machine and must end without races."""

import gc

import pytest
import torch

from distorch.testing import sim


@pytest.fixture(autouse=True)
def _machine():
    with torch.autograd.set_multithreading_enabled(False):
        sim.configure(devices=2)
        yield
        gc.collect()
        sim.synchronize()
        assert sim.races() == []
        sim.configure(devices=2)
