# SPDX-License-Identifier: Apache-2.0
"""What waits for what on an accelerator: copies, streams, donors, captures, and the errors of others."""

import sys
import threading

import pytest
import torch
from torch import nn

import distorch
from distorch import _ops
from distorch.testing import sim
from tests.accelerator.machines import TELLS_CAPTURES
from tests.accelerator.streams import in_threads

WIDTH = 64
WEIGHT = 4 * WIDTH * WIDTH


def chain(count=6):
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(count)))


def offloaded(count=6, donor="cpu", **options):
    return distorch.distribute(chain(count), f"sim:0,0b;{donor},*", min_bytes=0, **options)


@pytest.fixture
def slow_link():
    """Copies are really on their way when the host goes on."""
    sim.configure(devices=2, links={("cpu", "sim:0"): (1e8, 1e-5), ("sim:1", "sim:0"): (1e8, 1e-5)})


@pytest.fixture
def x():
    return torch.ones(4, WIDTH)


DONORS = ["cpu", "sim:1", "cpu+sim:1", "disk"]


def doubled(module):
    return {name: 2 * value for name, value in chain(len(module)).state_dict().items()}


WRITES = {
    "load_state_dict": lambda m: m.load_state_dict(doubled(m)),
    "copy_": lambda m: [p.copy_(2 * q) for p, q in zip(m.parameters(), chain().parameters(), strict=True)],
    "mul_": lambda m: [p.mul_(2) for p in m.parameters()],
    "foreach": lambda m: torch._foreach_mul_(list(m.parameters()), 2),
}  # fmt: skip


@pytest.mark.parametrize("donor", DONORS)
@pytest.mark.parametrize("write", WRITES)
@pytest.mark.usefixtures("slow_link")
def test_a_write_behind_a_forward(donor, write, x):
    """The copies that the forward asked for still read the old bytes; the next one sees the new."""
    model, plain = offloaded(donor=donor, prefetch=4 * WEIGHT), chain()
    there = x.to("sim:0")
    with torch.no_grad():
        for _ in range(2):
            model(there)
        sim.synchronize()
        before = model(there)
        WRITES[write](model)
        after = model(there)
        assert torch.equal(before.cpu(), plain(x))
        plain.load_state_dict(doubled(plain))
        assert torch.equal(after.cpu(), plain(x))


@pytest.mark.parametrize("donor", DONORS)
@pytest.mark.parametrize("end", ["let go", "move", "undistribute"])
@pytest.mark.usefixtures("slow_link")
def test_memory_of_a_donor_goes_behind_its_copies(donor, end, x):
    """The simulator tells of memory that is given back while a copy from it is still to come."""
    model = offloaded(donor=donor, prefetch=4 * WEIGHT)
    there = x.to("sim:0")
    with torch.no_grad():
        for _ in range(2):
            model(there)
        result = model(there)
        if end == "move":
            distorch.redistribute(model, "sim:0,0b;sim:1,*" if donor == "cpu" else "cpu,*")
        elif end == "undistribute":
            distorch.undistribute(model)
        del model
    assert torch.equal(result.cpu(), chain()(x))
    sim.synchronize()
    assert sim.races() == []
    assert sim.pinned_bytes() == 0


def test_a_stream_that_is_not_used_any_more_is_not_waited_for(x):
    sim.configure(flops=1e8)
    model = offloaded(prefetch=3 * WEIGHT)
    there, busy = x.to("sim:0"), torch.ones(512, 512, device="sim:0")
    side = torch.Stream(device="sim:0")
    with torch.no_grad():
        side.wait_stream(torch.accelerator.current_stream("sim:0"))
        with side:
            model(there)
        for _ in range(3):
            model(there)
        sim.synchronize()
        with side:
            held = torch.mm(busy, busy)  # 2.7 s of somebody else's work
        start = sim.now()
        for _ in range(3):
            model(there)
        torch.accelerator.current_stream("sim:0").synchronize()
        assert sim.now() - start < 1
        sim.synchronize()
        assert sim.now() - start > 2 and held.shape == busy.shape


def test_events_of_a_fetch(x):
    """A weight that is there and was lent before costs none; one that came costs one and a wait."""
    model = offloaded(prefetch="1mb")  # room for all
    there = x.to("sim:0")
    with torch.no_grad():
        for _ in range(2):
            model(there)
        before = sim.event_counts()
        model(there)
        assert sim.event_counts() == before
        side = torch.Stream(device="sim:0")
        side.wait_stream(torch.accelerator.current_stream("sim:0"))
        before = sim.event_counts()
        with side:
            model(there)
        recorded, waited = sim.event_counts()
        assert (recorded - before[0], waited - before[1]) == (len(model), len(model))


def test_events_of_a_step_that_fetches_everything(x):
    """For each weight: one behind its copy, one where the operator needs it, one where it is let
    go of, and one that its copy waits for.
    """
    model = offloaded(prefetch=3 * WEIGHT)
    there = x.to("sim:0")
    with torch.no_grad():
        for _ in range(3):
            model(there)
        before = sim.event_counts()
        model(there)
        recorded, waited = sim.event_counts()
        assert distorch.stats(model).overflows == 0
        assert recorded - before[0] <= 4 * len(model)
        assert waited - before[1] <= 3 * len(model)


@pytest.mark.skipif(not TELLS_CAPTURES, reason="PyTorch before 2.13 does not tell of captures")
def test_a_stream_that_is_being_captured_is_left_alone(x):
    """A slot was lent to a stream on which another thread captures now. Letting go of the slot
    records no event there: that would break the capture.
    """
    model = offloaded(prefetch="1mb")  # room for all: slots stay until a write drops them
    there = x.to("sim:0")
    side, ready, done = torch.Stream(device="sim:0"), threading.Event(), threading.Event()
    with torch.no_grad():
        side.wait_stream(torch.accelerator.current_stream("sim:0"))
        with side:
            model(there)
        sim.synchronize()

        def work(index):
            if index == 0:
                with side, sim.capturing():
                    ready.set()
                    assert done.wait(60)
                return None
            assert ready.wait(60)
            try:
                with torch.no_grad():
                    for weight in model.parameters():
                        weight.mul_(1)
                    return [model(there) for _ in range(3)]
            finally:
                done.set()

        for result in in_threads(2, work)[1]:
            assert torch.equal(result.cpu(), chain()(x))


@pytest.mark.parametrize("prefetch", [0, 3 * WEIGHT])
def test_an_error_that_was_there_before_is_told_as_what_it_is(prefetch, x):
    """It is about no weight. A FetchError would send its reader looking in the wrong place."""
    model = offloaded(prefetch=prefetch)
    there = x.to("sim:0")
    with torch.no_grad():
        model(there)
        sim.fail("device", "sim:0")
        # The first layer is in the ring, if there is one. The fourth has to be copied there.
        for layer in (model[0], model[3]):
            with pytest.raises(RuntimeError, match="sim:0 is lost") as caught:
                layer(there)
            assert not isinstance(caught.value, distorch.DistorchError)
        sim.reset()
        assert torch.equal(model(there).cpu(), chain()(x))
        if TELLS_CAPTURES:  # as before the error
            refused = pytest.raises(distorch.FetchError, match="a graph is being captured")
            with refused, sim.capturing():
                model(there)


def test_no_room_for_the_ring_is_asked_for_once_a_step(x):
    """Each time PyTorch would empty its cache first, and wait for the device."""
    model = offloaded(prefetch=3 * WEIGHT)
    there = x.to("sim:0")
    held = torch.sim.memory_allocated("sim:0")
    with torch.no_grad():
        sim.fail("alloc", nth=1, device="sim:0")
        for layer in model[:4]:
            there = layer(there)
            assert torch.sim.memory_allocated("sim:0") < held + 3 * WEIGHT
        for _ in range(2):
            model(there)
        assert torch.sim.memory_allocated("sim:0") >= held + 3 * WEIGHT


@pytest.mark.usefixtures("slow_link")
def test_other_threads_run_while_a_donor_waits_for_its_copies(x):
    """The last holder of a donor waits without the interpreter's lock: a kernel that it waits for
    may wait for one that another thread has yet to launch.
    """
    model, there = offloaded(prefetch=4 * WEIGHT), x.to("sim:0")
    turns, ended = [0], threading.Event()

    def count():
        while not ended.wait(0.001):
            turns[0] += 1

    other = threading.Thread(target=count)
    with torch.no_grad():
        for _ in range(2):
            model(there)
        busy = torch.ones(512, 512, device="sim:0")
        for _ in range(60):  # before the forward, so that its copies are a while to come
            torch.mm(busy, busy)
        result = model(there)
        other.start()
        switch = sys.getswitchinterval()
        sys.setswitchinterval(1000)  # nobody gives the lock up but whoever waits
        try:
            before = turns[0]
            del model
            after = turns[0]
        finally:
            sys.setswitchinterval(switch)
            ended.set()
    other.join()
    # A switch that was asked for before the interval was changed may still come, but not several.
    assert after - before > 5
    assert torch.equal(result.cpu(), chain()(x))


def test_pinned_buffers_are_bounded(x):
    """Larger and larger weights are written. Buffers for the earlier ones are not kept for ever."""
    sim.configure(memory="1gb")
    donors = 0
    with torch.no_grad():
        weights = []
        for rows in range(17, 27):  # 68 MB and more
            weights.append(distorch.shard(torch.ones(rows << 10, 1 << 10), "cpu", "sim:0"))
            donors += weights[-1].nbytes
            weights[-1].mul_(2)
            assert sim.pinned_bytes() - donors <= 5 * weights[-1].nbytes


def test_what_is_written_comes_back_through_pinned_memory(x):
    model = offloaded(donor="disk")
    assert sim.pinned_bytes() == 0
    with torch.no_grad():
        model[0].weight.mul_(2)
    assert sim.pinned_bytes() > 0
    assert torch.equal(distorch.materialize(model[0].weight).cpu(), 2 * chain()[0].weight)


def test_pinned_memory_that_goes_under_a_copy_is_a_race():
    """What the tests above stand on."""
    memory = _ops.pinned_memory(1 << 20, torch.device("sim:0"))
    target = torch.empty(1 << 20, dtype=torch.uint8, device="sim:0")
    donor = _ops.shard_slab(memory, 0, memory, torch.device("sim:0"), "weight")
    del memory
    target.copy_(donor, non_blocking=True)
    del donor
    sim.synchronize()
    assert sim.races() == []
    _sim_free_under_a_copy(target)
    assert any("giving pinned memory back" in race for race in sim.races())
    sim.reset()


def _sim_free_under_a_copy(target):
    """A copy that PyTorch does not know the memory of, as the engine's own are."""
    memory = _ops.pinned_memory(target.nbytes, target.device)
    alias = torch.from_numpy(memory.numpy()[64:])
    target[64:].copy_(alias, non_blocking=True)
    del alias, memory


def test_one_race_does_not_hide_another():
    """Bytes that were ever touched piece by piece meet a copy once for every piece."""
    sim.configure(links={("cpu", "sim:0"): (1e6, 1e-5)})
    pieces = torch.zeros(WEIGHT, dtype=torch.uint8, device="sim:0")
    sim.synchronize()
    for start in range(0, WEIGHT, 64):
        pieces[start : start + 32].zero_()
    other, source = torch.zeros(8, device="sim:0"), _ops.pinned_memory(WEIGHT, pieces.device)
    with torch.Stream(device="sim:0"):
        pieces.copy_(source, non_blocking=True)
        other.add_(1)
    found = sim.races()
    sim.synchronize()
    sim.reset()
    assert len(found) == len(set(found)) < 10
    assert any("'aten::add'" in race for race in found), found


@pytest.mark.parametrize("host", ["writes", "reads"])
def test_the_host_takes_part_in_races(host):
    """A copy that the donor does not know of is on its way while the host touches the donor."""
    sim.configure(links={("cpu", "sim:0"): (1e6, 1e-5), ("sim:0", "cpu"): (1e6, 1e-5)})
    slab = _ops.pinned_memory(WEIGHT, torch.device("sim:0"))
    weight = _ops.shard_slab(slab, 0, slab, torch.device("sim:0"), "w")
    there = torch.zeros(WEIGHT, dtype=torch.uint8, device="sim:0")
    with torch.Stream(device="sim:0"):
        if host == "writes":
            there.copy_(slab, non_blocking=True)
        else:
            slab.copy_(there, non_blocking=True)
    if host == "writes":
        weight.fill_(1)
        expected = "'writing to a donor' on stream 0 writes bytes that 'copy"
    else:
        _ops.donor_bytes(weight)
        expected = "'mapping a donor' on stream 0 reads bytes that 'copy"
    found = sim.races()
    sim.synchronize()
    sim.reset()  # told, and forgotten
    assert any(race.startswith(expected) for race in found), found
