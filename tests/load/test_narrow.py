# SPDX-License-Identifier: Apache-2.0
"""Bases of 8 bits, with and without scales; conversion on the way; torch files."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers.integrations import finegrained_fp8

import distorch
from distorch import FormatError, SpecError
from tests.formats.originals import FLUX, FluxTransformer2DModel, flux_inputs, outputs, small

SPECS = ["cpu,*", "cpu,0b;disk,*"]
FLOATS = [torch.float8_e4m3fn, torch.float8_e5m2]


def net(dtype=torch.bfloat16):
    return nn.ModuleDict({"a": nn.Linear(256, 200), "b": nn.Linear(200, 256)}).to(dtype)


def narrow(module, dtype):
    return {
        name: value.to(dtype) if value.dim() > 1 else value
        for name, value in module.state_dict().items()
    }


def lora(scale=1.0):
    generator = torch.Generator().manual_seed(0)
    down = torch.randn(4, 256, generator=generator) * scale
    return {"a.lora_A.weight": down, "a.lora_B.weight": torch.randn(200, 4, generator=generator)}


def delta(state):
    return state["a.lora_B.weight"].double() @ state["a.lora_A.weight"].double()


def load(path, spec, **options):
    return distorch.load(net(), path, spec, min_bytes=0, **options)


def bits(tensor):
    return tensor.contiguous().view(torch.uint8)


@pytest.mark.parametrize("mode", ["merge", "fetch", "background"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("spec", SPECS)
def test_a_delta_far_below_a_step_survives(tmp_path, spec, dtype, mode):
    torch.manual_seed(0)
    state = narrow(net(), dtype)
    save_file(state, tmp_path / "fp8.safetensors")
    small = lora(1e-4)
    model = load(tmp_path / "fp8.safetensors", spec, loras=[(small, 1.0)], lora_mode=mode)
    patched = distorch.materialize(model["a"].weight)
    assert patched.dtype == torch.bfloat16
    exact = state["a.weight"].double() + delta(small)
    assert torch.equal(patched, exact.float().to(torch.bfloat16))
    assert not torch.equal(patched.float(), state["a.weight"].float())
    unpatched = distorch.materialize(model["b"].weight)
    assert unpatched.dtype == dtype and torch.equal(bits(unpatched), bits(state["b.weight"]))
    assert distorch.report(model).ok, distorch.report(model).problems
    distorch.set_loras(model, [])
    back = distorch.materialize(model["a"].weight)
    assert back.dtype == dtype and torch.equal(bits(back), bits(state["a.weight"]))
    distorch.set_loras(model, [(small, 1.0)])
    assert torch.equal(distorch.materialize(model["a"].weight), patched)
    assert distorch.report(model).ok, distorch.report(model).problems


@pytest.mark.parametrize("choice", ["float16", torch.float32, "base"])
def test_dtype_of_patched_weights(tmp_path, choice):
    torch.manual_seed(0)
    state = narrow(net(), torch.float8_e4m3fn)
    save_file(state, tmp_path / "fp8.safetensors")
    file, big = tmp_path / "fp8.safetensors", lora(0.1)
    model = load(file, "cpu,*", loras=[(big, 1.0)], patched_dtype=choice)
    dtype = {"float16": torch.float16, "base": torch.float8_e4m3fn}.get(choice, choice)
    exact = (state["a.weight"].double() + delta(big)).float()
    patched = distorch.materialize(model["a"].weight)
    assert patched.dtype == dtype
    assert (bits(patched) == bits(exact.to(dtype))).float().mean() > 0.999  # ties aside
    with pytest.raises(SpecError, match="patched_dtype"):
        load(file, "cpu,*", patched_dtype="float8")


SCALES = {
    "one": (lambda: torch.tensor(0.37), lambda s: s),
    "one in a list": (lambda: torch.tensor([0.37]), lambda s: s),
    "per row": (lambda: torch.rand(200, 1) + 0.1, lambda s: s),
    "blocks": (
        lambda: torch.rand(2, 2) + 0.1,
        lambda s: s.repeat_interleave(128, 0).repeat_interleave(128, 1)[:200],
    ),
}


@pytest.mark.parametrize("mode", ["merge", "fetch", "background"])
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("kind", SCALES)
def test_scales_beside_fp8(tmp_path, kind, spec, mode):
    torch.manual_seed(0)
    make, spread = SCALES[kind]
    state = narrow(net(), torch.float8_e4m3fn)
    scale = make()
    state["a.weight_scale"], state["a.input_scale"] = scale, torch.tensor(1.0)
    state["b.scale_weight"] = torch.tensor(2.0)
    save_file(state, tmp_path / "scaled.safetensors")
    wide = state["a.weight"].float() * spread(scale)
    model = load(tmp_path / "scaled.safetensors", spec)
    assert torch.equal(distorch.materialize(model["a"].weight), wide.bfloat16())
    assert torch.equal(
        distorch.materialize(model["b"].weight), (state["b.weight"].float() * 2).bfloat16()
    )
    report = distorch.report(model)
    assert report.ok
    assert sum(report.bytes.values()) == 2 * 200 * 256 + 2 * (200 + 256)  # as narrow as the file
    x = torch.randn(3, 256).bfloat16()
    expected = nn.functional.linear(x, wide.bfloat16(), model["a"].bias)
    assert torch.equal(model["a"](x), expected)
    small = lora(1e-4)
    distorch.set_loras(model, [(small, 0.5)], lora_mode=mode)
    patched = distorch.materialize(model["a"].weight)
    fresh = load(tmp_path / "scaled.safetensors", spec, loras=[(small, 0.5)], lora_mode=mode)
    assert torch.equal(patched, distorch.materialize(fresh["a"].weight))
    exact = wide.double() + 0.5 * delta(small)
    assert (
        (patched.double() - exact).abs() <= torch.finfo(torch.bfloat16).eps * exact.abs() + 1e-9
    ).all()
    distorch.set_loras(model, [])
    assert torch.equal(distorch.materialize(model["a"].weight), wide.bfloat16())
    assert torch.equal(
        distorch.materialize(distorch.undistribute(model)["a"].weight), wide.bfloat16()
    )


def test_int8_with_scales(tmp_path):
    torch.manual_seed(0)
    state = {k: v.clone() for k, v in net().state_dict().items()}
    largest = torch.rand(200) + 0.5
    state["a.weight"] = torch.randint(-127, 128, (200, 256), dtype=torch.int8)
    state["a.SCB"] = largest
    state["b.weight"] = torch.randint(-127, 128, (256, 200), dtype=torch.int8)
    state["b.weight_scale"] = torch.rand(256, 1)
    save_file(state, tmp_path / "int8.safetensors")
    model = load(tmp_path / "int8.safetensors", "cpu,0b;disk,*", loras=[(lora(0.01), 1.0)])
    exact = state["a.weight"].float() * (largest[:, None] / 127)
    patched = distorch.materialize(model["a"].weight)
    wanted = exact.double() + delta(lora(0.01))
    assert (
        (patched.double() - wanted).abs() <= torch.finfo(torch.bfloat16).eps * wanted.abs() + 1e-9
    ).all()
    other = state["b.weight"].float() * state["b.weight_scale"]
    assert torch.equal(distorch.materialize(model["b"].weight), other.bfloat16())


def test_scales_of_no_known_shape(tmp_path):
    state = narrow(net(), torch.float8_e4m3fn) | {"a.weight_scale": torch.rand(7)}
    save_file(state, tmp_path / "odd.safetensors")
    with pytest.raises(FormatError, match=r"a\.weight_scale.*\(7,\).*one per row"):
        load(tmp_path / "odd.safetensors", "cpu,*")


def test_scales_that_the_module_has_itself(tmp_path):
    """A module with its own code for fp8 gets numbers and scales as they are."""

    class Scaled(nn.Linear):
        def __init__(self):
            super().__init__(256, 200, bias=False, dtype=torch.bfloat16)
            self.weight = nn.Parameter(self.weight.to(torch.float8_e4m3fn), requires_grad=False)
            self.weight_scale = nn.Parameter(torch.ones(200, 1))

        def forward(self, x):
            return x @ (self.weight.to(x.dtype) * self.weight_scale.to(x.dtype)).t()

    torch.manual_seed(0)
    source = Scaled()
    source.weight_scale.data.uniform_()
    save_file(source.state_dict(), tmp_path / "own.safetensors")
    x = torch.randn(2, 256).bfloat16()
    expected = source(x)
    model = distorch.load(Scaled(), tmp_path / "own.safetensors", "cpu,0b;disk,*", min_bytes=0)
    assert model.weight.dtype == torch.float8_e4m3fn
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("spec", SPECS)
def test_conversion_on_the_way(tmp_path, spec):
    torch.manual_seed(0)
    source = net(torch.float32)
    save_file(source.state_dict(), tmp_path / "fp32.safetensors")
    model = load(tmp_path / "fp32.safetensors", spec, dtype=torch.float16)
    for name, parameter in model.named_parameters():
        assert torch.equal(distorch.materialize(parameter), source.state_dict()[name].half()), name
    assert distorch.report(model).ok
    patched = load(tmp_path / "fp32.safetensors", spec, dtype=torch.bfloat16, loras=[(lora(), 1.0)])
    exact = source["a"].weight.double() + delta(lora())
    actual = distorch.materialize(patched["a"].weight).double()
    assert ((actual - exact).abs() <= torch.finfo(torch.bfloat16).eps * exact.abs()).all()
    with pytest.raises(SpecError, match="dtype"):
        load(tmp_path / "fp32.safetensors", spec, dtype="int8")


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("wrapper", [None, "state_dict"])
def test_torch_files(tmp_path, spec, wrapper):
    torch.manual_seed(0)
    source = net()
    state = source.state_dict()
    torch.save({wrapper: state} if wrapper else state, tmp_path / "model.pt")
    model = load(tmp_path / "model.pt", spec, loras=[(lora(), 0.5)])
    expected = (source["a"].weight.double() + 0.5 * delta(lora())).float().bfloat16()
    assert (distorch.materialize(model["a"].weight) == expected).float().mean() > 0.99
    assert torch.equal(distorch.materialize(model["b"].weight), source["b"].weight)
    if "disk" in spec:  # read from that very file
        assert str(tmp_path / "model.pt") in torch.ops.distorch.weight_info(model["b"].weight)[3]


def test_torch_files_that_are_none(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("never",))

    torch.save({"a.weight": Evil()}, tmp_path / "evil.pt")
    (tmp_path / "cut.pt").write_bytes(b"PK\x03\x04 nothing")
    torch.save([1, 2, 3], tmp_path / "list.pt")
    for name in ("evil.pt", "cut.pt", "list.pt"):
        with pytest.raises(FormatError, match=name):
            load(tmp_path / name, "cpu,*")


def test_loras_in_torch_files(tmp_path):
    torch.manual_seed(0)
    save_file(net().state_dict(), tmp_path / "base.safetensors")
    torch.save(lora(), tmp_path / "lora.bin")
    one = load(tmp_path / "base.safetensors", "cpu,*", loras=[(tmp_path / "lora.bin", 0.5)])
    two = load(tmp_path / "base.safetensors", "cpu,*", loras=[(lora(), 0.5)])
    assert torch.equal(distorch.materialize(one["a"].weight), distorch.materialize(two["a"].weight))


def test_layerwise_casting_of_diffusers():
    """Its hooks widen fp8 weights before a layer and narrow them after it, on donors too."""
    model = small(FluxTransformer2DModel, FLUX).to(torch.bfloat16)
    model.enable_layerwise_casting(torch.float8_e4m3fn, torch.bfloat16)
    inputs = {
        name: value.bfloat16() if value.is_floating_point() else value
        for name, value in flux_inputs().items()
    }
    expected = outputs(model, inputs)
    for spec in SPECS:
        distorch.distribute(model, spec, min_bytes=0)
        for _ in range(2):
            assert torch.equal(outputs(model, inputs), expected)
            assert distorch.report(model).ok
    assert any(
        p.dtype == torch.float8_e4m3fn and distorch.is_sharded(p) for p in model.parameters()
    )


class Fp8Net(nn.Module):
    """What transformers makes of linear layers and tables of fine-grained fp8 checkpoints."""

    def __init__(self):
        super().__init__()
        self.table = finegrained_fp8.FP8Embedding(50, 64)
        self.blocks = finegrained_fp8.FP8Linear(64, 96, block_size=(32, 32), has_bias=True)
        self.whole = finegrained_fp8.FP8Linear(96, 40)

    def forward(self, ids):
        return self.whole(torch.tanh(self.blocks(self.table(ids))))


def test_fp8_modules_of_transformers(tmp_path, monkeypatch):
    """Numbers and scales arrive as they are, forward and backward; the product itself stands in for
    a kernel that only GPUs have.
    """

    def product(x, weight, scale, block_size=None, bias=None, *_):
        wide = finegrained_fp8._dequantize_fp8_weight(weight, scale, block_size, x.dtype)
        return nn.functional.linear(x, wide, bias)

    monkeypatch.setattr(finegrained_fp8, "fp8_linear", product)
    torch.manual_seed(0)
    source = Fp8Net().requires_grad_(False)
    for name, parameter in source.named_parameters():
        values = (
            torch.rand(parameter.shape) + 0.5 if "scale" in name else torch.randn(parameter.shape)
        )
        parameter.data = values.to(parameter.dtype)
    save_file(source.state_dict(), tmp_path / "own.safetensors")

    ids = torch.arange(6)
    expected = source(ids)
    for spec in SPECS:
        with torch.device("meta"):
            model = Fp8Net().requires_grad_(False)
        distorch.load(model, tmp_path / "own.safetensors", spec, min_bytes=0)
        assert model.blocks.weight.dtype == torch.float8_e4m3fn
        assert torch.equal(model(ids), expected)
        x, y = (torch.ones(2, 64, requires_grad=True) for _ in range(2))
        source.blocks(x).sum().backward()
        model.blocks(y).sum().backward()
        assert torch.equal(x.grad, y.grad)

    lora = {"whole.lora_up.weight": torch.ones(40, 2), "whole.lora_down.weight": torch.ones(2, 96)}
    before = model(ids)
    with pytest.raises(
        distorch.PlacementError, match="'weight_scale_inv'.*belong to its FP8Linear"
    ):
        distorch.set_loras(model, [(lora, 1.0)])
    assert torch.equal(model(ids), before)
    with torch.device("meta"):
        model = Fp8Net()
    with pytest.raises(distorch.PlacementError, match="would be wrong"):
        distorch.load(model, tmp_path / "own.safetensors", "cpu,*", loras=[(lora, 1.0)])
    assert model.whole.weight.is_meta
