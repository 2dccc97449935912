# SPDX-License-Identifier: Apache-2.0
"""Every test of this folder starts with a fresh simulated machine that nobody has measured."""

import gc
import sys

import pytest
import torch

from distorch import _donors
from distorch.machine import links as known_links
from distorch.testing import sim
from tests.prediction.programs import configure


@pytest.fixture(autouse=True)
def _machine(tmp_path, monkeypatch):
    """A fresh machine, and nothing that was calibrated before."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(known_links, "_known", {})
    monkeypatch.setattr(_donors, "link_rates", {})
    torch.manual_seed(0)
    # A model that another test left, or its error, would share its ring with this one's.
    for name in ("last_exc", "last_value", "last_traceback"):
        sys.__dict__.pop(name, None)
    gc.collect()
    with torch.autograd.set_multithreading_enabled(False):
        configure()
        yield
        sim.synchronize()
        sim.configure()
