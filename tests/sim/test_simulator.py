# SPDX-License-Identifier: Apache-2.0
"""The simulated accelerator by itself: exact times, limits, races, faults, real numbers."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map

from distorch.testing import sim
from tests.conformance import evidence
from tests.conformance.checks import Subject
from tests.conformance.systems import Resident
from tests.conformance.zoo import zoo

MB = 1 << 20
PER_CALL = 2e-6  # what the host pays to issue


def pinned(nbytes):
    return torch.empty(nbytes, dtype=torch.uint8).pin_memory()


def copies():
    return [span for span in sim.timeline() if "->" in span.resource]


def test_a_copy_takes_latency_and_bytes_by_rate():
    sim.configure(links={("cpu", "sim:0"): (1e9, 5e-6)})
    host, device = pinned(10 * MB), torch.empty(10 * MB, dtype=torch.uint8, device="sim:0")
    sim.reset()
    device.copy_(host, non_blocking=True)
    assert sim.now() == PER_CALL
    sim.synchronize()
    (span,) = copies()
    assert span.end - span.start == pytest.approx(5e-6 + 10 * MB / 1e9, rel=1e-12)
    assert sim.now() == span.end


def test_times_repeat_to_the_last_digit():
    def once():
        sim.reset()
        x = torch.ones(64, 64, device="sim:0")
        for _ in range(10):
            x = (x @ x).tanh()
        x.cpu()
        return [tuple(span) for span in sim.timeline()], sim.now()

    once()
    assert once() == once()


def two_copies(shared):
    links = {("cpu", "sim:0"): (1e9, 0.0), ("cpu", "sim:1"): (1e9, 0.0)}
    sim.configure(devices=2, links=links, shared=[set(links)] if shared else [])
    hosts = [pinned(10 * MB) for _ in range(2)]
    devices = [torch.empty(10 * MB, dtype=torch.uint8, device=f"sim:{i}") for i in range(2)]
    sim.reset()
    for device, host in zip(devices, hosts, strict=True):
        device.copy_(host, non_blocking=True)
    sim.synchronize()
    return sim.now()


def test_links_that_share_a_capacity():
    alone = 10 * MB / 1e9
    assert two_copies(shared=False) == pytest.approx(alone, abs=5 * PER_CALL)
    assert two_copies(shared=True) == pytest.approx(2 * alone, abs=5 * PER_CALL)


def test_compute_and_copies_overlap():
    sim.configure(flops=1e9, links={("cpu", "sim:0"): (1e9, 0.0)})
    a = torch.ones(100, 100, device="sim:0")
    host, device = pinned(2 * MB), torch.empty(2 * MB, dtype=torch.uint8, device="sim:0")
    side = torch.Stream(device="sim:0")
    side.wait_stream(torch.accelerator.current_stream("sim:0"))
    sim.synchronize()
    sim.reset()
    a = a @ a  # 2 ms
    with side:
        device.copy_(host, non_blocking=True)
    sim.synchronize()
    assert sim.now() == pytest.approx(2 * MB / 1e9, abs=1e-5)


def test_a_missing_event_is_a_race_that_names_both_sides():
    host, device = pinned(MB), torch.empty(MB, dtype=torch.uint8, device="sim:0")
    side = torch.Stream(device="sim:0")
    side.wait_stream(torch.accelerator.current_stream("sim:0"))
    with side:
        device.copy_(host, non_blocking=True)
    device.add_(1)
    (race, *_) = sim.races()
    assert "aten::add" in race and "cpu->sim:0" in race
    sim.synchronize()
    sim.reset()
    with side:
        device.copy_(host, non_blocking=True)
    torch.accelerator.current_stream("sim:0").wait_stream(side)
    device.add_(1)
    assert sim.races() == []


def test_a_copy_that_nobody_waited_for_is_not_there_yet():
    host, device = pinned(MB), torch.zeros(MB, dtype=torch.uint8, device="sim:0")
    device.fill_(7)
    back = host.copy_(device, non_blocking=True)
    assert back[0] != 7
    sim.synchronize()
    assert back[0] == 7


def test_memory_is_limited_and_counted():
    sim.configure(memory="1mb")
    keep = torch.empty(MB // 2, dtype=torch.uint8, device="sim:0")
    with pytest.raises(torch.OutOfMemoryError, match="sim:0"):
        torch.empty(MB, dtype=torch.uint8, device="sim:0")
    assert torch.sim.memory_allocated("sim:0") == keep.nbytes
    del keep
    assert torch.sim.memory_allocated() == 0
    assert torch.sim.max_memory_allocated() == MB // 2
    torch.empty(MB, dtype=torch.uint8, device="sim:0")


def test_the_host_cannot_touch_device_memory():
    program = """
import ctypes, torch
from distorch.testing import sim
x = torch.ones(8, device="sim:0")
sim.synchronize()
print("before", flush=True)
ctypes.string_at(x.data_ptr(), 4)
print("after")
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == -11 and done.stdout == "before\n", done.stderr


def test_importing_distorch_does_not_load_it():
    program = "import sys, distorch; print([m for m in sys.modules if 'testing' in m])"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert "distorch.testing" not in done.stdout


def test_faults():
    x = torch.ones(4, device="sim:0")
    sim.fail("copy", nth=2)
    x.cpu()
    with pytest.raises(RuntimeError, match="copy failed"):
        x.cpu()
    x.cpu()
    sim.fail("alloc", nth=1, device="sim:1")
    torch.ones(4, device="sim:0")
    with pytest.raises(torch.OutOfMemoryError):
        torch.ones(4, device="sim:1")
    sim.fail("device", "sim:1")
    with pytest.raises(RuntimeError, match="sim:1 is lost"):
        torch.ones(4, device="sim:1")
    torch.ones(4, device="sim:0")
    with pytest.raises(ValueError, match="expected 'copy'"):
        sim.fail("nothing")


def test_a_slow_link():
    sim.configure(links={("cpu", "sim:0"): (1e9, 0.0)})
    host, device = pinned(10 * MB), torch.empty(10 * MB, dtype=torch.uint8, device="sim:0")
    sim.reset()
    sim.slow(("cpu", "sim:0"), factor=4, start=5e-3)
    device.copy_(host, non_blocking=True)
    sim.synchronize()
    assert sim.now() == pytest.approx(5e-3 + 4 * (10 * MB / 1e9 - 5e-3), abs=1e-5)


@pytest.mark.parametrize("direct", [True, False])
def test_device_to_device(direct):
    links = {("sim:1", "sim:0"): (50e9, 0.0)} if direct else {}
    sim.configure(devices=2, links=links)
    x = torch.randn(1000)
    assert torch.equal(x.to("sim:1").to("sim:0").cpu(), x)
    ways = [span.resource for span in copies()]
    assert ("sim:1->sim:0" in ways) == direct
    assert torch.sim.can_device_access_peer(1, 0) == direct


def test_strides_dtypes_and_lazy_bits_travel():
    x = torch.randn(6, 8, dtype=torch.complex64)
    for y in (x.t(), x[:, ::2], x.conj(), x.conj().imag, x[1:3, 2:]):
        assert torch.equal(y.to("sim").cpu(), y)
        assert torch.equal(y.to("sim:1").to("sim:0").cpu(), y)
    there = torch.zeros(8, 6, device="sim")
    there.copy_(torch.arange(48.0).view(6, 8).t())
    assert torch.equal(there.cpu(), torch.arange(48.0).view(6, 8).t())
    assert torch.equal(x.real.to("sim").to(torch.float16).cpu(), x.real.half())


MODELS = ["linear", "conv", "gpt_neox", "llama", "vit", "FluxTransformer2DModel"]


@pytest.mark.parametrize("mode", ["deferred", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_models_equal_the_cpu(name, mode):
    sim.configure(mode=mode)
    built = zoo()[name]()
    subject = Subject(built, Resident())
    there = copy.deepcopy(built.module).to("sim:0")
    there.register_forward_pre_hook(
        lambda _, args, kwargs: tree_map(
            lambda t: t.to("sim:0") if isinstance(t, torch.Tensor) else t, (args, kwargs)
        ),
        with_kwargs=True,
    )
    with sdpa_kernel(SDPBackend.MATH):
        wanted, got = (
            [subject.forward(module), subject.backward(module)] for module in (built.module, there)
        )
    assert evidence.difference(tree_map(lambda t: t.cpu(), got), wanted) is None


def test_dry_runs_cost_no_memory():
    sim.configure(memory="24gb", mode="dry")
    layers = nn.Sequential(*(nn.Linear(8192, 8192, bias=False, device="sim") for _ in range(40)))
    assert torch.sim.memory_allocated() == 40 * 4 * 8192**2
    x = torch.empty(1024, 8192, device="sim")
    sim.synchronize()
    sim.reset()
    layers(x)
    sim.synchronize()
    assert sim.now() == pytest.approx(40 * 2 * 1024 * 8192**2 / 35e12, rel=1e-3)
    with pytest.raises(RuntimeError, match="dry"):
        x.sum().item()
