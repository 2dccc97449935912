# SPDX-License-Identifier: Apache-2.0
"""The node pack against a stand-in for its host (`stub/`), and in `real/` against a real one."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "stub"))


@pytest.fixture
def host():
    """The stand-in's models, with no model on any device."""
    import comfy.model_management as management

    management.current_loaded_models.clear()
    management.free.clear()
    management.default = torch.device("cpu")
    yield management
    management.current_loaded_models.clear()
    management.free.clear()
    management.default = torch.device("cpu")


@pytest.fixture
def accelerators(host):
    """Two simulated devices; the host computes on the first."""
    from distorch.testing import sim

    with torch.autograd.set_multithreading_enabled(False):
        sim.configure(devices=2, memory="1gb", mode="eager")
        host.default = torch.device("sim:0")
        yield
        sim.synchronize()
        assert sim.races() == []
        sim.configure(devices=2)
