# SPDX-License-Identifier: Apache-2.0
"""Modules that are made, placed and asked for their state in inference mode, as some hosts do."""

import torch
from torch import nn

import distorch


def test_state_dict_in_inference_mode():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8))
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    distorch.distribute(model, "cpu,0b;disk,*", min_bytes=0)
    with torch.inference_mode():
        found = model.state_dict()
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor)
    assert torch.equal(model.state_dict()["0.weight"], expected["0.weight"])


def test_a_module_made_in_inference_mode():
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8))
        x = torch.randn(4, 64)
        expected = model(x)
        tied = model[0].weight
        model.register_parameter("tied", tied)
        distorch.distribute(model, "cpu,0b;disk,*", min_bytes=0)
        assert model[0].weight is model.tied
        assert torch.equal(model(x), expected)
    assert not model[0].weight.is_inference()
    assert torch.equal(model(x.clone()), expected.clone())


def test_progress_is_told_every_byte_that_moves():
    model, told = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8)), []
    distorch.distribute(model, "cpu,0b;disk,*", min_bytes=0, progress=told.append)
    assert sum(told) == distorch.report(model).bytes["disk"]
