# SPDX-License-Identifier: Apache-2.0
"""Programs of the first day: threads, streams, odd weights, faults, traces, files."""

import _thread
import contextlib
import copy
import io
import json
import signal
import threading
import time

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import distorch
from distorch import _donors
from distorch.machine import links

from .day_one import (
    COUNT,
    DONORS,
    batch,
    chain,
    everywhere,
    issued,
    offloaded,
    result,
    same,
    warm,
    weights,
    width_of,
)
from .streams import in_threads, on_a_stream

# ---- threads and streams -----------------------------------------------------


@pytest.mark.parametrize("streams", ["one stream", "streams of their own"])
@pytest.mark.parametrize("donor", DONORS)
def test_placements_change_beside_forwards_in_threads(machine, donor, streams):
    """On streams of their own: from donor to donor. Resident weights are the next test's."""
    plain, x = chain(machine), batch(machine)
    wanted = result(plain, x)
    model = offloaded(machine, plain, donor)
    machine.module.synchronize()
    ended = threading.Event()

    def change():
        for place in everywhere(machine)[1 if streams == "one stream" else 2 :] * 2:
            distorch.redistribute(model, place)
            copy.deepcopy(model)
            torch.save(model.state_dict(), io.BytesIO())

    def forward():
        if streams == "one stream":
            return result(model, x)
        return on_a_stream(machine, lambda: result(model, x))

    def work(index):
        if index == 0:
            try:
                change()
            finally:
                ended.set()
            return True
        right, turns = True, 0
        while right and not (ended.is_set() and turns):
            right = torch.equal(forward(), wanted)
            turns += 1
        return right

    assert all(in_threads(3, work))
    assert distorch.report(model).ok


def test_resident_weights_leave_behind_a_forward_on_another_stream(machine):
    """Who redistributes cannot know what other streams still read, and has no weight to record."""
    plain, x = chain(machine), batch(machine)
    model = offloaded(machine, plain)
    distorch.redistribute(model, f"{machine.device},50%;cpu,*", prefetch=plain[0].weight.nbytes)
    wanted = result(plain, x)
    warm(machine, model, x)
    here = torch.accelerator.current_stream(machine.device)
    stream = torch.Stream(device=machine.device)
    with stream:
        first = issued(machine, model, x)
    distorch.redistribute(model, f"{machine.device},0b;cpu,*")
    second = result(model, x)  # takes the memory that the weights had
    here.wait_stream(stream)
    first.record_stream(here)
    assert torch.equal(first, wanted)
    assert torch.equal(second, wanted)


def test_two_streams_in_turn(machine):
    """Neither waits for the other, and both read one ring."""
    plain = chain(machine)
    model = offloaded(machine, plain)
    batches = [batch(machine, seed=seed) for seed in range(2)]
    wanted = [result(plain, x) for x in batches]
    machine.module.synchronize()
    streams = [torch.Stream(device=machine.device) for _ in batches]
    got = [[], []]
    for _ in range(4):
        for index, stream in enumerate(streams):
            with stream:
                got[index].append(result(model, batches[index]))
    machine.module.synchronize()
    for results, want in zip(got, wanted, strict=True):
        assert same(results, [want] * 4)


def test_everything_on_a_stream_of_its_own(machine):
    """The current stream is never the default one: forward, backward, write, forward."""
    plain, x = chain(machine), batch(machine)
    model = offloaded(machine, plain)
    machine.module.synchronize()

    def work(module):
        found = []
        for _ in range(3):
            y = module(x)
            y.float().square().mean().backward()
            with torch.no_grad():
                for weight in module.parameters():
                    weight.sub_(weight.grad)
                    weight.grad = None
            found.append(y.detach())
        return torch.stack(found)

    assert torch.equal(on_a_stream(machine, lambda: work(model)), work(plain))
    assert same(weights(model), weights(plain))


def test_modes_in_turn(machine):
    """Under inference_mode, no_grad and neither, with a write between, in one program."""
    plain, x = chain(machine), batch(machine)
    model = offloaded(machine, plain)
    pairs = []
    for turn in range(6):
        mode = (torch.inference_mode, torch.no_grad, torch.enable_grad)[turn % 3]
        for module in (plain, model):
            with mode():
                pairs.append(module(x))
            if turn % 3 == 2:
                pairs[-1].float().square().mean().backward()
            with torch.no_grad():
                module[turn].weight.mul_(0.5)
    assert same(pairs[::2], pairs[1::2])
    assert same(*([p.grad for p in m.parameters()] for m in (plain, model)))


def test_layers_are_left_out_and_repeated(machine):
    """Another order each time: the look-ahead is always wrong somewhere."""
    plain, x = chain(machine), batch(machine)
    model = offloaded(machine, plain)
    orders = [[0, 1, 2, 3], [7, 6, 5], [0, 0, 4, 4, 1], [2, 7, 2, 7], [5], [0, 1, 2, 3, 4, 5, 6, 7]]
    with torch.no_grad():
        for order in orders * 2:
            results = []
            for module in (plain, model):
                y = x
                for index in order:
                    y = module[index](y)
                results.append(y)
            assert torch.equal(*results)


# ---- unusual weights ---------------------------------------------------------


def test_a_weight_larger_than_the_ring(machine):
    plain = chain(machine, count=3)
    width = width_of(machine)
    plain.append(nn.Linear(width, 4 * width, device=machine.device, dtype=machine.dtype))
    x = batch(machine)
    model = offloaded(machine, plain, prefetch=2 * plain[0].weight.nbytes)
    wanted = result(plain, x)
    got = [result(model, x) for _ in range(4)]
    assert same(got, [wanted] * 4)


def test_tied_and_transposed_weights(machine):
    plain = chain(machine, count=4)
    plain[3].weight = plain[0].weight
    plain[1].weight = nn.Parameter(plain[1].weight.detach().t())
    x = batch(machine)
    model = offloaded(machine, plain)
    assert model[3].weight is model[0].weight
    warm(machine, model, x)
    pairs = []
    for module in (plain, model):
        pairs.append(result(module, x))
        with torch.no_grad():
            module[3].weight.mul_(0.5)  # the first layer's, too
        pairs.append(result(module, x))
    assert same(pairs[:2], pairs[2:])


def test_small_steps_over_a_slow_link(machine):
    """One row at a time: compute takes nothing, and the host runs far ahead of the copies."""
    plain = chain(machine)
    model = offloaded(machine, plain)
    rows = batch(machine, rows=24)
    machine.busy()
    got = [result(model, row[None]) for row in rows]
    wanted = [result(plain, row[None]) for row in rows]
    assert same(got, wanted)


# ---- faults in the middle of a step ------------------------------------------


class StoppedError(Exception):
    pass


@pytest.mark.parametrize("error", [StoppedError, KeyboardInterrupt, torch.OutOfMemoryError])
def test_an_error_in_the_middle_of_a_forward(machine, error):
    plain, x = chain(machine), batch(machine)
    model = offloaded(machine, plain)
    wanted = result(plain, x)

    def fail(*_):
        raise error("in the middle")

    for index in (1, COUNT - 1):
        handle = model[index].register_forward_pre_hook(fail)
        with pytest.raises(error):
            result(model, x)
        handle.remove()
        assert torch.equal(result(model, x), wanted)


def test_an_error_in_the_middle_of_a_backward(machine):
    plain, x = chain(machine), batch(machine)
    model = offloaded(machine, plain)

    def fail(_):
        raise StoppedError

    kept = []
    handle = model[4].register_forward_hook(lambda *a: kept.append(a[2].register_hook(fail)))
    with pytest.raises(StoppedError):
        model(x).float().sum().backward()
    handle.remove()
    model.zero_grad()
    for module in (plain, model):
        module(x).float().sum().backward()
    assert same(*([p.grad for p in m.parameters()] for m in (plain, model)))


@pytest.mark.parametrize("donor", DONORS)
def test_ctrl_c(machine, donor):
    """Wherever it comes, the next step has the right bits."""
    plain, x = chain(machine), batch(machine)
    model = offloaded(machine, plain, donor)
    wanted = result(plain, x)
    warm(machine, model, x)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        for turn in range(8):
            timer = threading.Timer(0.002 * turn, _thread.interrupt_main)
            with pytest.raises(KeyboardInterrupt):
                timer.start()
                end = time.monotonic() + 20
                while time.monotonic() < end:
                    result(model, x)
            timer.join()
            assert torch.equal(result(model, x), wanted)
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_smaller_batch_after_out_of_memory(machine):
    """What everybody does: catch it, halve the batch, go on."""
    plain = chain(machine, width=machine.width)
    x = batch(machine, rows=8 * machine.width, width=machine.width)
    wanted = result(plain, x[: machine.width // 8]).cpu()
    model = offloaded(machine, plain)
    warm(machine, model, x[:1])
    del plain
    sizes = []
    with machine.room(2 * machine.weight_bytes):
        rows = len(x)
        while True:
            sizes.append(rows)
            with contextlib.suppress(torch.OutOfMemoryError):
                got = result(model, x[:rows])
                break
            rows //= 2
        assert len(sizes) > 1
        assert torch.equal(result(model, x[: machine.width // 8]).cpu(), wanted)
    del got
    assert torch.equal(result(model, x[: machine.width // 8]).cpu(), wanted)


def test_sustained_memory_pressure(machine):
    """Many steps with hardly any memory: right bits, and no byte more at the end."""
    plain, x = chain(machine), batch(machine, rows=width_of(machine))
    nbytes = plain[0].weight.nbytes
    wanted = result(plain, x).cpu()
    model = offloaded(machine, plain, prefetch=6 * nbytes)
    warm(machine, model, x)
    held = machine.allocated()
    with machine.room(nbytes):
        hoard = []
        for turn in range(30):
            if turn % 5 == 0:
                with contextlib.suppress(torch.OutOfMemoryError):
                    hoard.append(torch.empty(nbytes, dtype=torch.uint8, device=machine.device))
            if turn % 5 == 4:
                hoard.clear()
            assert torch.equal(result(model, x).cpu(), wanted)
    assert distorch.stats(model).overflows > 0
    for _ in range(3):
        assert torch.equal(result(model, x).cpu(), wanted)  # the ring comes back
    assert machine.allocated() == held


# ---- what tells about a step, used while it runs -----------------------------


def test_trace_statistics_and_report_around_a_step(machine, tmp_path):
    plain, x = chain(machine), batch(machine)
    model = offloaded(machine, plain)
    warm(machine, model, x)
    distorch.reset_stats(model)
    with distorch.trace(model, tmp_path / "step.json"):
        got = result(model, x)
    stats = distorch.stats(model)
    assert stats.fetches == COUNT
    assert distorch.report(model).ok
    events = json.loads((tmp_path / "step.json").read_text())["traceEvents"]
    copied_bytes = sum(event.get("args", {}).get("bytes", 0) for event in events)
    assert copied_bytes >= (COUNT - 3) * plain[0].weight.nbytes  # the ring may hold some already
    assert torch.equal(got, result(plain, x))


def test_calibrate_behind_a_forward(machine, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(links, "_known", {})
    monkeypatch.setattr(_donors, "link_rates", dict(_donors.link_rates))
    plain, x = chain(machine), batch(machine)
    model = offloaded(machine, plain)
    warm(machine, model, x)
    first = issued(machine, model, x)
    found = distorch.calibrate(progress=False)
    second = result(model, x)
    assert found.rate("cpu", str(machine.device)) > 0
    wanted = result(plain, x)
    assert torch.equal(first, wanted)
    assert torch.equal(second, wanted)


# ---- files -------------------------------------------------------------------


def test_from_a_file_to_disk_to_the_device(machine, tmp_path):
    """A module without weights; the file is replaced by another one while it is read from."""
    plain, other, x = chain(machine), chain(machine, seed=5), batch(machine)
    wanted = result(plain, x)
    save_file(plain.state_dict(), tmp_path / "m.safetensors")
    spec = f"{machine.device},0b;disk,*"
    width = width_of(machine)
    with torch.device("meta"):
        empty = nn.Sequential(
            *(nn.Linear(width, width, bias=False, dtype=machine.dtype) for _ in range(COUNT))
        )
    model = distorch.load(empty, tmp_path / "m.safetensors", spec, min_bytes=0)
    got = [result(model, x) for _ in range(2)]
    save_file(other.state_dict(), tmp_path / "new.safetensors")
    (tmp_path / "new.safetensors").replace(tmp_path / "m.safetensors")
    got += [result(model, x) for _ in range(2)]
    distorch.redistribute(model, f"{machine.device},0b;cpu,*")
    got.append(result(model, x))
    distorch.redistribute(model, f"{machine.device},*")
    got.append(result(model, x))
    assert same(got, [wanted] * len(got))
