# SPDX-License-Identifier: Apache-2.0
"""Training with weights on donors, step after step without waiting for the device."""

import copy
import io

import pytest
import torch
from torch.nn.utils import clip_grad_norm_
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import distorch

from .day_one import DONORS, batch, chain, offloaded, result, same, weights, width_of

OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, foreach=False),
    "SGD, foreach": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, foreach=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=False),
    "AdamW, foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
}
COUNT = 6


@pytest.fixture
def pair(machine):
    """The same model resident and with its weights in RAM."""
    plain = chain(machine, count=COUNT)
    return plain, offloaded(machine, plain)


def batches(machine, count):
    return [batch(machine, seed=seed) for seed in range(count)]


def loss_of(module, x):
    """So large that a step changes weights of 16 bits, so small that they stay finite."""
    return 256 * module(x).float().square().mean()


def train(module, optimizer, xs, accumulate=1, clip=None):
    """Losses on the device: nobody waits for them."""
    losses = []
    for step, x in enumerate(xs):
        loss = loss_of(module, x) / accumulate
        loss.backward()
        losses.append(loss.detach())
        if (step + 1) % accumulate == 0:
            if clip is not None:
                clip_grad_norm_(module.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
    return losses


def assert_same_training(machine, pair, run):
    plain, model = pair
    before = weights(plain)
    results = []
    for module in pair:
        machine.busy()
        results.append(run(module))
    after = weights(plain)
    assert same(weights(model), after)
    assert same(*results)
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert distorch.report(model).ok


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("donor", DONORS)
def test_steps_without_a_wait(machine, donor, name):
    plain = chain(machine, count=COUNT)
    xs = batches(machine, 4)

    def run(module):
        return train(module, OPTIMIZERS[name](module.parameters()), xs)

    assert_same_training(machine, (plain, offloaded(machine, plain, donor)), run)


@pytest.mark.parametrize("name", ["SGD", "AdamW, foreach"])
def test_accumulated_and_clipped(machine, pair, name):
    xs = batches(machine, 6)

    def run(module):
        return train(module, OPTIMIZERS[name](module.parameters()), xs, accumulate=3, clip=1.0)

    assert_same_training(machine, pair, run)


def test_half_of_the_weights_resident(machine):
    plain = chain(machine, count=COUNT)
    spec = f"{machine.device},50%;cpu,50%"
    model = distorch.distribute(copy.deepcopy(plain), spec, min_bytes=0)
    xs = batches(machine, 4)

    def run(module):
        return train(module, OPTIMIZERS["AdamW, foreach"](module.parameters()), xs)

    assert_same_training(machine, (plain, model), run)


def test_an_optimizer_in_backward(machine, pair):
    """Each weight is written as soon as its gradient is there, others are still to be read."""
    xs = batches(machine, 4)

    def run(module):
        optimizers = {p: torch.optim.SGD([p], lr=0.1, momentum=0.9) for p in module.parameters()}

        def step(parameter):
            optimizers[parameter].step()
            optimizers[parameter].zero_grad()

        handles = [p.register_post_accumulate_grad_hook(step) for p in module.parameters()]
        losses = []
        for x in xs:
            loss = loss_of(module, x)
            loss.backward()
            losses.append(loss.detach())
        for handle in handles:
            handle.remove()
        return losses

    assert_same_training(machine, pair, run)


def test_an_average_of_the_weights(machine, pair):
    """A copy that follows the weights, updated behind each step."""
    xs = batches(machine, 3)
    averages = []

    def run(module):
        average = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(0.5))
        optimizer = OPTIMIZERS["SGD"](module.parameters())
        losses = []
        for x in xs:
            losses += train(module, optimizer, [x])
            average.update_parameters(module)
            losses.append(result(average, x))
        averages.append(weights(average.module))
        return losses

    assert_same_training(machine, pair, run)
    assert same(*averages)


def test_a_checkpoint_file_behind_a_step(machine, pair):
    xs = batches(machine, 2)
    files = []

    def run(module):
        optimizer = OPTIMIZERS["AdamW, foreach"](module.parameters())
        losses = train(module, optimizer, xs)
        files.append(io.BytesIO())
        torch.save([module.state_dict(), optimizer.state_dict()], files[-1])
        losses += train(module, optimizer, xs)
        files[-1].seek(0)
        saved, state = torch.load(files[-1], map_location="cpu")
        module.load_state_dict(saved)  # back to the middle, right behind a step
        optimizer.load_state_dict(state)
        return losses + train(module, optimizer, xs)

    assert_same_training(machine, pair, run)


@pytest.mark.parametrize("kind", ["reentrant", "not reentrant", "segments"])
def test_gradient_checkpointing(machine, pair, kind):
    """The order of fetches goes forward and back within a step."""
    xs = [x.requires_grad_() for x in batches(machine, 3)]

    class Checkpointed(torch.nn.Module):
        def __init__(self, layers):
            super().__init__()
            self.layers = layers

        def forward(self, x):
            if kind == "segments":
                return checkpoint_sequential(self.layers, 2, x, use_reentrant=False)
            for layer in self.layers:
                x = checkpoint(layer, x, use_reentrant=kind == "reentrant")
            return x

    def run(module):
        return train(Checkpointed(module), OPTIMIZERS["SGD"](module.parameters()), xs)

    assert_same_training(machine, pair, run)


def test_autocast(machine):
    """float32 weights, cast for each operator, written to by every step."""
    plain = chain(machine, count=COUNT, width=width_of(machine) // 2).float()
    model = offloaded(machine, plain)
    xs = [batch(machine, seed=seed, width=width_of(machine) // 2).float() for seed in range(3)]

    def run(module):
        optimizer = OPTIMIZERS["AdamW, foreach"](module.parameters())
        losses = []
        for x in xs:
            with torch.autocast(machine.type, dtype=torch.bfloat16):
                loss = loss_of(module, x) + loss_of(module, x)  # casts are kept for the second
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
            with torch.autocast(machine.type, dtype=torch.bfloat16):
                losses.append(result(module, x))
        return losses

    assert_same_training(machine, (plain, model), run)
