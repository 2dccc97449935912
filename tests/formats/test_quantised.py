# SPDX-License-Identifier: Apache-2.0
"""ComfyUI's narrow formats: decoded to the right numbers wherever they lie, or refused by name."""

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import distorch
from distorch import _ops
from distorch.errors import FormatError, SpecError
from distorch.formats.checkpoint import open_checkpoint
from distorch.formats.naming.tracing import Run, as_stored

KITCHEN = Path(__file__).parent / "kitchen.safetensors"  # of make_kitchen.py
SPECS = ["cpu,*", "cpu,0b;disk,*"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
with safe_open(KITCHEN, "pt") as opened:
    TOLD = {kind: json.loads(text) for kind, text in sorted(opened.metadata().items())}
TURNED = ["int8", "int4"]  # the exact sum, rounded once
INTEGERS = ["w4a8", "w4a8 without a codebook", "w6a8"]


def note(told):
    return torch.tensor(list(json.dumps(told).encode()), dtype=torch.uint8)


def stored(kind, name="proj"):
    """The tensors of one layer as a file has them."""
    tensors = load_file(KITCHEN)
    start = f"{kind}/weight"
    found = {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}
    layer = {f"{name}.weight{suffix}": value for suffix, value in found.items()}
    return layer | {f"{name}.comfy_quant": note(TOLD[kind])}


def kitchens(kind, dtype):
    return load_file(KITCHEN)[f"{kind}/{dtype}"]


def hadamard(size):
    base = torch.ones(4, 4) - 2 * torch.eye(4).flip(1)
    whole = torch.ones(1, 1)
    while whole.shape[0] < size:
        whole = torch.kron(whole, base)
    return whole.double() / size**0.5


def halves(packed, signed):
    """Two numbers of each byte, the low half first."""
    byte = packed.view(torch.uint8).int()
    found = torch.stack([byte & 15, byte >> 4], -1).flatten(-2)
    return torch.where(found > 7, found - 16, found) if signed else found


def exact(kind):
    """float64: the integers turned back, times the scale of each row."""
    layer = stored(kind)
    numbers = layer["proj.weight"]
    numbers = (numbers if kind == "int8" else halves(numbers, True)).double()
    group = TOLD[kind]["convrot_groupsize"]
    turned = (numbers.view(numbers.shape[0], -1, group) @ hadamard(group)).view(numbers.shape)
    return turned * layer["proj.weight_scale"].double().reshape(-1, 1)


def wanted(kind, dtype):
    if kind in TURNED:
        return exact(kind).float().to(dtype)
    if kind == "nvfp4":  # rounded once, as comfy-kitchen's CUDA kernel does
        return kitchens(kind, torch.float32).to(dtype)
    return kitchens(kind, dtype)


def net(shape, dtype=torch.float32):
    return nn.ModuleDict({"proj": nn.Linear(shape[1], shape[0], bias=False)}).to(dtype)


def load(tmp_path, tensors, spec, dtype=torch.float32, shape=None, **options):
    shape = shape or tuple(kitchens("mxfp8", torch.float32).shape)
    save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / "m.safetensors")
    return distorch.load(net(shape, dtype), tmp_path / "m.safetensors", spec, min_bytes=0,
                         compute="cpu", **options)  # fmt: skip


def weight_of(model):
    return distorch.materialize(model["proj"].weight)


# --- numbers ---


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", TOLD)
def test_the_numbers_of_comfy_kitchen(tmp_path, kind, dtype, spec):
    model = load(tmp_path, stored(kind), spec, dtype)
    found = weight_of(model)
    assert found.dtype == dtype
    near = kitchens(kind, dtype).float()
    steps = {torch.float32: 2**-20, torch.float16: 2**-10, torch.bfloat16: 2**-7}
    torch.testing.assert_close(found.float(), near, rtol=2 * steps[dtype], atol=1e-6)
    if kind not in INTEGERS or dtype != torch.float32:  # there its sums depend on the machine
        assert torch.equal(found, wanted(kind, dtype))
    x = torch.randn(3, near.shape[1]).to(dtype)
    assert torch.equal(model["proj"](x), nn.functional.linear(x, found))
    assert distorch.report(model).ok


def test_as_narrow_as_in_the_file(tmp_path):
    bits = {"int8": 8, "int4": 4, "nvfp4": 4.5, "mxfp8": 8.25, "w4a8": 4.5, "w6a8": 6.5}
    for kind, each in bits.items():
        model = load(tmp_path, stored(kind), "cpu,0b;disk,*")
        state = _ops.state(model["proj"].weight)
        assert state.nbytes == kitchens(kind, torch.float32).numel() * each / 8
        assert state.factor_bytes <= 9 * 4 + 16 * 4


def tiled(scales):
    """[rows, columns] in tiles of 128 x 4, number by number as cuBLAS documents it."""
    rows, columns = scales.shape
    high, wide = -(-rows // 128), -(-columns // 4)
    flat = torch.zeros(high * wide * 512, dtype=torch.uint8)
    for r in range(rows):
        for c in range(columns):
            tile = (r // 128) * wide + c // 4
            flat[tile * 512 + (r % 32) * 16 + (r % 128) // 32 * 4 + c % 4] = scales[r, c]
    return flat.view(high * 128, wide * 4)


def large(kind, rows, columns):
    """A layer of random bytes, and its weight by what the format says."""
    torch.manual_seed(3)
    if kind == "nvfp4":
        numbers = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8)
        scales = torch.randint(0, 0x7F, (rows, columns // 16), dtype=torch.uint8)
        factor = torch.tensor(0.37)
        digits = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
        codes = halves(numbers, False).view(rows, -1, 2).flip(-1).view(rows, columns)
        values = torch.where(codes > 7, -digits[codes & 7], digits[codes & 7])
        each = scales.view(torch.float8_e4m3fn).float() * factor
        layer = {"proj.weight_scale_2": factor}
    else:
        numbers = torch.randint(0, 0x7F, (rows, columns), dtype=torch.uint8)
        numbers = numbers.view(torch.float8_e4m3fn)
        scales = torch.randint(100, 140, (rows, columns // 32), dtype=torch.uint8)
        values, each, layer = numbers.float(), 2.0 ** (scales.float() - 127), {}
    layer |= {"proj.weight": numbers, "proj.weight_scale": tiled(scales)}
    layer["proj.comfy_quant"] = note({"format": kind})
    return layer, values * each.repeat_interleave(columns // each.shape[1], 1)


@pytest.mark.parametrize("kind", ["nvfp4", "mxfp8"])
@pytest.mark.parametrize("rows", [32, 128, 320])
def test_scales_in_tiles(tmp_path, kind, rows):
    layer, weight = large(kind, rows, 160)
    for spec in SPECS:
        assert torch.equal(weight_of(load(tmp_path, layer, spec, shape=(rows, 160))), weight)
    as_bytes = layer["proj.weight_scale"].view(
        torch.float8_e4m3fn if kind == "nvfp4" else torch.float8_e8m0fnu
    )
    flat = {**layer, "proj.weight_scale": as_bytes}
    assert torch.equal(weight_of(load(tmp_path, flat, "cpu,*", shape=(rows, 160))), weight)


@pytest.mark.parametrize("kind", ["nvfp4", "mxfp8", *INTEGERS])
def test_rows_of_a_fused_weight(tmp_path, kind):
    """What a conversion of names makes: parts of one tensor, and in another order."""
    rows, columns = 288, 160
    if kind in INTEGERS:
        layer, rows, columns = stored(kind), 9, 128
    else:
        layer, _ = large(kind, rows, columns)
    save_file({k: v.contiguous() for k, v in layer.items()}, tmp_path / "m.safetensors")
    whole = open_checkpoint(tmp_path / "m.safetensors").tensors["proj.weight"]
    packed = whole.read().view(rows, -1)
    cuts = [(0, rows // 3), (rows // 3, rows - 1), (rows - 1, rows)]
    for begin, end in cuts:
        part = as_stored("part", [Run(whole, begin * columns, end * columns)],
                         (end - begin, columns))  # fmt: skip
        assert torch.equal(part.read(), packed[begin:end].flatten())
        assert part.declared == whole.declared
    runs = [Run(whole, begin * columns, end * columns) for begin, end in reversed(cuts)]
    turned = as_stored("turned", runs, (rows, columns))
    swapped = torch.cat([packed[begin:end] for begin, end in reversed(cuts)])
    assert torch.equal(turned.read(), swapped.flatten())
    within = torch.empty(100, dtype=torch.uint8)
    whole.read_bytes(7, within)  # a row is cut
    assert torch.equal(within, packed.flatten()[7:107])


def test_rows_of_an_embedding(tmp_path):
    save_file(stored("int8", "table"), tmp_path / "m.safetensors")
    for spec in SPECS:
        module = nn.ModuleDict({"table": nn.Embedding(9, 128)}).to(torch.bfloat16)
        distorch.load(module, tmp_path / "m.safetensors", spec, min_bytes=0, compute="cpu")
        rows = torch.tensor([[3, 8], [0, 3]])
        assert torch.equal(module["table"](rows), exact("int8").float().to(torch.bfloat16)[rows])


# --- LoRAs, and what else is done to a model ---


def lora(columns=128, rows=9, size=1e-2):
    generator = torch.Generator().manual_seed(5)
    down = torch.randn(3, columns, generator=generator)
    up = torch.randn(rows, 3, generator=generator) * size
    return {"proj.lora_A.weight": down, "proj.lora_B.weight": up}, (up.double() @ down.double())


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("kind", TOLD)
def test_a_lora_over_each_format(tmp_path, kind, spec):
    """On the numbers in float32, rounded once; the same in every mode; and off again."""
    tensors, delta = lora()
    base = exact(kind) if kind in TURNED else kitchens(kind, torch.float32).double()
    found = {}
    for mode in ("merge", "fetch", "background"):
        model = load(tmp_path, stored(kind), spec, torch.bfloat16, loras=[(tensors, 0.5)],
                     lora_mode=mode)  # fmt: skip
        found[mode] = weight_of(model)
        distorch.finish_merging(model)
        assert torch.equal(weight_of(model), found[mode])
        distorch.set_loras(model, [])
        assert torch.equal(weight_of(model), wanted(kind, torch.bfloat16))
        distorch.set_loras(model, [(tensors, 0.5)])
        assert torch.equal(weight_of(model), found[mode])
        copied = copy.deepcopy(model)
        distorch.set_loras(copied, [(tensors, 1.0)])
        assert torch.equal(weight_of(model), found[mode])
    assert torch.equal(found["merge"], found["fetch"])
    assert torch.equal(found["merge"], found["background"])
    patched = (base + 0.5 * delta).float()
    off = (found["merge"].float() - patched).abs()
    assert bool((off <= patched.abs() * 2**-8 + 1e-6).all())


@pytest.mark.parametrize("kind", TOLD)
def test_moved_widened_saved_and_taken_back(tmp_path, kind):
    right = wanted(kind, torch.bfloat16)
    model = load(tmp_path, stored(kind), "cpu,*", torch.bfloat16)
    for spec in ("cpu,0b;disk,*", "cpu,*"):
        distorch.redistribute(model, spec)
        assert torch.equal(weight_of(model), right)
    assert torch.equal(weight_of(copy.deepcopy(model)), right)
    torch.save(model.state_dict(), tmp_path / "s.pt")
    assert torch.equal(torch.load(tmp_path / "s.pt")["proj.weight"], right)
    distorch.undistribute(model)
    assert torch.equal(model["proj"].weight, right)
    wide = load(tmp_path, stored(kind), "cpu,*", torch.bfloat16, resident="dequantised")
    assert torch.equal(weight_of(wide), right)


@pytest.mark.parametrize("kind", TOLD)
def test_a_patched_weight_is_not_rounded_to_blocks(tmp_path, kind):
    tensors, _ = lora()
    with pytest.raises(SpecError, match=r"patched_dtype='base'.*proj\.weight"):
        load(tmp_path, stored(kind), "cpu,*", loras=[(tensors, 1.0)], patched_dtype="base")
    model = load(tmp_path, stored(kind), "cpu,*", torch.bfloat16, patched_dtype="base")
    with pytest.raises(SpecError, match="patched_dtype='base'"):
        distorch.set_loras(model, [(tensors, 1.0)])
    assert torch.equal(weight_of(model), wanted(kind, torch.bfloat16))


def test_inspect_and_plan_know_them(tmp_path, capsys):
    from distorch.cli import main

    tensors = {k: v for kind in TOLD for k, v in stored(kind, kind.replace(" ", "_")).items()}
    save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / "m.safetensors")
    assert main(["inspect", str(tmp_path / "m.safetensors")]) == 0
    told = capsys.readouterr().out
    for name in (
        "nvfp4",
        "mxfp8",
        "convrot_w4a4",
        "asym_w4a8_int8",
        "int8_tensorwise with convrot",
    ):
        assert name in told
    plan = distorch.plan(tmp_path / "m.safetensors", "cpu,*", min_bytes=0)
    assert plan.placement["nvfp4.weight"] == "cpu"
    assert not any(
        name.endswith(("weight_scale_2", "codebook", "s_rel")) for name in plan.placement
    )


# --- what is refused, and by which name ---


def without(kind, key):
    return {k: v for k, v in stored(kind).items() if k != f"proj.{key}"}


def with_told(kind, **more):
    return {**stored(kind), "proj.comfy_quant": note({**TOLD[kind], **more})}


def with_part(kind, key, value):
    return {**stored(kind), f"proj.{key}": value}


REFUSED = {
    "no scale of rows": (without("int4", "weight_scale"), "no 'proj.weight_scale'"),
    "no scale of the weight": (without("nvfp4", "weight_scale_2"), "no 'proj.weight_scale_2'"),
    "no scales of blocks": (without("mxfp8", "weight_scale"), "no 'proj.weight_scale'"),
    "no scales of groups": (without("w4a8", "weight_s_rel"), "no 'proj.weight_s_rel'"),
    "no scale of integers": (without("w4a8", "weight_s_channel"), "no 'proj.weight_s_channel'"),
    "scales not in tiles": (
        with_part("nvfp4", "weight_scale", torch.ones(9, 8).to(torch.float8_e4m3fn)),
        r"'proj.weight_scale' has the shape \(9, 8\); expected \(128, 8\)",
    ),
    "scales of another dtype": (
        with_part("mxfp8", "weight_scale", torch.ones(128, 4)), "'proj.weight_scale' has the dtype"
    ),
    "a group that is no power of 4": (with_told("int8", convrot_groupsize=32), "convrot_groupsize"),
    "a group that does not divide": (with_told("int8", convrot_groupsize=256), "convrot_groupsize"),
    "a group that is no number": (with_told("int4", convrot_groupsize="64"), "convrot_groupsize"),
    "integers that are not turned": (with_told("w4a8", convrot=False), "convrot=False"),
    "groups that are too small": (with_told("w4a8", group_size=8), "group_size=8"),
    "groups of another size": (with_told("w4a8", group_size=32), "4 or 6 bits"),
    "another group of nvfp4": (with_told("nvfp4", group_size=32), "group_size=32"),
    "an unknown product": (with_told("int4", linear_dtype="fp4"), "linear_dtype"),
    "another key for the scale": (
        {**without("w4a8", "weight_s_channel"), "proj.SCB": torch.ones(9)},
        "no 'proj.weight_s_channel'",
    ),
    "a group without end": (with_told("w6a8", group_size=16 * 10**400), "group_size=1600"),
    "an unknown key": (with_told("nvfp4", swizzle="none"), "swizzle"),
    "keys that are no table": (with_told("mxfp8", params=3), "params=3"),
    "a correction": (
        with_part("w4a8", "weight_correction", torch.zeros(8, 9)), "weight_correction"
    ),
    "scaled inputs": (
        with_part("nvfp4", "pre_quant_scale", torch.ones(128)), "pre_quant_scale"
    ),
    "scales of columns": (
        with_part("int8", "weight_scale", torch.ones(1, 128)), "'proj.weight_scale' has shape"
    ),
    "one scale of integers": (
        with_part("w6a8", "weight_s_channel", torch.ones(1)), "'proj.weight_s_channel' has shape"
    ),
    "a codebook of another length": (
        with_part("w4a8", "weight_codebook", torch.zeros(8)), "'proj.weight_codebook' has the shape"
    ),
    "numbers of another dtype": (
        with_part("nvfp4", "weight", torch.zeros(16, 64)), "numbers are torch.float32"
    ),
}  # fmt: skip


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(tmp_path, case, strict):
    tensors, message = REFUSED[case]
    with pytest.raises(FormatError, match=message):
        load(tmp_path, tensors, "cpu,*", strict=strict)


@pytest.mark.parametrize("kind", TOLD)
def test_other_rows_than_the_module_has(tmp_path, kind):
    """Also where they would be padded to the same number of rows: these are no zeros."""
    for shape in ((8, 128), (33, 128), (9, 64), (9, 120)):
        with pytest.raises(FormatError, match="'proj.weight': the file has shape"):
            load(tmp_path, stored(kind), "cpu,*", shape=shape)


@pytest.mark.parametrize("kind", ["nvfp4", "mxfp8"])
def test_rows_that_are_not_padding(tmp_path, kind):
    layer, _ = large(kind, 32, 160)
    for rows in (17, 31):
        with pytest.raises(FormatError, match=r"the file has shape \(32, 160\)"):
            load(tmp_path, layer, "cpu,*", shape=(rows, 160))


def kept_in_columns(tensors):
    """As a torch file has what was saved as a view: not one row after the other."""
    return {k: v.t().contiguous().t() if v.dim() == 2 else v for k, v in tensors.items()}


@pytest.mark.parametrize("kind", TOLD)
def test_torch_files(tmp_path, kind):
    module = net(kitchens(kind, torch.float32).shape, torch.bfloat16)
    for number, tensors in enumerate((stored(kind), kept_in_columns(stored(kind)))):
        file = tmp_path / f"{number}.pt"
        torch.save(tensors, file)
        for spec in SPECS:
            model = distorch.load(copy.deepcopy(module), file, spec, min_bytes=0, compute="cpu")
            assert torch.equal(weight_of(model), wanted(kind, torch.bfloat16))


@pytest.mark.parametrize("kind", TOLD)
def test_whatever_the_caller_made_the_default(tmp_path, kind):
    save_file(stored(kind), tmp_path / "m.safetensors")
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            module = net(kitchens(kind, torch.float32).shape, torch.bfloat16)
            distorch.load(module, tmp_path / "m.safetensors", "cpu,0b;disk,*", min_bytes=0,
                          compute="cpu")  # fmt: skip
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(weight_of(module), wanted(kind, torch.bfloat16))


@pytest.mark.parametrize("kind", TOLD)
def test_dtypes_that_nothing_decodes_to(tmp_path, kind):
    model = load(tmp_path, stored(kind), "cpu,*", torch.float64)
    assert weight_of(model).dtype == torch.float32
    for dtype in (torch.float64, torch.float8_e4m3fn):
        with pytest.raises(SpecError, match=f"dtype={dtype}"):
            distorch.load(net((9, 128)), tmp_path / "m.safetensors", "cpu,*", dtype=dtype)


def test_said_in_both_places(tmp_path):
    """One layer beside its weight, others in the header without the prefix of the names."""
    prefix = "model.diffusion_model."
    tensors = {f"{prefix}{k}": v for k, v in stored("int8", "a").items()}
    tensors |= {f"{prefix}{k}": v for k, v in stored("int8", "b").items()}
    del tensors[f"{prefix}b.comfy_quant"]
    layers = {"layers": {"b": TOLD["int8"], "b.weight": TOLD["int8"]}}
    save_file(tensors, tmp_path / "m.safetensors", {"_quantization_metadata": json.dumps(layers)})
    found = open_checkpoint(tmp_path / "m.safetensors").tensors
    for name in "ab":
        declared = found[f"{prefix}{name}.weight"].declared
        assert declared is not None and declared.rotation == 64 and not declared.refusal


def test_columns_that_were_turned_together_are_not_cut(tmp_path):
    save_file(stored("int8"), tmp_path / "m.safetensors")
    whole = open_checkpoint(tmp_path / "m.safetensors").tensors["proj.weight"]
    runs = [Run(whole, row * 128 + 32, row * 128 + 96) for row in range(9)]
    with pytest.raises(FormatError, match=r"turned groups \(convrot\) of 64 elements"):
        as_stored("part", runs, (9, 64))


def test_original_names_of_what_is_refused(tmp_path):
    tensors = with_told("nvfp4", swizzle="none")
    save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / "m.safetensors")
    whole = open_checkpoint(tmp_path / "m.safetensors").tensors["proj.weight"]
    with pytest.raises(FormatError, match="swizzle='none', which is not known"):
        as_stored("part", [Run(whole, 0, 64)], (1, 64))


def test_declarations_without_end(tmp_path):
    text = torch.tensor(list(b"[" * 100_000), dtype=torch.uint8)
    with pytest.raises(FormatError, match="'proj.comfy_quant' is no JSON"):
        load(tmp_path, {**stored("int8"), "proj.comfy_quant": text}, "cpu,*")


def test_reading_more_rows_than_at_once(tmp_path, monkeypatch):
    from distorch.formats import packing

    monkeypatch.setattr(packing, "_AT_ONCE", 1000)
    layer, weight = large("nvfp4", 144, 160)
    assert torch.equal(weight_of(load(tmp_path, layer, "cpu,*", shape=(144, 160))), weight)


class Keeps(nn.Module):
    def __init__(self, buffer):
        super().__init__()
        numbers = torch.zeros(9, 128, dtype=torch.int8)
        if buffer:
            self.register_buffer("weight", numbers)
        else:
            self.weight = nn.Parameter(numbers, requires_grad=False)
        self.register_buffer("weight_scale", torch.zeros(9, 1))


@pytest.mark.parametrize("buffer", [True, False])
def test_modules_that_decode_for_themselves(tmp_path, buffer):
    save_file(stored("int8"), tmp_path / "m.safetensors")
    with pytest.raises(FormatError, match=r"proj\.weight.*int8_tensorwise with convrot"):
        distorch.load(
            nn.ModuleDict({"proj": Keeps(buffer)}), tmp_path / "m.safetensors", "cpu,*", min_bytes=0
        )


def test_tied_weights_that_are_turned_otherwise(tmp_path):
    """The same bytes, and another rotation of them."""
    one, other = stored("int8", "a"), stored("int8", "b")
    other["b.comfy_quant"] = note({**TOLD["int8"], "convrot_groupsize": 16})
    save_file({**one, **other}, tmp_path / "m.safetensors")
    module = nn.ModuleDict({name: nn.Linear(128, 9, bias=False) for name in "ab"})
    module["b"].weight = module["a"].weight
    with pytest.raises(FormatError, match="one weight in this module"):
        distorch.load(module, tmp_path / "m.safetensors", "cpu,*", min_bytes=0)
