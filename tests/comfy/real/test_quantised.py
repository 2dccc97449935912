# SPDX-License-Identifier: Apache-2.0
"""The host's quantised checkpoints in a real ComfyUI: same bits as its own loaders, as placed."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.comfy.real import graphs as g
from tests.comfy.real.client import GraphError, Host
from tests.comfy.real.conftest import COMFYUI
from tests.comfy.real.kitchen import FORMATS
from tests.comfy.real.test_host import CHECKPOINT, A, B, assert_same_tensors, run, saved

KINDS = ("scaled", *FORMATS)
SPEC, MOST = "cpu,2mb;disk,*", 2 << 20


def require(host, kind):
    """Skips where this host does not know the format, or the file could not be made."""
    algorithms = Path(host.folder, "comfy", "quant_ops.py")
    known = algorithms.read_text() if algorithms.exists() else ""
    if kind != "scaled" and f'"{kind}"' not in known:
        pytest.skip(f"this ComfyUI does not know {kind}")
    if not (host.base / "models" / "diffusion_models" / f"flux-{kind}.safetensors").exists():
        pytest.skip("files in this format need comfy_kitchen")


def stock(kind):
    name = f"flux-{kind}.safetensors"
    return g.node("UNETLoader", unet_name=name, weight_dtype="default")


def ours(kind, spec=SPEC, **inputs):
    return g.old_inputs(
        "UNETLoaderDisTorch2MultiGPU", unet_name=f"flux-{kind}.safetensors",
        weight_dtype="default", expert_mode_allocations=spec, **inputs,
    )  # fmt: skip


@pytest.mark.tiny_flux
@pytest.mark.parametrize("kind", KINDS)
def test_same_bits(host, kind):
    require(host, kind)
    plain = run(host, g.flux(stock(kind)))
    changed = ((A, (B[0], 0.25)), ((A[0], 0.3),)) if kind == "scaled" else ()
    for loras in ((), (A,), *changed, ()):  # other strengths, none again
        expected = run(host, g.flux(stock(kind), *loras)).digest
        assert (expected == plain.digest) == (not loras)
        for _ in range(2 if kind == "scaled" else 1):
            found = run(host, g.flux(ours(kind), *loras))
            assert found.digest == expected, loras
            assert 1 << 20 < found.model["measured"]["cpu"] <= MOST
            assert found.model["backups"] == (32 if loras else 0)
            assert found.model["fetches"] > 0
    # The blocks are as narrow as in the file, wherever they are; float16 is float32 here.
    file = load_file(host.base / "models" / "diffusion_models" / f"flux-{kind}.safetensors")
    most = sum(t.nbytes * (2 if t.dtype == torch.float16 else 1) for t in file.values())
    tables = 64 << 10  # of the model's own
    assert sum(found.model["measured"].values()) <= most + tables


@pytest.fixture(scope="module")
def fast(base):
    """A ComfyUI that is told to multiply in fp8: activations are quantised, too."""
    with Host(Path(COMFYUI), base, options=("--supports-fp8-compute",)) as started:
        yield started


@pytest.mark.tiny_flux
def test_products_in_fp8(host, fast):
    kind = "float8_e4m3fn"
    require(fast, kind)
    for loras in ((), (A,)):
        expected = run(fast, g.flux(stock(kind), *loras)).digest
        assert expected != run(host, g.flux(stock(kind), *loras)).digest
        found = run(fast, g.flux(ours(kind), *loras))
        assert found.digest == expected
        assert found.model["measured"]["cpu"] <= MOST
    assert "_scaled_mm failed" not in fast.log.read_text()


@pytest.mark.tiny_flux
@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("kind", ["scaled", "nvfp4"])
def test_after_free_memory(host, kind, cache):
    require(host, kind)
    expected = run(host, g.flux(stock(kind), A, seed=3)).digest
    run(host, g.flux(ours(kind), A, seed=1))
    host.free(cache=cache)
    again = run(host, g.flux(ours(kind), A, seed=3))
    assert again.digest == expected
    assert again.model["backups"] == 32


@pytest.mark.tiny_flux
@pytest.mark.parametrize("kind", ["scaled", "nvfp4"])
def test_distribute_model(host, kind):
    require(host, kind)
    before = run(host, g.flux(stock(kind), A))
    graph = g.flux(stock(kind), A)
    graph["placed"] = g.node("DistributeModel", model=["lora0", 0], spec=SPEC)
    graph["sample"]["inputs"]["model"] = graph["figures"]["inputs"]["model"] = ["placed", 0]
    found = run(host, graph)
    assert found.digest == before.digest
    assert found.model["measured"]["cpu"] <= MOST
    assert run(host, g.flux(stock(kind), A)).digest == before.digest


@pytest.mark.tiny_flux
def test_patches_at_full_precision(host):
    def placed(*loras, **options):
        graph = g.flux(stock("scaled"), *loras)
        model = [f"lora{len(loras) - 1}", 0] if loras else ["load", 0]
        graph["placed"] = g.node("DistributeModel", model=model, spec=SPEC, **options)
        graph["sample"]["inputs"]["model"] = graph["figures"]["inputs"]["model"] = ["placed", 0]
        return run(host, graph)

    rounded = run(host, g.flux(stock("scaled"), A)).digest
    narrow = sum(placed().model["measured"].values())
    full = placed(A, lora_precision="full")
    assert full.digest != rounded
    assert sum(full.model["measured"].values()) > 2 * narrow  # float32 where it was fp8
    assert full.model["measured"]["cpu"] <= MOST
    assert placed(A).digest == rounded


@pytest.mark.tiny_flux
@pytest.mark.parametrize("kind", ["scaled", "nvfp4"])
def test_a_saved_model_is_the_stock_one(host, kind):
    require(host, kind)
    assert_same_tensors(
        saved(host, ours(kind), "quantised-ours"), saved(host, stock(kind), "quantised-stock")
    )


def outcome(host, graph):
    """What a run made, or how it failed."""
    try:
        return run(host, graph).digest
    except GraphError as error:
        (name, said) = error.detail[-1]
        return name, said["exception_message"]


@pytest.mark.tiny_flux
def test_hooked_loras_do_what_they_do_with_the_stock_loader(host):
    """It knows no hooks on quantised weights, in the versions that were tried: nothing is harmed."""
    expected = run(host, g.flux(stock("scaled"), B)).digest
    wanted = outcome(host, g.hooked(stock("scaled"), A, B))
    assert outcome(host, g.hooked(ours("scaled"), A, B)) == wanted
    assert run(host, g.flux(ours("scaled"), B)).digest == expected


def sd15(loader, lora=None):
    graph = {
        "load": loader,
        "text": g.node("TestConditioning", seed=1, tokens=77, width=768, pooled=768),
    }
    model = g.with_loras(graph, ["load", 0], (("sd15.safetensors", lora),) if lora else ())
    return g.sampled(graph, model, positive=["text", 0], size=64)


def test_scaled_fp8_of_another_model(host):
    file = {"unet_name": "sd15-scaled.safetensors", "weight_dtype": "default"}
    placed = g.old_inputs(
        "UNETLoaderDisTorch2MultiGPU", **file, expert_mode_allocations="cpu,20mb;disk,*"
    )
    for lora in (None, 0.7):
        expected = run(host, sd15(g.node("UNETLoader", **file), lora)).digest
        found = run(host, sd15(placed, lora))
        assert found.digest == expected, lora
        assert 10 << 20 < found.model["measured"]["cpu"] <= 20 << 20


def test_scaled_fp8_text_encoder(host):
    file = {"clip_name": "clip_l-scaled.safetensors", "type": "stable_diffusion"}
    loader = g.node("CheckpointLoaderSimple", **CHECKPOINT)
    placed = g.old_inputs("CLIPLoaderDisTorch2MultiGPU", "device", **file)
    for lora in (None, 0.5):
        expected = run(host, g.checkpoint(loader, lora=lora, clip=g.node("CLIPLoader", **file)))
        found = run(host, g.checkpoint(loader, lora=lora, clip=placed))
        assert found.digest == expected.digest, lora
        assert found.figures["clip_figures"]["measured"]["disk"] > 60 << 20
