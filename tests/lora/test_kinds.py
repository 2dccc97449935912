# SPDX-License-Identifier: Apache-2.0
"""Every kind of patch against the library that defines it (PEFT) or the formula in float64."""

import math
import subprocess
import sys

import pytest
import torch
from peft import (
    BOFTConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    get_peft_model,
    get_peft_model_state_dict,
)
from safetensors.torch import save_file
from torch import nn

import distorch
from distorch import FormatError, _ops
from distorch.lora import patches

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(24, 32)
        self.to_q = nn.Linear(32, 64)
        self.conv = nn.Conv2d(8, 16, 3)
        self.out = nn.Linear(64, 32)

    def forward(self, tokens):
        hidden = self.to_q(self.emb(tokens))
        image = self.conv(hidden.reshape(1, 8, -1, 8))
        return self.out(hidden) + image.sum() * 0


LORA = {"r": 4, "lora_alpha": 6}
PEFT = {
    "lora": LoraConfig(target_modules=["to_q", "conv", "out", "emb"], **LORA),
    "rank stabilised": LoraConfig(target_modules=["to_q", "out"], use_rslora=True, **LORA),
    "patterns": LoraConfig(
        target_modules=["to_q", "out"], rank_pattern={"to_q": 8}, alpha_pattern={"out": 3}, **LORA
    ),
    "dora": LoraConfig(target_modules=["to_q", "conv", "out"], use_dora=True, **LORA),
    "lora bias": LoraConfig(target_modules=["to_q", "out"], lora_bias=True, **LORA),
    "loha": LoHaConfig(target_modules=["to_q", "conv", "out"], r=3, alpha=6),
    "loha effective": LoHaConfig(target_modules=["conv"], r=3, alpha=6, use_effective_conv2d=True),
    "lokr": LoKrConfig(target_modules=["to_q", "conv", "out"], r=3, alpha=6),
    "lokr whole": LoKrConfig(target_modules=["to_q", "out"], r=64, alpha=5),
    "lokr effective": LoKrConfig(
        target_modules=["conv"], r=2, alpha=5, use_effective_conv2d=True, decompose_both=True
    ),
    "oft": OFTConfig(target_modules=["to_q", "out"], oft_block_size=8, use_cayley_neumann=False),
    "oft series": OFTConfig(target_modules=["to_q", "out"], oft_block_size=8),
    "oft conv": OFTConfig(target_modules=["conv"], oft_block_size=8, use_cayley_neumann=False),
    "boft": BOFTConfig(target_modules=["to_q", "out"], boft_block_size=4),
    "boft stages": BOFTConfig(
        target_modules=["to_q", "out"], boft_block_size=4, boft_n_butterfly_factor=2
    ),
}


def saved(tmp_path, module, dtype=torch.float32):
    path = tmp_path / "base.safetensors"
    save_file({k: v.to(dtype).contiguous() for k, v in module.state_dict().items()}, path)
    return path


def one_step(exact, dtype):
    """The distance between neighbours of `dtype` around each value."""
    exponent = torch.floor(torch.log2(exact.abs().clamp_min(2.0**-14)))
    return torch.finfo(dtype).eps * torch.exp2(exponent)


def assert_close(actual, exact):
    error = (actual.double() - exact).abs()
    assert (error <= 1.0 * one_step(exact, actual.dtype)).all(), error.max()


@pytest.fixture
def base(tmp_path):
    torch.manual_seed(1)
    return Net()


def trained(base, kind, folder):
    """A PEFT adapter with random values, saved as PEFT does; and the weights merged in float64."""
    model = Net()
    model.load_state_dict(base.state_dict())
    adapted = get_peft_model(model.double(), PEFT[kind])
    generator = torch.Generator().manual_seed(5)
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad and "magnitude" not in name and "boft_s" not in name:
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.1
            parameter.data.copy_(noise.float())
        elif parameter.requires_grad:
            scale = 1 + torch.rand(parameter.shape, generator=generator, dtype=torch.float64) * 0.2
            parameter.data.copy_((parameter.data * scale).float())
    for parameter in adapted.parameters():
        parameter.data = parameter.data.double()
    adapted.save_pretrained(folder)
    return dict(adapted.merge_and_unload().named_parameters())


@pytest.fixture(autouse=True, params=["whole", "in parts"])
def wide_numbers(request, monkeypatch):
    """Patches that are no products are added to some rows after the other where it is many."""
    if request.param == "in parts":
        monkeypatch.setattr(patches, "_WIDE_NUMBERS", 200)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", PEFT)
def test_adapters_that_peft_saved(base, tmp_path, kind, dtype):
    for parameter in base.parameters():
        parameter.data = parameter.data.to(dtype).float()
    exact = trained(base, kind, tmp_path / "adapter")
    path = saved(tmp_path, base, dtype)
    model = distorch.load(Net(), path, "cpu,*", loras=[(tmp_path / "adapter", 1.0)], min_bytes=0)
    changed = 0
    for name, parameter in model.named_parameters():
        assert parameter.dtype == dtype
        actual = distorch.materialize(parameter)
        assert_close(actual, exact[name].detach())
        changed += not torch.equal(actual.float(), base.state_dict()[name])
    assert changed >= len(PEFT[kind].target_modules)


def test_a_state_dict_of_peft(base, tmp_path):
    """Without its configuration the scale is 1, so alpha = rank."""
    config = LoraConfig(target_modules=["to_q"], r=4, lora_alpha=4)
    model = get_peft_model(Net(), config)
    nn.init.normal_(model.base_model.model.to_q.lora_B["default"].weight)
    state = get_peft_model_state_dict(model)
    loaded = distorch.load(Net(), saved(tmp_path, base), "cpu,*", loras=[(state, 0.5)])
    up, down = (state[f"base_model.model.to_q.lora_{side}.weight"].double() for side in "BA")
    assert_close(
        distorch.materialize(loaded.to_q.weight), base.to_q.weight.double() + 0.5 * up @ down
    )


# ---- kinds that PEFT does not have, by their formulas -------------------------------


def rand(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator)


def tucker(core, up, down):
    return torch.einsum("ij...,ip,jr->pr...", core.double(), up.double(), down.double())


def locon_mid():
    up, down, mid = rand(16, 3, 1, 1), rand(3, 8, 1, 1), rand(3, 3, 3, 3)
    state = {"conv.lora_up.weight": up, "conv.lora_down.weight": down, "conv.lora_mid.weight": mid}
    state["conv.alpha"] = torch.tensor(2.0)
    return state, "conv.weight", lambda w: 2 / 3 * tucker(mid, up.flatten(1).t(), down.flatten(1))


def glora():
    a1, a2, b1, b2 = rand(3, 32), rand(32, 3, seed=1), rand(3, 32, seed=2), rand(64, 3, seed=3)
    state = {
        f"to_q.{k}.weight": v
        for k, v in zip(("a1", "a2", "b1", "b2"), (a1, a2, b1, b2), strict=True)
    }
    state["to_q.alpha"] = torch.tensor(6.0)
    a1, a2, b1, b2 = (t.double() for t in (a1, a2, b1, b2))
    return state, "to_q.weight", lambda w: 2 * (w @ a2 @ a1 + b2 @ b1)


def lycoris_oft():
    blocks = rand(8, 8, 8) * 0.1
    skew = blocks.double() - blocks.double().transpose(1, 2)
    one = torch.eye(8, dtype=torch.float64)
    turn = (one + skew) @ torch.linalg.inv(one - skew)
    state = {"to_q.oft_blocks": blocks, "to_q.alpha": torch.tensor(0.0)}
    return state, "to_q.weight", lambda w: torch.block_diag(*turn.transpose(1, 2)) @ w - w


def kohya_dora():
    up, down, scale = rand(64, 4), rand(4, 32), rand(64, 1).abs() + 1
    state = {"to_q.lora_up.weight": up, "to_q.lora_down.weight": down, "to_q.dora_scale": scale}
    state["to_q.alpha"] = torch.tensor(2.0)

    def delta(w):
        moved = w + 0.5 * up.double() @ down.double()
        return moved / moved.norm(dim=1, keepdim=True) * scale.double() - w

    return state, "to_q.weight", delta


def dora_by_column():
    state, name, _ = kohya_dora()
    up, down = (state[f"to_q.lora_{side}.weight"].double() for side in ("up", "down"))
    state["to_q.dora_scale"] = scale = rand(1, 32).abs() + 1

    def delta(w):
        moved = w + 0.5 * up @ down
        return moved / moved.norm(dim=0, keepdim=True) * scale.double() - w

    return state, name, delta


def difference():
    value = rand(64, 32)
    return {"to_q.diff": value}, "to_q.weight", lambda w: value.double()


def bias_difference():
    value = rand(64)
    return {"to_q.diff_b": value}, "to_q.bias", lambda w: value.double()


FORMULAS = [locon_mid, glora, lycoris_oft, kohya_dora, dora_by_column, difference, bias_difference]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("formula", FORMULAS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("strength", [1.0, -0.7])
def test_formulas(base, tmp_path, formula, dtype, strength):
    state, name, delta = formula()
    path = saved(tmp_path, base, dtype)
    original = base.state_dict()[name].to(dtype).double()
    model = distorch.load(Net(), path, "cpu,0b;disk,*", loras=[(state, strength)], min_bytes=0)
    actual = distorch.materialize(dict(model.named_parameters())[name])
    assert_close(actual, original + strength * delta(original))


@pytest.mark.parametrize("strength", [1.0, 0.6, -0.7])
def test_what_is_replaced_is_so_at_any_strength(base, strength):
    """As in ComfyUI, diffusers and PEFT. The last one wins; later patches are added to it."""
    one, other, added = (rand(64, 32, seed=seed) for seed in range(3))
    model = distorch.distribute(base, "cpu,0b;disk,*", min_bytes=0, compute="cpu")
    before = distorch.materialize(model.to_q.weight).double()
    set_one, set_other = {"to_q.set_weight": one}, {"to_q.set_weight": other}
    difference = {"to_q.diff": added}
    distorch.set_loras(model, [(set_one, strength)])
    assert torch.equal(model.to_q.weight.detach(), one)
    distorch.set_loras(model, [(difference, 0.5), (set_one, strength), (set_other, 0.3)])
    assert torch.equal(model.to_q.weight.detach(), other)
    distorch.set_loras(model, [(set_one, strength), (difference, 0.5)])
    assert_close(model.to_q.weight.detach(), one.double() + 0.5 * added.double())
    distorch.set_loras(model, [(set_one, 0.0)])
    assert torch.equal(model.to_q.weight.detach(), before.float())


def test_several_in_the_order_given(base, tmp_path):
    """LoRA after DoRA after a difference: every delta is of the original, rounded once together."""
    parts = [
        kohya_dora(),
        difference(),
        ({"to_q.lora_up.weight": rand(64, 2), "to_q.lora_down.weight": rand(2, 32)},),
    ]
    path = saved(tmp_path, base, torch.bfloat16)
    loras = [(part[0], 0.5) for part in parts]
    model = distorch.load(Net(), path, "cpu,*", loras=loras, min_bytes=0)
    w = base.to_q.weight.bfloat16().double()
    exact = (
        w
        + 0.5 * parts[0][2](w)
        + 0.5 * parts[1][2](w)
        + 0.5 * rand(64, 2).double() @ rand(2, 32).double()
    )
    assert_close(distorch.materialize(model.to_q.weight), exact)


BROKEN = {
    "inf in a LoHa": ({f"to_q.hada_w{i}_{s}": rand(64, 2) if s == "a" else rand(2, 32) * math.inf
                       for i in (1, 2) for s in "ab"}, "NaN or inf"),
    "LoKr of another size": ({"to_q.lokr_w1": rand(4, 4), "to_q.lokr_w2": rand(4, 4)}, "another model"),
    "half a LoKr": ({"to_q.lokr_w1": rand(4, 4), "to_q.lokr_w2_a": rand(16, 2)}, "one of its two factors"),
    "a difference of another shape": ({"to_q.diff": rand(3, 3)}, r"\[3, 3\].*\(64, 32\)"),
    "factors that do not meet": ({"to_q.lora_up.weight": rand(64, 3), "to_q.lora_down.weight": rand(4, 32)}, "do not make a product"),
    "a bias where there is none": ({"emb.diff_b": rand(32)}, "has none"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_patches(base, tmp_path, kind):
    state, message = BROKEN[kind]
    module = Net()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    with pytest.raises(FormatError, match=message):
        distorch.load(module, saved(tmp_path, base), "cpu,*", loras=[(state, 1.0)])
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())


MEMORY = """
import torch
from distorch.lora import LoraReader, merge

size = 4096
shapes = {"w.weight": (size, size)}
parts = {f"w.hada_w{i}_{side}": torch.ones((size, 4) if side == "a" else (4, size))
         for i in (1, 2) for side in "ab"}
patches, _ = LoraReader(shapes).read([(parts, 1e-3)], True)
weight = torch.ones(size, size, dtype=torch.bfloat16)
warm = torch.ones(256, 256, dtype=torch.float64)
warm @ warm


def peak():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) << 10


before = peak()
merged = merge(patches.of(["w.weight"]), weight, torch.bfloat16)
assert merged[5, 7] == torch.tensor(1 + 1e-3 * 16).bfloat16()
print(peak() - before)
"""


def test_no_wide_copy_of_a_big_weight():
    """In float64 it is 128 MiB; so would be each of its deltas."""
    done = subprocess.run(
        [sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True
    )
    result = 2 * 4096**2
    assert int(done.stdout) - result < 96 << 20


@pytest.mark.parametrize("shape", [(0, 8), (8, 0), (1, 1), (48, 3), (97, 5000)])
def test_products_on_weights_of_any_size(shape):
    rows, columns = shape
    up, down, terms = rand(rows, 2), rand(2, columns), _ops.Terms()
    terms.add(up, down, 0.5, 0)
    weight = rand(rows, columns).bfloat16()
    into = torch.empty_like(weight)
    _ops.decode(into, weight, "bfloat16", terms=terms)
    assert_close(into, weight.double() + 0.5 * up.double() @ down.double())


@pytest.mark.parametrize("kind", ["diff", "set_weight"])
def test_a_scalar_parameter(kind):
    model = nn.ModuleDict({"part": nn.Module()})
    model["part"].gate = nn.Parameter(torch.tensor(2.0))
    distorch.distribute(model, "cpu,0b;disk,*", min_bytes=0, compute="cpu")
    distorch.set_loras(model, [({f"part.gate.{kind}": torch.tensor(0.5)}, 1.0)])
    assert model["part"].gate.item() == {"diff": 2.5, "set_weight": 0.5}[kind]
