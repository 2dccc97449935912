# SPDX-License-Identifier: Apache-2.0
"""The patcher keeps the host's contract: sizes, clones, patches, partial and whole unloading."""

import gc
import types

import pytest
import torch

import distorch
from distorch.errors import PlacementError
from distorch.runtime.distribution import distribution_of
from tests.processes import donor_files

X = torch.linspace(-1, 1, 128).reshape(2, 64)
UP = "diffusion_model.{}.up.weight".format
KB = 1 << 10


def adapters(seed, *blocks):
    from comfy.lora import Adapter

    generator = torch.Generator().manual_seed(seed)
    return {
        UP(block): Adapter(
            torch.randn(256, 4, generator=generator), torch.randn(4, 64, generator=generator)
        )
        for block in blocks
    }


def patched(patcher, *patches):
    clone = patcher.clone()
    for strength, adapter in patches:
        clone.add_patches(adapter, strength)
    return clone


def placed(spec="cpu,100kb;disk,*", compute="cpu", **options):
    import comfy.sd

    from distorch.comfy import outputs
    from distorch.comfy.placement import Placement

    return outputs.distributed(comfy.sd.patcher(), Placement(spec, compute, **options))


def output(host, patcher):
    host.load_models_gpu([patcher])
    with torch.inference_mode():
        return patcher.model(X.to(patcher.load_device)).cpu()


def expected(*patches):
    """What the stand-in's model gives with these patches merged in float32."""
    import comfy.lora
    import comfy.sd

    model = comfy.sd.patcher().model
    with torch.inference_mode():
        for strength, adapter in patches:
            for key, value in adapter.items():
                weight = model.get_parameter(key)
                weight.copy_(comfy.lora.calculate_weight([(strength, value)], weight.clone(), key))
        return model(X)


@pytest.fixture
def merges(monkeypatch):
    """Names of the weights that were merged, in order."""
    from distorch.comfy import weights

    seen, merged = [], weights.merged

    def counting(model, key, *rest):
        seen.append(key)
        return merged(model, key, *rest)

    monkeypatch.setattr(weights, "merged", counting)
    return seen


def test_same_bits_and_placed_as_asked(host):
    patcher = placed()
    assert torch.equal(output(host, patcher), expected())
    report = distorch.report(patcher.model)
    assert report.ok
    assert 32 * KB < report.bytes["cpu"] <= 100 * KB
    ring = distribution_of(patcher.model).ring_bytes
    assert patcher.loaded_size() == report.bytes["cpu"] + ring
    assert patcher.model_size() == patcher.loaded_size()
    assert not patcher.is_dynamic()


def test_sizes_are_known_before_loading(host):
    patcher = placed()
    planned = patcher.model_size()
    assert patcher.loaded_size() == 0
    host.load_models_gpu([patcher])
    assert patcher.loaded_size() == planned


def test_clones_share_weights_and_the_placement(host):
    patcher = placed()
    clone = patcher.clone()
    assert type(clone) is type(patcher)
    assert clone.placement == patcher.placement
    assert clone.is_clone(patcher)
    first = output(host, patcher)
    with_patch = patched(patcher, (0.5, adapters(1, 0)))
    assert torch.equal(output(host, with_patch), expected((0.5, adapters(1, 0))))
    assert torch.equal(output(host, patcher), first)


def test_patches_are_redone_only_where_they_changed(host, merges):
    patcher, a, b = placed(), adapters(1, 0, 1), adapters(2, 1)
    one = patched(patcher, (0.5, a), (1.0, b))
    assert torch.equal(output(host, one), expected((0.5, a), (1.0, b)))
    assert merges == [UP(0), UP(1)]
    merges.clear()
    assert torch.equal(output(host, one.clone()), expected((0.5, a), (1.0, b)))
    assert merges == []
    other = patched(patcher, (0.5, a), (0.25, b))  # block 0 has what it had
    assert torch.equal(output(host, other), expected((0.5, a), (0.25, b)))
    assert merges == [UP(1)]
    merges.clear()
    assert torch.equal(output(host, patched(patcher, (0.5, a))), expected((0.5, a)))
    assert merges == [UP(1)]
    assert set(patcher.backup) == {UP(0), UP(1)}
    merges.clear()
    assert torch.equal(output(host, patcher), expected())
    assert (merges, patcher.backup) == ([], {})


def test_an_adapter_read_again_is_the_same(host, merges):
    from comfy.lora import Adapter

    patcher, a = placed(), adapters(1, 0)
    output(host, patched(patcher, (0.5, a)))
    again = {key: Adapter(*value.weights) for key, value in a.items()}
    output(host, patched(patcher, (0.5, again)))
    assert len(merges) == 1


def test_originals_are_where_the_host_looks_for_them(host):
    patcher = placed()
    before = patcher.model.state_dict()[UP(0)].clone()
    output(host, patched(patcher, (0.5, adapters(1, 0))))
    kept = patcher.backup[UP(0)].weight
    assert torch.equal(distorch.materialize(kept) if distorch.is_sharded(kept) else kept, before)


def test_detaching_takes_patches_off_and_keeps_donors(host):
    patcher = placed()
    clone = patched(patcher, (0.5, adapters(1, 0)))
    output(host, clone)
    host.free_memory(1 << 50, torch.device("cpu"))
    assert patcher.backup == {}
    assert patcher.loaded_size() == 0
    assert host.current_loaded_models == []
    assert distorch.report(patcher.model).bytes["disk"] > 0
    assert torch.equal(output(host, clone), expected((0.5, adapters(1, 0))))


def test_a_model_that_is_gone_leaves_nothing(host):
    gc.collect()  # other tests' models
    files = donor_files()
    patcher = placed("cpu,0b;disk,*")
    output(host, patcher)
    assert donor_files() > files
    host.current_loaded_models.clear()
    del patcher
    gc.collect()
    assert donor_files() == files


def test_another_placement_of_the_same_model(host):
    from distorch.comfy import outputs
    from distorch.comfy.placement import Placement

    patcher = placed()
    other = outputs.own_copy(patcher, Placement("cpu,0b;disk,*", "cpu"))
    assert other.is_clone(patcher)
    assert torch.equal(output(host, other), expected())
    few = distorch.report(other.model).bytes["cpu"]
    assert torch.equal(output(host, patcher), expected())
    assert distorch.report(patcher.model).bytes["cpu"] > few


def test_distributing_a_foreign_model_leaves_it_alone(host):
    import comfy.sd

    from distorch.comfy import outputs
    from distorch.comfy.placement import Placement

    theirs = comfy.sd.patcher()
    before = {name: t.clone() for name, t in theirs.model.state_dict().items()}
    patched_theirs = patched(theirs, (0.5, adapters(1, 0)))
    ours = outputs.own_copy(patched_theirs, Placement("cpu,0b;disk,*", "cpu"))
    assert ours.model is not theirs.model
    assert torch.equal(output(host, ours), expected((0.5, adapters(1, 0))))
    assert all(torch.equal(t, before[name]) for name, t in theirs.model.state_dict().items())
    assert type(theirs).__name__ == "ModelPatcher"


def test_patchers_of_other_packs_are_refused():
    import comfy.model_patcher
    import comfy.sd

    from distorch.comfy.outputs import as_placed
    from distorch.comfy.placement import Placement

    class Foreign(comfy.model_patcher.ModelPatcher):
        pass

    cpu = torch.device("cpu")
    with pytest.raises(PlacementError, match="moves weights in its own way"):
        as_placed(Foreign(comfy.sd.Model(), cpu, cpu), Placement("cpu,*", "cpu"))


def test_object_patches_come_and_go(host):
    patcher = placed()
    clone = patcher.clone()
    clone.add_object_patch("sigmas", torch.full((8,), 2.0))
    assert torch.equal(output(host, clone), 2 * expected())
    assert torch.equal(output(host, patcher), expected())


def test_weight_wrappers(host):
    clone = placed().clone()
    clone.weight_wrapper_patches = {UP(0): [lambda weight: weight * 0]}
    changed = output(host, clone)
    assert not torch.equal(changed, expected())
    clone.weight_wrapper_patches = {}
    assert torch.equal(output(host, clone), expected())


def test_progress_is_reported(host):
    from comfy.utils import ProgressBar

    ProgressBar.told.clear()
    patcher = placed("cpu,0b;disk,*")
    output(host, patcher)
    moved = sum(value for value, _ in ProgressBar.told)
    assert moved == distorch.report(patcher.model).bytes["disk"]


def test_a_placement_that_does_not_fit_is_refused_at_once():
    with pytest.raises(PlacementError, match="9000gb"):
        placed("cpu,9000gb;disk,*")


# --- on two simulated accelerators ---

SPEC = "sim:0,200kb;sim:1,70kb;cpu,*"


def device_bytes(patcher):
    return distorch.report(patcher.model).bytes


def test_donors_on_devices(accelerators, host):
    patcher = placed(SPEC, "sim:0")
    a = adapters(1, 0, 1, 2)
    for patches in ((), ((0.5, a),), ()):
        assert torch.equal(output(host, patched(patcher, *patches)), expected(*patches))
        measured = device_bytes(patcher)
        assert 150 * KB < measured["sim:0"] <= 200 * KB
        assert 0 < measured["sim:1"] <= 70 * KB
        assert distorch.report(patcher.model).ok
    assert patcher.model.device == torch.device("sim:0")


@pytest.mark.parametrize("wanted", [64 * KB, 200 * KB])
def test_partial_unload_frees_what_it_says(accelerators, host, wanted):
    patcher = placed(SPEC, "sim:0", prefetch="130kb")
    clone = patched(patcher, (0.5, adapters(1, 0, 1, 2)))
    output(host, clone)
    before, size = device_bytes(patcher)["sim:0"], patcher.loaded_size()
    used = torch.sim.memory_allocated(0)
    freed = clone.partially_unload(torch.device("cpu"), wanted)
    assert freed >= wanted
    assert size - clone.loaded_size() == freed
    assert used - torch.sim.memory_allocated(0) == pytest.approx(freed, abs=16 * KB)  # granules
    assert (device_bytes(patcher)["sim:0"] < before) == (wanted > 130_000)  # the ring goes first
    with torch.inference_mode():
        found = clone.model(X.to("sim:0")).cpu()
    assert torch.equal(found, expected((0.5, adapters(1, 0, 1, 2))))
    output(host, clone)
    assert device_bytes(patcher)["sim:0"] == before  # as asked again


def test_a_ring_that_two_models_share_is_freed_with_the_last(accelerators, host):
    first, second = (placed(SPEC, "sim:0", prefetch="130kb") for _ in range(2))
    output(host, first)
    output(host, second)
    used, resident = torch.sim.memory_allocated(0), device_bytes(first)["sim:0"]
    freed = first.partially_unload(torch.device("cpu"), 64 * KB)
    assert freed >= 64 * KB
    assert device_bytes(first)["sim:0"] == resident - freed  # the ring is the second one's, too
    assert used - torch.sim.memory_allocated(0) == pytest.approx(freed, abs=16 * KB)
    freed = second.partially_unload(torch.device("cpu"), 64 * KB)
    assert freed >= 130_000


def test_the_host_takes_what_it_needs(accelerators, host):
    patcher = placed(SPEC, "sim:0", prefetch="130kb")
    output(host, patcher)
    device = torch.device("sim:0")
    host.free[device] = 0
    host.free_memory(64 * KB, device)
    assert len(host.current_loaded_models) == 1
    assert 0 < patcher.loaded_size() < patcher.model_size()
    host.free_memory(1 << 40, device)
    assert host.current_loaded_models == []
    assert patcher.loaded_size() == 0
    measured = device_bytes(patcher)
    assert measured.get("sim:0", 0) == measured.get("sim:1", 0) == 0
    assert distribution_of(patcher.model).ring_bytes == 0
    assert torch.equal(output(host, patcher), expected())
    assert distorch.report(patcher.model).ok


def test_a_clone_on_a_donor_is_refused(accelerators):
    clone = placed(SPEC, "sim:0").clone()
    clone.load_device = torch.device("sim:1")
    with pytest.raises(PlacementError, match="donor"):
        clone.model_size()


def test_out_of_memory_names_what_to_change(accelerators):
    from comfy.patcher_extension import WrappersMP

    patcher = placed(SPEC, "sim:0")
    (wrapper,) = patcher.wrappers[WrappersMP.SAMPLER_SAMPLE]["distorch"]

    def executor(_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    with pytest.raises(PlacementError) as caught:
        wrapper(executor, types.SimpleNamespace(model_patcher=patcher))
    assert SPEC in str(caught.value)
    assert "smaller share for sim:0" in str(caught.value)


def test_other_models_make_room_on_donors(host, accelerators):
    from distorch.testing import sim

    second = torch.device("sim:1")
    sim.configure(devices=2, memory=600_000, mode="eager")
    other = placed("sim:1,*", "sim:1")
    output(host, other)
    whole = other.loaded_size()
    spec = "sim:0,100kb;sim:1,*"
    made = placed(spec, "sim:0")  # more than is free, less than can be
    host.free[second] = 0
    assert torch.equal(output(host, made), expected())
    assert other.loaded_size() < whole / 2
    again = placed(spec, "sim:0")  # and for models of ours that keep weights there
    assert torch.equal(output(host, again), expected())
    assert device_bytes(made).get("sim:1", 0) == 0
    with pytest.raises(PlacementError, match="on sim:1, which has"):
        sim.configure(devices=2, memory=200_000, mode="eager")
        placed(spec, "sim:0")


def test_what_is_loaded_together_stays_on_a_donor(host, accelerators):
    """A ControlNet, for instance, on the device that keeps the model's weights."""
    second = torch.device("sim:1")
    control = placed("sim:1,*", "sim:1")
    made = placed("sim:0,100kb;sim:1,*", "sim:0")
    host.free[second] = 0
    host.load_models_gpu([made, control])  # the last is loaded first
    assert {loaded.model for loaded in host.current_loaded_models} == {made, control}
    assert control.loaded_size() > 300 * KB
    assert device_bytes(made)["sim:1"] > 200 * KB


def test_patches_on_a_donor_that_is_nearly_full(host, accelerators):
    from distorch.testing import sim

    made = placed("sim:0,100kb;sim:1,*", "sim:0", prefetch="130kb")
    loras = (0.5, adapters(1, 0, 1, 2))
    output(host, made)
    with sim.room(40 * KB, "sim:1"):  # less than a weight
        assert torch.equal(output(host, patched(made, loras)), expected(loras))
        assert torch.equal(output(host, made), expected())


def test_a_model_that_the_loader_had_loaded_is_off_the_hosts_list(host):
    import comfy.sd

    from distorch.comfy import outputs
    from distorch.comfy.placement import Placement

    clip = comfy.sd.CLIP()
    host.load_models_gpu([clip.patcher])
    found = outputs.distributed(clip, Placement("cpu,100kb;disk,*", "cpu"))
    assert host.current_loaded_models == []
    assert found.patcher.loaded_size() == 0


@pytest.mark.parametrize(
    ("message", "compute", "full"),
    [
        ("sim: out of memory on sim:1: tried to allocate 5 bytes", "sim:0", "sim:1"),
        ("CUDA out of memory. Tried to allocate 2 GiB. GPU 1 has a total", "cuda:0", "cuda:1"),
        ("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has a total", "cuda:0", "cuda:0"),
        ("Allocation on device 1 would exceed allowed memory. (out of memory)", "cuda:0", "cuda:1"),
        ("out of memory", "cuda:0", "cuda:0"),
    ],
)
def test_the_advice_names_the_device_that_is_full(message, compute, full):
    from distorch.comfy.patcher import advice
    from distorch.comfy.placement import Placement

    error = advice(torch.OutOfMemoryError(message), Placement(f"{compute},*", compute))
    assert str(error).startswith(f"{full} ran out of memory")
    assert f"a smaller share for {full}" in str(error)
    assert ("smaller image" in str(error)) == (full == compute)


def test_a_module_that_a_node_adds_to_a_placed_model(host, accelerators):
    """As PuLID for FLUX adds its attention, on the device that computes."""
    patcher = placed("sim:0,100kb;cpu,*", "sim:0")
    before = output(host, patcher)
    added = torch.nn.Linear(64, 64, device="sim:0")
    wanted = added.weight.detach().cpu().clone()
    patcher.model.diffusion_model[0].pulid_ca = added
    assert torch.equal(output(host, patcher), before)
    patcher.partially_unload(torch.device("cpu"), 50 * KB)
    assert torch.equal(output(host, patcher), before)
    for _ in range(2):
        host.free_memory(1 << 50, torch.device("sim:0"))
        assert torch.equal(output(host, patcher), before)
        assert str(added.weight.device) == "sim:0"  # it computes there
        assert torch.equal(added(X.to("sim:0")).cpu(), X @ wanted.T + added.bias.detach().cpu())
    clone = patcher.clone()
    assert torch.equal(output(host, clone), before)
