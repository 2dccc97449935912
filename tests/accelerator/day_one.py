"""The first day with an accelerator: what programs do around a forward that is still running.

A forward returns when its work is issued. On a GPU the weights are large enough, and on the
simulated accelerator the link is slow enough, that the copies are on their way for a while after
that. No test here waits for the device between such a forward and what comes next, unless it says
so. Most are modelled on faults that users of other offloading systems reported.
"""

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
from distorch.runtime import links

from .streams import in_threads, on_a_stream

COUNT = 8
DONORS = ["cpu", "disk"]


def chain(machine, seed=0, count=COUNT, width=None):
    """A stack of square weights, on the device."""
    width = width or machine.width
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
    x = torch.randn(rows, width or machine.width, generator=generator)
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
    before = result(model, x)
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
    before = result(model, x)
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
    first = result(model, x)
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
    first = result(model, x)
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
        first = result(model, x)
        distorch.redistribute(model, place)
        second = result(model, x)
        assert torch.equal(first, wanted)
        assert torch.equal(second, wanted)


@pytest.mark.parametrize("donor", DONORS)
def test_undistribute_behind_a_forward(machine, donor):
    """To the device and to the host, whose memory the copies were read from."""
    plain, x = chain(machine), batch(machine)
    wanted = result(plain, x)
    for target in (machine.device, "cpu"):
        model = offloaded(machine, plain, donor)
        warm(machine, model, x)
        got = result(model, x)
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
        first = result(model, x)
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
    width = machine.width // 2  # merged on the host, in this one thread
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
    got = [result(model, x)]
    for loras in ([(delta, 0.5)], [], [(delta, 0.5)]):
        distorch.set_loras(model, loras, lora_mode=mode)
        got.append(result(model, x))
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


# ---- threads and streams -----------------------------------------------------


@pytest.mark.parametrize("streams", ["one stream", "streams of their own"])
@pytest.mark.parametrize("donor", DONORS)
def test_placements_change_beside_forwards_in_threads(machine, donor, streams):
    plain, x = chain(machine), batch(machine)
    wanted = result(plain, x)
    model = offloaded(machine, plain, donor)
    machine.module.synchronize()
    ended = threading.Event()

    def change():
        for place in (*PLACES[1:], *PLACES[1:]):
            distorch.redistribute(model, place.format(machine.device))
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
    width = machine.width
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
    x = batch(machine, rows=8 * machine.width)
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
    plain, x = chain(machine), batch(machine)
    wanted = result(plain, x)
    model = offloaded(machine, plain, prefetch=6 * plain[0].weight.nbytes)
    warm(machine, model, x)
    with machine.room(plain[0].weight.nbytes):
        hoard, got = [], []
        for turn in range(30):
            if turn % 5 == 0:
                with contextlib.suppress(torch.OutOfMemoryError):
                    hoard.append(torch.empty_like(plain[0].weight))
            if turn % 5 == 4:
                hoard.clear()
            got.append(result(model, x))
            if turn == 9:
                held = machine.allocated()
        assert same(got, [wanted] * 30)
        del got[10:]
        assert machine.allocated() <= held


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
    first = result(model, x)
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
    with torch.device("meta"):
        empty = nn.Sequential(
            *(
                nn.Linear(machine.width, machine.width, bias=False, dtype=machine.dtype)
                for _ in range(COUNT)
            )
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
