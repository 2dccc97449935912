# SPDX-License-Identifier: Apache-2.0
"""Nodes made from the host's loaders and from other packs' classes."""

import gc
import json
import re
import sys
import types
from pathlib import Path

import pytest
import torch

import distorch
from distorch.comfy import host as border
from distorch.errors import PlacementError, SpecError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PACK = Path(__file__).parents[2] / "comfyui-distorch"


@pytest.fixture
def known(host):
    from distorch.comfy import NODE_CLASS_MAPPINGS

    return NODE_CLASS_MAPPINGS


def run(node, **inputs):
    made = node()
    return getattr(made, node.FUNCTION)(**inputs)


OLD = {"virtual_vram_gb": 4.0, "donor_device": "disk", "expert_mode_allocations": ""}


def test_loaders_that_the_host_lacks_have_no_node(known):
    assert "UNETLoaderDisTorch2MultiGPU" in known
    assert "VAELoaderMultiGPU" not in known
    assert not any(name.startswith("WanVideo") for name in known)


def test_our_inputs_come_after_the_hosts_in_the_old_order(known):
    inputs = known["UNETLoaderDisTorch2MultiGPU"].INPUT_TYPES()
    assert list(inputs["required"]) == ["unet_name", "weight_dtype"]
    assert list(inputs["optional"]) == [
        "compute_device", "virtual_vram_gb", "donor_device", "expert_mode_allocations",
        "eject_models",
    ]  # fmt: skip
    assert inputs["optional"]["eject_models"][1]["default"] is True
    assert inputs["optional"]["virtual_vram_gb"][1]["max"] == 128.0
    inputs = known["CLIPLoaderDisTorch2MultiGPU"].INPUT_TYPES()
    assert next(iter(inputs["optional"])) == "device"
    assert inputs["optional"]["eject_models"][1]["default"] is False


def test_every_output_of_a_checkpoint_is_placed(known, host):
    from distorch.comfy.patcher import is_ours

    for name in (
        "CheckpointLoaderSimpleDisTorch2MultiGPU", "CheckpointLoaderSimpleDistorch2MultiGPU",
    ):  # fmt: skip
        node = known[name]
        assert node.RETURN_TYPES == ("MODEL", "CLIP", "VAE")
        model, clip, vae = run(node, ckpt_name="a", compute_device="cpu", **OLD)
        assert is_ours(model)
        assert is_ours(clip.patcher)
        assert is_ours(vae.patcher)
        assert vae.first_stage_model is vae.patcher.model
        host.load_models_gpu([model, clip.patcher, vae.patcher])
        for patcher in (model, clip.patcher, vae.patcher):
            assert distorch.report(patcher.model).bytes["disk"] > 100 << 10


def test_control_nets_are_placed(known):
    (net,) = run(
        known["ControlNetLoaderDisTorch2MultiGPU"],
        control_net_name="a",
        compute_device="cpu",
        **OLD,
    )
    assert type(net.control_model_wrapped).__name__ == "DistorchPatcher"
    assert net.control_model is net.control_model_wrapped.model


@pytest.mark.parametrize("made", ["CLIP", "VAE"])
def test_distribute_clip_and_vae(known, host, made):
    import comfy.sd

    from distorch.comfy.patcher import is_ours

    given = getattr(comfy.sd, made)()
    before = given.patcher
    inputs = {made.lower(): given, "spec": "cpu,100kb;disk,*"}
    (found,) = run(known[f"Distribute{made}"], **inputs, order="sequential")
    assert is_ours(found.patcher)
    inner = found.cond_stage_model if made == "CLIP" else found.first_stage_model
    assert inner is found.patcher.model is not before.model
    assert given.patcher is before  # others may use it
    host.load_models_gpu([found.patcher])
    assert distorch.report(found.patcher.model).bytes["disk"] > 100 << 10
    with pytest.raises(SpecError, match="input 'order'"):
        run(known[f"Distribute{made}"], **inputs, order="x")


def test_the_host_is_told_when_a_text_encoder_goes_to_the_cpu(known, accelerators):
    for name, inputs in (("MultiGPU", {}), ("DisTorch2MultiGPU", OLD)):
        for device, told in (("cpu", "cpu"), ("sim:1", "default")):
            (clip,) = run(
                known[f"CLIPLoader{name}"], clip_name="a", type="sd", device=device, **inputs
            )
            assert clip.asked_for == told


def test_what_has_no_weights_cannot_be_placed(known, monkeypatch):
    with pytest.raises(PlacementError, match="this str has no weights that ComfyUI manages"):
        run(known["DistributeVAE"], vae="a", spec="cpu,*")
    loader = known["UNETLoaderDisTorch2MultiGPU"]
    monkeypatch.setattr(border, "call_node", lambda name, arguments: (object(),))
    with pytest.raises(PlacementError, match="whose weights ComfyUI does not manage"):
        run(loader, unet_name="a", weight_dtype="default", compute_device="cpu", **OLD)


def test_a_control_net_computes_where_it_is_loaded(known, accelerators, host):
    """The model that calls it may be on another device."""
    node = known["ControlNetLoaderMultiGPU"]
    (net,) = run(node, control_net_name="a", device="sim:1")
    host.load_models_gpu([net.control_model_wrapped])
    x = torch.linspace(-1, 1, 128).reshape(2, 64)
    devices = []

    def look(module, args, kwargs):
        devices.extend(str(part.device) for part in (*args, *kwargs.values()))

    net.control_model.register_forward_pre_hook(look, with_kwargs=True)
    with torch.inference_mode():
        found = net.control_model(x=x.to("sim:0"))
        again = net.control_model(x.to("sim:0"))
    assert devices == ["sim:1", "sim:1"]
    assert found.device == again.device == torch.device("sim:0")
    (plain,) = run(node, control_net_name="a", device="cpu")
    with torch.inference_mode():
        assert torch.equal(found.cpu(), plain.control_model(x))


def test_a_model_that_a_loader_has_loaded_moves_to_the_chosen_device(known, accelerators, host):
    """ComfyUI may load a text encoder at once. Its list of loaded models then says where."""
    import comfy.sd

    from distorch.comfy import outputs

    clip = comfy.sd.CLIP()
    clip.patcher.load_device = torch.device("sim:0")
    host.load_models_gpu([clip.patcher])
    found = outputs.on_device(clip, "cpu")
    assert host.current_loaded_models == []
    host.load_models_gpu([found.patcher])
    assert {str(weight.device) for weight in found.cond_stage_model.parameters()} == {"cpu"}


@pytest.mark.parametrize("kind", ["ModelPatcherDynamic", "OnlyDynamic"])
def test_a_dynamic_model_on_the_cpu_is_as_wide_as_it_says(known, host, kind, monkeypatch):
    import comfy.sd
    from comfy import model_patcher

    from distorch.comfy import outputs

    made = comfy.sd.dynamic_patcher(getattr(model_patcher, kind))
    monkeypatch.setattr(model_patcher.ModelPatcherDynamic, "cpu_is_static", True)
    made.load_device = torch.device("meta")
    found = outputs.on_device(made, "cpu")
    assert not found.is_dynamic()
    assert {weight.dtype for weight in found.model.parameters()} == {torch.float32}


def test_the_choice_of_a_device_says_what_it_is(known, accelerators):
    (_, device), *_ = known["UNETLoaderMultiGPU"].INPUT_TYPES()["optional"].values()
    assert "sim:0" in device["tooltip"]
    assert "1.0 GB" in device["tooltip"]


def test_nodes_of_the_new_interface(known):
    (clip,) = run(known["TripleCLIPLoaderDisTorch2MultiGPU"], clip_name1="a", device="cpu", **OLD)
    assert type(clip.patcher).__name__ == "DistorchPatcher"


def test_without_virtual_vram_nothing_is_distributed(known):
    inputs = {"unet_name": "a", "weight_dtype": "default", "compute_device": "cpu"}
    node = known["UNETLoaderDisTorch2MultiGPU"]
    (model,) = run(node, **inputs, virtual_vram_gb=0.0)
    assert type(model).__name__ == "ModelPatcher"
    (model,) = run(node, **inputs, virtual_vram_gb=4.0, donor_device="cpu")
    assert type(model).__name__ == "ModelPatcher"


def test_plain_nodes_choose_the_device(known, accelerators):
    node = known["UNETLoaderMultiGPU"]
    (model,) = run(node, unet_name="a", weight_dtype="default", device="sim:1")
    assert model.load_device == torch.device("sim:1")
    assert torch.sim.current_device() == 0


def test_placement_strings_are_checked_before_anything_runs(known):
    check = known["UNETLoaderDisTorch2MultiGPU"].VALIDATE_INPUTS
    assert check(expert_mode_allocations="") is True
    assert check(expert_mode_allocations="cpu,1gb;disk,*") is True
    assert "unknown unit 'qb'" in check(expert_mode_allocations="cpu,2qb")
    assert "no 'cuda:3'" in check(expert_mode_allocations="cuda:3,1gb;cpu,*")
    assert "given" in known["DistributeModel"].VALIDATE_INPUTS(spec="cpu,1gb;cpu,2gb")
    advanced = known["CheckpointLoaderAdvancedDisTorch2MultiGPU"].VALIDATE_INPUTS
    assert "unknown unit" in advanced(clip_expert_mode_allocations="cpu,2qb")


def test_eject_models(known, host):
    import comfy.sd

    node, inputs = (
        known["UNETLoaderDisTorch2MultiGPU"],
        {"unet_name": "a", "weight_dtype": "default"},
    )
    other = comfy.sd.patcher(5)
    host.load_models_gpu([other])
    run(node, **inputs, compute_device="cpu", eject_models=False, **OLD)
    assert len(host.current_loaded_models) == 1
    run(node, **inputs, compute_device="cpu", eject_models=True, **OLD)
    assert host.current_loaded_models == []


def test_the_report(known, host):
    (model,) = run(
        known["UNETLoaderDisTorch2MultiGPU"], unet_name="a", weight_dtype="default",
        compute_device="cpu", **OLD,
    )  # fmt: skip
    node = known["DistributionReport"]
    assert "not loaded yet" in run(node, model=model)["ui"]["text"][0]
    host.load_models_gpu([model])
    with torch.inference_mode():
        model.model(torch.ones(2, 64))
    shown = run(node, model=model)
    picture, text = shown["result"]
    assert picture.shape[0] == 1
    assert picture.shape[2:] == (960, 3)
    assert 0 < picture.mean() < 1
    (found,) = shown["ui"]["distorch"]
    assert found["bytes"] == distorch.report(model.model).bytes
    assert found["fetches"] == 6
    assert found["ok"]
    assert found["svg"].startswith("<svg ") and "cpu (compute)" in found["svg"]
    assert "disk->cpu" in text
    assert run(node, model=model)["ui"]["distorch"][0]["fetches"] == 0  # since the last report


# --- other packs ---


class Loader:
    """A node of another pack."""

    RETURN_TYPES, RETURN_NAMES, FUNCTION = ("THING",), ("thing",), "go"
    seen = []

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model_name": (["a"],), "load_device": (["main_device"],)}}

    def go(self, model_name, load_device):
        Loader.seen.append((load_device, sys.modules[__name__].device))
        if model_name == "bad":
            raise ValueError("no such model")
        return ("thing",)


device = torch.device("cpu")  # what packs remember


@pytest.fixture
def installed(monkeypatch, tmp_path, host):
    import folder_paths
    import nodes

    def install(folder, **classes):
        (tmp_path / folder).mkdir()
        monkeypatch.setitem(
            folder_paths.folder_names_and_paths, "custom_nodes", ([str(tmp_path)], set())
        )
        for name, node in classes.items():
            monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, name, node)
        from distorch.comfy import packs

        return dict(packs.nodes())

    return install


def test_nodes_for_an_installed_pack(installed, accelerators):
    made = installed("comfyui_wanvideowrapper", LoadWanVideoT5TextEncoder=Loader)
    node = made["LoadWanVideoT5TextEncoderMultiGPU"]
    assert node.RETURN_TYPES == ("THING", "MULTIGPUDEVICE")
    assert node.RETURN_NAMES == ("thing", "device")
    inputs = node.INPUT_TYPES()
    assert "load_device" not in inputs["required"]
    Loader.seen.clear()
    assert run(node, model_name="a", device="sim:1") == ("thing", "sim:1")
    assert Loader.seen == [("main_device", torch.device("sim:1"))]
    assert (device, torch.sim.current_device()) == (torch.device("cpu"), 0)


def test_devices_are_put_back_after_an_error(installed, accelerators):
    node = installed("ComfyUI-WanVideoWrapper", LoadWanVideoT5TextEncoder=Loader)[
        "LoadWanVideoT5TextEncoderMultiGPU"
    ]
    with pytest.raises(ValueError, match="no such model"):
        run(node, model_name="bad", device="sim:1")
    assert (device, torch.sim.current_device()) == (torch.device("cpu"), 0)


def test_packs_that_load_later(installed):
    node = installed("ComfyUI-WanVideoWrapper")["WanVideoModelLoaderMultiGPU"]
    assert node.RETURN_TYPES == ("MULTIGPUDEVICE",)
    assert border.node_class("WanVideoModelLoader") is None


def test_devices_of_a_whole_pack(installed, accelerators, monkeypatch):
    """A node's module may ask another of its pack for the device."""
    other = types.ModuleType(f"{__name__.partition('.')[0]}.utils_of_the_pack")
    other.device = other.offload_device = torch.device("cpu")
    monkeypatch.setitem(sys.modules, other.__name__, other)

    class Asking(Loader):
        def go(self, **_):
            return (other.device, other.offload_device)

    made = installed("ComfyUI-Florence2", Florence2ModelLoader=Asking)
    node = made["Florence2ModelLoaderMultiGPU"]
    found = run(node, model_name="a", load_device="", device="sim:1", offload_device="sim:0")
    assert found == (torch.device("sim:1"), torch.device("sim:0"))
    assert other.device == other.offload_device == torch.device("cpu")


class Applying:
    """As PuLID for FLUX: what it has put into a model goes away with the node."""

    RETURN_TYPES, FUNCTION = ("MODEL",), "apply"
    data = None

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",)}, "hidden": {"unique_id": "UNIQUE_ID"}}

    def apply(self, model, unique_id):
        self.data = model.setdefault("data", {})
        self.data[unique_id] = str(torch.device("sim", torch.sim.current_device()))
        return (model,)

    def __del__(self):
        if self.data is not None:
            del self.data["7"]


@pytest.mark.parametrize("pack", ["ComfyUI-PuLID-Flux", "ComfyUI_PuLID_Flux_ll"])
def test_their_node_lives_as_long_as_ours(installed, accelerators, pack):
    node = installed(pack, ApplyPulidFlux=Applying)["ApplyPulidFluxMultiGPU"]()
    assert node.INPUT_TYPES()["hidden"] == {"unique_id": "UNIQUE_ID"}
    (model,) = node.run(model={}, unique_id="7", device="sim:1")
    assert model["data"] == {"7": "sim:1"}
    (again,) = node.run(model=model, unique_id="7", device="sim:0")
    assert again["data"] == {"7": "sim:0"}
    del node
    gc.collect()
    assert model["data"] == {}


# --- the host stays as it is ---


def _members():

    names = [n for n in sys.modules if n.split(".")[0] in ("comfy", "nodes", "folder_paths")]
    found = {}
    for name in names:
        module = sys.modules[name]
        for key, value in vars(module).items():
            if callable(value) or isinstance(value, type):
                found[name, key] = value
                if isinstance(value, type):
                    found |= {(name, key, k): v for k, v in vars(value).items() if callable(v)}
    return found


def test_nothing_of_the_host_is_replaced(known, host):
    import importlib

    import distorch.comfy

    before = _members()
    importlib.reload(distorch.comfy)
    (model,) = run(
        known["UNETLoaderDisTorch2MultiGPU"], unet_name="a", weight_dtype="default",
        compute_device="cpu", **OLD,
    )  # fmt: skip
    host.load_models_gpu([model])
    host.free_memory(1 << 50, torch.device("cpu"))
    assert _members() == before


# --- what ComfyUI-Manager reads ---


def test_the_list_of_nodes_has_every_name_that_we_can_make(known):
    from distorch.comfy import advanced, gguf_nodes, loaders, own_nodes, packs

    listed = json.loads((PACK / "node_list.json").read_text())
    core = {f.source + suffix for f in loaders.CORE for suffix in ("MultiGPU", "DisTorch2MultiGPU")}
    gguf = {source + suffix for source in gguf_nodes.READERS for suffix in gguf_nodes._KINDS}
    guests = {f"{guest.source}MultiGPU" for guests in packs.PACKS.values() for guest in guests}
    typing_error = {"CheckpointLoaderSimpleDistorch2MultiGPU"}  # published, too
    made = core | gguf | guests | typing_error | {*advanced.NODES, *own_nodes.NODES}
    assert listed.keys() == made
    assert made >= known.keys()


def test_the_folder_is_a_pack_as_comfyui_manager_takes_it():
    project = tomllib.loads((PACK / "pyproject.toml").read_text())
    assert project["project"]["name"] == PACK.name  # Manager calls the installed folder so
    assert re.fullmatch(r"\d+\.\d+\.\d+", project["project"]["version"])
    assert {"PublisherId", "DisplayName"} <= project["tool"]["comfy"].keys()
    assert (PACK / "requirements.txt").read_text().split() == project["project"]["dependencies"]
