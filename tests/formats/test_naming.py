# SPDX-License-Identifier: Apache-2.0
"""Checkpoints in the names of their makers fill diffusers' modules."""

import pytest
import torch
from diffusers import FluxTransformer2DModel, WanTransformer3DModel
from safetensors.torch import save_file
from torch import nn

import distorch
from distorch import FormatError
from distorch.formats.checkpoint import open_checkpoint
from distorch.formats.naming import fit_names
from distorch.formats.naming.tracing import trace
from distorch.formats.stored import StoredTensor
from tests.formats.originals import (
    FLUX,
    ORIGINALS,
    WAN,
    empty,
    flux_original,
    outputs,
    same_weights,
    small,
)

SPECS = ["cpu,*", "cpu,0b;disk,*"]


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
@pytest.mark.parametrize("kind", ORIGINALS)
def test_original_names_fill_a_diffusers_module(tmp_path, small_widths, kind, prefix, spec):
    cls, config, original, inputs = ORIGINALS[kind]
    model = small(cls, config)
    stored = {prefix + k: v for k, v in original(model.state_dict()).items()}
    save_file(stored, tmp_path / "m.safetensors")
    loaded = distorch.load(empty(cls, config), tmp_path / "m.safetensors", spec, min_bytes=0)
    same_weights(loaded, model.state_dict())
    assert torch.equal(outputs(loaded, inputs()), outputs(model, inputs()))


def test_a_torch_file_in_original_names(tmp_path, small_widths):
    model = small(FluxTransformer2DModel, FLUX)
    for name, new in (("new.pt", True), ("old.pt", False)):
        torch.save(flux_original(model.state_dict()), tmp_path / name,
                   _use_new_zipfile_serialization=new)  # fmt: skip
        loaded = distorch.load(
            empty(FluxTransformer2DModel, FLUX), tmp_path / name, "cpu,0b;disk,*", min_bytes=0
        )
        same_weights(loaded, model.state_dict())


def test_split_rows_stay_in_the_file_and_swapped_ones_do_not(tmp_path, small_widths):
    model = small(FluxTransformer2DModel, FLUX)
    file = tmp_path / "m.safetensors"
    save_file(flux_original(model.state_dict()), file)
    checkpoint = open_checkpoint(file)
    fitted = fit_names(checkpoint, empty(FluxTransformer2DModel, FLUX)).tensors
    fused = checkpoint.tensors["double_blocks.0.img_attn.qkv.weight"]
    key = fitted["transformer_blocks.0.attn.to_k.weight"]
    assert key.in_one_range
    assert (key.offset, key.nbytes) == (fused.offset + fused.nbytes // 3, fused.nbytes // 3)
    pieces = {name for name, stored in fitted.items() if not stored.in_one_range}
    assert pieces == {"norm_out.linear.weight", "norm_out.linear.bias"}
    swapped = fitted["norm_out.linear.weight"]
    half = swapped.nbytes // 2
    assert [(p.begin, p.nbytes) for p in swapped.pieces] == [(half, half), (0, half)]


@pytest.mark.parametrize("mode", ["merge", "fetch", "background"])
def test_loras_come_off_split_and_swapped_weights(tmp_path, small_widths, mode):
    model = small(FluxTransformer2DModel, FLUX)
    file = tmp_path / "m.safetensors"
    save_file(flux_original(model.state_dict()), file)
    lora = {}
    for name, columns, rows in (("norm_out.linear", 64, 128), ("context_embedder", 32, 64)):
        lora[f"transformer.{name}.lora_A.weight"] = torch.randn(2, columns)
        lora[f"transformer.{name}.lora_B.weight"] = torch.randn(rows, 2)
    loaded = distorch.load(
        empty(FluxTransformer2DModel, FLUX),
        file,
        "cpu,0b;disk,*",
        min_bytes=0,
        loras=[(lora, 1.0)],
        lora_mode=mode,
    )
    assert not torch.equal(loaded.norm_out.linear.weight, model.norm_out.linear.weight)
    distorch.set_loras(loaded, [])
    same_weights(loaded, model.state_dict())


def test_scales_go_with_the_parts(tmp_path, small_widths):
    model = small(FluxTransformer2DModel, FLUX)
    stored = flux_original(model.state_dict())
    qkv = stored["double_blocks.0.img_attn.qkv.weight"]
    narrow = (qkv * 100).to(torch.float8_e4m3fn)
    by_row = torch.arange(1.0, 193.0).reshape(192, 1) / 7
    stored["double_blocks.0.img_attn.qkv.weight"] = narrow
    stored["double_blocks.0.img_attn.qkv.scale_weight"] = by_row
    linear2 = (stored["single_blocks.0.linear2.weight"] * 100).to(torch.float8_e4m3fn)
    stored["single_blocks.0.linear2.weight"] = linear2
    stored["single_blocks.0.linear2.scale_weight"] = torch.tensor(0.25)
    stored["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    save_file(stored, tmp_path / "m.safetensors")
    loaded = distorch.load(
        empty(FluxTransformer2DModel, FLUX), tmp_path / "m.safetensors", "cpu,*", min_bytes=0
    )
    wanted = narrow.float() * by_row
    attention = loaded.transformer_blocks[0].attn
    assert torch.equal(attention.to_k.weight + 0, wanted[64:128])
    assert torch.equal(attention.to_v.weight + 0, wanted[128:])
    proj = loaded.single_transformer_blocks[0].proj_out.weight
    assert torch.equal(proj + 0, linear2.float() * 0.25)


# --- what cannot be had by moving rows ---


def stored_matrix(name="w", shape=(6, 4), dtype=torch.float32, block_type=None, nbytes=None):
    nbytes = nbytes or dtype.itemsize * shape[0] * shape[1]
    return StoredTensor(name, "/f", 100, nbytes, dtype, shape, block_type=block_type)


@pytest.mark.parametrize(
    ("change", "named"),
    [(lambda w: w * 2, "'w'.*mul"), (lambda w: w - 1, "'w'.*sub"),
     (lambda w: w.half(), "'w'.*_to_copy"), (lambda w: w.exp_(), "'w'.*exp_"),
     (lambda w: torch.cat([w, w.new_zeros(6, 4)]), "'w'.*new_zeros"), (lambda w: torch.ones(3), "ones"),
     (lambda w: 3, "'new'.*int")],
)  # fmt: skip
def test_arithmetic_is_refused_by_name(change, named):
    with pytest.raises(FormatError, match=named):
        trace({"w": stored_matrix()}, lambda tensors: {"new": change(tensors["w"])})


def test_big_transposes_and_cut_blocks_are_refused():
    big = {"w": stored_matrix(shape=(1024, 1024))}
    with pytest.raises(FormatError, match="'w'.*transposes"):
        trace(big, lambda tensors: {"new": tensors["w"].T})
    blocks = {"w": stored_matrix(shape=(2, 64), dtype=torch.uint8, block_type="Q8_0", nbytes=136)}
    with pytest.raises(FormatError, match="'w' .Q8_0.*blocks of 32"):
        trace(blocks, lambda tensors: {"new": tensors["w"].reshape(8, 16)[1:2]})
    mixed = {"w": stored_matrix(), "v": stored_matrix("v", dtype=torch.float16)}
    with pytest.raises(FormatError, match="expected one dtype"):
        trace(mixed, lambda t: {"new": torch.cat([t["w"], t["v"].reshape(6, 4)]).clone()})


def test_views_are_followed_as_torch_makes_them(tmp_path):
    weight = torch.arange(48.0).reshape(12, 4)
    save_file({"w": weight}, tmp_path / "m.safetensors")
    tensors = open_checkpoint(tmp_path / "m.safetensors").tensors

    def convert(t):
        (w,) = t.values()
        heads = w.reshape(2, 3, 2, 4).swapaxes(2, 1)
        return {
            "heads": heads.reshape(12, 4), "again": heads.reshape(12, 4)[3:7],
            "columns": w[:, 1:3], "joined": torch.cat([w[6:], w[:6]])[2:9],
            "wider": torch.cat([w[:6], w[6:, 1:3]], dim=1), "stack": torch.stack([w[:2], w[4:6]], 1),
            "nothing": torch.cat([w[:0], w[2:3]]), "turned": w.T, "turned copy": w.T.clone(), "one": w[3, 2], "repeated": w[:1].expand(3, 4),
        }  # fmt: skip

    found, left = trace(tensors, convert)
    assert left == []
    for name, value in convert({"w": weight}).items():
        assert torch.equal(found[name].stored.read(), value), name


def test_a_file_that_does_not_fit_is_left_to_loads_own_error(tmp_path):
    save_file({"something.weight": torch.zeros(3, 3)}, tmp_path / "m.safetensors")
    with pytest.raises(FormatError, match=r"missing \(.*1 unexpected \(something.weight\)"):
        distorch.load(empty(FluxTransformer2DModel, FLUX), tmp_path / "m.safetensors", "cpu,*")


def test_a_weight_that_no_name_takes_is_reported(tmp_path, small_widths):
    stored = flux_original(small(FluxTransformer2DModel, FLUX).state_dict())
    stored["double_blocks.0.surplus.weight"] = torch.zeros(3)
    stored["vae.decoder.weight"] = torch.zeros(3)  # another model of the same file
    save_file(stored, tmp_path / "m.safetensors")
    with pytest.raises(FormatError, match="0 missing .*1 unexpected .double_blocks.0.surplus"):
        distorch.load(empty(FluxTransformer2DModel, FLUX), tmp_path / "m.safetensors", "cpu,*")


def test_names_that_fit_are_left_alone(tmp_path):
    model = small(WanTransformer3DModel, WAN)
    save_file(model.state_dict(), tmp_path / "m.safetensors")
    checkpoint = open_checkpoint(tmp_path / "m.safetensors")
    assert fit_names(checkpoint, model) is checkpoint
    assert fit_names(checkpoint, nn.Linear(2, 2)) is checkpoint


def test_the_released_width_is_said_when_a_conversion_wants_it(tmp_path):
    stored = flux_original(small(FluxTransformer2DModel, FLUX).state_dict())
    save_file(stored, tmp_path / "m.safetensors")
    with pytest.raises(FormatError, match=r"shapes .* are not those that its conversion expects"):
        distorch.load(empty(FluxTransformer2DModel, FLUX), tmp_path / "m.safetensors", "cpu,*")
