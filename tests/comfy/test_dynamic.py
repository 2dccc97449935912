# SPDX-License-Identifier: Apache-2.0
"""Models that a host with dynamic VRAM gives us: on its static path, or as dynamic ones of ours."""

import gc
import logging

import pytest
import torch

from distorch.runtime.distribution import distribution_of
from tests.comfy.test_patcher import X, adapters, output, patched


def _loaded(kind):
    import comfy.sd
    from comfy import model_patcher

    return comfy.sd.dynamic_patcher(getattr(model_patcher, kind))


def taken_over(kind, spec="cpu,*", compute="cpu"):
    """As a loader of ours gives it out."""
    from distorch.comfy import outputs
    from distorch.comfy.placement import Placement

    return outputs.distributed(_loaded(kind), Placement(spec, compute))


def own_copy(kind, spec="cpu,*", compute="cpu"):
    """As Distribute Model gives it out."""
    from distorch.comfy import outputs
    from distorch.comfy.placement import Placement

    return outputs.own_copy(_loaded(kind), Placement(spec, compute))


def expected(*patches):
    """The stand-in's model as dynamic VRAM would run it: float32 from bfloat16, zeros for what the
    file lacks.
    """
    import comfy.lora
    import comfy.sd

    model = comfy.sd.patcher().model
    with torch.inference_mode():
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16().float()
        model.diffusion_model[2].up.bias.zero_()
        for strength, adapter in patches:
            for key, found in adapter.items():
                weight = model.get_parameter(key)
                merged = comfy.lora.calculate_weight(
                    [(strength, found, 1.0, None, None)], weight.clone(), key
                )
                weight.copy_(merged)
        return model(X)


@pytest.mark.parametrize("take", [taken_over, own_copy])
@pytest.mark.parametrize(
    ("kind", "ours"),
    [("ModelPatcherDynamic", "DistorchPatcher"), ("OnlyDynamic", "DynamicPatcher")],
)
def test_the_way_that_the_host_has(host, accelerators, take, kind, ours):
    made = take(kind, "sim:0,200kb;cpu,*", "sim:0")
    assert type(made).__name__ == ours
    assert made.is_dynamic() == (ours == "DynamicPatcher")
    assert torch.equal(output(host, made), expected())
    lora = adapters(1, 0, 2)
    assert torch.equal(output(host, patched(made, (0.5, lora))), expected((0.5, lora)))
    assert torch.equal(output(host, made), expected())
    assert distribution_of(made.model).plan.bytes["cpu"] > 0


@pytest.mark.parametrize("take", [taken_over, own_copy])
def test_what_the_host_loads_again_is_as_wide_as_the_model(host, take):
    """For a copy on another device, for instance."""
    make, arguments, *_ = take("ModelPatcherDynamic").cached_patcher_init
    fresh = make(*arguments, disable_dynamic=True)
    for parameter in fresh.model.parameters():
        assert parameter.dtype == torch.float32
        assert not parameter.is_meta


def test_shared_weights_stay_shared(host):
    from distorch.comfy.outputs import settle

    model = torch.nn.ModuleDict({"a": torch.nn.Linear(4, 4), "b": torch.nn.Linear(4, 4)}).bfloat16()
    model.b.weight = model.a.weight
    for layer in model.values():
        layer.weight_comfy_model_dtype = torch.float32
    settle(model)
    assert model.b.weight is model.a.weight
    assert (model.a.weight.dtype, model.a.bias.dtype) == (torch.float32, torch.bfloat16)


def test_a_dynamic_one_of_ours_answers_what_the_host_asks(host, accelerators):
    made = taken_over("OnlyDynamic", "sim:0,200kb;cpu,*", "sim:0")
    record = made.model.dynamic_pins[made.load_device]
    assert record == {"active": False, "current_prompt": False}
    made.set_in_use_by_current_prompt(True)
    assert record["current_prompt"]
    assert made.loaded_ram_size() == 0
    output(host, made)
    in_ram = distribution_of(made.model).plan.bytes["cpu"]
    assert in_ram > 0
    assert made.loaded_ram_size() == made.pinned_memory_size() == in_ram
    assert made.partially_unload_ram(1 << 40, subsets=["patches"]) == 0
    assert made.unregister_inactive_pins(1 << 40) == 0
    for clone in (made.clone(disable_dynamic=True), made.get_non_dynamic_delegate()):
        assert type(clone) is type(made)
        assert clone.model is made.model
    made.register_load_device(torch.device("sim:1"))
    assert set(made.model.dynamic_pins) == {torch.device("sim:0"), torch.device("sim:1")}


def test_a_dynamic_one_of_ours_makes_room_for_itself(host, accelerators):
    """The host frees nothing between dynamic models. What it loads together stays."""
    sim = torch.device("sim:0")
    first = taken_over("OnlyDynamic", "sim:0,*", "sim:0")
    second = taken_over("OnlyDynamic", "sim:0,*", "sim:0")
    host.free[sim] = 0
    host.load_models_gpu([first, second])
    assert first.loaded_size() == second.loaded_size() > 0
    second.detach()
    host.current_loaded_models[:] = [m for m in host.current_loaded_models if m.model is first]
    output(host, second)
    assert first.loaded_size() == 0 < second.loaded_size()


def test_auto_gets_what_is_free_once_there_is_room(host, accelerators):
    sim = torch.device("sim:0")
    first = taken_over("OnlyDynamic", "sim:0,*", "sim:0")
    output(host, first)
    made = taken_over("OnlyDynamic", "auto", "sim:0")
    host.free[sim] = 1 << 20
    host.current_loaded_models.clear()
    made.model_size()
    made.partially_load(sim, 0.1)  # what the host says before dynamic models have given up theirs
    assert distribution_of(made.model).plan.bytes["sim:0"] > 300_000


def test_the_host_is_asked_for_pinned_memory(host, accelerators, caplog, monkeypatch):
    from distorch.comfy import outputs
    from distorch.comfy.placement import Placement

    host.asked_to_pin.clear()
    made = taken_over("ModelPatcherDynamic", "sim:0,200kb;cpu,*", "sim:0")
    output(host, made)
    in_ram = distribution_of(made.model).plan.bytes["cpu"]
    assert host.asked_to_pin == [in_ram]
    output(host, made)
    assert host.asked_to_pin == [in_ram]  # they are pinned already
    less = outputs.own_copy(made, Placement("sim:0,100kb;cpu,*", "sim:0"))
    output(host, less)
    more = distribution_of(less.model).plan.bytes["cpu"] - in_ram
    assert host.asked_to_pin == [in_ram, more]
    monkeypatch.setattr(host, "MAX_PINNED_MEMORY", 1000)
    made.detach()
    with caplog.at_level(logging.WARNING, "distorch"):
        output(host, taken_over("ModelPatcherDynamic", "sim:0,200kb;cpu,*", "sim:0"))
    assert "of RAM, more than ComfyUI has left for pinned memory" in caplog.text


def test_the_budget_counts_what_models_of_ours_have_pinned(host, accelerators, caplog, monkeypatch):
    gc.collect()  # models of other tests
    monkeypatch.setattr(host, "MAX_PINNED_MEMORY", 300_000)
    first, second = (
        taken_over("ModelPatcherDynamic", "sim:0,200kb;cpu,*", "sim:0") for _ in range(2)
    )
    with caplog.at_level(logging.WARNING, "distorch"):
        output(host, first)
        assert caplog.text == ""
        output(host, second)
    assert "of RAM, more than ComfyUI has left for pinned memory" in caplog.text


def test_nothing_is_pinned_for_the_cpu(host):
    host.asked_to_pin.clear()
    output(host, taken_over("ModelPatcherDynamic", "cpu,100kb;disk,*"))
    assert host.asked_to_pin == []
