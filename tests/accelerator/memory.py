# SPDX-License-Identifier: Apache-2.0
"""Memory: what happens when there is none left, caches are emptied, and what is counted."""

import copy

import pytest
import torch
from torch import nn

import distorch


def chain(width, count=6):
    return nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(count)))


@pytest.fixture(params=["cpu", "disk"])
def tight(machine, request):
    """(model, x, its result): a ring of four weights, nothing else on the device but x."""
    torch.manual_seed(0)
    plain = chain(machine.width).to(machine.device)
    x = torch.randn(machine.width, machine.width).to(machine.device)
    with torch.no_grad():
        wanted = plain(x).cpu()
        model = distorch.distribute(
            plain, f"{machine.device},0b;{request.param},*",
            min_bytes=0, prefetch=4 * machine.weight_bytes,
        )  # fmt: skip
        for _ in range(2):
            assert torch.equal(model(x).cpu(), wanted)
    return model, x, wanted


def test_an_operator_without_memory_gets_the_rings(machine, tight):
    model, x, wanted = tight
    distorch.reset_stats(model)
    with torch.no_grad(), machine.room(machine.weight_bytes):
        for _ in range(4):
            assert torch.equal(model(x).cpu(), wanted)
    assert distorch.stats(model).overflows > 0
    with torch.no_grad():
        for _ in range(3):
            model(x)  # the ring comes back
        distorch.reset_stats(model)
        assert torch.equal(model(x).cpu(), wanted)
    assert distorch.stats(model).overflows == 0


def test_an_operator_of_the_fallback_gets_it_too(machine, tight):
    model, x, _ = tight
    weight = model[0].weight
    plain = distorch.materialize(weight).cpu()
    with torch.no_grad(), machine.room(machine.weight_bytes):
        kept = [torch.add(weight, x), torch.maximum(weight, x)]
        joined = torch.stack([weight[:4], model[1].weight[:4]])
        for got, run in zip(kept, (torch.add, torch.maximum), strict=True):
            assert torch.equal(got.cpu(), run(plain, x.cpu()))
        assert torch.equal(joined[0].cpu(), plain[:4])
    assert distorch.stats(model).overflows > 0


def test_operators_that_write_are_not_run_twice(machine, tight):
    model, x, _ = tight
    weight = model[0].weight
    with torch.no_grad(), machine.room(machine.weight_bytes):
        kept = torch.empty_like(x)
        with pytest.raises(torch.OutOfMemoryError):
            torch.add(weight, x, out=torch.empty(0, device=machine.device))
        out = torch.empty(0, device=machine.device)
        torch.add(weight, x, out=out)  # the ring's memory is free now
        assert torch.equal(out.cpu(), distorch.materialize(weight).cpu() + x.cpu())
        del kept


def test_too_little_memory_is_told(machine, tight):
    model, x, wanted = tight
    many = x.repeat(8, 1)
    with torch.no_grad():
        with (
            machine.room(machine.weight_bytes),
            pytest.raises(torch.OutOfMemoryError, match="distorch had given back the"),
        ):
            model[0](many)
        assert torch.equal(model(x).cpu(), wanted)


def test_no_memory_for_a_fetch(machine, tight):
    """A weight that finds no room gets the ring's, too; and what others hold is not taken."""
    model, x, wanted = tight
    big = torch.randn(5 * machine.width, machine.width)
    with torch.no_grad():
        other = distorch.shard(big, "cpu", machine.device)  # larger than the ring
        with machine.room(2 * machine.weight_bytes):
            assert torch.equal((other[:2] + 0).cpu(), big[:2])
        assert torch.equal(model(x).cpu(), wanted)


def test_empty_cache(machine):
    torch.manual_seed(0)
    plain = chain(machine.width)
    model = distorch.distribute(copy.deepcopy(plain), f"{machine.device},0b;cpu,*", min_bytes=0)
    plain.to(machine.device)
    x = torch.randn(4, machine.width).to(machine.device)
    with torch.no_grad():
        wanted = plain(x).cpu()
        for _ in range(3):
            got = x
            for layer in model:
                got = layer(got)
                torch.accelerator.empty_cache()
            assert torch.equal(got.cpu(), wanted)


def test_statistics(machine):
    """What the device's statistics count is the resident weights, the ring and activations."""
    before = machine.allocated()
    model = chain(machine.width)
    spec = f"{machine.device},{machine.weight_bytes}b;cpu,*"
    distorch.distribute(model, spec, min_bytes=0, prefetch=2 * machine.weight_bytes)
    assert distorch.report(model).ok
    assert machine.allocated() - before == machine.weight_bytes
    x = torch.randn(4, machine.width).to(machine.device)
    with torch.no_grad():
        model(x)
        held = machine.allocated() - before
    workspace = held - 3 * machine.weight_bytes - x.nbytes
    assert 0 <= workspace <= machine.most_workspace
    with torch.no_grad():
        machine.module.reset_peak_memory_stats()
        for _ in range(3):
            model(x)
        machine.settle()
        peak = machine.module.max_memory_allocated() - before
    assert 0 <= peak - held <= 2 * x.nbytes
    distorch.undistribute(model, device="cpu")
    del x, model
    assert machine.allocated() - before == workspace
