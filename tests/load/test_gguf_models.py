"""Whole models from GGUF files in llama.cpp's or the original names: blocks on donors, the outputs
of the same model with the decoded values."""

import copy

import pytest
import torch
from diffusers import FluxTransformer2DModel, GGUFQuantizationConfig
from gguf import GGMLQuantizationType as Q

import distorch
from tests.formats.originals import FLUX, empty, flux_inputs, flux_original, outputs, small
from tests.formats.test_naming_gguf import MODELS, after_storing, llama_cpp_tensors, write_gguf

SPECS = ["cpu,*", "cpu,0b;disk,*"]


def with_stored_values(model, kind, dtype=torch.float32):
    """The model as it is after its weights were in such a file."""
    plain = copy.deepcopy(model)
    for parameter in plain.parameters():
        parameter.data = after_storing(parameter.detach(), kind)
    return plain.to(dtype)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("which", [name for name in MODELS if name != "gemma3"])
def test_text_models(tmp_path, which, spec):
    arch, cls, config = MODELS[which]
    model, file = small(cls, config), tmp_path / "m.gguf"
    write_gguf(file, arch, llama_cpp_tensors(model, arch, config), Q.Q8_0, config)
    loaded = distorch.load(empty(cls, config), file, spec, min_bytes=0)
    plain = with_stored_values(model, Q.Q8_0)
    ids = torch.arange(6).reshape(1, 6)
    with torch.no_grad():
        assert torch.equal(loaded(ids)[0], plain(ids)[0])
    report = distorch.report(loaded)
    assert report.ok
    assert sum(report.bytes.values()) < 0.4 * sum(p.nbytes for p in plain.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spec", SPECS)
def test_flux(tmp_path, small_widths, spec, dtype):
    model, file = small(FluxTransformer2DModel, FLUX), tmp_path / "m.gguf"
    write_gguf(file, "flux", flux_original(model.state_dict()), Q.Q4_0)
    loaded = distorch.load(
        empty(FluxTransformer2DModel, FLUX), file, spec, min_bytes=0, dtype=dtype
    )
    plain = with_stored_values(model, Q.Q4_0, dtype)
    inputs = {
        name: value.to(dtype) if value.is_floating_point() else value
        for name, value in flux_inputs().items()
    }
    assert torch.equal(outputs(loaded, inputs), outputs(plain, inputs))
    assert distorch.report(loaded).ok


@pytest.mark.parametrize("kind", [Q.Q8_0, Q.Q4_0])
def test_the_outputs_of_diffusers_own_loader(tmp_path, small_widths, kind):
    model, file = small(FluxTransformer2DModel, FLUX), tmp_path / "m.gguf"
    write_gguf(file, "flux", flux_original(model.state_dict()), kind)
    model.save_config(tmp_path / "config")
    theirs = FluxTransformer2DModel.from_single_file(
        str(file), config=str(tmp_path / "config"), torch_dtype=torch.float32,
        quantization_config=GGUFQuantizationConfig(compute_dtype=torch.float32),
    )  # fmt: skip
    ours = distorch.load(empty(FluxTransformer2DModel, FLUX), file, "cpu,0b;disk,*", min_bytes=0)
    mine, other = outputs(ours, flux_inputs()), outputs(theirs, flux_inputs())
    # Theirs multiplies by the scales in float16; ours, as gguf-py, in float32.
    torch.testing.assert_close(mine, other, rtol=0, atol=4e-3)
    exact = outputs(with_stored_values(model, kind), flux_inputs())
    assert torch.equal(mine, exact) and not torch.equal(other, exact)
