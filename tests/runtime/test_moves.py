# SPDX-License-Identifier: Apache-2.0
"""Weights get other places while the model is used: same bits, same tensors, nothing breaks."""

import copy
import io
import itertools
import threading
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import distorch
from distorch import _native
from distorch.runtime import changes

PLACES = ["cpu,0b;disk,*", "cpu,50%;disk,50%", "cpu,*", "cpu,10%;disk,90%"]


def net():
    blocks = (nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64)) for _ in range(4))
    return nn.Sequential(*blocks).eval()


def lora():
    generator = torch.Generator().manual_seed(1)
    shapes = {"A": (4, 64), "B": (128, 4)}
    return {
        f"{block}.0.lora_{side}.weight": torch.randn(shape, generator=generator) * 0.05
        for block in range(4)
        for side, shape in shapes.items()
    }


@pytest.fixture
def path(tmp_path):
    torch.manual_seed(0)
    save_file(net().state_dict(), tmp_path / "net.safetensors")
    return tmp_path / "net.safetensors"


def narrow(path, tmp_path):
    """The matrices as float8 with a scale each, as checkpoints have them."""
    tensors = {}
    for name, value in load_file(path).items():
        if value.dim() == 2:
            tensors[name] = (value * 64).to(torch.float8_e4m3fn)
            tensors[name.replace(".weight", ".weight_scale")] = torch.tensor(1 / 64)
        else:
            tensors[name] = value
    save_file(tensors, tmp_path / "narrow.safetensors")
    return tmp_path / "narrow.safetensors"


def changes_beside_forwards(model, x, changes):
    """The outputs that differ from the first one, and the errors, while `changes` are made."""
    with torch.no_grad():
        wanted = model(x).clone()
    ended, wrong = threading.Event(), []

    def forward():
        while not ended.is_set():
            try:
                with torch.no_grad():
                    y = model(x)
                if not torch.equal(y, wanted):
                    wrong.append(f"differs by {(y - wanted).abs().max()}")
            except Exception as error:
                wrong.append(repr(error))

    workers = [threading.Thread(target=forward) for _ in range(3)]
    for worker in workers:
        worker.start()
    try:
        for change in changes:
            change(model)
    finally:
        ended.set()
        for worker in workers:
            worker.join(60)
    assert not any(worker.is_alive() for worker in workers)
    return wrong


def all_changes(count):
    places = itertools.cycle(PLACES)
    for _ in range(count):
        yield lambda m: distorch.redistribute(m, next(places))
        yield lambda m: distorch.redistribute(m, next(places))
        yield copy.deepcopy
        yield lambda m: torch.save(m.state_dict(), io.BytesIO())


@pytest.mark.parametrize("kind", ["plain", "narrow"])
@pytest.mark.parametrize("mode", ["merge", "fetch", "background"])
def test_changes_beside_forwards(path, tmp_path, mode, kind):
    file = path if kind == "plain" else narrow(path, tmp_path)
    model = distorch.load(
        net(), file, "cpu,25%;disk,75%", compute="cpu", min_bytes=0, prefetch="128kb",
        loras=[(lora(), 0.5)], lora_mode=mode,
    )  # fmt: skip
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(2))
    assert changes_beside_forwards(model, x, all_changes(15)) == []


def test_a_parameter_stays_the_same_object(path):
    model = distorch.load(net(), path, "disk,*", compute="cpu", min_bytes=0)
    weight = model[0][0].weight
    before = distorch.materialize(weight).clone()
    distorch.set_loras(model, [(lora(), 0.5)], lora_mode="fetch")
    patched = distorch.materialize(weight).clone()
    assert not torch.equal(before, patched)
    for place in PLACES:
        distorch.redistribute(model, place)
        assert model[0][0].weight is weight
        assert torch.equal(distorch.materialize(weight), patched)


@pytest.mark.parametrize("change", ["redistribute", "merge"])
def test_state_dicts_have_what_was_written_last(path, change):
    model = distorch.load(
        net(), path, "disk,*", compute="cpu", min_bytes=0,
        loras=[(lora(), 0.5)], lora_mode="background" if change == "merge" else "fetch",
    )  # fmt: skip
    kept = model.state_dict()
    if change == "merge":
        distorch.redistribute(model, "cpu,0b;disk,*")
        distorch.finish_merging(model)
    else:
        distorch.redistribute(model, "cpu,50%;disk,*")
    again = model.state_dict()
    assert all(torch.equal(kept[name], again[name]) for name in kept)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    written = model.state_dict()
    for name, parameter in model.named_parameters():
        assert torch.equal(written[name], distorch.materialize(parameter))


def test_gradients_arrive_where_the_graph_is_older_than_the_place(path):
    model = distorch.load(net(), path, "cpu,50%;disk,50%", compute="cpu", min_bytes=0)
    plain = net()
    plain.load_state_dict(model.state_dict())
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(2))
    plain(x).square().sum().backward()
    loss = model(x).square().sum()  # whose graph holds the weights
    distorch.redistribute(model, "cpu,0b;disk,*")
    loss.backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


class Methods(nn.Module):
    """Weights that operators take by reference alone, which no count of references shows."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        shapes = [(64, 64)] * 6
        self.weights = nn.ParameterList(torch.randn(s, generator=generator) / 8 for s in shapes)

    def forward(self, x):
        for weight in self.weights:
            x = (weight @ x.t()).t() + weight.clone().sum(0) + weight.double().mean().float()
        return x


def test_weights_whose_methods_run():
    model = distorch.distribute(Methods(), "disk,*", compute="cpu", min_bytes=0, prefetch=40_000)
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(2))
    changes = [partial(distorch.redistribute, spec=spec) for spec in 60 * PLACES]
    assert changes_beside_forwards(model, x, changes) == []


@pytest.mark.parametrize("change", ["redistribute", "set_loras", "undistribute"])
def test_a_change_beside_a_forward_that_waits_for_it_is_refused(path, monkeypatch, change):
    """They would wait for each other. Nothing is changed then, and the forward goes on."""
    monkeypatch.setattr(changes, "_PATIENCE", 0.2)
    model = distorch.load(net(), path, "cpu,50%;disk,50%", compute="cpu", min_bytes=0)
    places, inside, changed = distorch.report(model).bytes, threading.Event(), threading.Event()

    def wait_inside(*_):
        inside.set()
        assert changed.wait(60)

    hook = model[1].register_forward_hook(wait_inside)
    x = torch.ones(1, 64)
    worker = threading.Thread(target=model, args=(x,), name="the one that waits")
    worker.start()
    assert inside.wait(60)
    change = {
        "redistribute": lambda: distorch.redistribute(model, "cpu,*"),
        "set_loras": lambda: distorch.set_loras(model, [(lora(), 0.5)]),
        "undistribute": lambda: distorch.undistribute(model),
    }[change]
    with pytest.raises(distorch.PlacementError, match="the one that waits"):
        change()
    assert worker.is_alive()
    changed.set()
    worker.join(60)
    hook.remove()
    report = distorch.report(model)
    assert report.ok
    assert report.bytes == places
    plain = net()
    plain.load_state_dict(load_file(path))
    assert torch.equal(model(x), plain(x))
    change()


@pytest.mark.parametrize("change", ["copy", "move", "unpatch"])
def test_a_patched_weight_that_was_written_to(path, change):
    """It is plain bytes in memory that no tensor of PyTorch has made."""
    model = distorch.load(
        net(), path, "cpu,*", compute="cpu", min_bytes=0, loras=[(lora(), 0.5)], lora_mode="fetch"
    )
    weight = model[0][0].weight
    wanted = distorch.materialize(weight) + 1
    with torch.no_grad():
        weight.add_(1)
    if change == "copy":
        weight = copy.deepcopy(model)[0][0].weight
    elif change == "move":
        distorch.redistribute(model, "cpu,0b;disk,*")
    else:
        with pytest.raises(distorch.PlacementError, match="was written to"):
            distorch.set_loras(model, [])
    assert torch.equal(distorch.materialize(weight), wanted)


def test_other_modules_run_while_one_is_changed(path):
    """Another module's forward is neither stopped nor waited for."""
    model = distorch.load(net(), path, "cpu,50%;disk,50%", compute="cpu", min_bytes=0)
    other, ran, ended = net(), threading.Event(), threading.Event()

    def forward():
        while not ended.is_set():
            other(torch.ones(1, 64))
            ran.set()

    worker = threading.Thread(target=forward)
    worker.start()
    with changes.alone(model), changes.at_rest(model):
        ran.clear()
        assert ran.wait(60)
    ended.set()
    worker.join(60)


def test_set_data_takes_tensors():
    with pytest.raises(TypeError, match="two tensors"):
        _native.set_data(torch.ones(3), 3)
