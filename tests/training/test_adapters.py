# SPDX-License-Identifier: Apache-2.0
"""A frozen base on donors, adapters that are trained on the compute device."""

import pytest
import torch

import distorch

from .loops import assert_same_training, train
from .models import language, with_low_rank, with_peft

SPECS = ["cpu,0b;disk,*", "cpu,40%;disk,60%"]
ADAPTERS = {"by hand": with_low_rank, "peft": with_peft}


def adapted(kind, spec=None, checkpointing=None):
    """The model with adapters; its base is on donors when there is a placement."""
    base = language()
    base.checkpointing = checkpointing
    if spec is not None:
        distorch.distribute(base, spec, min_bytes=0)
    model = ADAPTERS[kind](base)
    if spec is not None:
        trained = [distorch.is_sharded(p) for p in model.parameters() if p.requires_grad]
        frozen = [distorch.is_sharded(p) for p in model.parameters() if not p.requires_grad]
        assert not any(trained) and any(frozen)
    return model


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("kind", ADAPTERS)
def test_fifty_steps(kind, spec):
    assert_same_training(train(adapted(kind, spec)), train(adapted(kind)))


@pytest.mark.parametrize("checkpointing", ["reentrant", "not"])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_gradient_checkpointing(kind, checkpointing):
    wanted = train(adapted(kind, checkpointing=checkpointing))
    assert_same_training(train(adapted(kind, SPECS[0], checkpointing)), wanted)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_gradient_accumulation(kind):
    options = {"steps": 15, "accumulate": 4, "clip": 0.5}
    assert_same_training(train(adapted(kind, SPECS[0]), **options), train(adapted(kind), **options))


@pytest.mark.parametrize("amp", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_mixed_precision(kind, amp):
    def run(model):
        return train(model, amp=amp, scaler=torch.amp.GradScaler("cpu", init_scale=1024.0))

    assert_same_training(run(adapted(kind, SPECS[0])), run(adapted(kind)))


@pytest.mark.parametrize("kind", ADAPTERS)
def test_the_base_does_not_change(kind):
    before = language().state_dict()
    model = adapted(kind, SPECS[0])
    train(model, steps=3)
    found = [p for p in model.parameters() if not p.requires_grad]
    plain = [p for p in adapted(kind).parameters() if not p.requires_grad]
    assert len(found) == len(plain) == len({t.data_ptr() for t in before.values()})
    for mine, other in zip(found, plain, strict=True):
        assert torch.equal(mine, other)
