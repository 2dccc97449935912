# SPDX-License-Identifier: Apache-2.0
"""A model that was made in inference mode computes on an accelerator after it was distributed."""

import torch
from torch import nn

import distorch


def test_parameters_made_in_inference_mode():
    with torch.inference_mode():
        model = nn.Linear(64, 64)
        x = torch.randn(4, 64)
        expected = model(x)
        for spec in ("sim:0,*", "sim:0,0b;cpu,*", "sim:0,0b;sim:1,*"):
            distorch.distribute(model, spec, min_bytes=0)
            assert torch.equal(model(x.to("sim:0")).cpu(), expected)
