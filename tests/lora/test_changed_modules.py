# SPDX-License-Identifier: Apache-2.0
"""Modules that change between two calls: layers replaced, vocabularies resized, copies."""

import copy
import pickle

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import distorch

SPECS = ["cpu,*", "cpu,0b;disk,*"]


def net():
    torch.manual_seed(0)
    return nn.ModuleDict({"words": nn.Embedding(12, 8), "proj": nn.Linear(8, 8, bias=False)})


def lora(name="proj", rows=8):
    torch.manual_seed(1)
    down, up = torch.randn(2, 8), torch.randn(rows, 2)
    return {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}, up @ down


def placed(spec, tmp_path, way, loras=()):
    if way == "distribute":
        module = distorch.distribute(net(), spec, min_bytes=0, compute="cpu")
        return distorch.set_loras(module, loras) if loras else module
    save_file(net().state_dict(), tmp_path / "base.safetensors")
    return distorch.load(net(), tmp_path / "base.safetensors", spec, min_bytes=0, compute="cpu",
                         loras=loras)  # fmt: skip


def value(parameter):
    return distorch.materialize(parameter).clone()


CHANGES = {
    "a parameter": lambda m, new: setattr(m["proj"], "weight", nn.Parameter(new)),
    "a layer": lambda m, new: m.update({"proj": with_weight(nn.Linear(8, 8, bias=False), new)}),
    "data": lambda m, new: setattr(m["proj"].weight, "data", new.clone()),
}


def with_weight(layer, new):
    layer.weight = nn.Parameter(new)
    return layer


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("way", ["load", "distribute"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("copied", [False, True])
def test_what_was_replaced_is_the_new_original(tmp_path, spec, way, change, copied):
    module = placed(spec, tmp_path, way)
    if copied:
        module = copy.deepcopy(module)
    new = torch.full((8, 8), 3.0)
    CHANGES[change](module, new)
    state, delta = lora()
    distorch.set_loras(module, [(state, 1.0)])
    torch.testing.assert_close(value(module["proj"].weight), new + delta)
    distorch.set_loras(module, [])
    assert torch.equal(value(module["proj"].weight), new)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("way", ["load", "distribute"])
@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_a_patched_weight_that_was_replaced(tmp_path, spec, way, copied, change):
    state, _ = lora()
    module = placed(spec, tmp_path, way, [(state, 1.0)])
    if copied:
        module = copy.deepcopy(module)
    new = torch.full((8, 8), 3.0)
    CHANGES[change](module, new)
    with pytest.raises(
        distorch.PlacementError, match="'proj.weight' was written to, or is another"
    ):
        distorch.set_loras(module, [])
    assert torch.equal(value(module["proj"].weight), new)


@pytest.mark.parametrize("spec", SPECS)
def test_a_copy_takes_its_loras_off(tmp_path, spec):
    state, delta = lora()
    module = placed(spec, tmp_path, "distribute", [(state, 1.0)])
    copied = copy.deepcopy(module)
    before = net()["proj"].weight.detach()
    distorch.set_loras(copied, [])
    assert torch.equal(value(copied["proj"].weight), before)
    torch.testing.assert_close(value(module["proj"].weight), before + delta)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("way", ["load", "distribute"])
@pytest.mark.parametrize("grow", ["a layer", "data"])
def test_a_vocabulary_that_grew(tmp_path, spec, way, grow):
    state, delta = lora("words", 14)
    module = placed(spec, tmp_path, way)
    distorch.set_loras(module, [(lora()[0], 0.5)])  # a reader that knows the old size
    grown = nn.Embedding(14, 8)
    grown.weight = nn.Parameter(torch.arange(112.0).reshape(14, 8))
    if grow == "data":  # as transformers does it
        module["words"].weight.data = grown.weight.data
    else:
        module["words"] = grown
    distorch.set_loras(module, [(state, 1.0)])
    wanted = torch.arange(112.0).reshape(14, 8) + delta
    torch.testing.assert_close(value(module["words"].weight), wanted)
    assert torch.equal(value(module["proj"].weight), net()["proj"].weight)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("way", ["load", "distribute"])
def test_what_only_moved_is_the_same(tmp_path, spec, way):
    """Placed anew between two changes of LoRAs: the originals are still what they were."""
    state, delta = lora()
    module = placed(spec, tmp_path, way, [(state, 1.0)])
    before = net()["proj"].weight.detach()
    for step, other in enumerate([*SPECS, *SPECS[::-1], "cpu,0.5;disk,*"]):
        distorch.redistribute(module, other)
        distorch.set_loras(module, [(state, step / 4)])
        torch.testing.assert_close(value(module["proj"].weight), before + step / 4 * delta)
    distorch.redistribute(module, SPECS[1])
    distorch.set_loras(module, [])
    assert torch.equal(value(module["proj"].weight), before)


def test_weights_made_in_inference_mode():
    with torch.inference_mode():
        module = distorch.distribute(net(), "cpu,*", min_bytes=0, compute="cpu")
        state, delta = lora()
        distorch.set_loras(module, [(state, 1.0)])
        before = net()["proj"].weight
        torch.testing.assert_close(value(module["proj"].weight), before + delta)


def test_views_in_another_order_are_refused():
    module = nn.ModuleDict({"a": nn.Linear(8, 8, bias=False), "b": nn.Linear(8, 8, bias=False)})
    module["b"].weight = nn.Parameter(module["a"].weight.data.t())
    distorch.distribute(module, "cpu,*", min_bytes=0, compute="cpu")
    with pytest.raises(distorch.PlacementError, match="of another shape or order"):
        distorch.set_loras(
            module, [({"a.diff": torch.ones(8, 8), "b.diff": torch.ones(8, 8)}, 1.0)]
        )


class Labelled(nn.Parameter):
    """A parameter with an attribute, and a way of its own to be made."""

    def __new__(cls, data, label):
        made = torch.Tensor._make_subclass(cls, data, False)
        made.label = label
        return made

    def __deepcopy__(self, memo):
        return memo.setdefault(id(self), Labelled(self.data.clone(), list(self.label)))

    def __reduce_ex__(self, protocol):
        return Labelled, (self.data, self.label)


def labelled():
    torch.manual_seed(2)
    module = nn.Sequential(nn.Linear(8, 8, bias=False))
    module[0].weight = Labelled(module[0].weight.detach(), ["rows"])
    return module


@pytest.mark.parametrize("spec", SPECS)
def test_subclasses_keep_class_and_attributes(tmp_path, spec):
    wanted = labelled()[0].weight.detach()
    save_file(labelled().state_dict(), tmp_path / "base.safetensors")
    options = {"min_bytes": 0, "compute": "cpu"}
    placed = distorch.distribute(labelled(), spec, **options)
    loaded = distorch.load(labelled(), tmp_path / "base.safetensors", spec, **options)
    copied = copy.deepcopy(placed)
    for module in (placed, loaded, copied, distorch.redistribute(loaded, SPECS[0])):
        weight = module[0].weight
        assert (type(weight), weight.label) == (Labelled, ["rows"])
        assert torch.equal(value(weight), wanted)
    assert copied[0].weight.label is not placed[0].weight.label
    pickled = pickle.loads(pickle.dumps(placed[0].weight))
    assert (type(pickled), pickled.label) == (Labelled, ["rows"]) and torch.equal(pickled, wanted)
