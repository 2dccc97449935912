# SPDX-License-Identifier: Apache-2.0
"""These tests need a CUDA device, which they see only with DISTORCH_REQUIRE_CUDA=1."""

import os
import sys
from pathlib import Path

import pytest
import torch

from tests.accelerator.machines import Cuda

HERE = Path(__file__).parent
REQUIRED = os.environ.get("DISTORCH_REQUIRE_CUDA") == "1"
HOW = "GPUs are hidden from this process: DISTORCH_REQUIRE_CUDA=1 shows them, or make test-gpu"


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    mine = [item for item in items if HERE in item.path.parents]
    if not REQUIRED:
        for item in mine:
            item.add_marker(pytest.mark.skip(reason=HOW))
    elif mine and "distorch.testing.sim" in sys.modules:
        raise pytest.UsageError(
            "tests/gpu and the simulated accelerator do not share a process: PyTorch's current "
            "accelerator would be the simulated one. Run tests/gpu alone: make test-gpu"
        )


@pytest.fixture
def machine():
    if not torch.cuda.is_available():
        pytest.fail(f"there is no CUDA device here (torch {torch.__version__})")
    found = Cuda()
    torch.cuda.set_device(found.device)
    yield found
    found.settle()
