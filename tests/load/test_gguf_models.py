# SPDX-License-Identifier: Apache-2.0
"""Whole models from GGUF files in llama.cpp's or the original names: blocks on donors, the outputs
of the same model with the decoded values."""

import copy

import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel, GGUFQuantizationConfig
from gguf import GGMLQuantizationType as Q
from gguf import GGUFWriter
from gguf.quants import dequantize, quantize
from safetensors.torch import save_file

import distorch
from distorch import _ops
from tests.formats.originals import (
    FLUX,
    ORIGINALS,
    empty,
    flux_inputs,
    flux_original,
    outputs,
    small,
)
from tests.formats.test_naming_gguf import MODELS, after_storing
from tests.gguf_files import llama_cpp_tensors, write_gguf

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


# Wide enough that rows are whole blocks.
WIDER = {
    "wan": {"attention_head_dim": 16, "text_dim": 32, "freq_dim": 32},
    "ltx": {"attention_head_dim": 16, "cross_attention_dim": 32, "caption_channels": 16},
}
DIFFUSION = [name for name in ORIGINALS if name != "lumina2"]


def write_diffusion_gguf(path, tensors, kind):
    """As converters of diffusion models do: blocks where rows allow it, weights of more than four
    dimensions flattened; or (`kind` None) everything in float16 and as it is. The values in it come
    back.
    """
    writer, found = GGUFWriter(path, "diffusion"), {}
    for name, tensor in tensors.items():
        value, data = tensor, tensor.numpy()
        if tensor.dim() == 2 and tensor.shape[1] % 32 == 0 and kind is not None:
            blocks = quantize(data, kind)
            value = torch.from_numpy(dequantize(blocks, kind))
            writer.add_tensor(name, blocks, raw_dtype=kind)
        elif tensor.dim() == 1:
            writer.add_tensor(name, data)
        else:
            value = tensor.half().float()
            if tensor.dim() > 4 and kind is not None:
                writer.add_array(f"comfy.gguf.orig_shape.{name}", list(tensor.shape))
                data = data.reshape(tensor.shape[0], -1)
            writer.add_tensor(name, data.astype(np.float16))
        found[name] = value.contiguous()
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return found


@pytest.mark.parametrize("kind", [Q.Q8_0, Q.Q5_1, None], ids=str)
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("which", DIFFUSION)
def test_diffusion_models(tmp_path, small_widths, which, spec, kind):
    cls, config, original, inputs = ORIGINALS[which]
    config, given = config | WIDER.get(which, {}), inputs()
    if which in WIDER:
        text = config.get("text_dim", config.get("caption_channels"))
        given["encoder_hidden_states"] = torch.ones(1, 3, text)
    model, file = small(cls, config), tmp_path / "m.gguf"
    values = write_diffusion_gguf(file, original(model.state_dict()), kind)
    save_file(values, tmp_path / "values.safetensors")
    plain = distorch.load(empty(cls, config), tmp_path / "values.safetensors", "cpu,*")
    loaded = distorch.load(empty(cls, config), file, spec, min_bytes=0)
    assert torch.equal(outputs(loaded, given), outputs(plain, given))
    quantised = sum(_ops.state(p).decoded for p in loaded.parameters() if _ops.is_sharded(p))
    assert (quantised > 10) == (kind is not None)
    assert distorch.report(loaded).ok
