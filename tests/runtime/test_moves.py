"""Weights get other places while the model is used: same bits, same tensors, nothing breaks."""

import copy
import io
import itertools
import threading

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import distorch
from distorch import _native, _ops

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


def changes_beside_forwards(model, x, changes, *, threads=3):
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

    workers = [threading.Thread(target=forward) for _ in range(threads)]
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


def test_gradients_arrive_where_the_graph_is_older_than_the_place(path, monkeypatch):
    monkeypatch.setattr(_ops.Patience, "__init__", lambda self: setattr(self, "left", 0.05))
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


def test_a_tensor_that_an_operator_has_is_not_changed():
    weight, other = nn.Parameter(torch.ones(3)), torch.zeros(3)
    graphs = [(weight * weight).sum()]  # holds the weight as an operator that runs does
    assert not _native.set_data(weight, other, only_idle=True)
    assert weight.detach().tolist() == [1, 1, 1]
    graphs.clear()
    assert _native.set_data(weight, other, only_idle=True)
    assert weight.detach().tolist() == [0, 0, 0]
    graphs.append((weight * weight).sum())
    assert _native.set_data(weight, torch.ones(3), only_idle=False)
    assert weight.detach().tolist() == [1, 1, 1]
    with pytest.raises(TypeError, match="two tensors"):
        _native.set_data(weight, 3, only_idle=False)
