# SPDX-License-Identifier: Apache-2.0
"""What a file says of its numbers is read, or refused by name; nothing beside a weight is ignored."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import distorch
from distorch.errors import FormatError

ROWS, COLUMNS = 32, 64


def weight():
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))


def int8():
    scale = weight().abs().amax(1, keepdim=True) / 127
    return (weight() / scale).round().to(torch.int8), scale


def fp8():
    scale = weight().abs().max() / 400
    return (weight() / scale).to(torch.float8_e4m3fn), scale


def as_bytes(text):
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def loaded(tmp_path, tensors, metadata=None, **options):
    save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / "m.safetensors", metadata)
    module = nn.ModuleDict({"proj": nn.Linear(COLUMNS, ROWS, bias=False)})
    distorch.load(module, tmp_path / "m.safetensors", "cpu,0b;disk,*", min_bytes=0, compute="cpu",
                  **options)  # fmt: skip
    return distorch.materialize(module["proj"].weight)


def declared(where, told, prefix=""):
    """A declaration beside the weight, or in the header: tensors and metadata."""
    if where == "tensor":
        return {f"{prefix}proj.comfy_quant": as_bytes(json.dumps(told))}, None
    layers = {"layers": {("" if where == "bare header" else prefix) + "proj": told}}
    return {}, {"_quantization_metadata": json.dumps(layers)}


PLACES = ["tensor", "header", "bare header"]


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "text_encoders.t5."])
def test_formats_that_are_numbers_times_a_scale(tmp_path, where, prefix):
    for (numbers, scale), kind in ((int8(), "int8_tensorwise"), (fp8(), "float8_e4m3fn")):
        told = {"format": kind, "full_precision_matrix_mult": True, "convrot": False}
        beside, metadata = declared(where, told, prefix)
        tensors = {f"{prefix}proj.weight": numbers, f"{prefix}proj.weight_scale": scale, **beside}
        found = loaded(tmp_path, tensors, metadata)
        torch.testing.assert_close(found, numbers.float() * scale)


REFUSED = {
    "convrot_groupsize": {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 32},
    "int8_tensorwise": {"format": "int8_tensorwise", "params": {"convrot": 1}},  # of 256 columns
    "nvfp4": {"format": "nvfp4"},  # the numbers are int8
    "mxfp8": {"format": "mxfp8"},
    "asym_w4a8_int8": {"format": "asym_w4a8_int8", "group_size": 16},  # other scales
    "awq_w4a16": {"format": "awq_w4a16"},
    "INT8_TENSORWISE": {"format": "INT8_TENSORWISE"},
    "None": {"format": None},
    "a_key_to_come": {"format": "int8_tensorwise", "a_key_to_come": 4},
    "float8_e5m2": {"format": "float8_e5m2"},  # the numbers are int8
}


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("strict", [True, False])
def test_other_formats_are_refused_by_name(tmp_path, where, prefix, name, strict):
    numbers, scale = int8()
    beside, metadata = declared(where, REFUSED[name], prefix)
    tensors = {f"{prefix}proj.weight": numbers, f"{prefix}proj.weight_scale": scale, **beside}
    with pytest.raises(FormatError, match=rf"proj.weight'.*{name}"):
        loaded(tmp_path, tensors, metadata, strict=strict)


@pytest.mark.parametrize("text", ["{", "[1]", "7", "null"])
def test_declarations_that_cannot_be_read(tmp_path, text):
    numbers, scale = int8()
    tensors = {"proj.weight": numbers, "proj.weight_scale": scale}
    with pytest.raises(FormatError, match="proj.comfy_quant"):
        loaded(tmp_path, {**tensors, "proj.comfy_quant": as_bytes(text)})
    for metadata in (text, json.dumps({"layers": [1]}), json.dumps({"layers": {"proj": 1}})):
        with pytest.raises(FormatError, match="_quantization_metadata"):
            loaded(tmp_path, tensors, {"_quantization_metadata": metadata})


def test_the_header_wins_and_every_shard_has_one(tmp_path):
    numbers, scale = int8()
    plain, _ = declared("tensor", {"format": "int8_tensorwise"})
    _, metadata = declared("header", {"format": "int8_tensorwise", "convrot": True})
    with pytest.raises(FormatError, match="convrot"):
        loaded(tmp_path, {"proj.weight": numbers, "proj.weight_scale": scale, **plain}, metadata)
    module = nn.ModuleDict({n: nn.Linear(COLUMNS, ROWS, bias=False) for n in ("proj", "other")})
    save_file(
        {"other.weight": weight()}, tmp_path / "m-00001-of-00002.safetensors", {"format": "pt"}
    )
    save_file({"proj.weight": numbers, "proj.weight_scale": scale},
              tmp_path / "m-00002-of-00002.safetensors", metadata)  # fmt: skip
    (tmp_path / "m.safetensors").unlink()
    with pytest.raises(FormatError, match="convrot"):
        distorch.load(module, tmp_path, "cpu,*", min_bytes=0)


@pytest.mark.parametrize("strict", [True, False])
def test_a_declared_scale_that_is_missing(tmp_path, strict):
    numbers, _ = int8()
    beside, _ = declared("tensor", {"format": "int8_tensorwise"})
    with pytest.raises(FormatError, match="no 'proj.weight_scale'"):
        loaded(tmp_path, {"proj.weight": numbers, **beside}, strict=strict)


# --- scales ---


def test_powers_of_two_as_scales(tmp_path):
    numbers = weight().clamp(-2, 2).to(torch.float8_e4m3fn)
    exponents = torch.randint(120, 134, (ROWS, 1), dtype=torch.uint8)
    wanted = numbers.float() * 2.0 ** (exponents.float() - 127)
    for scale in (exponents, exponents.view(torch.float8_e8m0fnu)):
        found = loaded(tmp_path, {"proj.weight": numbers, "proj.weight_scale_inv": scale})
        assert torch.equal(found, wanted)


def test_scales_of_blocks_and_of_columns(tmp_path):
    numbers, _ = fp8()
    torch.manual_seed(1)
    for grid in ((1, COLUMNS), (2, 4), (ROWS, 2), (4, 1)):
        scale = torch.rand(grid) + 0.5
        wide = scale.repeat_interleave(ROWS // grid[0], 0).repeat_interleave(COLUMNS // grid[1], 1)
        found = loaded(tmp_path, {"proj.weight": numbers, "proj.weight_scale": scale})
        torch.testing.assert_close(found, numbers.float() * wide)


WRONG_SCALES = {
    "a grid that does not divide": torch.ones(3, 4),
    "another length": torch.ones(COLUMNS + 1),
    "whole numbers": torch.ones(ROWS, 1, dtype=torch.int32),
}


@pytest.mark.parametrize("case", WRONG_SCALES)
def test_scales_that_mean_nothing(tmp_path, case):
    numbers, _ = fp8()
    with pytest.raises(FormatError, match="'proj.weight_scale' has (the dtype|shape)"):
        loaded(tmp_path, {"proj.weight": numbers, "proj.weight_scale": WRONG_SCALES[case]})
    with pytest.raises(FormatError, match="'proj.weight_scale' has the dtype torch.uint8"):
        scale = torch.ones(ROWS, 1, dtype=torch.uint8)
        loaded(tmp_path, {"proj.weight": int8()[0], "proj.weight_scale": scale})


def test_rows_that_bitsandbytes_laid_out_otherwise(tmp_path):
    numbers, scale = int8()
    tensors = {"proj.weight": numbers, "proj.SCB": scale.flatten() * 127}
    same = loaded(tmp_path, {**tensors, "proj.weight_format": torch.tensor(0, dtype=torch.uint8)})
    torch.testing.assert_close(same, numbers.float() * scale)
    with pytest.raises(FormatError, match="weight_format"):
        loaded(tmp_path, {**tensors, "proj.weight_format": torch.tensor(1, dtype=torch.uint8)})


# --- companions that are not known ---

COMPANIONS = [
    "weight_zero_point", "weight_scale_2", "g_idx", "qzeros", "pre_quant_scale", "smooth_factor",
    "lora_A.weight", "lora_down.weight", "weight_mask", "weight.absmax", "weight.quant_map",
    "parametrizations.weight.original0", "weight_quantizer._scale", "bias_scale", "codebook",
]  # fmt: skip


@pytest.mark.parametrize("key", COMPANIONS)
@pytest.mark.parametrize("base", ["fp8", "float"])
@pytest.mark.parametrize("prefix", ["", "model."])
def test_what_lies_beside_a_weight_is_refused_strict_or_not(tmp_path, key, base, prefix):
    numbers, scale = fp8()
    tensors = {"proj.weight": weight()} if base == "float" else {
        "proj.weight": numbers, "proj.weight_scale": scale}  # fmt: skip
    tensors = {
        prefix + name: value for name, value in {**tensors, f"proj.{key}": torch.ones(4)}.items()
    }
    for strict in (True, False):
        with pytest.raises(FormatError, match=rf"proj\.{key} beside the weights of 'proj'"):
            loaded(tmp_path, tensors, strict=strict)


def test_weights_that_are_stored_in_parts(tmp_path):
    """No weight of that name at all: the module's own, random one would stay."""
    torch.manual_seed(2)
    for parts in (
        {"weight_g": torch.ones(ROWS, 1), "weight_v": weight()},
        {"qweight": torch.ones(8, ROWS, dtype=torch.int32), "scales": torch.ones(1, ROWS)},
    ):
        tensors = {f"proj.{name}": value for name, value in parts.items()}
        with pytest.raises(FormatError, match=f"proj.{next(iter(parts))}"):
            loaded(tmp_path, tensors, strict=False)
    with pytest.raises(FormatError, match="has nothing of this ModuleDict"):
        loaded(tmp_path, {"elsewhere.weight": weight()}, strict=False)


def test_what_a_module_may_do_without(tmp_path):
    """Of activations, of other programs, and tensors of their own."""
    numbers, scale = fp8()
    harmless = {"proj.input_scale": torch.ones(1), "scaled_fp8": torch.zeros(0, dtype=torch.uint8),
                "spiece_model": torch.zeros(9, dtype=torch.uint8),
                "__index_timestep_zero__": torch.zeros(0)}  # fmt: skip
    tensors = {"proj.weight": numbers, "proj.weight_scale": scale, **harmless}
    wanted = numbers.float() * scale
    torch.testing.assert_close(loaded(tmp_path, tensors), wanted)
    more = {**tensors, "proj.bias": torch.ones(ROWS), "other.head.weight": torch.ones(4)}
    torch.testing.assert_close(loaded(tmp_path, more, strict=False), wanted)
    with pytest.raises(FormatError, match="unexpected"):
        loaded(tmp_path, more)
    plain = {"proj.weight": weight(), "proj.input_scale": torch.ones(1)}
    assert torch.equal(loaded(tmp_path, plain), weight())


def test_inspect_names_what_is_passed_over(tmp_path, capsys):
    from distorch.cli import main

    numbers, _ = int8()
    beside, _ = declared("tensor", {"format": "int8_tensorwise", "convrot": True})
    tensors = {
        "proj.weight": numbers,
        **beside,
        "te.spiece_model": torch.zeros(9, dtype=torch.uint8),
    }
    save_file(tensors, tmp_path / "m.safetensors")
    assert main(["inspect", str(tmp_path / "m.safetensors")]) == 0
    told = capsys.readouterr().out
    assert "passed over: te.spiece_model" in told
    assert "int8_tensorwise with convrot (1 tensors)" in told


# --- scales of others: buffers, tied weights, modules that keep their own ---


class Keeps(nn.Module):
    """A layer whose narrow numbers are a buffer, with or without its scale."""

    def __init__(self, scale):
        super().__init__()
        self.register_buffer("weight", torch.zeros(ROWS, COLUMNS, dtype=torch.int8))
        if scale:
            self.register_buffer("weight_scale", torch.zeros(ROWS, 1))


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("comfy", [True, False])
def test_scales_that_a_module_keeps_or_lacks(tmp_path, strict, comfy):
    numbers, scale = int8()
    beside, _ = declared("tensor", {"format": "int8_tensorwise"})
    tensors = {"proj.weight": numbers, "proj.weight_scale": scale, **(beside if comfy else {})}
    save_file(tensors, tmp_path / "m.safetensors")
    module = nn.ModuleDict({"proj": Keeps(True)})
    distorch.load(module, tmp_path / "m.safetensors", "cpu,*", min_bytes=0, strict=strict)
    assert torch.equal(module["proj"].weight, numbers)
    assert torch.equal(module["proj"].weight_scale, scale)
    with pytest.raises(FormatError, match="proj.weight_scale"):
        module = nn.ModuleDict({"proj": Keeps(False)})
        distorch.load(module, tmp_path / "m.safetensors", "cpu,*", min_bytes=0, strict=strict)


def tied():
    module = nn.ModuleDict({n: nn.Linear(COLUMNS, ROWS, bias=False) for n in ("a", "b")})
    module["b"].weight = module["a"].weight
    return module


def test_both_ends_of_a_tie_in_one_file(tmp_path):
    numbers, scale = fp8()
    for change in (0.0, 1.0):
        for kind in ("plain", "scaled"):
            first = (
                {"weight": weight()}
                if kind == "plain"
                else {"weight": numbers, "weight_scale": scale}
            )
            key = "weight" if kind == "plain" else "weight_scale"
            second = {**first, key: first[key] + change}
            tensors = {
                f"{m}.{k}": v.clone()
                for m, part in (("a", first), ("b", second))
                for k, v in part.items()
            }
            save_file(tensors, tmp_path / "m.safetensors")
            if change:
                with pytest.raises(FormatError, match="'a.weight' and 'b.weight' are one weight"):
                    distorch.load(tied(), tmp_path / "m.safetensors", "cpu,*", min_bytes=0)
                continue
            module = distorch.load(tied(), tmp_path / "m.safetensors", "cpu,*", min_bytes=0)
            wanted = weight() if kind == "plain" else numbers.float() * scale
            torch.testing.assert_close(distorch.materialize(module["b"].weight), wanted)


def test_companions_of_a_modules_second_name(tmp_path):
    module = nn.ModuleDict({"a": nn.Linear(COLUMNS, ROWS, bias=False)})
    module["b"] = module["a"]
    save_file(
        {"b.weight": weight(), "b.weight_zero_point": torch.ones(ROWS)}, tmp_path / "m.safetensors"
    )
    with pytest.raises(FormatError, match="b.weight_zero_point"):
        distorch.load(module, tmp_path / "m.safetensors", "cpu,*", strict=False, min_bytes=0)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.modulation = nn.Parameter(torch.zeros(4))
        self.proj = nn.Linear(COLUMNS, ROWS, bias=False)


def test_what_a_block_does_without(tmp_path):
    """Parameters of a block are no scales of a layer; what is named like one is refused."""
    tensors = {"net.modulation": torch.ones(4), "net.proj.weight": weight(),
               "net.mask_token": torch.ones(4), "other.proj.gain": torch.ones(4)}  # fmt: skip
    save_file(tensors, tmp_path / "m.safetensors")
    module = nn.ModuleDict({"net": Block()})
    distorch.load(module, tmp_path / "m.safetensors", "cpu,*", strict=False, min_bytes=0)
    assert torch.equal(module["net"].modulation, torch.ones(4))
    save_file({**tensors, "net.weight_scales": torch.ones(4)}, tmp_path / "m.safetensors")
    with pytest.raises(FormatError, match="net.weight_scales"):
        distorch.load(module, tmp_path / "m.safetensors", "cpu,*", strict=False, min_bytes=0)


def test_old_names_of_a_norm(tmp_path):
    save_file({"norm.gamma": torch.ones(4), "norm.beta": torch.ones(4)}, tmp_path / "m.safetensors")
    module = nn.ModuleDict({"norm": nn.LayerNorm(4)})
    with pytest.raises(
        FormatError, match="norm.beta, norm.gamma beside.*whose norm.weight, norm.bias it lacks"
    ):
        distorch.load(module, tmp_path / "m.safetensors", "cpu,*", min_bytes=0)


def test_a_format_that_is_no_word(tmp_path):
    numbers, scale = int8()
    beside, _ = declared("tensor", {"format": ["int8_tensorwise"]})
    with pytest.raises(FormatError, match="the format"):
        loaded(tmp_path, {"proj.weight": numbers, "proj.weight_scale": scale, **beside})


def test_a_bare_header_is_for_one_prefix(tmp_path):
    """A layer's name that is the end of another's is not the other."""
    numbers, scale = int8()
    _, metadata = declared("header", {"format": "int8_tensorwise"})
    tensors = {"proj.weight": numbers, "proj.weight_scale": scale, "blk.proj.weight": weight()}
    save_file(tensors, tmp_path / "m.safetensors", metadata)
    blk = nn.ModuleDict({"proj": nn.Linear(COLUMNS, ROWS, bias=False)})
    module = nn.ModuleDict({"proj": nn.Linear(COLUMNS, ROWS, bias=False), "blk": blk})
    distorch.load(module, tmp_path / "m.safetensors", "cpu,*", min_bytes=0)
    assert torch.equal(blk["proj"].weight, weight())


def test_only_a_scale_of_activations(tmp_path):
    numbers = weight().to(torch.float8_e4m3fn)
    found = loaded(tmp_path, {"proj.weight": numbers, "proj.input_scale": torch.ones(1)})
    assert found.dtype == torch.float8_e4m3fn  # the numbers as they are


def test_an_index_does_not_hide_a_companion(tmp_path):
    numbers, scale = int8()
    tensors = {"proj.weight": numbers, "proj.weight_scale": scale, "proj.weight_zero_point": scale}
    save_file({k: v.clone() for k, v in tensors.items()}, tmp_path / "x.safetensors")
    index = tmp_path / "m.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"proj.weight": "x.safetensors"}}))
    module = nn.ModuleDict({"proj": nn.Linear(COLUMNS, ROWS, bias=False)})
    with pytest.raises(FormatError, match="proj.weight_zero_point"):
        distorch.load(module, index, "cpu,*", min_bytes=0, strict=False)
