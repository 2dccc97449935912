# SPDX-License-Identifier: Apache-2.0
"""LoRA at load: round_once(fp32(W) + sum of strength * alpha / rank * B @ A), for any placement."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import distorch
from distorch import FormatError

SPECS = ["cpu,0b;disk,*", "cpu,*"]


def net(dtype=torch.bfloat16):
    return nn.ModuleDict({"to_q": nn.Linear(32, 48), "to_out": nn.Linear(48, 32)}).to(dtype)


def factors(rank=4, dtype=torch.float32, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (
            torch.randn(rank, inner, generator=generator).to(dtype),
            torch.randn(outer, rank, generator=generator).to(dtype),
        )
        for name, inner, outer in [("to_q", 32, 48), ("to_out", 48, 32)]
    }


def spelled(pairs, down, up, prefix="", alpha=None):
    state = {}
    for name, (a, b) in pairs.items():
        state[f"{prefix}{name}{down}"], state[f"{prefix}{name}{up}"] = a, b
        if alpha is not None:
            state[f"{prefix}{name}.alpha"] = torch.tensor(float(alpha))
    return state


def merged(weight, *terms):
    exact = weight.double()
    for scale, (down, up) in terms:
        exact = exact + scale * (up.double() @ down.double())
    return exact


def assert_rounded_once(actual, exact):
    """The nearest value of the weight's dtype, but for ties that fp32 arithmetic may move."""
    nearest = exact.to(actual.dtype)
    one_step = torch.finfo(actual.dtype).eps * exact.abs().clamp_min(1e-30)
    error = (actual.double() - exact).abs()
    assert (error <= 0.5001 * one_step + 1e-6 * exact.abs().max()).all()
    assert (actual == nearest).float().mean() > 0.99


@pytest.fixture
def base(tmp_path):
    source = net()
    save_file(source.state_dict(), tmp_path / "base.safetensors")
    return source, tmp_path / "base.safetensors"


SPELLINGS = {
    "peft": (".lora_A.weight", ".lora_B.weight", "base_model.model."),
    "peft named": (".lora_A.default.weight", ".lora_B.default.weight", ""),
    "diffusers": (".lora_A.weight", ".lora_B.weight", "transformer."),
    "kohya factors": (".lora_down.weight", ".lora_up.weight", "diffusion_model."),
}


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_formula(base, spec, spelling):
    source, path = base
    pairs = factors()
    lora = spelled(pairs, *SPELLINGS[spelling], alpha=2)
    loaded = distorch.load(net(), path, spec, loras=[(lora, 0.75)], min_bytes=0)
    for name in pairs:
        exact = merged(source[name].weight, (0.75 * 2 / 4, pairs[name]))
        assert_rounded_once(distorch.materialize(loaded[name].weight)
                            if distorch.is_sharded(loaded[name].weight) else loaded[name].weight,
                            exact)  # fmt: skip
        assert torch.equal(loaded[name].bias + 0, source[name].bias)


def test_two_loras_are_rounded_once(base):
    source, path = base
    one, two = factors(4, seed=1), factors(8, torch.float16, seed=2)
    loras = [(spelled(one, *SPELLINGS["peft"]), 0.5), (spelled(two, *SPELLINGS["peft"]), -0.25)]
    loaded = distorch.load(net(), path, "disk,*", loras=loras, min_bytes=0)
    for name in one:
        exact = merged(source[name].weight, (0.5, one[name]), (-0.25, two[name]))
        assert_rounded_once(loaded[name].weight + 0, exact)


def test_same_bits_everywhere(base):
    _, path = base
    loras = [(spelled(factors(), *SPELLINGS["peft"]), 0.3)]
    models = [distorch.load(net(), path, s, loras=loras, min_bytes=0) for s in SPECS]
    for name in ("to_q", "to_out"):
        values = [m[name].weight + 0 for m in models]
        assert torch.equal(values[0].view(torch.int16), values[1].view(torch.int16))


@pytest.mark.parametrize(
    "metadata",
    [
        {"lora_alpha": "8", "r": "4"},
        {"lora_adapter_metadata": json.dumps({"lora_alpha": 8, "r": 4})},
    ],
)
def test_alpha_of_the_file(base, tmp_path, metadata):
    source, path = base
    pairs = factors()
    lora = tmp_path / "lora.safetensors"
    save_file(spelled(pairs, *SPELLINGS["peft"]), lora, metadata)
    loaded = distorch.load(net(), path, "disk,*", loras=[(lora, 1.0)], min_bytes=0)
    assert_rounded_once(loaded["to_q"].weight + 0,
                        merged(source["to_q"].weight, (2.0, pairs["to_q"])))  # fmt: skip


def test_strength_zero_is_the_base(base):
    source, path = base
    loras = [(spelled(factors(), *SPELLINGS["peft"]), 0.0)]
    loaded = distorch.load(net(), path, "disk,*", loras=loras, min_bytes=0)
    assert torch.equal(loaded["to_q"].weight + 0, source["to_q"].weight)


def broken(change):
    state = spelled(factors(), *SPELLINGS["peft"])
    change(state)
    return state


KEY = "base_model.model.to_q.lora_A.weight"
REFUSED = {
    "another model": ({"x.lora_A.weight": torch.ones(2, 2), "x.lora_B.weight": torch.ones(2, 2)},
                      "fit no weight"),
    "one key too many": (broken(lambda s: s.update({"x.lora_A.weight": torch.ones(2, 2),
                                                    "x.lora_B.weight": torch.ones(2, 2)})),
                         "strict_loras"),
    "no second factor": (broken(lambda s: s.pop(KEY.replace("_A", "_B"))), "second factor"),
    "shape": (broken(lambda s: s.update({KEY: torch.ones(4, 31)})), r"\[48, 31\] of rank 4.*\(48, 32\)"),
    "nan": (broken(lambda s: s.update({KEY: torch.full((4, 32), float("nan"))})), "NaN"),
    "nothing": ({}, "fit no weight"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_refusals(base, kind):
    _, path = base
    lora, message = REFUSED[kind]
    module = net()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    with pytest.raises(FormatError, match=message):
        distorch.load(module, path, "disk,*", loras=[(lora, 1.0)], min_bytes=0)
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    assert not any(distorch.is_sharded(p) for p in module.parameters())


def test_not_strict_warns_and_goes_on(base):
    _, path = base
    lora, _ = REFUSED["one key too many"]
    with pytest.warns(UserWarning, match="1 of its 3"):
        distorch.load(net(), path, "disk,*", loras=[(lora, 1.0)], strict_loras=False, min_bytes=0)


def test_no_such_lora(base, tmp_path):
    _, path = base
    with pytest.raises(FormatError, match="no such file"):
        distorch.load(net(), path, "disk,*", loras=[(tmp_path / "none.safetensors", 1.0)])
