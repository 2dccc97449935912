# SPDX-License-Identifier: Apache-2.0
"""Old and new nodes in a real ComfyUI on the CPU: same bits as the host's loaders, as placed."""

import json
import urllib.request
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.comfy.real import graphs as g
from tests.comfy.real.client import GraphError

WORKFLOWS = Path(__file__).parents[3] / "comfyui-distorch" / "example_workflows"
SPEC = "cpu,5mb;disk,*"
RATIO = "cpu,40%;disk,60%"
A, B = ("flux_a.safetensors", 0.8), ("flux_b.safetensors", -0.5)
CHECKPOINT = {"ckpt_name": "sd15.safetensors"}


def run(host, graph):
    result = g.Result.of(host.run(graph))
    result.assert_as_planned()
    return result


def stock_flux():
    return g.node("UNETLoader", unet_name="flux.safetensors", weight_dtype="default")


def our_flux(spec=SPEC, **inputs):
    return g.old_inputs(
        "UNETLoaderDisTorch2MultiGPU", unet_name="flux.safetensors", weight_dtype="default",
        expert_mode_allocations=spec, **inputs,
    )  # fmt: skip


def fp8(loader):
    return {**loader, "inputs": {**loader["inputs"], "weight_dtype": "fp8_e4m3fn"}}


def test_every_old_node_is_there(host):
    known = set(host.get("/object_info"))
    wanted = json.loads(Path(__file__).with_name("old_nodes.json").read_text())
    missing = [name for name in wanted["always"] if name not in known]
    for name, source in wanted["if the host has"].items():
        if source in known and name not in known:
            missing.append(name)
    assert missing == []
    assert not {name for name in known if name.startswith("WanVideo")}


def test_the_old_inputs_keep_their_names_and_order(host):
    known = host.get("/object_info")
    wanted = json.loads(Path(__file__).with_name("old_nodes.json").read_text())
    for name, ours in wanted["inputs"].items():
        if name in known:
            order = known[name]["input_order"]
            names = [*order.get("required", ()), *order.get("optional", ())]
            assert names[-len(ours) :] == ours, name


@pytest.mark.tiny_flux
@pytest.mark.parametrize("loras", [(), (A,), (A, B)], ids=["plain", "one LoRA", "two LoRAs"])
@pytest.mark.parametrize("spec", [SPEC, RATIO, ""], ids=["bytes", "ratio", "virtual VRAM"])
def test_unet(host, spec, loras):
    stock = run(host, g.flux(stock_flux(), *loras))
    for seed in (1, 1, 2):  # twice the same, and with another seed
        ours = run(host, g.flux(our_flux(spec), *loras, seed=seed))
        if seed == 1:
            assert ours.digest == stock.digest
    assert ours.digest == run(host, g.flux(stock_flux(), *loras, seed=2)).digest
    assert ours.model["fetches"] > 0
    assert ours.model["backups"] == (32 if loras else 0)
    measured = ours.model["measured"]
    if spec == SPEC:
        assert 4 << 20 < measured["cpu"] <= 5 << 20
    if spec == RATIO:
        assert measured["cpu"] == pytest.approx(0.4 * sum(measured.values()), rel=0.05)
    if not spec:
        assert measured["cpu"] < 1 << 20


@pytest.mark.tiny_flux
def test_fp8_weights(host):
    for loras in ((), (A,)):
        stock = run(host, g.flux(fp8(stock_flux()), *loras))
        ours = run(host, g.flux(fp8(our_flux("cpu,2mb;disk,*")), *loras))
        assert ours.digest == stock.digest
        assert ours.model["measured"]["cpu"] <= 2 << 20


@pytest.mark.tiny_flux
def test_a_changed_strength_patches_what_changed(host):
    for loras in ((A, B), (A, (B[0], 0.25)), ((A[0], 0.3), B), ()):
        stock = run(host, g.flux(stock_flux(), *loras))
        assert run(host, g.flux(our_flux(), *loras)).digest == stock.digest


@pytest.mark.tiny_flux
@pytest.mark.parametrize("cache", [False, True])
def test_after_free_memory(host, cache):
    stock = run(host, g.flux(stock_flux(), A, seed=3))
    run(host, g.flux(our_flux(), A, seed=1))
    host.free(cache=cache)
    again = run(host, g.flux(our_flux(), A, seed=3))
    assert again.digest == stock.digest
    assert again.model["backups"] == 32


def test_checkpoint_text_encoder_vae_and_control_net(host):
    control = g.node("ControlNetLoader", control_net_name="cn.safetensors")
    our_control = g.old_inputs(
        "ControlNetLoaderDisTorch2MultiGPU", control_net_name="cn.safetensors",
        expert_mode_allocations=RATIO,
    )  # fmt: skip
    for lora in (None, 0.7):
        stock = run(
            host,
            g.checkpoint(
                g.node("CheckpointLoaderSimple", **CHECKPOINT), lora=lora, control=control
            ),
        )
        for name in (
            "CheckpointLoaderSimpleDistorch2MultiGPU", "CheckpointLoaderSimpleDisTorch2MultiGPU",
        ):  # fmt: skip
            loader = g.old_inputs(name, **CHECKPOINT, expert_mode_allocations=RATIO)
            ours = run(host, g.checkpoint(loader, lora=lora, control=our_control))
            assert ours.digest == stock.digest
        for found in ours.figures.values():  # every output is placed, not the first alone
            measured = found["measured"]
            assert measured["disk"] == pytest.approx(0.6 * sum(measured.values()), rel=0.15)


def test_checkpoint_twice_changed_and_freed(host):
    stock = g.node("CheckpointLoaderSimple", **CHECKPOINT)
    ours = g.old_inputs(
        "CheckpointLoaderSimpleDisTorch2MultiGPU", **CHECKPOINT, expert_mode_allocations=RATIO
    )
    for lora, seed in ((0.7, 1), (0.7, 2), (0.25, 2), (None, 3)):
        expected = run(host, g.checkpoint(stock, lora=lora, seed=seed)).digest
        assert run(host, g.checkpoint(ours, lora=lora, seed=seed)).digest == expected
    for cache in (False, True):
        expected = run(host, g.checkpoint(stock, lora=0.7, seed=4 + cache)).digest
        run(host, g.checkpoint(ours, lora=0.7, seed=9))
        host.free(cache=cache)
        assert run(host, g.checkpoint(ours, lora=0.7, seed=4 + cache)).digest == expected


def test_separate_loaders(host):
    plain = {
        "vae": g.node("VAELoader", vae_name="vae.safetensors"),
        "clip": g.node("CLIPLoader", clip_name="clip_l.safetensors", type="stable_diffusion"),
    }
    ours = {
        "vae": g.old_inputs("VAELoaderDisTorch2MultiGPU", vae_name="vae.safetensors"),
        "clip": g.old_inputs(
            "CLIPLoaderDisTorch2MultiGPU", "device", clip_name="clip_l.safetensors",
            type="stable_diffusion", eject_models=False,
        ),
    }  # fmt: skip
    only_device = {
        "vae": g.node("VAELoaderMultiGPU", vae_name="vae.safetensors", device="cpu"),
        "clip": g.node(
            "CLIPLoaderMultiGPU", clip_name="clip_l.safetensors", type="stable_diffusion",
            device="cpu",
        ),
    }  # fmt: skip
    loader = g.node("CheckpointLoaderSimple", **CHECKPOINT)
    stock = run(host, g.checkpoint(loader, lora=0.5, **plain))
    placed = run(host, g.checkpoint(loader, lora=0.5, **ours))
    assert placed.digest == stock.digest
    assert placed.figures["vae_figures"]["measured"]["disk"] > 200 << 20
    assert placed.figures["clip_figures"]["measured"]["disk"] > 200 << 20
    assert run(host, g.checkpoint(loader, lora=0.5, **only_device)).digest == stock.digest


def test_advanced_checkpoint_loaders(host):
    stock = run(host, g.checkpoint(g.node("CheckpointLoaderSimple", **CHECKPOINT), lora=0.7))
    loader = g.node(
        "CheckpointLoaderAdvancedDisTorch2MultiGPU", **CHECKPOINT, unet_compute_device="cpu",
        unet_virtual_vram_gb=4.0, unet_donor_device="disk", clip_compute_device="cpu",
        clip_virtual_vram_gb=2.0, clip_donor_device="disk", vae_device="cpu",
        unet_expert_mode_allocations=RATIO, clip_expert_mode_allocations="",
        high_precision_loras=True, eject_models=True,
    )  # fmt: skip
    assert run(host, g.checkpoint(loader, lora=0.7)).digest == stock.digest
    loader = g.node(
        "CheckpointLoaderAdvancedMultiGPU", **CHECKPOINT, unet_device="cpu", clip_device="cpu",
        vae_device="cpu",
    )  # fmt: skip
    assert run(host, g.checkpoint(loader, lora=0.7)).digest == stock.digest


@pytest.mark.tiny_flux
def test_gguf(host):
    stock = g.node("UNETLoader", unet_name="flux-q.safetensors", weight_dtype="default")
    file = {"unet_name": "flux-q.gguf"}
    device = {"device": "cpu"}
    advanced = {"dequant_dtype": "float32", "patch_dtype": "default", "patch_on_device": False}
    loaders = {
        "UnetLoaderGGUF": g.node("UnetLoaderGGUF", **file),
        "plain": g.node("UnetLoaderGGUFMultiGPU", **file, **device),
        "legacy": g.node(
            "UnetLoaderGGUFDisTorchMultiGPU", **file, **device, virtual_vram_gb=4.0,
            use_other_vram=True, expert_mode_allocations="",
        ),
        "DisTorch2": g.old_inputs(
            "UnetLoaderGGUFDisTorch2MultiGPU", **file, expert_mode_allocations="cpu,3mb;disk,*"
        ),
        "advanced": g.old_inputs("UnetLoaderGGUFAdvancedDisTorch2MultiGPU", **file, **advanced),
    }  # fmt: skip
    for loras in ((), (A,), (A, B)):
        expected = run(host, g.flux(stock, *loras)).digest
        for name, loader in loaders.items():
            ours = run(host, g.flux(loader, *loras))
            assert ours.digest == expected, name
            if name == "DisTorch2":
                assert ours.model["measured"]["cpu"] <= 3 << 20
            if not loras:  # blocks stay blocks
                assert sum(ours.model["measured"].values()) < 9 << 20


def test_gguf_text_encoder(host):
    def encoded(loader):
        return run(host, g.encoded(loader, "waves on a shore"))

    kind = {"type": "stable_audio"}
    stock = encoded(g.node("CLIPLoader", clip_name="t5-q.safetensors", **kind))
    plain = encoded(g.node("CLIPLoaderGGUF", clip_name="t5-q.gguf", **kind))
    ours = encoded(
        g.old_inputs("CLIPLoaderGGUFDisTorch2MultiGPU", "device", clip_name="t5-q.gguf", **kind)
    )
    assert plain.digest == ours.digest == stock.digest
    assert sum(ours.model["measured"].values()) < 90 << 20  # 4 to 8 bits a weight, not 32
    assert ours.model["measured"]["disk"] > 60 << 20


@pytest.mark.tiny_flux
def test_distribute_model_leaves_the_other_branch_alone(host):
    before = run(host, g.flux(stock_flux(), A))
    graph = g.flux(stock_flux(), A)
    graph["placed"] = g.node("DistributeModel", model=["lora0", 0], spec=SPEC, order="sequential")
    graph["sample"]["inputs"]["model"] = graph["figures"]["inputs"]["model"] = ["placed", 0]
    ours = run(host, graph)
    assert ours.digest == before.digest
    assert ours.model["measured"]["cpu"] <= 5 << 20
    graph = g.flux(stock_flux(), seed=4)
    graph["lora0"] = g.node(
        "LoraLoaderModelOnly", model=["load", 0], lora_name=A[0], strength_model=0.8
    )
    after = run(host, g.flux(stock_flux(), A))
    assert after.digest == before.digest
    assert after.model == before.model


def test_stock_workflows_are_as_before(host):
    loader = g.node("CheckpointLoaderSimple", **CHECKPOINT)
    host.free(cache=True)
    before = run(host, g.checkpoint(loader, lora=0.7))
    host.free(cache=True)
    ours = g.old_inputs("CheckpointLoaderSimpleDisTorch2MultiGPU", **CHECKPOINT)
    run(host, g.checkpoint(ours, lora=0.7))
    host.free(cache=True)
    after = run(host, g.checkpoint(loader, lora=0.7))
    assert after.digest == before.digest
    assert after.figures == before.figures


@pytest.mark.tiny_flux
def test_two_models_keep_their_donors(host):
    graph = g.flux(our_flux(eject_models=False), A)
    second = our_flux("cpu,2mb;disk,*", eject_models=False)
    second["inputs"]["unet_name"] = "flux2.safetensors"
    graph["load2"] = second
    graph["figures2"] = g.node("TestFigures", model=["load2", 0], after=["sample", 0])
    graph["sample2"] = json.loads(json.dumps(graph["sample"]))
    graph["sample2"]["inputs"] |= {
        "model": ["load2", 0],
        "latent_image": ["sample", 0],
        "denoise": 0.6,
    }
    graph["figures2"]["inputs"]["after"] = ["sample2", 0]
    graph["figures"]["inputs"]["after"] = ["sample2", 0]
    graph["hash"]["inputs"]["value"] = ["sample2", 0]
    ours = run(host, graph)
    assert ours.figures["figures"]["measured"]["cpu"] <= 5 << 20
    assert ours.figures["figures2"]["measured"]["cpu"] <= 2 << 20
    for name, file in (("load", "flux.safetensors"), ("load2", "flux2.safetensors")):
        graph[name] = g.node("UNETLoader", unet_name=file, weight_dtype="default")
    assert ours.digest == run(host, graph).digest


def message(host, graph):
    with pytest.raises(GraphError) as caught:
        host.run(graph)
    return str(caught.value)


@pytest.mark.tiny_flux
@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("cuda:7,2gb;cpu,*", "there is no 'cuda:7' here"),
        ("cpu,2qb", "unknown unit 'qb'"),
        ("cpu,1gb;cpu,2gb", "already given"),
    ],
)
def test_a_wrong_placement_is_refused_on_the_node(host, spec, says):
    if says != "already given":  # in an old string, what was said last counts
        found = message(host, g.flux(our_flux(spec)))
        assert "custom_validation_failed" in found
        assert says in found
    graph = g.flux(stock_flux())
    graph["placed"] = g.node("DistributeModel", model=["load", 0], spec=spec)
    graph["sample"]["inputs"]["model"] = ["placed", 0]
    assert says in message(host, graph)


@pytest.mark.tiny_flux
def test_a_placement_that_does_not_fit_fails_before_sampling(host):
    found = message(host, g.flux(our_flux("cpu,9000gb;disk,*")))
    assert "9000gb" in found
    assert '"node_id": "load"' in found


@pytest.mark.tiny_flux
def test_loras_hooked_into_a_part_of_the_sampling(host):
    for seed in (1, 2):
        assert (
            run(host, g.hooked(our_flux(), A, B, seed=seed)).digest
            == run(host, g.hooked(stock_flux(), A, B, seed=seed)).digest
        )
    assert run(host, g.flux(our_flux(), B)).digest == run(host, g.flux(stock_flux(), B)).digest


def saved(host, loader, name):
    """What the host's ModelSave writes of a model with a LoRA."""
    for old in (host.base / "output").glob(f"{name}*"):
        old.unlink()
    graph = g.flux(loader, A, seed=11)
    graph["save"] = g.node("ModelSave", model=["lora0", 0], filename_prefix=name)
    host.run(graph)
    (file,) = (host.base / "output").glob(f"{name}*")
    return load_file(file)


def assert_same_tensors(found, wanted):
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert found[key].dtype == tensor.dtype, key
        pair = (t.reshape(-1).view(torch.uint8) for t in (found[key], tensor))
        assert torch.equal(*pair), key


@pytest.mark.tiny_flux
def test_a_saved_model_is_the_stock_one(host):
    assert_same_tensors(
        saved(host, our_flux(), "saved-ours"), saved(host, stock_flux(), "saved-stock")
    )


def test_report(host):
    loader = g.old_inputs(
        "CheckpointLoaderSimpleDisTorch2MultiGPU", **CHECKPOINT, expert_mode_allocations=RATIO
    )
    graph = g.checkpoint(loader, seed=9)
    graph["report"] = g.node("DistributionReport", model=["load", 0], after=["sample", 0])
    graph["picture"] = g.node("TestHash", value=["report", 0])
    shown = host.run(graph)
    (found,) = shown["report"]["distorch"]
    assert shown["picture"]["good"] == [True]
    assert found["ok"]
    assert found["bytes"] == json.loads(shown["figures"]["figures"][0])["measured"]
    assert found["fetches"] > 0
    assert found["gb_per_second"]["disk->cpu"] > 0
    assert found["svg"].startswith("<svg ") and "GB/s" in found["svg"]
    assert "as planned" in shown["report"]["text"][0]


def widgets(description):
    """Inputs of a node that are widgets, in order."""
    kinds = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
    inputs = {
        **description["input"].get("required", {}),
        **description["input"].get("optional", {}),
    }
    return {
        name: kind for name, kind in inputs.items() if isinstance(kind[0], list) or kind[0] in kinds
    }


@pytest.mark.parametrize("file", sorted(WORKFLOWS.glob("*.json")), ids=lambda file: file.stem)
def test_example_workflows_fit_the_nodes(host, file):
    known = host.get("/object_info")
    ours = 0
    for node in json.loads(file.read_text())["nodes"]:
        assert node["type"] in known
        if not known[node["type"]]["python_module"].endswith("comfyui-distorch"):
            continue
        ours += 1
        values = node["widgets_values"]
        expected = widgets(known[node["type"]])
        assert len(values) == len(expected), node["type"]
        for value, (name, kind) in zip(values, expected.items(), strict=True):
            if kind[0] == "FLOAT":
                assert kind[1]["min"] <= value <= kind[1]["max"], name
            elif kind[0] == "BOOLEAN":
                assert isinstance(value, bool), name
            else:
                assert isinstance(value, str), name
    assert ours >= 2


def test_templates_and_help_pages_are_found(host):
    templates = host.get("/workflow_templates")
    if "comfyui-distorch" not in templates:
        pytest.skip("this ComfyUI does not look into folders that are links")
    assert sorted(templates["comfyui-distorch"]) == sorted(p.stem for p in WORKFLOWS.glob("*.json"))
    address = f"http://127.0.0.1:{host.port}/extensions/comfyui-distorch/docs/DistributeModel.md"
    with urllib.request.urlopen(address) as page:
        assert page.read().decode().startswith("# Distribute Model\n")


@pytest.mark.tiny_flux
def test_what_presets_leave_for_sampling_is_what_the_host_says(host):
    load = g.node("UNETLoader", unet_name="flux.safetensors", weight_dtype="default")
    shown = host.run({"load": load, "need": g.node("TestSamplingMemory", model=["load", 0])})
    found, said = shown["need"]["need"]
    assert found == pytest.approx(said, rel=0.01)
    assert found > 1 << 30
