# SPDX-License-Identifier: Apache-2.0
"""Names as trainers and wrappers leave them: stray underscores, compiled and sharded modules; LoKr
cut for weights that the file has fused.
"""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import distorch
from distorch.errors import FormatError


def net():
    torch.manual_seed(0)
    block = nn.ModuleDict(
        {"attn": nn.ModuleDict({"out": nn.Linear(8, 6), "in_k": nn.Linear(8, 6)})}
    )
    return nn.ModuleDict({"blocks": nn.ModuleList([block])})


def factors():
    torch.manual_seed(1)
    return torch.randn(2, 8), torch.randn(6, 2)


STEMS = [
    "lora_unet__blocks_0_attn_out", "lora_unet_blocks_0_attn_out_", "lora_unet__blocks_0_attn_out_",
    "diffusion_model.blocks.0.attn.out_", "lora_transformer_blocks_0_attn_out",
    "base_model.model._orig_mod.blocks.0.attn.out", "transformer.blocks.0._orig_mod.attn.out",
    "_fsdp_wrapped_module.blocks.0._checkpoint_wrapped_module.attn.out",
    "model.diffusion_model.base_model.model.blocks.0.attn.out", "lycoris_lora_unet_blocks_0_attn_out",
    "diffusion_model.blocks.0.attn_out", "blocks_0.attn.out",
]  # fmt: skip


def added(module, name, state):
    before = module.state_dict()[name].clone()
    distorch.distribute(module, "cpu,0b;disk,*", min_bytes=0, compute="cpu")
    distorch.set_loras(module, [(state, 1.0)])
    return module.state_dict()[name] - before


@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_stem_finds_its_weight(stem, wrapped):
    module, name = net(), "blocks.0.attn.out.weight"
    if wrapped:
        module = torch.compile(module, backend="eager")
        name = f"_orig_mod.{name}"
    down, up = factors()
    state = {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
    torch.testing.assert_close(added(module, name, state), up @ down, rtol=1e-5, atol=1e-5)


def spelled(kind, name):
    first, rest = name.split(".", 1)
    return {
        "plain": name, "compiled": f"_orig_mod.{name}", "a part compiled": f"{first}._orig_mod.{rest}",
        "fsdp": f"_fsdp_wrapped_module.{name}", "data parallel": f"module.{name}",
        "in a pipeline": f"text_encoders.t5xxl.transformer.{name}",
    }[kind]  # fmt: skip


@pytest.mark.parametrize(
    "kind", ["plain", "compiled", "a part compiled", "fsdp", "data parallel", "in a pipeline"]
)
@pytest.mark.parametrize("into", ["plain", "compiled"])
@pytest.mark.parametrize("strict", [True, False])
def test_checkpoints_of_wrapped_modules(tmp_path, kind, into, strict):
    wanted = {name: torch.randn_like(value) for name, value in net().state_dict().items()}
    save_file({spelled(kind, k): v for k, v in wanted.items()}, tmp_path / "m.safetensors")
    module = net() if into == "plain" else torch.compile(net(), backend="eager")
    distorch.load(module, tmp_path / "m.safetensors", "cpu,*", min_bytes=0, strict=strict)
    for name, value in module.state_dict().items():
        assert torch.equal(value, wanted[name.removeprefix("_orig_mod.")])


# --- LoKr over a fused weight, on the weights that it was fused of ---


class Parts(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        for name in "qkv":
            setattr(self, f"to_{name}", nn.Linear(8, 8, bias=False))


KRONECKER = {
    "whole blocks": ((6, 2), (4, 4)),
    "cut inside a block": ((8, 2), (3, 4)),
    "one block over all": ((1, 2), (24, 4)),
    "two large ones": ((2, 2), (12, 4)),
}


@pytest.mark.parametrize("case", KRONECKER)
@pytest.mark.parametrize("factored", [False, True])
@pytest.mark.parametrize("decomposed", [False, True])
def test_lokr_is_cut_at_any_row(case, factored, decomposed):
    torch.manual_seed(3)
    left, right = (torch.randn(shape) for shape in KRONECKER[case])
    state, scale = {"attn.to_qkv.lokr_w1": left, "attn.to_qkv.lokr_w2": right}, 1.0
    if factored:
        a, b = torch.randn(right.shape[0], 2), torch.randn(2, right.shape[1])
        right, scale = a @ b, 3 / 2
        state = {"attn.to_qkv.lokr_w1": left, "attn.to_qkv.lokr_w2_a": a,
                 "attn.to_qkv.lokr_w2_b": b, "attn.to_qkv.alpha": torch.tensor(3.0)}  # fmt: skip
    module = nn.ModuleDict({"attn": Parts()})
    before = torch.cat([value.clone() for value in module.state_dict().values()])
    wanted = before + scale * torch.kron(left, right)
    if decomposed:
        magnitude = torch.rand(24, 1) + 0.5
        state["attn.to_qkv.dora_scale"] = magnitude
        wanted = magnitude * wanted / wanted.norm(dim=1, keepdim=True)
    distorch.distribute(module, "cpu,0b;disk,*", min_bytes=0, compute="cpu")
    distorch.set_loras(module, [(state, 1.0)])
    found = torch.cat(list(module.state_dict().values()))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


# --- what only some models of a family have ---


class Wan(nn.Module):
    def __init__(self):
        super().__init__()
        block = nn.Module()
        block.attn1, block.attn2 = nn.Module(), nn.Module()
        block.attn1.to_q, block.attn1.norm_q = nn.Linear(8, 8), nn.RMSNorm(8)
        block.attn2.to_q = nn.Linear(8, 8)
        block.scale_shift_table = nn.Parameter(torch.zeros(1, 6, 8))
        self.blocks = nn.ModuleList([block])
        self.scale_shift_table = nn.Parameter(torch.zeros(1, 2, 8))


def test_differences_of_norms_and_tables():
    state = {
        "diffusion_model.blocks.0.self_attn.norm_q.diff": torch.full((8,), 2.0),
        "diffusion_model.blocks.0.self_attn.q.diff_b": torch.full((8,), 3.0),
        "diffusion_model.blocks.0.diff_m": torch.full((1, 6, 8), 4.0),
        "diffusion_model.head.diff_m": torch.full((1, 2, 8), 5.0),
    }
    module = Wan()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    distorch.distribute(module, "cpu,*", min_bytes=0, compute="cpu")
    distorch.set_loras(module, [(state, 1.0)])
    changed = {n: float((v - before[n]).mean()) for n, v in module.state_dict().items()}
    wanted = {"blocks.0.attn1.norm_q.weight": 2, "blocks.0.attn1.to_q.bias": 3,
              "blocks.0.scale_shift_table": 4, "scale_shift_table": 5}  # fmt: skip
    assert {name: value for name, value in changed.items() if value} == pytest.approx(wanted)


def test_a_branch_that_the_module_lacks_is_passed_over_aloud():
    ours = {"diffusion_model.blocks.0.self_attn.q.diff_b": torch.ones(8)}
    branch = {"diffusion_model.blocks.0.cross_attn.k_img.diff_b": torch.ones(8),
              "diffusion_model.img_emb.proj.0.diff": torch.ones(8)}  # fmt: skip
    module = distorch.distribute(Wan(), "cpu,*", min_bytes=0, compute="cpu")
    with pytest.warns(UserWarning, match=r"branch that this module lacks.*k_img.*2 in all"):
        distorch.set_loras(module, [({**ours, **branch}, 1.0)])
    listed = distorch.report(module).to_dict()["loras"][0]["unmatched"]
    assert len(listed) == 2 and "img_emb" in listed[1]
    with pytest.raises(FormatError, match="fit no weight"):
        distorch.set_loras(module, [(branch, 1.0)])
    with pytest.raises(FormatError, match="fit no weight"):
        distorch.set_loras(module, [({**ours, "diffusion_model.other.diff": torch.ones(8)}, 1.0)])


class Flux(nn.Module):
    """A block of FLUX, named by its authors or by diffusers."""

    def __init__(self, authors):
        super().__init__()
        block = nn.Module()
        if authors:
            block.img_attn = nn.Module()
            block.img_attn.norm = nn.Module()
            block.img_attn.norm.query_norm = nn.Module()
            block.img_attn.norm.query_norm.scale = nn.Parameter(torch.ones(4))
            self.img_in, self.double_blocks = nn.Linear(8, 4), nn.ModuleList([block])
        else:
            block.attn = nn.Module()
            block.attn.norm_q = nn.RMSNorm(4)
            self.x_embedder, self.transformer_blocks = nn.Linear(8, 4), nn.ModuleList([block])


CONTROL = {
    True: ("double_blocks.0.img_attn.norm.query_norm.scale", "img_in"),
    False: ("transformer.transformer_blocks.0.attn.norm_q.weight", "transformer.x_embedder"),
}


@pytest.mark.parametrize("module_of_authors", [True, False])
@pytest.mark.parametrize("file_of_authors", [True, False])
def test_control_loras_bring_norms_whole(module_of_authors, file_of_authors):
    torch.manual_seed(4)
    norm, layer = CONTROL[file_of_authors]
    down, up = torch.randn(2, 8), torch.randn(4, 2)
    state = {
        norm: torch.full((4,), 3.0),
        f"{layer}.lora_A.weight": down,
        f"{layer}.lora_B.weight": up,
    }
    module = Flux(module_of_authors)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    distorch.distribute(module, "cpu,*", min_bytes=0, compute="cpu")
    distorch.set_loras(module, [(state, 1.0)])
    norm, layer = (key.removeprefix("transformer.") for key in CONTROL[module_of_authors])
    after = module.state_dict()
    assert torch.equal(after[norm], torch.full((4,), 3.0))
    change = after[f"{layer}.weight"] - before[f"{layer}.weight"]
    torch.testing.assert_close(change, up @ down, rtol=1e-5, atol=1e-5)
