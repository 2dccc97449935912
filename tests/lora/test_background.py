# SPDX-License-Identifier: Apache-2.0
"""lora_mode="background": right at once, merged while the model is used, and nobody is disturbed."""

import copy
import gc
import subprocess
import sys
import textwrap
import threading
import weakref

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import distorch
from distorch import FetchError, _donors, _ops
from distorch.patching import background
from distorch.testing import sim

SIZE = 64


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(SIZE, SIZE, dtype=torch.bfloat16) for _ in range(4))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x).relu()
        return x


def lora(seed=0, layers=(0, 1, 2, 3)):
    generator = torch.Generator().manual_seed(seed)
    return {
        f"layers.{i}.lora_{side}.weight": torch.randn(shape, generator=generator) * 0.1
        for i in layers
        for side, shape in (("A", (4, SIZE)), ("B", (SIZE, 4)))
    }


@pytest.fixture
def path(tmp_path):
    torch.manual_seed(0)
    save_file(Net().state_dict(), tmp_path / "base.safetensors")
    return tmp_path / "base.safetensors"


def load(path, spec="cpu,*", loras=(), **options):
    options = {"min_bytes": 0, "prefetch": "64kb", "lora_mode": "background", **options}
    return distorch.load(Net(), path, spec, loras=loras, **options)


def values(model):
    return {name: distorch.materialize(p).cpu() for name, p in model.named_parameters()}


def assert_same(model, other):
    mine, others = values(model), values(other)
    for name, value in mine.items():
        assert torch.equal(value.view(torch.int16), others[name].view(torch.int16)), name


class Gate:
    """Lets merges through one by one."""

    def __init__(self, monkeypatch):
        self.passes = threading.Semaphore(0)
        self.reached = threading.Event()
        merge = background._merge

        def gated(*arguments):
            self.reached.set()
            self.passes.acquire()
            merge(*arguments)

        monkeypatch.setattr(background, "_merge", gated)

    def open(self, count=1000):
        self.passes.release(count)


@pytest.fixture
def gate(monkeypatch):
    made = Gate(monkeypatch)
    yield made
    made.open()


def pending(model):
    return distorch.report(model).merging


def wait_for(model, count):
    while pending(model) > count:
        threading.Event().wait(0.01)


@pytest.mark.parametrize("spec", ["cpu,*", "cpu,20kb;disk,*"])
def test_the_same_bits_before_between_and_after(path, gate, spec):
    model, loras = load(path, spec, [(lora(), 0.5)]), [(lora(), 0.5)]
    merged = load(path, "cpu,*", loras, lora_mode="merge")
    x = torch.randn(3, SIZE).bfloat16()
    total = pending(model)
    assert total == (4 if spec == "cpu,*" else 2)
    for left in reversed(range(total)):
        assert torch.equal(model(x), merged(x))
        assert_same(model, merged)
        assert distorch.report(model).ok
        gate.open(1)
        wait_for(model, left)
    distorch.finish_merging(model)
    assert_same(model, merged)
    assert torch.equal(model(x), merged(x))


def test_nothing_is_fetched_any_more_after_it(path):
    model = load(path, loras=[(lora(), 0.5)])
    distorch.finish_merging(model)
    x = torch.randn(3, SIZE).bfloat16()
    model(x)
    distorch.reset_stats(model)
    model(x)
    stats = distorch.stats(model)
    assert stats.fetches == stats.hits == 4
    assert stats.bytes == {}
    report = distorch.report(model)
    assert report.ok
    assert report.bytes == report.planned


def test_what_is_in_memory_afterwards_does_not_change_with_its_file(path):
    """Taken off and put on again, the weights were over a map of the file."""
    model, loras = load(path, loras=[(lora(), 0.5)]), [(lora(), 0.5)]
    x = torch.randn(3, SIZE).bfloat16()
    distorch.finish_merging(model)
    patched = model(x)
    for wanted in ([], loras, []):
        distorch.set_loras(model, wanted)
        distorch.finish_merging(model)
    plain = load(path, "cpu,*")(x)
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.write(bytes(size))
    assert torch.equal(model(x), plain)
    distorch.set_loras(model, loras)
    distorch.finish_merging(model)
    assert torch.equal(model(x), patched)


def test_another_change_meanwhile(path, gate):
    model = load(path, loras=[(lora(), 0.5)])
    gate.open(2)
    wait_for(model, 2)
    gate.open()  # one is being merged with strengths that are old soon
    for strength in (0.1, 0.2, 0.3):
        distorch.set_loras(model, [(lora(), strength), (lora(1, (1,)), 1.0)])
    expected = load(path, loras=[(lora(), 0.3), (lora(1, (1,)), 1.0)], lora_mode="merge")
    assert_same(model, expected)
    distorch.finish_merging(model)
    assert_same(model, expected)
    distorch.set_loras(model, [])
    assert_same(model, load(path))
    distorch.finish_merging(model)
    assert_same(model, load(path))
    assert distorch.report(model).bytes == distorch.report(model).planned


def test_what_is_written_meanwhile_stays(path, gate, monkeypatch):
    model = load(path, loras=[(lora(), 0.5)])
    gate.reached.wait()
    expected = values(model)["layers.0.weight"] + 1
    started, written, adopt = threading.Event(), threading.Event(), _ops.adopt

    def late(*arguments):
        started.set()
        written.wait()
        return adopt(*arguments)

    monkeypatch.setattr(_ops, "adopt", late)
    gate.open()
    started.wait()
    with torch.no_grad():
        model.layers[0].weight.add_(1)
    written.set()
    distorch.finish_merging(model)
    assert pending(model) == 0
    assert torch.equal(values(model)["layers.0.weight"], expected)


@pytest.mark.parametrize("target", ["cpu,20kb;disk,*", "cpu,0b;disk,*", None])
def test_a_new_placement_meanwhile(path, gate, target):
    model = load(path, loras=[(lora(), 0.5)])
    expected = load(path, loras=[(lora(), 0.5)], lora_mode="merge")
    gate.open(2)
    wait_for(model, 2)
    gate.open()
    if target is None:
        distorch.undistribute(model)
        assert not any(distorch.is_sharded(p) for p in model.parameters())
    else:
        distorch.redistribute(model, target)
        distorch.finish_merging(model)
        assert distorch.report(model).ok
    assert_same(model, expected)


def test_copies_and_state_dicts_meanwhile(path, gate):
    model = load(path, loras=[(lora(), 0.5)])
    expected = load(path, loras=[(lora(), 0.5)], lora_mode="merge")
    gate.open(2)
    wait_for(model, 2)
    other = copy.deepcopy(model)
    state = model.state_dict()
    gate.open()
    for name, value in expected.state_dict().items():
        assert torch.equal(distorch.materialize(state[name]), value)
    assert_same(other, expected)
    distorch.finish_merging(other)
    assert_same(other, expected)
    assert distorch.report(other).bytes == distorch.report(other).planned


def test_an_error_is_told_and_the_model_is_right(path, monkeypatch):
    def fails(*arguments, **options):
        raise FetchError("no such luck")

    monkeypatch.setattr(_ops, "adopt", fails)
    model = load(path, loras=[(lora(), 0.5)])
    with pytest.raises(FetchError, match="no such luck"):
        distorch.finish_merging(model)
    report = distorch.report(model)
    assert report.merge_error == "no such luck"
    assert "4 weights left" in str(report)
    assert_same(model, load(path, loras=[(lora(), 0.5)], lora_mode="merge"))
    monkeypatch.undo()
    distorch.set_loras(model, [(lora(), 0.6)])
    distorch.finish_merging(model)
    assert_same(model, load(path, loras=[(lora(), 0.6)], lora_mode="merge"))


def test_a_module_that_nobody_wants_is_let_go(path, gate):
    model = load(path, loras=[(lora(), 0.5)])
    gate.reached.wait()
    known = weakref.ref(model)
    threads = [t for t in threading.enumerate() if t.name == "distorch-merge"]
    del model
    gc.collect()
    gate.open()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    gc.collect()
    assert known() is None


def test_a_program_may_end_meanwhile(path):
    program = textwrap.dedent(f"""
        import threading, torch
        from tests.lora import test_background as t
        from distorch.patching import background
        merge = background._merge
        def slow(*arguments):
            threading.Event().wait(0.5)
            merge(*arguments)
        background._merge = slow
        model = t.load({str(path)!r}, loras=[(t.lora(), 0.5)])
        print(t.pending(model))
    """)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "4"
    assert "Traceback" not in done.stderr


def test_on_a_simulated_accelerator(path):
    sim.configure(devices=2)
    loras = [(lora(), 0.5)]
    expected = load(path, "cpu,*", loras, lora_mode="merge")
    x = torch.randn(3, SIZE).bfloat16()
    for spec in ("sim:0,0b;cpu,*", "sim:0,50%;cpu,50%", "sim:0,20kb;sim:1,10kb;disk,*"):
        model = load(path, spec, loras)
        while pending(model):
            assert torch.equal(model(x.to("sim")).cpu(), expected(x))
        distorch.finish_merging(model)
        for _ in range(3):
            assert torch.equal(model(x.to("sim")).cpu(), expected(x))
        assert_same(model, expected)
        report = distorch.report(model)
        assert report.ok
        assert report.bytes == report.planned
    assert sim.races() == []


# The ring has room for about two weights. On the host they take whole pages.
@pytest.mark.parametrize(("compute", "prefetch"), [("cpu", "28kb"), ("sim:0", "16kb")])
def test_what_operators_use_in_place_by_now_is_not_fetched_ahead(path, compute, prefetch):
    """The passes before have taught the look-ahead that it comes next."""
    sim.configure(devices=1)
    model = load(path, f"{compute},0b;disk,*", prefetch=prefetch, compute=compute)
    x = torch.randn(3, SIZE, device=compute).bfloat16()
    for _ in range(4):
        model(x)
    weight = model.layers[2].weight.detach()
    same = _donors.shard_on(compute, weight.clone(), torch.device(compute), "weight")
    assert _ops.adopt(weight, same, _ops.moves(weight))
    model(x).cpu()  # what had been asked for before comes now
    with distorch.trace(model) as timeline:
        for _ in range(3):
            model(x)
    brought = {s.name for s in timeline.spans if s.bytes}
    assert {"layers.1.weight", "layers.3.weight"} <= brought
    assert "layers.2.weight" not in brought


@pytest.mark.parametrize("donor", ["a checkpoint", "scratch"])
def test_a_write_is_not_undone_by_a_copy_from_before(donor, path):
    if donor == "scratch":
        model = distorch.distribute(Net(), "disk,*", min_bytes=0, compute="cpu")
    else:
        model = distorch.load(Net(), path, "disk,*", min_bytes=0)
    weight = model.layers[0].weight.detach()
    moves = _ops.moves(weight)
    same = _donors.shard_on("cpu", weight.clone(), torch.device("cpu"), "weight")
    with torch.no_grad():
        weight.fill_(3.0)
    assert not _ops.adopt(weight, same, moves)
    assert (distorch.materialize(weight) == 3).all()


def test_writes_beside_adoptions():
    """Whichever comes last to the weight, the values that were written stay."""
    size = 512
    model = nn.ParameterList([nn.Parameter(torch.zeros(size, size))])
    distorch.distribute(model, "disk,*", min_bytes=0, compute="cpu", progress=False)
    for round_ in range(40):
        weight = copy.deepcopy(model)[0].detach()
        over = threading.Event()

        def adopt(weight=weight, over=over):
            while not over.is_set():
                moves = _ops.moves(weight)
                same = _donors.shard_on("cpu", weight.clone(), torch.device("cpu"), "weight")
                if _ops.adopt(weight, same, moves):
                    return

        thread = threading.Thread(target=adopt)
        thread.start()
        for value in range(3):
            with torch.no_grad():
                weight.copy_(torch.full((size, size), float(value)))
            assert (distorch.materialize(weight) == value).all(), f"round {round_}"
        over.set()
        thread.join()
        assert (distorch.materialize(weight) == 2).all(), f"round {round_}"


def test_there_may_be_nothing_to_wait_for(path):
    model = load(path, loras=[(lora(), 0.5)], lora_mode="merge")
    assert distorch.finish_merging(model) is model
    with pytest.raises(distorch.PlacementError, match="not distributed"):
        distorch.finish_merging(Net())


def test_a_wait_goes_on_with_what_an_interrupt_left(path, gate):
    model = load(path, loras=[(lora(), 0.5)])
    gate.reached.wait()
    merging = distorch.runtime.distribution.distribution_of(model).merging
    merging._work.stop = True  # as an interrupt of set_loras while it waits for the thread
    gate.open()
    merging._end()
    assert pending(model) == 3
    distorch.finish_merging(model)
    assert pending(model) == 0
    assert distorch.report(model).bytes == distorch.report(model).planned


def on_fetch(model):
    """Weights that are still patched when they are fetched."""
    return sum(_ops.state(p).decoded for p in model.parameters() if _ops.is_sharded(p))


def test_a_load_over_it_leaves_the_new_weights_to_the_new_mode(path):
    model = load(path, loras=[(lora(), 0.5)])
    distorch.finish_merging(model)
    for _ in range(5):  # the thread would have to be quick
        distorch.load(model, path, "cpu,*", loras=[(lora(1), 0.5)], lora_mode="fetch", min_bytes=0)
        wait_for(model, 0)
        assert on_fetch(model) == 4
        assert_same(model, load(path, loras=[(lora(1), 0.5)], lora_mode="merge"))


def test_a_load_that_fails_over_it_goes_on_with_the_old_weights(path, gate, monkeypatch):
    model, loras = load(path, loras=[(lora(), 0.5)]), [(lora(), 0.5)]
    gate.reached.wait()

    def broken(*arguments, **options):
        raise RuntimeError("no")

    gate.open()
    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="no"):
        patched.setattr("distorch.runtime.placing._install", broken)
        distorch.load(model, path, "cpu,*", loras=[(lora(1), 1.0)], min_bytes=0)
    distorch.finish_merging(model)
    assert on_fetch(model) == 0
    assert_same(model, load(path, loras=loras, lora_mode="merge"))
    assert distorch.report(model).ok


def test_a_load_onto_a_shallow_copy_of_a_module_that_is_gone_is_merged(path):
    model = load(path, loras=[(lora(), 0.5)])
    distorch.finish_merging(model)
    other = copy.copy(model)
    del model
    gc.collect()
    distorch.load(other, path, "cpu,*", loras=[(lora(1), 0.5)], lora_mode="background", min_bytes=0)
    distorch.finish_merging(other)
    assert on_fetch(other) == 0
    assert_same(other, load(path, loras=[(lora(1), 0.5)], lora_mode="merge"))


def test_a_whole_that_is_placed_while_a_part_merges(path, gate):
    part = load(path, loras=[(lora(), 0.5)])
    whole = nn.Sequential(part, nn.Linear(SIZE, SIZE, dtype=torch.bfloat16))
    gate.reached.wait()
    threading.Timer(0.2, gate.open).start()  # while the whole is placed
    distorch.distribute(whole, "cpu,0b;disk,*", min_bytes=0)
    for thread in threading.enumerate():
        if thread.name == "distorch-merge":
            thread.join()
    assert distorch.report(whole).ok
    assert_same(part, load(path, loras=[(lora(), 0.5)], lora_mode="merge"))
