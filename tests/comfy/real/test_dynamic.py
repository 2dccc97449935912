# SPDX-License-Identifier: Apache-2.0
"""Beside models that ComfyUI's dynamic VRAM pages in and out, on two small simulated devices."""

import pytest

from tests.comfy.real import graphs as g
from tests.comfy.real.test_host import A, B, run, stock_flux
from tests.comfy.real.test_simulated import MIB, loader

pytestmark = pytest.mark.tiny_flux
SPEC = "sim:0,30mb;sim:1,4mb;cpu,*"


def kind(host):
    return "DynamicPatcher" if host.way == "dynamic only" else "DistorchPatcher"


def test_the_stock_loader_is_dynamic_and_ours_is_as_the_host_allows(dynamic):
    assert run(dynamic, g.flux(stock_flux())).model["class"] == "ModelPatcherDynamic"
    assert run(dynamic, g.flux(loader(SPEC))).model["class"] == kind(dynamic)


def both(first, second, *loras, seed):
    """One workflow with two models, the second of which goes on from what the first made."""
    graph = g.flux(first, *loras, seed=seed)
    more = g.flux(second, *loras, seed=seed + 1)
    again = {
        f"{name}2": g.node(
            value["class_type"],
            **{
                key: [f"{link[0]}2", link[1]] if isinstance(link, list) else link
                for key, link in value["inputs"].items()
            },
        )
        for name, value in more.items()
        if name not in ("hash", "latent")
    }
    graph |= again
    graph["sample2"]["inputs"]["latent_image"] = ["sample", 0]
    graph["hash"]["inputs"]["value"] = ["sample2", 0]
    return graph


@pytest.mark.parametrize("loras", [(), (A,), (A, B)], ids=len)
def test_models_of_both_kinds_in_one_workflow(dynamic, loras):
    for seed, (first, second) in enumerate(
        ((stock_flux(), loader(SPEC)), (loader(SPEC), stock_flux()), (loader(SPEC), loader(SPEC)))
    ):
        stock = run(dynamic, both(stock_flux(), stock_flux(), *loras, seed=seed))
        ours = run(dynamic, both(first, second, *loras, seed=seed))
        assert ours.digest == stock.digest


def test_in_turn_under_pressure(dynamic):
    """Each of them fills more than half of the device."""
    wanted = [run(dynamic, g.flux(stock_flux(), seed=seed)).digest for seed in range(3)]
    spec = "sim:0,38mb;cpu,*"
    for seed, digest in enumerate(wanted):
        for made in (loader(spec), stock_flux(), loader("sim:0,39mb;sim:1,*")):
            assert run(dynamic, g.flux(made, seed=seed)).digest == digest


def test_what_the_host_is_told(dynamic):
    dynamic.free(cache=True)
    told = run(dynamic, g.flux(loader(SPEC), A)).model
    assert told["loaded_size"] == told["model_size"] > told["measured"]["sim:0"] + MIB  # a ring
    assert abs(told["used"][0] - told["loaded_size"]) < MIB
    assert abs(told["used"][1] - told["measured"]["sim:1"]) < MIB


def test_free_memory_gives_everything_back(dynamic):
    run(dynamic, both(stock_flux(), loader(SPEC), A, seed=4))
    dynamic.free(cache=True)
    graph = {"look": g.node("TestConditioning", seed=1, tokens=1, width=1, pooled=1)}
    graph["figures"] = g.node("TestUsed", after=["look", 0])
    assert dynamic.run(graph)["figures"]["used"] == [0, 0]


def test_the_host_gives_up_pinned_memory_for_weights_in_ram(dynamic):
    dynamic.free(cache=True)
    stock = run(dynamic, g.flux(stock_flux(), seed=7))
    if not stock.model["pinned"]:
        pytest.skip("this ComfyUI pins nothing on a device without streams")
    assert stock.model["pinned"] > 19 * MIB
    graph = both(stock_flux(), loader("sim:0,4mb;cpu,*"), seed=7)  # together more than it allows
    assert run(dynamic, graph).figures["figures2"]["pinned"] == 0


def test_a_checkpoint_whose_three_models_are_placed(large):
    graph = g.checkpoint(g.node("CheckpointLoaderSimple", ckpt_name="sd15.safetensors"), lora=0.7)
    stock = run(large, graph)
    placed = g.old_inputs(
        "CheckpointLoaderSimpleDisTorch2MultiGPU", compute_device="sim:0", donor_device="cpu",
        ckpt_name="sd15.safetensors", expert_mode_allocations="sim:0,8mb;cpu,*",
    )  # fmt: skip
    ours = run(large, g.checkpoint(placed, lora=0.7))
    assert ours.digest == stock.digest
    assert ours.model["class"] == kind(large)
    for found in ours.figures.values():
        assert found["measured"]["sim:0"] <= 8 * MIB


def test_distribute_model(dynamic):
    stock = run(dynamic, g.flux(stock_flux(), A, seed=5))
    graph = g.flux(stock_flux(), A, seed=5)
    graph["placed"] = g.node("DistributeModel", model=["lora0", 0], spec="sim:0,10mb;cpu,*")
    graph["sample"]["inputs"]["model"] = graph["figures"]["inputs"]["model"] = ["placed", 0]
    ours = run(dynamic, graph)
    assert ours.digest == stock.digest
    assert ours.model["class"] == kind(dynamic)
    assert ours.model["measured"]["sim:0"] <= 10 * MIB


@pytest.fixture(scope="module")
def hooked_digest(static_host):
    return run(static_host, g.hooked(stock_flux(), A, B, seed=5)).digest


def test_hooked_loras(dynamic, hooked_digest):
    """Beside dynamic VRAM the stock loader fails at this, with weights forced to float32."""
    ours = run(dynamic, g.hooked(loader("sim:0,10mb;cpu,*"), A, B, seed=5))
    assert ours.digest == hooked_digest
    assert ours.model["measured"]["sim:0"] <= 10 * MIB


def test_the_report_says_how_the_host_takes_it(dynamic):
    graph = g.flux(loader(SPEC))
    graph["report"] = g.node("DistributionReport", model=["load", 0], after=["sample", 0])
    said = dynamic.run(graph)["report"]["text"][0]
    assert ("no static path" in said) == (dynamic.way == "dynamic only")
    assert "dynamic VRAM" in said


def test_a_control_net_on_another_device(large):
    """ComfyUI's own computes on the device of the model only."""
    inputs = {"control_net_name": "cn.safetensors"}
    load = g.node("CheckpointLoaderSimple", ckpt_name="sd15.safetensors")
    stock = run(large, g.checkpoint(load, control=g.node("ControlNetLoader", **inputs)))
    on_cpu = set()  # not the bits of the simulated device, but always the same
    for device, donor in (("sim:1", "cpu"), ("cpu", "disk")):
        plain = g.node("ControlNetLoaderMultiGPU", **inputs, device=device)
        placed = g.old_inputs(
            "ControlNetLoaderDisTorch2MultiGPU", **inputs, compute_device=device,
            expert_mode_allocations=f"{device},8mb;{donor},*",
        )  # fmt: skip
        for control in (plain, placed):
            found = run(large, g.checkpoint(load, control=control))
            assert found.figures["net_figures"]["device"] == device
            if device == "cpu":
                on_cpu.add(found.digest)
            else:
                assert found.digest == stock.digest
    assert len(on_cpu) == 1


@pytest.mark.parametrize("kind", ["CLIP", "VAE"])
def test_distribute_clip_and_vae(large, kind):
    load = g.node("CheckpointLoaderSimple", ckpt_name="sd15.safetensors")
    stock = run(large, g.checkpoint(load))
    graph = g.checkpoint(load)
    name = kind.lower()
    output = ["load", ("MODEL", "CLIP", "VAE").index(kind)]
    for node in graph.values():
        node["inputs"].update({k: ["placed", 0] for k, v in node["inputs"].items() if v == output})
    graph["placed"] = g.node(f"Distribute{kind}", **{name: output}, spec="sim:0,1mb;cpu,*")
    ours = run(large, graph)
    assert ours.digest == stock.digest
    figures = ours.figures[f"{name}_figures"]
    assert figures["measured"]["cpu"] > figures["measured"]["sim:0"] > 0


@pytest.mark.parametrize("part", [0, 1, 2], ids=["MODEL", "CLIP", "VAE"])
def test_parts_of_a_checkpoint_on_the_cpu(large, part):
    names = "unet_device", "clip_device", "vae_device"
    devices = {name: "cpu" if place == part else "sim:0" for place, name in enumerate(names)}
    load = g.node("CheckpointLoaderAdvancedMultiGPU", ckpt_name="sd15.safetensors", **devices)
    stock = g.node("CheckpointLoaderSimple", ckpt_name="sd15.safetensors")
    ours = run(large, g.checkpoint(load))
    assert ours.digest == run(large, g.checkpoint(stock)).digest
    parts = [ours.figures[name]["device"] for name in ("figures", "clip_figures", "vae_figures")]
    assert parts == [*devices.values()]


def test_unclip_checkpoints(large):
    stock = run(large, g.checkpoint(g.node("unCLIPCheckpointLoader", ckpt_name="sd15.safetensors")))
    placed = g.old_inputs(
        "unCLIPCheckpointLoaderDisTorch2MultiGPU", compute_device="sim:0", donor_device="cpu",
        ckpt_name="sd15.safetensors", expert_mode_allocations="sim:0,8mb;cpu,*",
    )  # fmt: skip
    assert run(large, g.checkpoint(placed)).digest == stock.digest
