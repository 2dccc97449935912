# SPDX-License-Identifier: Apache-2.0
"""The first day with a GPU, here on the simulated accelerator with a slow link."""

import pytest

from distorch.testing import sim
from tests.accelerator.day_one import *  # noqa: F403
from tests.accelerator.exits import *  # noqa: F403
from tests.accelerator.machines import Simulated
from tests.accelerator.programs import *  # noqa: F403
from tests.accelerator.training import *  # noqa: F403
from tests.accelerator.with_libraries import *  # noqa: F403


@pytest.fixture
def machine(_machine):
    slow = {("cpu", "sim:0"): (1e9, 10e-6), ("sim:0", "cpu"): (1e9, 10e-6)}
    peers = {("sim:1", "sim:0"): (50e9, 5e-6), ("sim:0", "sim:1"): (50e9, 5e-6)}
    sim.configure(devices=2, memory="512mb", links={**slow, **peers})
    return Simulated()
