# SPDX-License-Identifier: Apache-2.0
"""Who writes LoRA keys how, and where they go: names, fused rows, other families' names."""

import pytest
import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, GPT2Config, GPT2LMHeadModel

import distorch
from distorch import FormatError

RANK = 3


def factors(rows, columns, seed=0):
    generator = torch.Generator().manual_seed(seed)
    up = torch.randn(rows, RANK, generator=generator)
    return up, torch.randn(RANK, columns, generator=generator)


def pair(stem, rows, columns, seed=0, down=".lora_A.weight", up=".lora_B.weight"):
    b, a = factors(rows, columns, seed)
    return {f"{stem}{down}": a, f"{stem}{up}": b}


def loaded(module, tmp_path, state, **options):
    """The module from its own weights with a LoRA, and what the LoRA changed, by name."""
    before = {k: v.clone() for k, v in module.state_dict().items()}
    save_file({k: v.contiguous() for k, v in before.items()}, tmp_path / "base.safetensors")
    model = distorch.load(
        module, tmp_path / "base.safetensors", "cpu,*", loras=[(state, 1.0)], min_bytes=0, **options
    )
    after = model.state_dict()
    return {k: after[k] - v for k, v in before.items() if not torch.equal(after[k], v)}


def assert_delta(actual, expected):
    torch.testing.assert_close(actual, expected.reshape(actual.shape), rtol=1e-4, atol=1e-4)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn_out = nn.Linear(8, 12)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block()])


STEMS = {
    "plain": ("blocks.0.attn_out", ".lora_A.weight", ".lora_B.weight"),
    "peft": ("base_model.model.blocks.0.attn_out", ".lora_A.weight", ".lora_B.weight"),
    "peft named": ("base_model.model.blocks.0.attn_out", ".lora_A.my_lora.weight", ".lora_B.my_lora.weight"),
    "kohya": ("lora_unet_blocks_0_attn_out", ".lora_down.weight", ".lora_up.weight"),
    "kohya text": ("lora_te_blocks_0_attn_out", ".lora_down.weight", ".lora_up.weight"),
    "lycoris": ("lycoris_blocks_0_attn_out", ".lora_down.weight", ".lora_up.weight"),
    "diffusers": ("transformer.blocks.0.attn_out", ".lora_A.weight", ".lora_B.weight"),
    "diffusers unet": ("unet.blocks.0.attn_out", ".lora.down.weight", ".lora.up.weight"),
    "comfyui": ("diffusion_model.blocks.0.attn_out", ".lora_A.weight", ".lora_B.weight"),
    "comfyui factors": ("model.diffusion_model.blocks.0.attn_out", ".lora_down.weight", ".lora_up.weight"),
    "linear layer": ("blocks.0.attn_out", ".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
    "bare": ("blocks.0.attn_out", ".lora_A", ".lora_B"),
}  # fmt: skip


@pytest.mark.parametrize("wrapped", [False, True], ids=["module", "wrapped"])
@pytest.mark.parametrize("spelling", STEMS)
def test_spellings(tmp_path, spelling, wrapped):
    stem, down, up = STEMS[spelling]
    module = nn.ModuleDict({"transformer": Net()}) if wrapped else Net()
    changed = loaded(module, tmp_path, pair(stem, 12, 8, down=down, up=up))
    (delta,) = changed.values()
    b, a = factors(12, 8)
    assert_delta(delta, b @ a)


def test_old_processors_of_diffusers(tmp_path):
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.to_q = nn.Linear(8, 12)
            self.to_out = nn.ModuleList([nn.Linear(12, 8)])

    module = nn.ModuleDict({"attn1": Attention(), "attn2": Attention()})
    state = pair("attn1.processor.to_q", 12, 8, 1, "_lora.down.weight", "_lora.up.weight")
    state |= pair("attn2.processor.to_out", 8, 12, 2, "_lora.down.weight", "_lora.up.weight")
    changed = loaded(module, tmp_path, state)
    assert set(changed) == {"attn1.to_q.weight", "attn2.to_out.0.weight"}


# ---- fused projections, both ways ----------------------------------------------------


class Fused(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.ModuleDict({"qkv_proj": nn.Linear(8, 12 + 4 + 4)})  # grouped queries
        self.mlp = nn.ModuleDict({"gate_up_proj": nn.Linear(8, 32)})


class Separate(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.ModuleDict(
            {"q_proj": nn.Linear(8, 12), "k_proj": nn.Linear(8, 4), "v_proj": nn.Linear(8, 4)}
        )


def test_separate_factors_on_a_fused_weight(tmp_path):
    sizes = {"q_proj": 12, "k_proj": 4, "v_proj": 4}
    state = {}
    for seed, (name, rows) in enumerate(sizes.items()):
        state |= pair(f"attn.{name}", rows, 8, seed)
    state |= pair("mlp.up_proj", 16, 8, 7)
    changed = loaded(Fused(), tmp_path, state)
    products = [
        b @ a for b, a in (factors(rows, 8, seed) for seed, rows in enumerate(sizes.values()))
    ]
    assert_delta(changed["attn.qkv_proj.weight"], torch.cat(products))
    b, a = factors(16, 8, 7)
    assert_delta(changed["mlp.gate_up_proj.weight"], torch.cat([torch.zeros(16, 8), b @ a]))


def test_one_part_leaves_the_others_bits(tmp_path):
    module = Fused()
    module.attn["qkv_proj"].weight.data[:, 0] = -0.0  # adding +0 would change it
    before = module.attn["qkv_proj"].weight.detach().clone()
    loaded(module, tmp_path, pair("attn.k_proj", 4, 8))
    after = distorch.materialize(module.attn["qkv_proj"].weight)
    same = (after.view(torch.int32) == before.view(torch.int32)).all(dim=1)
    assert same.tolist() == [True] * 12 + [False] * 4 + [True] * 4


def test_fused_factors_on_separate_weights(tmp_path):
    changed = loaded(Separate(), tmp_path, pair("attn.qkv_proj", 20, 8))
    b, a = factors(20, 8)
    assert_delta(torch.cat([changed[f"attn.{n}_proj.weight"] for n in "qkv"]), b @ a)


def test_attention_of_torch(tmp_path):
    module = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2)})
    changed = loaded(
        module,
        tmp_path,
        pair("lora_te_attn_v_proj", 8, 8, down=".lora_down.weight", up=".lora_up.weight"),
    )
    b, a = factors(8, 8)
    assert_delta(changed["attn.in_proj_weight"], torch.cat([torch.zeros(16, 8), b @ a]))


def test_weights_kept_the_other_way_round(tmp_path):
    module = GPT2LMHeadModel(
        GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=50, n_positions=16)
    )
    state = pair("base_model.model.transformer.h.0.mlp.c_proj", 32, 128)
    state |= pair("base_model.model.transformer.h.0.attn.c_proj", 32, 32, 1)  # square
    save = {k: v.clone() for k, v in module.state_dict().items() if k != "lm_head.weight"}
    save_file(save, tmp_path / "gpt.safetensors")
    distorch.load(module, tmp_path / "gpt.safetensors", "cpu,*", loras=[(state, 1.0)], min_bytes=0)
    for name, (rows, columns, seed) in {
        "transformer.h.0.mlp.c_proj.weight": (32, 128, 0),
        "transformer.h.0.attn.c_proj.weight": (32, 32, 1),
    }.items():
        b, a = factors(rows, columns, seed)
        assert_delta(module.state_dict()[name] - save[name], (b @ a).t())


# ---- other families' names ----------------------------------------------------------------


def flux():
    return FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8), guidance_embeds=True,
    )  # fmt: skip


D = 32  # hidden size of flux()


@pytest.mark.parametrize("prefix", ["lora_unet_", "diffusion_model."])
def test_names_of_the_original_flux(tmp_path, prefix):
    """kohya and ComfyUI name the original's modules; the module is that of diffusers."""
    dotted = prefix.endswith(".")
    spell = lambda name: prefix + (name if dotted else name.replace(".", "_"))  # noqa: E731
    sizes = {
        "double_blocks.0.img_attn.qkv": (3 * D, D), "double_blocks.0.txt_mlp.2": (D, 4 * D),
        "double_blocks.0.img_mod.lin": (6 * D, D), "single_blocks.0.linear1": (7 * D, D),
        "single_blocks.0.linear2": (D, 5 * D), "time_in.in_layer": (D, 256),
        "final_layer.adaLN_modulation.1": (2 * D, D),
    }  # fmt: skip
    state = {}
    for seed, (name, (rows, columns)) in enumerate(sizes.items()):
        state |= pair(spell(name), rows, columns, seed, ".lora_down.weight", ".lora_up.weight")
    product = {
        name: (lambda ba: ba[0] @ ba[1])(factors(rows, columns, seed))
        for seed, (name, (rows, columns)) in enumerate(sizes.items())
    }
    changed = loaded(flux(), tmp_path, state)
    qkv = [changed[f"transformer_blocks.0.attn.to_{n}.weight"] for n in "qkv"]
    assert_delta(torch.cat(qkv), product["double_blocks.0.img_attn.qkv"])
    single = "single_transformer_blocks.0"
    parts = [changed[f"{single}.attn.to_{n}.weight"] for n in "qkv"] + [
        changed[f"{single}.proj_mlp.weight"]
    ]
    assert_delta(torch.cat(parts), product["single_blocks.0.linear1"])
    assert_delta(changed[f"{single}.proj_out.weight"], product["single_blocks.0.linear2"])
    assert_delta(
        changed["transformer_blocks.0.ff_context.net.2.weight"],
        product["double_blocks.0.txt_mlp.2"],
    )
    assert_delta(
        changed["transformer_blocks.0.norm1.linear.weight"], product["double_blocks.0.img_mod.lin"]
    )
    assert_delta(
        changed["time_text_embed.timestep_embedder.linear_1.weight"], product["time_in.in_layer"]
    )
    shift, scale = product["final_layer.adaLN_modulation.1"].chunk(2)
    assert_delta(changed["norm_out.linear.weight"], torch.cat([scale, shift]))
    assert len(changed) == 12


def test_names_of_xlabs(tmp_path):
    down, up = ".down.weight", ".up.weight"
    state = pair("double_blocks.0.processor.qkv_lora1", 3 * D, D, 0, down, up)
    state |= pair("double_blocks.0.processor.proj_lora2", D, D, 1, down, up)
    state |= pair("single_blocks.0.processor.qkv_lora", 3 * D, D, 2, down, up)
    state |= pair("single_blocks.0.processor.proj_lora", D, 5 * D, 3, down, up)
    changed = loaded(flux(), tmp_path, state)
    assert set(changed) == {
        *(f"transformer_blocks.0.attn.to_{n}.weight" for n in "qkv"),
        "transformer_blocks.0.attn.to_add_out.weight",
        *(f"single_transformer_blocks.0.attn.to_{n}.weight" for n in "qkv"),
        "single_transformer_blocks.0.proj_out.weight",
    }


class OriginalFlux(nn.Module):
    """The names and shapes of the original's blocks."""

    def __init__(self):
        super().__init__()
        attention = lambda: nn.ModuleDict({"qkv": nn.Linear(D, 3 * D), "proj": nn.Linear(D, D)})  # noqa: E731
        self.double_blocks = nn.ModuleList(
            [nn.ModuleDict({"img_attn": attention(), "txt_attn": attention()})]
        )
        self.single_blocks = nn.ModuleList(
            [nn.ModuleDict({"linear1": nn.Linear(D, 7 * D), "linear2": nn.Linear(5 * D, D)})]
        )


def test_names_of_diffusers_on_the_original_flux(tmp_path):
    state = pair("transformer.transformer_blocks.0.attn.add_k_proj", D, D, 0)
    state |= pair("transformer.single_transformer_blocks.0.proj_mlp", 4 * D, D, 1)
    state |= pair("transformer.single_transformer_blocks.0.attn.to_k", D, D, 2)
    changed = loaded(OriginalFlux(), tmp_path, state)
    product = [b @ a for b, a in (factors(D, D, 0), factors(4 * D, D, 1), factors(D, D, 2))]
    rest = torch.zeros(D, D)
    assert_delta(
        changed["double_blocks.0.txt_attn.qkv.weight"], torch.cat([rest, product[0], rest])
    )
    assert_delta(
        changed["single_blocks.0.linear1.weight"], torch.cat([rest, product[2], rest, product[1]])
    )


def test_names_of_the_original_unet(tmp_path):
    unet = UNet2DConditionModel(
        block_out_channels=(32, 64), layers_per_block=2, sample_size=8, cross_attention_dim=16,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), attention_head_dim=8, norm_num_groups=8,
    )  # fmt: skip
    down, up = ".lora_down.weight", ".lora_up.weight"
    state = pair("lora_unet_input_blocks_2_1_transformer_blocks_0_attn2_to_k", 32, 16, 0, down, up)
    state |= pair("lora_unet_middle_block_1_proj_in", 64, 64, 1, down, up)
    state |= pair(
        "lora_unet_output_blocks_3_1_transformer_blocks_0_ff_net_0_proj", 256, 32, 2, down, up
    )
    state |= pair("lora_unet_input_blocks_4_0_emb_layers_1", 64, 128, 3, down, up)
    state |= pair(
        "lora_te_text_model_encoder_layers_0_mlp_fc1", 64, 16, 4, down, up
    )  # of the text encoder
    changed = loaded(unet, tmp_path, state)
    assert set(changed) == {
        "down_blocks.0.attentions.1.transformer_blocks.0.attn2.to_k.weight",
        "mid_block.attentions.0.proj_in.weight",
        "up_blocks.1.attentions.0.transformer_blocks.0.ff.net.0.proj.weight",
        "down_blocks.1.resnets.0.time_emb_proj.weight",
    }


def test_text_encoders(tmp_path):
    """A file for a whole pipeline: each part takes its own keys."""
    encoder = CLIPTextModel(
        CLIPTextConfig(
            hidden_size=16,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            vocab_size=50,
        )
    )
    down, up = ".lora_down.weight", ".lora_up.weight"
    stem = "text_model_encoder_layers_0_mlp_fc1"
    state = pair(f"lora_te1_{stem}", 64, 16, 0, down, up)
    state |= pair(f"lora_te2_{stem}", 80, 20, 1, down, up)  # the larger encoder of SDXL
    state |= pair("lora_unet_input_blocks_1_1_proj_in", 32, 32, 2, down, up)
    (changed,) = loaded(encoder, tmp_path, state).values()
    b, a = factors(64, 16)
    assert_delta(changed, b @ a)


def test_another_model_is_refused_with_examples(tmp_path):
    with pytest.raises(
        FormatError, match=r"fit no weight.*layers\.7.*blocks\.0\.attn_out.*another model"
    ):
        loaded(Net(), tmp_path, pair("model.layers.7.q_proj", 8, 8))
    with pytest.raises(FormatError, match="strict_loras=False"):
        loaded(Net(), tmp_path, pair("blocks.0.attn_out", 12, 8) | pair("blocks.9.attn_out", 12, 8))
    with pytest.warns(UserWarning, match="blocks.9"):
        state = pair("blocks.0.attn_out", 12, 8) | pair("blocks.9.attn_out", 12, 8)
        assert len(loaded(Net(), tmp_path, state, strict_loras=False)) == 1
    with pytest.raises(FormatError, match=r"\[13, 8\].*\(12, 8\).*another model"):
        loaded(Net(), tmp_path, pair("blocks.0.attn_out", 13, 8))
