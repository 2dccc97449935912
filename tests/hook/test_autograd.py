# SPDX-License-Identifier: Apache-2.0
"""Autograd saves the sharded weight, fetches again in backward, and gives the same gradients."""

import pytest
import torch
from torch import nn

import distorch


def twins(donor="disk"):
    plain = nn.Linear(12, 16)
    sharded = nn.Linear(12, 16)
    sharded.load_state_dict(plain.state_dict())
    sharded.weight = distorch.shard(sharded.weight, donor)
    return plain, sharded


def test_saved_tensor_is_sharded():
    _, layer = twins()
    x = torch.randn(3, 12, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = layer(x)
    assert any(distorch.is_sharded(t) for t in saved)
    before = distorch.fetch_count()
    out.sum().backward()
    assert distorch.fetch_count() == before + 1


def test_gradients_are_plain_and_equal():
    plain, sharded = twins()
    x = torch.randn(3, 12)
    for layer in (plain, sharded):
        layer(x).square().sum().backward()
    assert torch.equal(plain.weight.grad, sharded.weight.grad)
    assert not distorch.is_sharded(sharded.weight.grad)
    assert type(sharded.weight) is nn.Parameter
    assert isinstance(sharded.weight, distorch.ShardedParameter)
    assert not isinstance(plain.weight, distorch.ShardedParameter)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.AdamW(p, lr=0.1),
        lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
        lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    ],
)
@pytest.mark.parametrize("donor", ["cpu", "disk"])
def test_training_steps(make, donor):
    plain, sharded = twins(donor)
    optimizers = [make(plain.parameters()), make(sharded.parameters())]
    x = torch.randn(3, 12)
    for _ in range(3):
        for layer, optimizer in zip((plain, sharded), optimizers, strict=True):
            optimizer.zero_grad()
            layer(x).square().sum().backward()
            optimizer.step()
    assert distorch.is_sharded(sharded.weight)
    assert torch.equal(distorch.materialize(sharded.weight), plain.weight)


def test_checkpointing_and_autocast():
    plain, sharded = twins()
    results = []
    for layer in (plain, sharded):
        x = torch.ones(3, 12, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            out = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
        out.float().sum().backward()
        results.append((out, x.grad, layer.weight.grad))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_double_backward():
    grads = []
    for layer in twins():
        torch.manual_seed(1)
        x = torch.randn(3, 12, requires_grad=True)
        (g,) = torch.autograd.grad(layer(x).pow(3).sum(), x, create_graph=True)
        g.square().sum().backward()
        grads.append(layer.weight.grad)
    assert torch.equal(*grads)


def test_inference_mode():
    plain, sharded = twins()
    with torch.inference_mode():
        x = torch.randn(3, 12)
        assert torch.equal(plain(x), sharded(x))


def test_functorch():
    plain, sharded = twins()
    x = torch.randn(5, 12)

    def loss(weight, x):
        return torch.nn.functional.linear(x, weight).square().sum()

    for transform in (
        lambda w: torch.func.grad(loss)(w, x),
        lambda w: torch.vmap(loss, (None, 0))(w, x),
        lambda w: torch.func.jvp(lambda v: loss(w, v), (x,), (x,))[1],
    ):
        assert torch.equal(transform(plain.weight.detach()), transform(sharded.weight.detach()))
