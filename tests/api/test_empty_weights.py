# SPDX-License-Identifier: Apache-2.0
"""Modules without weights, whose buffers are real."""

import copy
import threading

import pytest
import torch
from torch import nn

import distorch


class Rotary(nn.Module):
    """A buffer that no file has, made by __init__; a tied weight; one of a parent's."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        self.last.weight = self.first.weight
        scale = nn.Parameter(torch.ones(8), requires_grad=False)
        scale.colour = "red"
        self.scale, self.again = scale, scale
        self.register_buffer("angles", torch.arange(8.0), persistent=False)

    def forward(self, x):
        return self.last(self.first(x) * self.scale + self.angles)


def test_load_fills_it(tmp_path):
    plain = Rotary()
    torch.save(plain.state_dict(), tmp_path / "m.pt")
    with distorch.init_empty_weights():
        module = Rotary()
    assert all(parameter.is_meta for parameter in module.parameters())
    assert module.first.weight is module.last.weight and module.scale is module.again
    assert module.scale.colour == "red" and not module.scale.requires_grad
    distorch.load(module, tmp_path / "m.pt", "disk,*", min_bytes=0)
    x = torch.randn(2, 8)
    assert torch.equal(module(x), plain(x))


def test_only_inside_and_only_this_thread():
    found = []
    with pytest.raises(KeyError), distorch.init_empty_weights():
        thread = threading.Thread(target=lambda: found.append(nn.Linear(2, 2)))
        thread.start()
        thread.join()
        with distorch.init_empty_weights():
            found.append(nn.Linear(2, 2))
        found.append(nn.Linear(2, 2))
        found.append(copy.deepcopy(found[0]))
        found.append(nn.LazyLinear(3))
        raise KeyError
    found.append(nn.Linear(2, 2))
    assert [module.weight.is_meta for module in found] == [False, True, True, False, False, False]
    assert isinstance(found[4].weight, nn.UninitializedParameter)


def test_a_buffer_without_values_says_what_to_do(tmp_path):
    torch.save(Rotary().state_dict(), tmp_path / "m.pt")
    with torch.device("meta"):
        module = Rotary()
    with pytest.raises(distorch.PlacementError, match="'angles'.*init_empty_weights"):
        distorch.load(module, tmp_path / "m.pt", "disk,*")
    assert module.first.weight.is_meta
