# SPDX-License-Identifier: Apache-2.0
"""Training on the simulated accelerator: the look-ahead learns the order of the backward pass."""

import copy

import pytest
import torch
from torch import nn

import distorch
from distorch.testing import sim

WIDTH, COUNT = 128, 16
WEIGHT = WIDTH * WIDTH * 4


def net():
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(COUNT)))


class Adapted(nn.Module):
    """A frozen base, and after each of its layers a scale that is trained."""

    def __init__(self, base):
        super().__init__()
        self.base = base.requires_grad_(False)
        device = next(base.parameters()).device
        self.scales = nn.ParameterList(nn.Parameter(torch.ones(WIDTH, device=device)) for _ in base)

    def forward(self, x):
        for layer, scale in zip(self.base, self.scales, strict=True):
            x = layer(x) * scale
        return x


def steps(model, x, count):
    """Losses of training steps; a step fetches every weight forward, and backward but the first."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(count):
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("spec", ["sim:0,0b;cpu,*", "sim:0,0b;disk,*", "sim:0,0b;sim:1,*"])
def test_the_backward_order_is_learnt(spec):
    """All but three weights of a step are there in time: those where it turns round."""
    sim.configure(devices=2, flops=2e10, links={("cpu", "sim:0"): (100e9, 1e-6)}, disk=(10e9, 1e-6))
    x = torch.randn(64, WIDTH)
    plain = steps(Adapted(net()), x, 6)
    stalls, losses = {}, {}
    for prefetch in (0, 4 * WEIGHT):
        base = distorch.distribute(net(), spec, min_bytes=0, prefetch=prefetch)
        model, there = Adapted(base), x.to("sim:0")
        losses[prefetch] = steps(model, there, 3)
        distorch.reset_stats(base)
        losses[prefetch] += steps(model, there, 3)
        stats = distorch.stats(base)
        assert stats.fetches == 3 * (2 * COUNT - 1)
        assert stats.fetches - stats.hits <= 3 * 3 if prefetch else stats.hits == 0
        assert not prefetch or stats.overflows == 0
        stalls[prefetch] = stats.stall_seconds
    assert losses[0] == losses[4 * WEIGHT] == plain
    assert stalls[4 * WEIGHT] < 0.5 * stalls[0]


def test_full_fine_tuning():
    sim.configure(devices=2)
    x = torch.randn(8, WIDTH)
    plain = net()
    model = distorch.distribute(copy.deepcopy(plain), "sim:0,0b;cpu,*", min_bytes=0)
    assert steps(model, x.to("sim:0"), 5) == steps(plain, x, 5)
    for mine, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(distorch.materialize(mine).cpu(), other)
