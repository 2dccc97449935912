# SPDX-License-Identifier: Apache-2.0
"""Buffers: those that a file brings, those that modules share, and those that have no values."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import distorch
from distorch.testing import sim


class Net(nn.Module):
    """A layer with a buffer that files keep, and tables that they do not."""

    def __init__(self, tables=("table",)):
        super().__init__()
        self.proj = nn.Linear(8, 8)
        self.register_buffer("kept", torch.arange(8.0))
        self.tables = tables
        for name in tables:
            self.register_buffer(name, torch.arange(8.0) + 1, persistent=False)

    def forward(self, x):
        return self.proj(x) * self.kept + sum(getattr(self, name) for name in self.tables)


class Shared(nn.Module):
    """Two layers with one buffer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = Net(()), Net(())
        self.second.register_buffer("kept", self.first.kept)

    def forward(self, x):
        return self.second(self.first(x))


def file_of(path, module):
    save_file({k: v.clone() for k, v in module.state_dict().items()}, path / "m.safetensors")
    return path / "m.safetensors"


@pytest.mark.parametrize("tables", [("table",), ("one", "two", "three")])
def test_each_buffer_without_values_is_named(tmp_path, tables):
    file = file_of(tmp_path, Net(tables))
    with torch.device("meta"):
        module = Net(tables)
    names = ", ".join(f"'{name}'" for name in tables)
    with pytest.raises(distorch.PlacementError, match=rf"{len(tables)} buffers .*\({names}\)"):
        distorch.load(module, file, "cpu,*", min_bytes=0)
    assert module.kept.is_meta and module.proj.weight.is_meta


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("strict", [True, False])
def test_one_buffer_of_two_modules_is_loaded(tmp_path, device, strict):
    plain = Shared()
    plain.first.kept.mul_(3)
    file = file_of(tmp_path, plain)
    with torch.device(device):
        module = Shared()
    distorch.load(module, file, "cpu,0b;disk,*", min_bytes=0, strict=strict)
    assert module.first.kept is module.second.kept
    x = torch.randn(2, 8)
    assert torch.equal(module(x), plain(x))


def test_one_buffer_of_two_modules_is_moved():
    plain, module = Shared(), Shared()
    x = torch.randn(2, 8)
    wanted = plain(x)
    sim.configure()
    distorch.distribute(module, "sim:0,0b;cpu,*", min_bytes=0)
    assert module.first.kept is module.second.kept and module.second.kept.device.type == "sim"
    assert torch.equal(module(x.to("sim:0")).cpu(), wanted)
    distorch.undistribute(module, "cpu")
    assert module.first.kept is module.second.kept
    assert torch.equal(module(x), wanted)
