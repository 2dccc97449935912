# SPDX-License-Identifier: Apache-2.0
"""The first day with an accelerator: what programs do around a forward that is still running.

A forward returns when its work is issued. On a GPU the stream is kept busy before (`issued`), and
the simulated accelerator runs nothing before somebody waits: the copies of all weights that the
ring has no room for are still to come. No test waits for the device between such a forward and what
follows it. Most are modelled on faults that users of other offloading systems reported.
"""

import copy
import io
import threading

import pytest
import torch
from torch import nn

import distorch

from .streams import in_threads, on_a_stream

COUNT = 8
DONORS = ["cpu", "disk"]


def width_of(machine):
    """Weights of 8 MiB on a GPU."""
    return min(machine.width, 2048)


def chain(machine, seed=0, count=COUNT, width=None):
    """A stack of square weights, on the device."""
    width = width or width_of(machine)
    torch.manual_seed(seed)
    options = {"bias": False, "device": machine.device, "dtype": machine.dtype}
    return nn.Sequential(*(nn.Linear(width, width, **options) for _ in range(count)))


def offloaded(machine, plain, donor="cpu", **options):
    """A copy of a resident model with all its weights on a donor and a ring of three of them."""
    options.setdefault("prefetch", 3 * next(plain.parameters()).nbytes)
    spec = f"{machine.device},0b;{donor},*"
    return distorch.distribute(copy.deepcopy(plain), spec, min_bytes=0, **options)


def batch(machine, rows=16, seed=1, width=None):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width or width_of(machine), generator=generator)
    return x.to(machine.device, machine.dtype)


def warm(machine, model, x):
    """Two steps, so that the order of the weights is known and the next one is read ahead."""
    with torch.no_grad():
        for _ in range(2):
            model(x)
    machine.module.synchronize()


def result(model, x):
    with torch.no_grad():
        return model(x)


def issued(machine, model, x):
    """The result of a forward whose copies are on their way."""
    machine.busy()
    return result(model, x)


def weights(model):
    return [distorch.materialize(p).cpu() for p in model.parameters()]


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# ---- writes right behind a forward -------------------------------------------


def copied(model, new):
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(new[name])


def copied_into_data(model, new):
    for name, weight in model.named_parameters():
        weight.data.copy_(new[name])


def copied_together(model, new):
    with torch.no_grad():
        names, targets = zip(*model.named_parameters(), strict=True)
        torch._foreach_copy_(list(targets), [new[name] for name in names])


def copied_into_rows(model, new):
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight[: len(weight) // 2].copy_(new[name][: len(weight) // 2])
            weight[len(weight) // 2 :] = new[name][len(weight) // 2 :]


def zeroed_and_added(model, new):
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.zero_().add_(new[name].to(weight.device))


WRITES = {
    "copy_": copied,
    "data.copy_": copied_into_data,
    "_foreach_copy_": copied_together,
    "rows": copied_into_rows,
    "add_": zeroed_and_added,
    "load_state_dict": lambda model, new: model.load_state_dict(new),
}


def check_a_write(machine, donor, write, where):
    """The forward has the weights of before, the next one those of after."""
    plain, other = chain(machine), chain(machine, seed=5)
    x = batch(machine)
    model = offloaded(machine, plain, donor)
    wanted = [result(m, x) for m in (plain, other)]
    new = {name: value.to(where) for name, value in other.state_dict().items()}
    warm(machine, model, x)
    before = issued(machine, model, x)
    write(model, new)
    after = result(model, x)
    assert torch.equal(before, wanted[0])
    assert torch.equal(after, wanted[1])


@pytest.mark.parametrize("where", ["host", "device"])
@pytest.mark.parametrize("donor", DONORS)
@pytest.mark.parametrize("write", WRITES)
def test_a_write_behind_a_forward(machine, write, donor, where):
    check_a_write(machine, donor, WRITES[write], "cpu" if where == "host" else machine.device)


@pytest.mark.parametrize("donor", DONORS)
def test_values_assigned_behind_a_forward(machine, donor):
    def assign(model, new):
        model.load_state_dict(new, assign=True)

    check_a_write(machine, donor, assign, machine.device)


@pytest.mark.parametrize("donor", DONORS)
def test_many_writes_and_forwards_in_turn(machine, donor):
    """Nothing is waited for until the end: the weights follow one another through one donor."""
    plain = chain(machine)
    model, x = offloaded(machine, plain, donor), batch(machine)
    warm(machine, model, x)
    pairs = []
    machine.busy()
    with torch.no_grad():
        for turn in range(4):
            pairs.append([m(x) for m in (plain, model)])
            for module in (plain, model):
                for weight in module.parameters():
                    weight.mul_(-1.5 if turn % 2 else 0.75)
    assert all(torch.equal(*pair) for pair in pairs)
    assert same(weights(model), weights(plain))


def test_a_write_to_a_resident_weight_behind_a_forward(machine):
    plain, other, x = chain(machine), chain(machine, seed=5), batch(machine)
    model = distorch.distribute(
        copy.deepcopy(plain), f"{machine.device},50%;cpu,*", min_bytes=0, prefetch="auto"
    )
    wanted = [result(m, x) for m in (plain, other)]
    warm(machine, model, x)
    before = issued(machine, model, x)
    model.load_state_dict(other.state_dict())
    after = result(model, x)
    assert torch.equal(before, wanted[0])
    assert torch.equal(after, wanted[1])


# ---- copies, files and placements right behind a forward ---------------------


@pytest.mark.parametrize("donor", DONORS)
def test_a_copy_behind_a_forward(machine, donor):
    plain = chain(machine)
    model, x = offloaded(machine, plain, donor), batch(machine)
    warm(machine, model, x)
    first = issued(machine, model, x)
    twin = copy.deepcopy(model)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()  # neither the copy nor what was saved
    second = result(twin, x)
    wanted = result(plain, x)
    assert torch.equal(first, wanted)
    assert torch.equal(second, wanted)
    buffer.seek(0)
    saved = torch.load(buffer, map_location="cpu").values()
    assert same(saved, weights(plain))


PLACES = ["{0},*", "{0},50%;cpu,*", "{0},0b;cpu,*", "{0},0b;disk,*", "{0},0b;cpu,50%;disk,50%"]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("donor", DONORS)
def test_another_placement_behind_a_forward(machine, donor, place):
    plain = chain(machine)
    model, x = offloaded(machine, plain, donor), batch(machine)
    warm(machine, model, x)
    first = issued(machine, model, x)
    distorch.redistribute(model, place.format(machine.device))
    second = result(model, x)
    wanted = result(plain, x)
    assert torch.equal(first, wanted)
    assert torch.equal(second, wanted)
    assert distorch.report(model).ok


@pytest.mark.parametrize("donor", DONORS)
def test_a_second_device_takes_over_behind_a_forward(machine, donor):
    other = machine.second()
    plain = chain(machine)
    model, x = offloaded(machine, plain, donor), batch(machine)
    warm(machine, model, x)
    wanted = result(plain, x)
    for place in (f"{machine.device},0b;{other},*", f"{machine.device},0b;{donor},*"):
        first = issued(machine, model, x)
        distorch.redistribute(model, place)
        second = result(model, x)
        assert torch.equal(first, wanted)
        assert torch.equal(second, wanted)


def everywhere(machine):
    """Placements of every kind that the machine has devices for."""
    places = [place.format(machine.device) for place in PLACES]
    if machine.module.device_count() > 1:
        other = torch.device(machine.type, 1)
        places += [f"{machine.device},0b;{other},*", f"{machine.device},0b;cpu+{other},*"]
    return places


def test_a_weight_is_one_tensor_wherever_its_bytes_are(machine):
    """Another donor is no other tensor: what was detached before sees what is written after."""
    model = offloaded(machine, chain(machine))
    weight = model[0].weight
    alias, before = weight.detach(), distorch.materialize(weight)
    for times, place in enumerate(everywhere(machine)[2:], start=1):
        distorch.redistribute(model, place)
        with torch.no_grad():
            weight.add_(1)
        assert model[0].weight is weight
        assert torch.equal(distorch.materialize(alias), distorch.materialize(weight))
        assert not torch.equal(distorch.materialize(alias), before), f"{times} writes are lost"


@pytest.mark.parametrize("donor", DONORS)
def test_undistribute_behind_a_forward(machine, donor):
    """To the device and to the host, whose memory the copies were read from."""
    plain, x = chain(machine), batch(machine)
    wanted = result(plain, x)
    for target in (machine.device, "cpu"):
        model = offloaded(machine, plain, donor)
        warm(machine, model, x)
        got = issued(machine, model, x)
        distorch.undistribute(model, device=target)
        with torch.no_grad():
            for weight in model.parameters():
                weight.zero_()
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("donor", DONORS)
def test_a_model_let_go_behind_a_forward(machine, donor):
    """Another model takes the memory that the first one's copies are still read from."""
    plain, other, x = chain(machine), chain(machine, seed=5), batch(machine)
    wanted = [result(m, x) for m in (plain, other)]
    for _ in range(2):
        model = offloaded(machine, plain, donor)
        warm(machine, model, x)
        first = issued(machine, model, x)
        del model
        model = offloaded(machine, other, donor)
        second = result(model, x)
        assert torch.equal(first, wanted[0])
        assert torch.equal(second, wanted[1])


def test_nothing_is_left_of_models_that_were_let_go(machine):
    plain, x = chain(machine), batch(machine)
    result(plain, x)
    held = machine.allocated()
    for donor in (*DONORS, *DONORS):
        model = offloaded(machine, plain, donor)
        result(model, x)
        del model
    assert machine.allocated() == held


# ---- LoRAs -------------------------------------------------------------------


def lora(machine, width, seed=4):
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{index}.lora_{side}.weight": torch.randn(shape, generator=generator)
        for index in range(COUNT)
        for side, shape in (("A", (4, width)), ("B", (width, 4)))
    }


def patched(machine, plain, loras):
    """The resident model with LoRAs merged on the host."""
    twin = distorch.distribute(copy.deepcopy(plain).cpu(), "cpu,*", compute="cpu", min_bytes=0)
    distorch.set_loras(twin, loras)
    return distorch.undistribute(twin, device=machine.device)


@pytest.fixture
def tuned(machine):
    """(plain model, its LoRA, x, the results without and with it)."""
    width = width_of(machine) // 2  # merged on the host, in this one thread
    plain, x = chain(machine, width=width), batch(machine, width=width)
    delta = lora(machine, width)
    both = result(plain, x), result(patched(machine, plain, [(delta, 0.5)]), x)
    assert not torch.equal(*both)
    return plain, delta, x, both


@pytest.mark.parametrize("donor", DONORS)
@pytest.mark.parametrize("mode", ["merge", "fetch", "background"])
def test_loras_set_and_unset_behind_a_forward(machine, tuned, mode, donor):
    plain, delta, x, (without, with_) = tuned
    model = offloaded(machine, plain, donor)
    warm(machine, model, x)
    got = [issued(machine, model, x)]
    for loras in ([(delta, 0.5)], [], [(delta, 0.5)]):
        distorch.set_loras(model, loras, lora_mode=mode)
        got.append(issued(machine, model, x))
    assert same(got, [without, with_, without, with_])
    distorch.finish_merging(model)
    assert torch.equal(result(model, x), with_)


def test_merging_in_the_background_under_load(machine, tuned):
    plain, delta, x, (without, with_) = tuned
    model = offloaded(machine, plain)
    distorch.set_loras(model, [(delta, 0.5)], lora_mode="background")
    got = [result(model, x) for _ in range(3)]
    while distorch.report(model).merging:
        got = [*got[-20:], result(model, x)]
    got.append(result(model, x))
    assert same(got, [with_] * len(got))
    distorch.set_loras(model, [])
    assert torch.equal(result(model, x), without)


@pytest.mark.parametrize("mode", ["merge", "fetch", "background"])
def test_loras_change_beside_forwards_in_threads(machine, tuned, mode):
    """Each weight is as before or as after. Which weights are, while they change, nobody says."""
    plain, delta, x, _ = tuned
    states = [plain, patched(machine, plain, [(delta, 0.5)])]
    allowed = [[result(m[i], x) for m in states] for i in range(COUNT)]
    model = offloaded(machine, plain)
    machine.module.synchronize()  # other threads' streams do not wait for this one's
    ended = threading.Event()

    def work(index):
        if index == 0:
            for turn in range(6):
                distorch.set_loras(model, [(delta, 0.5)] if turn % 2 == 0 else [], lora_mode=mode)
            ended.set()
            return True
        right = True
        while right and not ended.is_set():
            for i, layer in enumerate(model):
                got = on_a_stream(machine, lambda layer=layer: result(layer, x))
                right = right and any(torch.equal(got, want) for want in allowed[i])
        return right

    try:
        assert all(in_threads(3, work))
    finally:
        ended.set()
    assert same(weights(model), weights(plain))
