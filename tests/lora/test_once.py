# SPDX-License-Identifier: Apache-2.0
"""One change once: in a file that says it twice, and on weights that modules share."""

import itertools

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import distorch
from distorch.errors import FormatError


class Attention(nn.Module):
    """An attention's projections, in parts or fused."""

    def __init__(self, fused):
        super().__init__()
        torch.manual_seed(0)
        self.parts = {"qkv_proj": 24} if fused else {"q_proj": 8, "k_proj": 8, "v_proj": 8}
        for name, rows in self.parts.items():
            setattr(self, name, nn.Linear(8, rows, bias=False))

    def whole(self):
        return torch.cat([self.state_dict()[f"{name}.weight"] for name in self.parts])


def pair(stem, down, up, spelling=("lora_A.weight", "lora_B.weight")):
    return {f"{stem}.{spelling[0]}": down, f"{stem}.{spelling[1]}": up}


def both(change=0.0):
    """A fused projection and its parts, which differ by `change`."""
    torch.manual_seed(1)
    down, up = torch.randn(2, 8), torch.randn(24, 2)
    state = pair("qkv_proj", down, up)
    for name, rows in zip(("q_proj", "k_proj", "v_proj"), up.split(8), strict=True):
        state |= pair(name, down.clone(), rows + change)
    return state, up @ down


def change_of(module, state, whole):
    before = whole(module).clone()
    distorch.distribute(module, "cpu,0b;disk,*", min_bytes=0, compute="cpu")
    distorch.set_loras(module, [(state, 1.0)])
    return whole(module) - before


@pytest.mark.parametrize("fused", [True, False])
def test_fused_and_in_parts(fused):
    state, wanted = both()
    found = change_of(Attention(fused), state, Attention.whole)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    reordered = dict(sorted(state.items(), key=lambda item: "qkv" in item[0]))
    found = change_of(Attention(fused), reordered, Attention.whole)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fused", [True, False])
def test_fused_and_other_parts_are_refused(fused):
    with pytest.raises(FormatError, match="'qkv_proj' and 'q_proj'|'q_proj' and 'qkv_proj'"):
        change_of(Attention(fused), both(0.5)[0], Attention.whole)


SPELLED = {
    "prefixes": ("transformer.proj", "base_model.model.proj"),
    "kohya": ("lora_unet_proj", "unet.proj"),
    "wrapped": ("proj", "diffusion_model.proj"),
}


@pytest.mark.parametrize("case", SPELLED)
@pytest.mark.parametrize("rounded", [False, True])
def test_one_weight_by_two_spellings(case, rounded):
    module = nn.ModuleDict({"proj": nn.Linear(8, 6, bias=False)})
    torch.manual_seed(2)
    down, up = torch.randn(2, 8), torch.randn(6, 2)
    first, second = SPELLED[case]
    # The same product, written otherwise: the rank turned around, the scale in another factor.
    again = pair(second, 2 * down.flip(0), up.flip(1) / 2)
    if rounded:
        again = pair(second, down, up * (1 + 1e-6))
    state = pair(first, down, up) | again
    found = change_of(module, state, lambda m: m.state_dict()["proj.weight"])
    torch.testing.assert_close(found, up @ down, rtol=1e-4, atol=1e-5)
    with pytest.raises(FormatError, match=f"'{first}' and '{second}' both change 'proj.weight'"):
        other = pair(first, down, up) | pair(second, down, 1.1 * up)
        change_of(nn.ModuleDict({"proj": nn.Linear(8, 6)}), other, lambda m: m["proj"].weight)


def test_kinds_are_compared_by_what_they_do():
    """A LoRA, and the difference that it makes."""
    module = nn.ModuleDict({"proj": nn.Linear(8, 6, bias=False)})
    torch.manual_seed(3)
    down, up = torch.randn(2, 8), torch.randn(6, 2)
    state = pair("proj", down, up) | {"unet.proj.diff": up @ down}
    found = change_of(module, state, lambda m: m.state_dict()["proj.weight"])
    torch.testing.assert_close(found, up @ down, rtol=1e-5, atol=1e-5)


def test_two_adapters_in_one_file():
    torch.manual_seed(4)
    down, up = torch.randn(2, 8), torch.randn(6, 2)
    named = [
        ("lora_A.default.weight", "lora_B.default.weight"),
        ("lora_A.b.weight", "lora_B.b.weight"),
    ]
    for change in (0.0, 1.0):
        state = pair("proj", down, up, named[0]) | pair("proj", down, up + change, named[1])
        module = nn.ModuleDict({"proj": nn.Linear(8, 6, bias=False)})
        if change:
            with pytest.raises(
                FormatError, match="lora_B.default.weight' and 'proj.lora_B.b.weight'"
            ):
                change_of(module, state, lambda m: m.state_dict()["proj.weight"])
        else:
            found = change_of(module, state, lambda m: m.state_dict()["proj.weight"])
            torch.testing.assert_close(found, up @ down, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("strict", [True, False])
def test_parts_that_do_not_go_together(strict):
    torch.manual_seed(5)
    module = distorch.distribute(nn.ModuleDict({"proj": nn.Linear(8, 6)}), "cpu,*", min_bytes=0)
    state = pair("proj", torch.randn(2, 8), torch.randn(6, 2))
    for key, message in {
        "proj.diff": "diff.*no kind of LoRA has both",
        "proj.lora_E": "'proj.lora_E' belongs to 'proj'",
    }.items():
        with pytest.raises(FormatError, match=message):
            distorch.set_loras(
                module, [(state | {key: torch.ones(6, 8)}, 1.0)], strict_loras=strict
            )
    with pytest.raises(FormatError, match="alpha has the shape"):
        distorch.set_loras(module, [(state | {"proj.alpha": torch.ones(2)}, 1.0)])


# --- tied weights ---


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(6)
        self.embed = nn.Embedding(12, 8)
        self.inner = nn.Linear(8, 8)
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(self.inner(self.embed(x)))


def ends(*names, change=0.0):
    torch.manual_seed(7)
    down, up = torch.randn(2, 8), torch.randn(12, 2)
    state = {}
    if "head" in names:
        state |= pair("head", down, up)
    if "embed" in names:  # PEFT keeps an embedding's factors turned over
        state |= {"embed.lora_embedding_A": (up + change).t().contiguous(),
                  "embed.lora_embedding_B": down.t().contiguous()}  # fmt: skip
    return state, up @ down


@pytest.mark.parametrize("mode", ["merge", "fetch"])
@pytest.mark.parametrize("way", ["load", "set_loras"])
def test_tied_weights_are_changed_alike(tmp_path, mode, way):
    torch.save({"embed.weight": Tied().embed.weight.detach(), **Tied().inner.state_dict(prefix="inner.")},
               tmp_path / "base.pt")  # fmt: skip

    def with_loras(*loras):
        if way == "load":
            return distorch.load(Tied(), tmp_path / "base.pt", "cpu,0b;disk,*", min_bytes=0,
                                 compute="cpu", loras=loras, lora_mode=mode)  # fmt: skip
        module = distorch.distribute(Tied(), "cpu,0b;disk,*", min_bytes=0, compute="cpu")
        return distorch.set_loras(module, loras, lora_mode=mode)

    for state in (ends("head")[0], ends("embed")[0], ends("head", "embed", change=0.1)[0]):
        with pytest.raises(FormatError, match="'embed.weight' and 'head.weight' are tied"):
            with_loras((state, 1.0))
    state, wanted = ends("head", "embed")
    module = with_loras((state, 0.5))
    assert module.head.weight is module.embed.weight
    found = distorch.materialize(module.embed.weight) - Tied().embed.weight
    torch.testing.assert_close(found, 0.5 * wanted, rtol=1e-5, atol=1e-5)
    with_loras((pair("inner", torch.ones(1, 8), torch.ones(8, 1)), 1.0))  # beside a tie


def test_one_module_by_two_names_is_no_tie():
    torch.manual_seed(8)
    down, up = torch.randn(2, 8), torch.randn(6, 2)

    def change(state):
        module = nn.ModuleDict({"a": nn.Linear(8, 6, bias=False)})
        module["b"] = module["a"]
        return change_of(module, state, lambda m: m.state_dict()["a.weight"])

    for names in (["a"], ["b"], ["a", "b"]):
        state = dict(itertools.chain(*(pair(name, down, up).items() for name in names)))
        torch.testing.assert_close(change(state), up @ down, rtol=1e-5, atol=1e-5)
    with pytest.raises(FormatError, match="'a.weight' and 'b.weight' are one module"):
        change(pair("a", down, up) | pair("b", down, 2 * up))


def test_an_embedding_that_was_saved_whole_is_for_all(tmp_path):
    """As PEFT loads it: into the one parameter."""
    value = torch.ones(12, 8)
    for key, saved, right in (
        ("embed", None, True),
        ("head", None, True),
        ("embed", ["embed"], False),
    ):
        module = distorch.distribute(Tied(), "cpu,*", min_bytes=0, compute="cpu")
        (tmp_path / "adapter_config.json").write_text(
            f'{{"r": 2, "modules_to_save": {saved or []}}}'.replace("'", '"')
        )
        save_file({f"base_model.model.{key}.weight": value}, tmp_path / "adapter_model.safetensors")
        if right:
            distorch.set_loras(module, [(tmp_path, 1.0)])
            assert torch.equal(distorch.materialize(module.embed.weight), value)
        else:
            with pytest.raises(FormatError, match="are tied"):
                distorch.set_loras(module, [(tmp_path, 1.0)])


def test_large_replacements_are_compared_in_parts(monkeypatch):
    from distorch.lora import once

    monkeypatch.setattr(once, "_AT_ONCE", 16)  # two rows
    values = torch.randn(12, 8)
    for change in (0.0, 1.0):
        state = {"head.set_weight": values, "embed.set_weight": values.clone()}
        state["embed.set_weight"][11, 7] += change
        module = distorch.distribute(Tied(), "cpu,*", min_bytes=0, compute="cpu")
        if change:
            with pytest.raises(FormatError, match="are tied"):
                distorch.set_loras(module, [(state, 1.0)])
        else:
            distorch.set_loras(module, [(state, 1.0)])
            assert torch.equal(distorch.materialize(module.embed.weight), values)


def test_strict_says_it_again_of_a_file_that_is_known():
    torch.manual_seed(9)
    module = distorch.distribute(nn.ModuleDict({"proj": nn.Linear(8, 6)}), "cpu,*", min_bytes=0)
    state = pair("proj", torch.randn(2, 8), torch.randn(6, 2)) | {"other.diff": torch.ones(3)}
    with pytest.warns(UserWarning, match="fit no weight"):
        distorch.set_loras(module, [(state, 1.0)], strict_loras=False)
    distorch.set_loras(module, [(state, 0.5)], strict_loras=False)  # was said
    with pytest.raises(FormatError, match="fit no weight"):
        distorch.set_loras(module, [(state, 1.0)])
