# SPDX-License-Identifier: Apache-2.0
"""The loaders that are seldom used, in a real ComfyUI: same bits as the host's own, as placed."""

from tests.comfy.real import graphs as g
from tests.comfy.real.test_host import CHECKPOINT, RATIO, run

CHECKPOINT_LOADER = g.node("CheckpointLoaderSimple", **CHECKPOINT)


def shares(found):
    """The part of a model that is on the donor."""
    measured = found["measured"]
    return measured["disk"] / sum(measured.values())


def assert_as_stock(host, name, graph_of, **files):
    """The host's own loader, ours with a placement, ours with a device: the same result."""
    stock = run(host, graph_of(g.node(name, **files)))
    ours = f"{name}DisTorch2MultiGPU"
    placed = run(
        host, graph_of(g.old_inputs(ours, "device", **files, expert_mode_allocations=RATIO))
    )
    assert placed.digest == stock.digest
    assert 0.55 < shares(placed.model) < 0.65
    plain = run(host, graph_of(g.node(f"{name}MultiGPU", **files, device="cpu")))
    assert plain.digest == stock.digest


def test_two_text_encoders(host):
    files = {"clip_name1": "clip_l.safetensors", "clip_name2": "clip_g.safetensors", "type": "sdxl"}
    assert_as_stock(host, "DualCLIPLoader", lambda load: g.encoded(load, "a lighthouse"), **files)


def test_clip_vision(host):
    def seen(loader):
        return {
            "load": loader,
            "image": g.node("TestImage", seed=3, size=224),
            "encode": g.node(
                "CLIPVisionEncode", clip_vision=["load", 0], image=["image", 0], crop="center"
            ),
            "hash": g.node("TestHash", value=["encode", 0]),
            "figures": g.node("TestFigures", model=["load", 0], after=["encode", 0]),
        }

    assert_as_stock(host, "CLIPVisionLoader", seen, clip_name="vitl.safetensors")


def test_a_folder_of_diffusers(host):
    folder = {"model_path": "tiny"}
    placed = g.old_inputs(
        "DiffusersLoaderDisTorch2MultiGPU", **folder, expert_mode_allocations=RATIO
    )
    plain = g.node("DiffusersLoaderMultiGPU", **folder, device="cpu")
    for lora in (None, 0.7):
        stock = run(host, g.checkpoint(g.node("DiffusersLoader", **folder), lora=lora))
        ours = run(host, g.checkpoint(placed, lora=lora))
        assert ours.digest == stock.digest, lora
        for name, found in ours.figures.items():
            assert 0.5 < shares(found) < 0.7, name
    assert run(host, g.checkpoint(plain, lora=0.7)).digest == stock.digest


def with_difference(control, loader):
    """A picture with a ControlNet that is loaded for the model that it is a difference to."""
    graph = g.checkpoint(loader, control=control)
    graph["net"]["inputs"]["model"] = ["load", 0]
    return graph


def test_control_net_that_is_a_difference(host):
    file = {"control_net_name": "cn-difference.safetensors"}
    stock = run(host, with_difference(g.node("DiffControlNetLoader", **file), CHECKPOINT_LOADER))
    ours = g.old_inputs(
        "DiffControlNetLoaderDisTorch2MultiGPU", **file, expert_mode_allocations=RATIO
    )
    placed = g.old_inputs(
        "CheckpointLoaderSimpleDisTorch2MultiGPU", **CHECKPOINT, expert_mode_allocations=RATIO
    )
    for loader in (CHECKPOINT_LOADER, placed):
        found = run(host, with_difference(ours, loader))
        assert found.digest == stock.digest
        assert 0.5 < shares(found.figures["net_figures"]) < 0.7
    plain = g.node("DiffControlNetLoaderMultiGPU", **file, device="cpu")
    assert run(host, with_difference(plain, CHECKPOINT_LOADER)).digest == stock.digest
