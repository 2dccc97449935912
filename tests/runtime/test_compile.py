"""torch.compile on a distributed model: one graph, the bits of the compiled resident one."""

import copy

import pytest
import torch
from torch import nn

import distorch


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(64)
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x):
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


@pytest.mark.parametrize("spec", ["cpu,0b;disk,*"])
def test_linear_weights_on_donors(spec):
    torch.manual_seed(0)
    plain = nn.Sequential(*(Block() for _ in range(3)))
    model = distorch.distribute(copy.deepcopy(plain), spec, min_bytes=0, keep=["*norm*", "*bias"])
    torch._dynamo.reset()
    compiled, expected = torch.compile(model, fullgraph=True), torch.compile(plain, fullgraph=True)
    x = torch.randn(2, 64)
    for _ in range(2):
        mine, other = compiled(x), expected(x)
        assert torch.equal(mine, other)
    mine.square().sum().backward()
    other.square().sum().backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)
