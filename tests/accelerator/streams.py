# SPDX-License-Identifier: Apache-2.0
"""Streams, threads, backward threads, captures, peers: the same bits as resident."""

import copy
import threading

import pytest
import torch
from torch import nn

import distorch
from distorch import _donors, _native, _ops


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


WIDTH = 64


def net():
    torch.manual_seed(0)
    return nn.Sequential(*(Block(WIDTH) for _ in range(4)))


def offloaded(machine, donor="cpu", **options):
    return distorch.distribute(net(), f"{machine.device},0b;{donor},*", min_bytes=0, **options)


def batch(machine, seed=1):
    return torch.randn(16, WIDTH, generator=torch.Generator().manual_seed(seed)).to(machine.device)


def in_threads(count, run):
    """Results of run(i) in threads of their own; raises what one of them raised."""
    results, errors = [None] * count, []

    def work(index):
        try:
            results[index] = run(index)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


def on_a_stream(machine, work):
    """What `work` gives, from a stream of its own that waits for the current one before."""
    here = torch.accelerator.current_stream(machine.device)
    stream = torch.Stream(device=machine.device)
    stream.wait_stream(here)
    with stream:
        result = work()
        assert torch.accelerator.current_stream(machine.device) == stream
    here.wait_stream(stream)
    result.record_stream(here)
    return result


@pytest.mark.parametrize("prefetch", [0, 40_000, "auto"])
def test_other_streams(machine, prefetch):
    plain, model = net().to(machine.device), offloaded(machine, prefetch=prefetch)
    x = batch(machine)
    with torch.no_grad():
        wanted = plain(x).cpu()
        for _ in range(4):
            assert torch.equal(on_a_stream(machine, lambda: model(x)).cpu(), wanted)
            assert torch.equal(model(x).cpu(), wanted)


def test_threads(machine):
    plain, model = net().to(machine.device), offloaded(machine)
    batches = [batch(machine, seed) for seed in range(3)]
    machine.module.synchronize()  # other threads' streams do not wait for this one's

    def run(index):
        with torch.no_grad():
            return [on_a_stream(machine, lambda: model(batches[index])).cpu() for _ in range(6)]

    with torch.no_grad():
        wanted = [plain(x).cpu() for x in batches]
    for results, want in zip(in_threads(3, run), wanted, strict=True):
        assert all(torch.equal(result, want) for result in results)


def test_the_current_device_stays(machine):
    model = offloaded(machine)
    other = machine.second()
    x = batch(machine)
    torch.accelerator.set_device_index(other.index)
    try:
        model(x).sum().backward()
        assert torch.accelerator.current_device_index() == other.index
    finally:
        torch.accelerator.set_device_index(machine.device.index)
    assert all(p.grad.device == machine.device for p in model.parameters())


def gradients(module, x):
    found = torch.autograd.grad(module(x).square().mean(), list(module.parameters()))
    return [grad.cpu() for grad in found]


def test_backward_in_threads(machine):
    """Backward fetches again, in a thread of autograd's for each device, for several at one time."""
    plain, model = net().to(machine.device), offloaded(machine, prefetch=40_000)
    batches = [batch(machine, seed) for seed in range(3)]
    machine.module.synchronize()
    wanted = [gradients(plain, x) for x in batches]
    for _ in range(2):
        results = in_threads(3, lambda index: gradients(model, batches[index]))
        for result, want in zip(results, wanted, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(result, want, strict=True))


def test_backward_on_the_stream_of_forward(machine):
    plain, model = net().to(machine.device), offloaded(machine)
    x = batch(machine)
    wanted = gradients(plain, x)

    def train():
        loss = model(x).square().mean()
        loss.backward()
        return loss.detach()

    on_a_stream(machine, train)
    machine.module.synchronize()
    got = [p.grad.cpu() for p in model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_a_fetch_in_a_capture_is_refused(machine):
    plain, model = net().to(machine.device), offloaded(machine)
    x = batch(machine)
    with torch.no_grad():
        wanted = plain(x).cpu()
        assert torch.equal(model(x).cpu(), wanted)
        machine.module.synchronize()
        with (
            pytest.raises(distorch.FetchError, match=r"weight '0\..*a graph is being captured"),
            machine.capturing(),
        ):
            model(x)
        assert torch.equal(model(x).cpu(), wanted)


def test_what_is_resident_can_be_captured(machine):
    """One block stays on the device; a capture of it alone asks the ring for nothing."""
    keep = [f"0.{name}" for name, _ in net()[0].named_parameters()]
    model = offloaded(machine, keep=keep)
    x = batch(machine)
    with torch.no_grad():
        wanted = model[0](x).cpu()
        model(x)
        machine.module.synchronize()
        with machine.capturing() as graph:
            held = model[0](x)
        machine.replay(graph)
        assert torch.equal(held.cpu(), wanted)


def test_rows_of_a_table_in_a_capture_are_refused(machine):
    table = torch.randint(-128, 128, (300, 64), dtype=torch.int8)
    stored = _donors.shard_on("cpu", table, machine.device, "table")
    rows = _ops.decoded(stored, "int8", torch.float32, (300, 64), name="table")
    ids = torch.arange(3, device=machine.device)
    machine.module.synchronize()
    with (
        pytest.raises(distorch.FetchError, match="weight 'table'.*a graph is being captured"),
        machine.capturing(),
    ):
        nn.functional.embedding(ids, rows)
    assert torch.equal(nn.functional.embedding(ids, rows).cpu(), table[:3].float())


@pytest.mark.parametrize("reach", [True, False], ids=["direct", "bounce"])
def test_a_donor_on_the_compute_device(machine, reach):
    """One device plays both ends of a link between two, with and without peer access."""
    device = str(machine.device)
    weights = [torch.randn(1500, 1000) for _ in range(3)]  # three turns of a bounce each
    x = torch.randn(4, 1500).to(machine.device)
    _native.set_peer_access(device, device, reach)
    try:
        sharded = [_donors.shard_on(device, w, machine.device, "weight") for w in weights]
        for _ in range(3):
            for weight, plain in zip(sharded, weights, strict=True):
                assert torch.equal((weight + 0).cpu(), plain)
        assert torch.equal(x @ sharded[0], x @ weights[0].to(machine.device))
        del sharded, weight
    finally:
        _native.set_peer_access(device, device, True)


@pytest.mark.parametrize("reach", ["as it is", "bounce"])
@pytest.mark.parametrize("stripes", [False, True], ids=["whole", "striped"])
def test_another_device_as_donor(machine, reach, stripes):
    other = machine.second()
    plain = net().to(machine.device)
    model = offloaded(machine, f"cpu+{other}" if stripes else str(other), prefetch=40_000)
    if reach == "bounce":
        _native.set_peer_access(str(machine.device), str(other), False)
    assert distorch.report(model).ok
    x = batch(machine)
    wanted = gradients(plain, x)
    for _ in range(3):
        got = gradients(model, x)
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    copied = copy.deepcopy(model)
    assert torch.equal(copied(x).cpu(), plain(x).cpu())
