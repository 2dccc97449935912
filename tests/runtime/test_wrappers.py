# SPDX-License-Identifier: Apache-2.0
"""Weights that are wrapper subclasses around several tensors, as quantised weights are."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import return_and_correct_aliasing

import distorch
from distorch import PlacementError
from distorch.runtime.wrapped import is_on_donor, sharded_parts
from distorch.testing import sim

aten = torch.ops.aten


class Scaled(torch.Tensor):
    """int8 numbers times a scale per row, times one for all."""

    @staticmethod
    def __new__(cls, numbers, rows, whole):
        return torch.Tensor._make_wrapper_subclass(
            cls, numbers.shape, dtype=torch.float32, device=numbers.device
        )

    def __init__(self, numbers, rows, whole):
        self.numbers, self.rows, self.whole = numbers, rows, whole

    @classmethod
    def of(cls, values):
        rows = values.abs().amax(1, keepdim=True) / 127
        return cls((values / rows).round().to(torch.int8), rows, torch.tensor(0.5))

    def plain(self):
        return self.numbers.float() * self.rows * self.whole

    def __tensor_flatten__(self):
        return ["numbers", "rows", "whole"], type(self)

    @staticmethod
    def __tensor_unflatten__(parts, context, size, stride):
        return context(parts["numbers"], parts["rows"], parts["whole"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (aten.detach.default, aten.clone.default, aten._to_copy.default):
            kwargs.pop("dtype", None)
            parts = (func(part, **kwargs) for part in _parts(args[0]))
            return return_and_correct_aliasing(func, args, kwargs, type(args[0])(*parts))
        if func is aten.copy_.default:
            for into, value in zip(_parts(args[0]), _parts(args[1]), strict=True):
                into.copy_(value)
            return args[0]
        args = [a.plain() if isinstance(a, Scaled) else a for a in args]
        return func(*args, **kwargs)


def _parts(tensor):
    return tensor.numbers, tensor.rows, tensor.whole


class Copying(Scaled):
    """One whose scales are copied when it is detached, as comfy-kitchen's are."""

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is aten.detach.default:
            numbers, rows, whole = _parts(args[0])
            return Copying(numbers.detach(), rows.clone(), whole.clone())
        return super().__torch_dispatch__(func, types, args, kwargs)


class OwnApply(nn.Linear):
    """A layer that makes parameters anew when it is converted, as the host's does."""

    def _apply(self, fn, recurse=True):
        for key, parameter in self._parameters.items():
            self._parameters[key] = nn.Parameter(fn(parameter), requires_grad=False)
        return self


class OwnStateDict(nn.Linear):
    """A layer that writes its state dict by itself, part by part, as the host's does."""

    def state_dict(self, *args, destination=None, prefix="", keep_vars=False):
        found = {} if destination is None else destination
        found[prefix + "bias"] = self.bias
        for name, part in zip(("numbers", "rows", "whole"), _parts(self.weight), strict=True):
            found[f"{prefix}weight.{name}"] = part
        return found


class Net(nn.Module):
    def __init__(self, device="cpu", kind=Scaled, linear=nn.Linear):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(linear(64, 64) for _ in range(4))
        self.table = nn.Embedding(10, 64)
        for layer in self.layers:
            layer.weight = nn.Parameter(kind.of(layer.weight.detach()), requires_grad=False)
        self.requires_grad_(False).to(device)

    def forward(self, ids):
        x = self.table(ids)
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


IDS = torch.arange(6)
WIDE = 4 * (64 * 64 + 64 * 4)  # bytes of parts that can leave


@pytest.mark.parametrize("spec", ["cpu,0b;disk,*", "cpu,5000b;disk,*"])
def test_parts_leave_and_come_back(spec):
    expected = Net()(IDS)
    net = distorch.distribute(Net(), spec, min_bytes=0)
    assert torch.equal(net(IDS), expected)
    report = distorch.report(net)
    assert report.ok, report
    assert report.bytes["disk"] >= WIDE // 4
    weight = net.layers[3].weight
    assert type(weight) is Scaled and isinstance(weight, nn.Parameter)
    assert len(sharded_parts(weight)) == 2 and weight.whole.device.type == "cpu"
    assert distorch.stats(net).bytes["disk->cpu"] > 0
    distorch.redistribute(net, "cpu,*")
    assert not any(is_on_donor(p) for p in net.parameters())
    assert torch.equal(net(IDS), expected)
    distorch.redistribute(net, "cpu,0b;disk,*")
    distorch.undistribute(net)
    assert not any(is_on_donor(p) for p in net.parameters())
    assert torch.equal(net(IDS), expected)


def test_parts_that_are_copied_when_they_are_detached():
    expected = Net()(IDS)
    net = distorch.distribute(Net(kind=Copying), "cpu,0b;disk,*", min_bytes=0)
    for layer in net.layers:
        assert type(layer.weight) is Copying and isinstance(layer.weight, nn.Parameter)
        assert len(sharded_parts(layer.weight)) == 2
    assert distorch.report(net).ok
    assert torch.equal(net(IDS), expected)


def test_a_wrapper_around_what_is_no_memory_stays():
    net = Net()
    for layer in net.layers:
        layer.weight.rows = layer.weight.rows.to_sparse()
    distorch.distribute(net, "cpu,0b;disk,*", min_bytes=0)
    assert not any(is_on_donor(layer.weight) for layer in net.layers)
    with pytest.raises(PlacementError, match=r"'layers.0.weight' should go to 'disk'"):
        distorch.redistribute(net, "cpu,*;disk,1mb", rules=[("layers.*", "disk")], min_bytes=0)


def test_a_part_that_strayed_is_reported():
    net = distorch.distribute(Net(), "cpu,0b;disk,*", min_bytes=0)
    weight, before = net.layers[2].weight, distorch.report(net).bytes["disk"]
    weight.rows = weight.rows.clone()
    report = distorch.report(net)
    assert report.problems == ["layers.2.weight: parts of it are on cpu"]
    assert report.bytes == {"cpu": 64 * 4, "disk": before - 64 * 4}


def test_a_layer_that_writes_its_state_dict_itself():
    expected = Net().state_dict()
    net = distorch.distribute(Net(linear=OwnStateDict), "cpu,0b;disk,*", min_bytes=0)
    for module in (net, copy.deepcopy(net)):
        saved = module.state_dict()
        assert not any(is_on_donor(value) for value in saved.values())
        assert torch.equal(saved["layers.1.bias"], expected["layers.1.bias"])
        assert torch.equal(saved["layers.1.weight.rows"], expected["layers.1.weight"].rows)
        assert is_on_donor(module.state_dict(keep_vars=True)["layers.1.weight.rows"])
    distorch.undistribute(net)
    assert "state_dict" not in net.layers[1].__dict__


def test_on_an_accelerator():
    sim.configure(memory="1gb")
    expected = Net()(IDS)
    net = distorch.distribute(Net(), "sim:0,0b;cpu,*", min_bytes=0)
    assert net.layers[0].weight.device.type == "sim"
    for _ in range(3):
        assert torch.equal(net(IDS.to("sim")).cpu(), expected)
    assert not sim.races()
    held = torch.get_device_module("sim").memory_allocated()
    ring = distorch.runtime.distribution.distribution_of(net).ring_bytes
    assert held - ring < 4096 * 6  # biases, single scales
    distorch.undistribute(net)
    assert all(p.device.type == "sim" for p in net.parameters())
    assert torch.equal(net(IDS.to("sim")).cpu(), expected)


def test_state_dicts_and_copies():
    net = distorch.distribute(Net(), "cpu,0b;disk,*", min_bytes=0)
    expected = net(IDS)
    saved = net.state_dict()
    assert not any(is_on_donor(value) for value in saved.values())
    assert isinstance(saved["layers.1.weight"], Scaled)
    fresh = Net()
    for layer in fresh.layers:
        layer.weight.numbers.zero_()
    fresh.load_state_dict(saved)
    assert torch.equal(fresh(IDS), expected)

    copied = copy.deepcopy(net)
    assert all(is_on_donor(layer.weight) for layer in copied.layers)
    assert torch.equal(copied(IDS), expected)


def test_conversions_leave_the_parts_where_they_are():
    net = distorch.distribute(Net(), "cpu,0b;disk,*", min_bytes=0)
    expected = net(IDS)
    net.to("cpu").float()
    assert all(is_on_donor(layer.weight) for layer in net.layers)
    assert torch.equal(net(IDS), expected)
    with pytest.raises(PlacementError, match="cannot move"):
        net.to("meta")


def test_parameters_that_are_made_anew_by_a_conversion_stay_on_donors():
    net = distorch.distribute(Net(kind=Copying, linear=OwnApply), "cpu,0b;disk,*", min_bytes=0)
    expected = net(IDS)
    net.to("cpu")
    assert all(len(sharded_parts(layer.weight)) == 2 for layer in net.layers)
    assert torch.equal(net(IDS), expected)


def test_what_cannot_be():
    net = distorch.distribute(Net(), "cpu,0b;disk,*", min_bytes=0)
    expected = net(IDS)
    lora = {
        "layers.1.lora_up.weight": torch.ones(64, 2),
        "layers.1.lora_down.weight": torch.ones(2, 64),
    }
    with pytest.raises(PlacementError, match=r"'layers.1.weight' is a Scaled.*adapter"):
        distorch.set_loras(net, [(lora, 1.0)])
    assert torch.equal(net(IDS), expected)


def test_a_failure_leaves_the_module_as_it_was(monkeypatch):
    net, count = Net(), 0
    expected, weights = net(IDS), list(net.parameters())
    put = distorch._donors.shard_on

    def fails(*args):
        nonlocal count
        count += 1
        if count == 6:
            raise PlacementError("no room for the sixth")
        return put(*args)

    monkeypatch.setattr(distorch._donors, "shard_on", fails)
    with pytest.raises(PlacementError, match="sixth"):
        distorch.distribute(net, "cpu,0b;disk,*", min_bytes=0)
    assert all(a is b for a, b in zip(net.parameters(), weights, strict=True))
    assert torch.equal(net(IDS), expected)
