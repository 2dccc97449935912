"""These tests need a CUDA device. DISTORCH_REQUIRE_CUDA=1: without one they fail, not skip."""

import os
from pathlib import Path

import pytest
import torch

from tests.accelerator.machines import Cuda

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available() or os.environ.get("DISTORCH_REQUIRE_CUDA") == "1":
        return
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="there is no CUDA device here"))


@pytest.fixture
def machine():
    found = Cuda()
    torch.cuda.set_device(found.device)
    yield found
    found.settle()
