# SPDX-License-Identifier: Apache-2.0
"""What record_step sees of a step, and what a CPU is told."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

import distorch
from distorch import _native
from distorch.machine import links
from distorch.prediction.operators import Names
from distorch.prediction.recording import _Recorder
from distorch.testing import sim
from tests.gguf_files import write_blocks
from tests.prediction.programs import (
    ALL_AWAY,
    CPU,
    DTYPE,
    chain,
    check,
    configure,
    inference,
    linear,
    ready,
    record,
    resident,
    there,
)


def waits_of(run):
    """Whether the host waited, for each use of a step of one weight and `run` on its result."""
    module = resident(nn.Linear(64, 64, bias=False))
    x = torch.ones(4, 64).to("sim:0")
    with torch.no_grad():
        step = record(module, lambda: run(module(x)))
    return [use.host_waits for use in step.uses]


WAITS = {
    "item": lambda y: y.sum().item(),
    "to the host": lambda y: y.cpu(),
    "from ordinary memory": lambda y: torch.ones(4).to("sim:0"),
    "equal": lambda y: torch.equal(y, y),
}
GOES_ON = {
    "a scalar of the host": lambda y: y * torch.tensor(0.5),
    "foreach": lambda y: torch._foreach_mul_([y, y.clone()], 0.5),
    "from pinned memory": lambda y: torch.ones(4, pin_memory=True).to("sim:0", non_blocking=True),
    "pinned or not": lambda y: y.is_pinned(),
    "numbers as an index": lambda y: y[torch.zeros(2, dtype=torch.long, device="sim:0")],
}


@pytest.mark.parametrize("what", [*WAITS, *GOES_ON])
def test_the_host_waits_only_for_what_it_needs(what):
    configure(mode="eager")
    assert any(waits_of((WAITS | GOES_ON)[what])) == (what in WAITS)


def test_masks_have_to_be_counted():
    """How many numbers a mask picks, only the device knows. (The simulator runs no such operator.)"""
    configure(mode="eager")
    module = resident(nn.Linear(4, 4))
    recorder = _Recorder(Names(module), torch.device("sim:0"))
    x = torch.ones(4).to("sim:0")
    index = torch.ops.aten.index.Tensor
    assert recorder._of_the_host(index, (x, [x > 0]), {}) == (0, True)
    assert recorder._of_the_host(index, (x, [x.long()]), {}) == (0, False)
    assert recorder._of_the_host(torch.ops.aten.nonzero.default, (x,), {}) == (0, True)
    assert recorder._of_the_host(torch.ops.aten.nonzero.default, (torch.ones(4),), {}) == (0, False)


def test_a_host_that_is_the_limit():
    """Small operators: the device waits for the host, also where something is recorded."""
    module = resident(nn.Sequential(*(nn.LayerNorm(64, dtype=DTYPE, device="meta"),) * 40))
    prediction, _ = check(
        module, inference(module, there(1, 64)), ALL_AWAY, min_bytes=0, prefetch="1mb"
    )
    assert prediction.binds == "host"


class Doubled(nn.Module):
    def forward(self, x):
        return torch.cond(x.sum() > -1e9, lambda y: y + y, lambda y: y - 1, (x,))


def test_higher_order_operators_run_as_without_a_recording():
    configure(mode="eager")
    module = nn.Sequential(nn.Linear(8, 8), Doubled())
    distorch.distribute(module, "cpu,*", min_bytes=0)
    x = torch.randn(2, 8)
    with torch.no_grad():
        wanted = module(x)
        with distorch.record_step(module) as step:
            assert torch.equal(module(x), wanted)
    assert set(step.weights) == {"0.weight", "0.bias"}


def test_tensors_of_other_layouts_are_nobodys():
    module = distorch.distribute(nn.Linear(8, 8), "cpu,*", min_bytes=0)
    sparse = torch.eye(8).to_sparse_csr()
    with torch.no_grad(), distorch.record_step(module) as step:
        module(torch.randn(4, 8))
        torch.ones(8, 8).to_mkldnn().to_dense()
        sparse @ torch.ones(8, 8)
    assert set(step.weights) == {"weight", "bias"}


class Flat(nn.Module):
    """All weights are views of one buffer, as FSDP and some loaders make them."""

    def __init__(self, count: int = 6, width: int = 256) -> None:
        super().__init__()
        buffer = torch.randn(count, width, width)
        self.weights = nn.ParameterList(nn.Parameter(buffer[i]) for i in range(count))

    def forward(self, x):
        for weight in self.weights:
            x = x @ weight
        return x


def test_views_of_one_buffer_are_weights_of_their_own():
    module = distorch.distribute(Flat(), "cpu,*", min_bytes=0)
    step = record(module, inference(module, torch.randn(2, 256)))
    assert [use.weights for use in step.uses if use.weights] == [
        (f"weights.{i}",) for i in range(6)
    ]


def test_only_this_thread_is_seen():
    module, run, _ = ready()
    with distorch.record_step(module) as step:
        other = threading.Thread(target=run)
        other.start()
        other.join()
    with pytest.raises(distorch.PlacementError, match="in the same thread"):
        distorch.predict(module, step)


def test_a_rehearsal_is_in_nobodys_trace():
    module, _, step = ready()
    with distorch.trace(module) as timeline:
        distorch.predict(module, step, "sim:0,0b;cpu,*", min_bytes=0, prefetch="5mb")
    assert timeline.spans == []


# ---- what is asked -------------------------------------------------------------------


def test_only_another_ring():
    """Without a placement the weights stay where they are, and the options may be others."""
    module, _, step = ready()
    distorch.redistribute(module, ALL_AWAY, min_bytes=0, prefetch="2mb")
    small, large = (distorch.predict(module, step, prefetch=size) for size in ("2mb", "64mb"))
    assert small.seconds == distorch.predict(module, step).seconds
    assert CPU in small.links and CPU not in large.links
    assert large.seconds < small.seconds


def test_plans_and_arguments_are_checked_as_distribute_does():
    module, _, step = ready()
    plan = distorch.plan(module, ALL_AWAY, min_bytes=0)
    found = distorch.predict(module, step, plan=plan, prefetch="5mb")
    assert (
        found.seconds
        == distorch.predict(module, step, ALL_AWAY, min_bytes=0, prefetch="5mb").seconds
    )
    wrong = [
        {"spec": ALL_AWAY, "plan": plan}, {"virtual_vram": "1mb", "plan": plan},
        {"donor": "cpu"}, {"plan": "plan.json"},
    ]  # fmt: skip
    for arguments in wrong:
        with pytest.raises(distorch.SpecError):
            distorch.predict(module, step, **arguments)
    with pytest.raises(distorch.PlacementError, match="the plan was made for"):
        distorch.predict(module, step, plan=distorch.plan(resident(chain(6, 512)), ALL_AWAY))


def test_numbers_that_nobody_recorded():
    module, _, _ = ready()
    for use in (
        distorch.Use(float("nan")), distorch.Use(-1.0), distorch.Use(1e308), distorch.Use(1.0, 0)
    ):  # fmt: skip
        with pytest.raises(distorch.SpecError, match="as distorch.record_step makes it"):
            distorch.predict(module, distorch.Step("sim:0", [use]), ALL_AWAY)


def test_a_step_of_other_numbers():
    """The same names and shapes in float32: its operators take other times."""
    module, _, step = ready()
    with pytest.raises(distorch.PlacementError, match="float32"):
        distorch.predict(resident(chain(6, 1024).float()), step)


def test_what_is_not_a_step():
    module, _, _ = ready()
    for wrong in (distorch.record_step(module), "step.json", None):
        with pytest.raises(distorch.SpecError, match="with distorch.record_step"):
            distorch.predict(module, wrong)


# ---- the CPU -------------------------------------------------------------------------


@pytest.fixture
def measured(monkeypatch):
    """A CPU whose disk is known: 1 GB/s, and nothing else takes time."""
    link = links.Link("disk", "cpu", 1e9, 0.0, 1e9, None)
    speed = links.Speed("cpu", 1e10, 1e11, 1e11, 0.0, 0.0)
    found = distorch.Calibration((link,), (speed,))
    monkeypatch.setitem(links._known, links._machine_key(), found)


def on_cpu(count: int, milliseconds: float):
    """A module of 1 MiB weights, and a step in which each takes so long."""
    module = nn.Sequential(*(nn.Linear(512, 512, bias=False) for _ in range(count)))
    distorch.distribute(module, "cpu,*", min_bytes=0)
    step = record(module, inference(module, torch.zeros(1, 512)))
    uses = [use._replace(seconds=milliseconds / 1e3) for use in step.uses if use.weights]
    return module, distorch.Step("cpu", uses, step.forms)


@pytest.mark.usefixtures("measured")
def test_a_cpu_with_all_in_ram():
    module, step = on_cpu(8, 2.0)
    found = distorch.predict(module, step, "cpu,*")
    assert found.seconds == found.busy_seconds == pytest.approx(16e-3)
    assert found.binds == "compute" and found.links == {} and found.stalls == {}


@pytest.mark.usefixtures("measured")
def test_a_cpu_that_reads_ahead():
    """1 MiB takes 1.05 ms to read: hidden behind 2 ms of computing, and not behind 0.5 ms."""
    options = {"min_bytes": 0, "prefetch": "3mb"}
    module, step = on_cpu(8, 2.0)
    slow = distorch.predict(module, step, "cpu,0b;disk,*", **options)
    assert slow.seconds == pytest.approx(16e-3, rel=0.01) and slow.binds == "compute"
    module, step = on_cpu(8, 0.5)
    fast = distorch.predict(module, step, "cpu,0b;disk,*", **options)
    assert fast.seconds == pytest.approx(8 * 1.048576e-3, rel=0.02) and fast.binds == "disk"
    assert fast.links["disk"].bytes == pytest.approx(8 << 20, rel=0.01)
    assert sum(fast.stalls.values()) == pytest.approx(fast.seconds - 4e-3, rel=0.02)


@pytest.mark.usefixtures("measured")
def test_a_cpu_that_decodes(tmp_path):
    write_blocks(tmp_path / "m.gguf", 4, 512)
    module = nn.Sequential(*(nn.Linear(512, 512, bias=False) for _ in range(4)))
    distorch.load(module, tmp_path / "m.gguf", "cpu,*", prefetch="64mb", min_bytes=0)
    run = inference(module, torch.zeros(1, 512))
    run()
    nothing_decoded = record(module, run)
    with pytest.raises(distorch.PlacementError, match="Record it with a small one"):
        distorch.predict(module, nothing_decoded, prefetch="1mb")
    distorch.redistribute(module, "cpu,*", prefetch="1mb", min_bytes=0)
    run()
    step = record(module, run)
    assert step.decodes
    found = distorch.predict(module, step)
    assert found.seconds > step.seconds


def test_others_reservations_are_told():
    assert _native.reserved_beside("sim:0", None) == 0
    module = distorch.distribute(nn.Sequential(linear(2048, 2048)), ALL_AWAY, prefetch="4mb")
    assert _native.reserved_beside("sim:0", None) == 4 << 20
    del module
    sim.synchronize()
