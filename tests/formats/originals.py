# SPDX-License-Identifier: Apache-2.0
"""Small models of diffusers, and their weights under the names that their makers use."""

import torch
from accelerate import init_empty_weights
from diffusers import (
    FluxTransformer2DModel,
    HunyuanVideoTransformer3DModel,
    LTXVideoTransformer3DModel,
    Lumina2Transformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    WanTransformer3DModel,
    ZImageTransformer2DModel,
)


def small(cls, config, seed=0):
    torch.manual_seed(seed)
    model = cls(**config) if isinstance(config, dict) else cls(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def empty(cls, config):
    with init_empty_weights(include_buffers=False):
        return (cls(**config) if isinstance(config, dict) else cls(config)).eval()


# --- diffusers: the original names, the other way round than diffusers converts them ---

FLUX = {
    "in_channels": 8, "num_layers": 1, "num_single_layers": 2, "attention_head_dim": 16,
    "num_attention_heads": 4, "joint_attention_dim": 32, "pooled_projection_dim": 32,
    "axes_dims_rope": (4, 4, 8), "guidance_embeds": True,
}  # fmt: skip
_FLUX_TOP = {
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "context_embedder": "txt_in", "x_embedder": "img_in", "proj_out": "final_layer.linear",
}  # fmt: skip
_FLUX_DOUBLE = {
    "norm1.linear": "img_mod.lin", "norm1_context.linear": "txt_mod.lin",
    "ff.net.0.proj": "img_mlp.0", "ff.net.2": "img_mlp.2", "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2", "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
}  # fmt: skip
_FLUX_FUSED = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}
_FLUX_NORMS = {
    "attn.norm_q": "img_attn.norm.query_norm", "attn.norm_k": "img_attn.norm.key_norm",
    "attn.norm_added_q": "txt_attn.norm.query_norm", "attn.norm_added_k": "txt_attn.norm.key_norm",
}  # fmt: skip


def flux_original(weights):
    out = {}
    for ending in ("weight", "bias"):
        for ours, theirs in _FLUX_TOP.items():
            out[f"{theirs}.{ending}"] = weights[f"{ours}.{ending}"]
        scale, shift = weights[f"norm_out.linear.{ending}"].chunk(2)
        out[f"final_layer.adaLN_modulation.1.{ending}"] = torch.cat([shift, scale])
        ours, theirs = "transformer_blocks.0", "double_blocks.0"
        for a, b in _FLUX_DOUBLE.items():
            out[f"{theirs}.{b}.{ending}"] = weights[f"{ours}.{a}.{ending}"]
        for fused, parts in _FLUX_FUSED.items():
            out[f"{theirs}.{fused}.{ending}"] = torch.cat(
                [weights[f"{ours}.{part}.{ending}"] for part in parts]
            )
        for i in range(2):
            ours, theirs = f"single_transformer_blocks.{i}", f"single_blocks.{i}"
            parts = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
            out[f"{theirs}.linear1.{ending}"] = torch.cat(
                [weights[f"{ours}.{part}.{ending}"] for part in parts]
            )
            out[f"{theirs}.linear2.{ending}"] = weights[f"{ours}.proj_out.{ending}"]
            out[f"{theirs}.modulation.lin.{ending}"] = weights[f"{ours}.norm.linear.{ending}"]
    for a, b in _FLUX_NORMS.items():
        out[f"double_blocks.0.{b}.scale"] = weights[f"transformer_blocks.0.{a}.weight"]
    for i in range(2):
        for a, b in (("norm_q", "query_norm"), ("norm_k", "key_norm")):
            name = f"single_transformer_blocks.{i}.attn.{a}.weight"
            out[f"single_blocks.{i}.norm.{b}.scale"] = weights[name]
    return {name: tensor.contiguous() for name, tensor in out.items()}


def flux_inputs():
    torch.manual_seed(7)
    return {
        "hidden_states": torch.randn(1, 6, 8), "encoder_hidden_states": torch.randn(1, 3, 32),
        "pooled_projections": torch.randn(1, 32), "timestep": torch.tensor([0.5]),
        "img_ids": torch.zeros(6, 3), "txt_ids": torch.zeros(3, 3),
        "guidance": torch.tensor([3.5]),
    }  # fmt: skip


WAN = {
    "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4,
    "out_channels": 4, "text_dim": 16, "freq_dim": 8, "ffn_dim": 32, "num_layers": 2,
    "cross_attn_norm": True,
}  # fmt: skip
_WAN = {
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_proj": "time_projection.1", "attn2": "cross_attn",
    "attn1": "self_attn", ".to_out.0.": ".o.", ".to_q.": ".q.", ".to_k.": ".k.", ".to_v.": ".v.",
    "proj_out": "head.head", "ffn.net.0.proj": "ffn.0", "ffn.net.2": "ffn.2",
    ".norm2.": ".norm3.",
}  # fmt: skip


def renamed(name, replacements):
    for ours, theirs in replacements.items():
        name = name.replace(ours, theirs)
    return name


def wan_original(weights):
    out = {}
    for ours, tensor in weights.items():
        name = "head.modulation" if ours == "scale_shift_table" else ours
        out[renamed(name.replace("scale_shift_table", "modulation"), _WAN)] = tensor
    return out


def wan_inputs():
    torch.manual_seed(7)
    return {
        "hidden_states": torch.randn(1, 4, 1, 4, 4), "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 3, 16),
    }  # fmt: skip


LTX = {
    "in_channels": 8, "out_channels": 8, "num_attention_heads": 2, "attention_head_dim": 12,
    "cross_attention_dim": 24, "num_layers": 2, "caption_channels": 16,
}  # fmt: skip


def ltx_original(weights):
    renames = {"proj_in": "patchify_proj", "time_embed": "adaln_single", "norm_q": "q_norm",
               "norm_k": "k_norm"}  # fmt: skip
    return {renamed(name, renames): tensor for name, tensor in weights.items()}


def ltx_inputs():
    torch.manual_seed(7)
    return {
        "hidden_states": torch.randn(1, 4, 8), "encoder_hidden_states": torch.randn(1, 3, 16),
        "timestep": torch.tensor([500]), "encoder_attention_mask": torch.ones(1, 3),
        "num_frames": 1, "height": 2, "width": 2,
    }  # fmt: skip


Z_IMAGE = {
    "all_patch_size": (2,), "all_f_patch_size": (1,), "in_channels": 4, "dim": 32, "n_layers": 2,
    "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2, "cap_feat_dim": 16,
    "axes_dims": (4, 6, 6), "axes_lens": (128, 32, 32),
}  # fmt: skip

_Z_IMAGE = {
    "all_final_layer.2-1.": "final_layer.", "all_x_embedder.2-1.": "x_embedder.",
    "to_out.0": "out", "norm_q": "q_norm", "norm_k": "k_norm",
}  # fmt: skip


def z_image_original(weights):
    out = {}
    for name, tensor in weights.items():
        if ".attention.to_q." in name:
            parts = [weights[name.replace("to_q", part)] for part in ("to_q", "to_k", "to_v")]
            out[name.replace("to_q", "qkv")] = torch.cat(parts)
        elif ".attention.to_k." not in name and ".attention.to_v." not in name:
            out[renamed(name, _Z_IMAGE)] = tensor
    return out


def z_image_inputs():
    torch.manual_seed(7)
    return {"x": [torch.randn(4, 1, 4, 4)], "t": torch.tensor([0.5]),
            "cap_feats": [torch.randn(3, 16)]}  # fmt: skip


HUNYUAN = {
    "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16,
    "num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1, "text_embed_dim": 16,
    "pooled_projection_dim": 8, "rope_axes_dim": (4, 6, 6),
}  # fmt: skip
_HUNYUAN_TEXT = {
    "context_embedder.proj_in": "txt_in.input_embedder",
    "context_embedder.time_text_embed.timestep_embedder.linear_1": "txt_in.t_embedder.mlp.0",
    "context_embedder.time_text_embed.timestep_embedder.linear_2": "txt_in.t_embedder.mlp.2",
    "context_embedder.time_text_embed.text_embedder.": "txt_in.c_embedder.",
    "context_embedder.token_refiner.refiner_blocks": "txt_in.individual_token_refiner.blocks",
    "attn.to_out.0": "self_attn_proj", "norm_out.linear": "adaLN_modulation.1",
    "ff.net.0.proj": "mlp.fc1", "ff.net.2": "mlp.fc2",
}  # fmt: skip
_HUNYUAN = {
    "x_embedder": "img_in", "time_text_embed.timestep_embedder.linear_1": "time_in.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "time_in.mlp.2",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.mlp.0",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.mlp.2",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "attn.norm_added_q": "txt_attn_q_norm", "attn.norm_added_k": "txt_attn_k_norm",
    "attn.to_out.0": "img_attn_proj", "attn.to_add_out": "txt_attn_proj",
    "norm1_context.linear": "txt_mod.linear", "norm1.linear": "img_mod.linear",
    "ff_context.net.0.proj": "txt_mlp.fc1", "ff_context.net.2": "txt_mlp.fc2",
    "ff.net.0.proj": "img_mlp.fc1", "ff.net.2": "img_mlp.fc2",
}  # fmt: skip


def hunyuan_original(weights):
    out = {}
    for name, tensor in weights.items():
        if any(
            part in name for part in (".to_k.", ".to_v.", "add_k_proj", "add_v_proj", "proj_mlp")
        ):
            continue
        if name.startswith("norm_out"):
            scale, shift = tensor.chunk(2)
            name_in_file = name.replace("norm_out.linear", "final_layer.adaLN_modulation.1")
            out[name_in_file] = torch.cat([shift, scale])
        elif name.startswith("context_embedder"):
            fused, parts = _fused(weights, name, "attn.to_{}")
            out[renamed(fused.replace("attn.to_q", "self_attn_qkv"), _HUNYUAN_TEXT)] = parts
        elif name.startswith("single_"):
            stem = name.rpartition("attn.to_q")[0]
            fused, parts = _fused(weights, name, "attn.to_{}")
            if stem:
                parts = torch.cat([parts, weights[name.replace("attn.to_q", "proj_mlp")]])
            table = {"single_transformer_blocks": "single_blocks", "attn.to_q": "linear1",
                     "proj_out": "linear2", "norm.linear": "modulation.linear",
                     "attn.norm_q": "q_norm", "attn.norm_k": "k_norm"}  # fmt: skip
            out[renamed(fused, table)] = parts
        elif name.startswith("transformer_blocks"):
            fused, parts = _fused(weights, name, "attn.to_{}")
            if "add_q_proj" in name:
                fused, parts = _fused(weights, name, "attn.add_{}_proj")
            table = {"transformer_blocks": "double_blocks", "attn.to_q": "img_attn_qkv",
                     "attn.add_q_proj": "txt_attn_qkv", **_HUNYUAN,
                     "attn.norm_q": "img_attn_q_norm", "attn.norm_k": "img_attn_k_norm"}  # fmt: skip
            out[renamed(fused, table)] = parts
        else:
            table = {"proj_out": "final_layer.linear", **_HUNYUAN}
            out[renamed(name, table)] = tensor
    return out


def _fused(weights, name, pattern):
    """q, k and v of a name of q's; other weights as they are."""
    if pattern.format("q") not in name or pattern.format("q") + "." not in name:
        return name, weights[name]
    parts = [weights[name.replace(pattern.format("q"), pattern.format(x))] for x in "qkv"]
    return name, torch.cat(parts)


def hunyuan_inputs():
    torch.manual_seed(7)
    return {
        "hidden_states": torch.randn(1, 4, 1, 4, 4), "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 3, 16), "pooled_projections": torch.randn(1, 8),
        "encoder_attention_mask": torch.ones(1, 3), "guidance": torch.tensor([6000.0]),
    }  # fmt: skip


SD3 = {
    "sample_size": 8, "in_channels": 4, "out_channels": 4, "num_layers": 2,
    "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 24,
    "caption_projection_dim": 32, "pooled_projection_dim": 16, "pos_embed_max_size": 8,
    "dual_attention_layers": (0,), "qk_norm": "rms_norm",
}  # fmt: skip
_SD3 = {
    "pos_embed.pos_embed": "pos_embed", "pos_embed.proj": "x_embedder.proj",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "transformer_blocks": "joint_blocks",
    "attn.norm_added_q": "context_block.attn.ln_q", "attn.norm_added_k": "context_block.attn.ln_k",
    "attn.norm_q": "x_block.attn.ln_q", "attn.norm_k": "x_block.attn.ln_k",
    "attn2.norm_q": "x_block.attn2.ln_q", "attn2.norm_k": "x_block.attn2.ln_k",
    "attn.to_out.0": "x_block.attn.proj", "attn2.to_out.0": "x_block.attn2.proj",
    "attn.to_add_out": "context_block.attn.proj", "attn.to_q": "x_block.attn.qkv",
    "attn2.to_q": "x_block.attn2.qkv", "attn.add_q_proj": "context_block.attn.qkv",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "norm1.linear": "x_block.adaLN_modulation.1",
    "ff_context.net.0.proj": "context_block.mlp.fc1", "ff_context.net.2": "context_block.mlp.fc2",
    "ff.net.0.proj": "x_block.mlp.fc1", "ff.net.2": "x_block.mlp.fc2",
    "norm_out.linear": "final_layer.adaLN_modulation.1", "proj_out": "final_layer.linear",
}  # fmt: skip


def sd3_original(weights):
    out = {}
    for name, tensor in weights.items():
        if any(part in name for part in (".to_k.", ".to_v.", "add_k_proj", "add_v_proj")):
            continue
        if name.startswith(("norm_out", "transformer_blocks.1.norm1_context")):
            scale, shift = tensor.chunk(2)
            out[renamed(name, _SD3)] = torch.cat([shift, scale])
        else:
            pattern = "attn.add_{}_proj" if "add_q_proj" in name else ".to_{}"
            out[renamed(name, _SD3)] = _fused(weights, name, pattern)[1]
    return out


def sd3_inputs():
    torch.manual_seed(7)
    return {
        "hidden_states": torch.randn(1, 4, 8, 8), "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 3, 24), "pooled_projections": torch.randn(1, 16),
    }  # fmt: skip


LUMINA = {
    "sample_size": 8, "in_channels": 4, "hidden_size": 48, "num_layers": 2,
    "num_refiner_layers": 2, "num_attention_heads": 4, "num_kv_heads": 2, "multiple_of": 16,
    "axes_dim_rope": (4, 4, 4), "axes_lens": (32, 32, 32), "cap_feat_dim": 16,
}  # fmt: skip
_LUMINA = {
    "norm_out.linear_1": "final_layer.adaLN_modulation.1", "norm_out.linear_2": "final_layer.linear",
    "time_caption_embed.caption_embedder": "cap_embedder",
    "time_caption_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_caption_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    ".attn.to_q.": ".attention.qkv.", ".attn.to_out.0.": ".attention.out.",
    ".attn.norm_q": ".attention.q_norm", ".attn.norm_k": ".attention.k_norm",
    "norm1.linear": "adaLN_modulation.1", "norm1.norm": "attention_norm1",
    ".norm1.": ".attention_norm1.", ".norm2.": ".attention_norm2.",
    "linear_1": "w1", "linear_2": "w2", "linear_3": "w3",
}  # fmt: skip


def lumina_original(weights):
    return {
        renamed(name, _LUMINA): _fused(weights, name, ".to_{}")[1].contiguous()
        for name in weights
        if ".to_k." not in name and ".to_v." not in name
    }


def lumina_inputs():
    torch.manual_seed(7)
    return {
        "hidden_states": torch.randn(1, 4, 8, 8), "timestep": torch.tensor([0.5]),
        "encoder_hidden_states": torch.randn(1, 3, 16),
        "encoder_attention_mask": torch.ones(1, 3, dtype=torch.bool),
    }  # fmt: skip


QWEN_IMAGE = {
    "in_channels": 16, "out_channels": 4, "num_layers": 2, "attention_head_dim": 16,
    "num_attention_heads": 2, "joint_attention_dim": 32, "axes_dims_rope": (4, 6, 6),
}  # fmt: skip


def qwen_image_original(weights):
    return dict(weights)


def qwen_image_inputs():
    torch.manual_seed(7)
    return {
        "hidden_states": torch.randn(1, 4, 16), "encoder_hidden_states": torch.randn(1, 3, 32),
        "encoder_hidden_states_mask": torch.ones(1, 3, dtype=torch.bool),
        "timestep": torch.tensor([0.5]), "img_shapes": [[(1, 2, 2)]],
    }  # fmt: skip


ORIGINALS = {
    "flux": (FluxTransformer2DModel, FLUX, flux_original, flux_inputs),
    "wan": (WanTransformer3DModel, WAN, wan_original, wan_inputs),
    "ltx": (LTXVideoTransformer3DModel, LTX, ltx_original, ltx_inputs),
    "z_image": (ZImageTransformer2DModel, Z_IMAGE, z_image_original, z_image_inputs),
    "hunyuan": (HunyuanVideoTransformer3DModel, HUNYUAN, hunyuan_original, hunyuan_inputs),
    "sd3": (SD3Transformer2DModel, SD3, sd3_original, sd3_inputs),
    "qwen_image": (QwenImageTransformer2DModel, QWEN_IMAGE, qwen_image_original, qwen_image_inputs),
    "lumina2": (Lumina2Transformer2DModel, LUMINA, lumina_original, lumina_inputs),
}


def same_weights(module, wanted):
    found = module.state_dict()
    assert set(found) == set(wanted)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def outputs(module, inputs):
    with torch.no_grad():
        out = module(**inputs, return_dict=False)[0]
    return out[0] if isinstance(out, list) else out
