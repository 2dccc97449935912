# SPDX-License-Identifier: Apache-2.0
"""Full fine-tuning: the weights that are trained are on donors, the optimizer is torch's own."""

import pytest
import torch

import distorch

from .loops import assert_same_training, train
from .models import language

SPECS = ["cpu,0b;disk,*", "cpu,40%;disk,60%", "cpu,*"]
WAYS = {
    "default": {},
    "for loop": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}
OPTIMIZERS = {
    "sgd": (torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.01}),
    "adamw": (torch.optim.AdamW, {"amsgrad": True}),
}


def distributed(spec=SPECS[0], checkpointing=None):
    model = distorch.distribute(language(), spec, min_bytes=0)
    model.checkpointing = checkpointing
    assert all(distorch.is_sharded(p) for p in model.parameters()) or spec != SPECS[0]
    return model


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_optimizers(kind, way, spec):
    optimizer, settings = OPTIMIZERS[kind]
    options = {"steps": 12, **settings, **WAYS[way]}
    model = distributed(spec)
    wanted = language()
    assert_same_training(train(model, optimizer, **options), train(wanted, optimizer, **options))
    assert distorch.report(model).ok
    distorch.undistribute(model)
    for mine, other in zip(model.parameters(), wanted.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_fifty_steps():
    assert_same_training(train(distributed()), train(language()))


@pytest.mark.parametrize("checkpointing", ["reentrant", "not"])
def test_gradient_checkpointing(checkpointing):
    plain = language()
    plain.checkpointing = checkpointing
    model = distributed(checkpointing=checkpointing)
    assert_same_training(train(model, steps=10), train(plain, steps=10))


def test_accumulated_clipped_and_scaled():
    def run(model):
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        return train(
            model, steps=8, accumulate=3, clip=0.5, amp=torch.bfloat16, scaler=scaler, fused=True
        )

    assert_same_training(run(distributed()), run(language()))


def test_gradients_are_plain():
    model = distributed()
    model(torch.ones(1, 4, dtype=torch.long)).sum().backward()
    assert all(not distorch.is_sharded(p.grad) for p in model.parameters())


def test_training_goes_on_elsewhere():
    """A new placement between two steps, and a checkpoint of model and optimizer."""
    model, plain = distributed(), language()
    assert_same_training(train(model, steps=4), train(plain, steps=4))
    distorch.redistribute(model, SPECS[1], min_bytes=0)
    assert_same_training(train(model, steps=4), train(plain, steps=4))
    other = distorch.distribute(language(), SPECS[0], min_bytes=0)
    other.load_state_dict(model.state_dict())
    assert_same_training(train(other, steps=4), train(plain, steps=4))
