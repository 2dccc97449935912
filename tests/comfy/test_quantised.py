# SPDX-License-Identifier: Apache-2.0
"""Models with the host's quantised weights: parts on donors, patches as the host puts them on."""

import gc

import pytest
import torch

import distorch
from distorch.errors import PlacementError
from distorch.runtime.wrapped import is_on_donor, sharded_parts
from tests.comfy.test_patcher import KB, UP, X, adapters, device_bytes, output, patched

SPEC = "cpu,30kb;disk,*"


def placed(spec=SPEC, compute="cpu", **options):
    import comfy.sd

    from distorch.comfy import outputs
    from distorch.comfy.placement import Placement

    return outputs.distributed(comfy.sd.quantised_patcher(), Placement(spec, compute, **options))


def expected(*patches, full=False):
    """The host's way: numbers, patched, quantised again with a seed from the name."""
    import comfy.lora
    import comfy.sd
    from comfy.model_patcher import string_to_seed

    model = comfy.sd.quantised_patcher().model
    found = {}
    for strength, adapter in patches:
        for key, value in adapter.items():
            found.setdefault(key, []).append((strength, value))
    with torch.inference_mode():
        for key, entries in found.items():
            owner = model.get_submodule(key.removesuffix(".weight"))
            value = owner.convert_weight(owner.weight.to(torch.float32, copy=True))
            value = comfy.lora.calculate_weight(entries, value, key)
            if full:
                owner.weight = torch.nn.Parameter(value, requires_grad=False)
            else:
                owner.set_weight(value, seed=string_to_seed(key))
        return model(X)


def weights_of(patcher):
    return [p for n, p in patcher.model.named_parameters() if n.endswith(".weight")]


def values(patcher):
    """Every part of every weight, in plain memory."""
    return {
        f"{name}{key}": distorch.materialize(part).cpu()
        for name, weight in patcher.model.named_parameters()
        if name.endswith(".weight")
        for key, part in weight.parts().items()
    }


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in found)


def test_parts_are_placed_as_asked(host):
    patcher = placed()
    assert torch.equal(output(host, patcher), expected())
    report = distorch.report(patcher.model)
    assert report.ok
    assert 16 * KB < report.bytes["cpu"] <= 30 * KB
    away = [weight for weight in weights_of(patcher) if is_on_donor(weight)]
    assert len(away) == 5
    assert all(len(sharded_parts(weight)) == 2 for weight in away)


@pytest.mark.parametrize("spec", [SPEC, "cpu,0b;disk,*", "cpu,*"])
def test_patches_come_and_go(host, spec):
    patcher = placed(spec)
    before = values(patcher)
    a, b = adapters(1, 0, 1, 2), adapters(2, 1)
    for patches in (((0.5, a),), ((0.5, a),), ((0.5, a), (1.0, b)), ((0.25, a), (1.0, b)), ()):
        found = output(host, patched(patcher, *patches))
        assert torch.equal(found, expected(*patches))
        report = distorch.report(patcher.model)
        assert report.ok, report.problems
        assert len(patcher.backup) == (3 if patches else 0)
    assert_same(values(patcher), before)


def test_only_what_changed_is_merged_again(host, monkeypatch):
    from distorch.comfy import weights

    seen, merged = [], weights.merged
    monkeypatch.setattr(
        weights, "merged", lambda model, key, *rest: seen.append(key) or merged(model, key, *rest)
    )
    patcher, a, b = placed(), adapters(1, 0, 1), adapters(2, 1)
    output(host, patched(patcher, (0.5, a), (1.0, b)))
    assert seen == [UP(0), UP(1)]
    seen.clear()
    output(host, patched(patcher, (0.5, a), (0.25, b)))
    assert seen == [UP(1)]


def test_patches_at_full_precision_and_back(host):
    from distorch.comfy import outputs
    from distorch.comfy.placement import Placement

    patcher, a = placed("cpu,0b;disk,*", lora_precision="full"), adapters(1, 0, 1)
    before = values(patcher)
    assert torch.equal(output(host, patched(patcher, (0.5, a))), expected((0.5, a), full=True))
    assert distorch.report(patcher.model).ok
    stored = outputs.own_copy(patcher, Placement("cpu,0b;disk,*", "cpu"))
    assert torch.equal(output(host, patched(stored, (0.5, a))), expected((0.5, a)))
    assert torch.equal(output(host, stored), expected())
    assert_same(values(patcher), before)


def test_a_copy_of_a_foreign_model_leaves_it_alone(host):
    import comfy.sd

    from distorch.comfy import outputs
    from distorch.comfy.placement import Placement

    theirs = comfy.sd.quantised_patcher()
    before, a = values(theirs), adapters(1, 0)
    made = outputs.own_copy(patched(theirs, (0.5, a)), Placement("cpu,0b;disk,*", "cpu"))
    assert torch.equal(output(host, made), expected((0.5, a)))
    assert not any(is_on_donor(weight) for weight in weights_of(theirs))
    assert_same(values(theirs), before)


def test_state_dicts_say_values(host):
    import comfy.sd

    patcher = placed("cpu,0b;disk,*")
    output(host, patcher)
    wanted = comfy.sd.quantised_patcher().model.diffusion_model.state_dict()
    found = patcher.model.diffusion_model.state_dict()
    assert not any(is_on_donor(value) for value in found.values())
    assert_same(found, wanted)


def test_weights_that_cannot_leave_are_refused():
    import comfy.sd
    from comfy.quant_ops import QuantizedTensor

    from distorch.comfy.outputs import as_placed
    from distorch.comfy.placement import Placement

    theirs = comfy.sd.patcher()
    for block in theirs.model.diffusion_model:
        scales = torch.ones(256, 1).to_sparse()  # no plain memory
        numbers = torch.ones(256, 64, dtype=torch.int8)
        block.up.weight = torch.nn.Parameter(
            QuantizedTensor(numbers, scales, torch.ones(())), requires_grad=False
        )
        block.down = torch.nn.Identity()
    with pytest.raises(PlacementError, match=r"3 weights of this model .* cannot leave cpu"):
        as_placed(theirs, Placement("cpu,0b;disk,*", "cpu")).model_size()


# --- on two simulated accelerators ---

DEVICES = "sim:0,45kb;sim:1,20kb;cpu,*"


def test_donors_on_devices(accelerators, host):
    patcher = placed(DEVICES, "sim:0")
    before = values(patcher)
    a = adapters(1, 0, 1, 2)
    for patches in ((), ((0.5, a),), ((0.25, a),), ()):
        assert torch.equal(output(host, patched(patcher, *patches)), expected(*patches))
        measured = device_bytes(patcher)
        assert 35 * KB < measured["sim:0"] <= 45 * KB
        assert 0 < measured["sim:1"] <= 20 * KB
        assert distorch.report(patcher.model).ok
    host.free[torch.device("sim:0")] = 0
    host.free_memory(1 << 40, torch.device("sim:0"))
    measured = device_bytes(patcher)
    assert measured.get("sim:0", 0) == measured.get("sim:1", 0) == 0
    assert_same(values(patcher), before)


def test_partial_unload_and_free_memory(accelerators, host):
    gc.collect()  # models of other tests may share the ring
    patcher = placed("sim:0,60kb;cpu,*", "sim:0", prefetch="40kb")
    clone = patched(patcher, (0.5, adapters(1, 0, 1, 2)))
    output(host, clone)
    before, size = device_bytes(patcher)["sim:0"], patcher.loaded_size()
    freed = clone.partially_unload(torch.device("cpu"), 17 * KB)
    assert freed >= 17 * KB
    assert size - clone.loaded_size() == freed
    with torch.inference_mode():
        found = clone.model(X.to("sim:0")).cpu()
    assert torch.equal(found, expected((0.5, adapters(1, 0, 1, 2))))
    host.free[torch.device("sim:0")] = 0
    host.free_memory(1 << 40, torch.device("sim:0"))
    assert patcher.loaded_size() == 0
    assert torch.equal(output(host, patcher), expected())
    assert device_bytes(patcher)["sim:0"] == before
