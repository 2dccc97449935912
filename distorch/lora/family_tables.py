"""How the networks of one family are named by their authors and by diffusers.

A row is an author's name and the diffusers names whose rows it holds, one after the other; "{}" is
the number of a block. A row counts only where a module has one side of it, so that rows of several
families do not get in each other's way. Sources: the conversions of diffusers' loaders.
"""

from __future__ import annotations

Row = tuple[str, tuple[str, ...]]


def _under(author: str, ours: str, *names: tuple[str, str]) -> tuple[Row, ...]:
    """Rows below two prefixes; several names of ours, separated by spaces, are fused in one."""
    return tuple(
        (author + name, tuple(ours + part for part in parts.split())) for name, parts in names
    )


_QKV = "attn.to_q attn.to_k attn.to_v"
_ADDED_QKV = "attn.add_q_proj attn.add_k_proj attn.add_v_proj"

_FLUX = (
    *_under("double_blocks.{}.", "transformer_blocks.{}.",
        ("img_attn.qkv", _QKV), ("txt_attn.qkv", _ADDED_QKV),
        ("img_attn.proj", "attn.to_out.0"), ("txt_attn.proj", "attn.to_add_out"),
        ("img_attn.norm.query_norm", "attn.norm_q"), ("img_attn.norm.key_norm", "attn.norm_k"),
        ("txt_attn.norm.query_norm", "attn.norm_added_q"),
        ("txt_attn.norm.key_norm", "attn.norm_added_k"),
        ("img_mlp.0", "ff.net.0.proj"), ("img_mlp.2", "ff.net.2"),
        ("txt_mlp.0", "ff_context.net.0.proj"), ("txt_mlp.2", "ff_context.net.2"),
        ("img_mod.lin", "norm1.linear"), ("txt_mod.lin", "norm1_context.linear"),
    ),
    *_under("single_blocks.{}.", "single_transformer_blocks.{}.",
        ("linear1", f"{_QKV} proj_mlp"), ("linear2", "proj_out"), ("modulation.lin", "norm.linear"),
        ("norm.query_norm", "attn.norm_q"), ("norm.key_norm", "attn.norm_k"),
        ("processor.qkv", _QKV),
    ),
    *_under("", "",
        ("img_in", "x_embedder"), ("txt_in", "context_embedder"),
        ("final_layer.linear", "proj_out"),
    ),
    *_under("", "time_text_embed.",
        ("time_in.in_layer", "timestep_embedder.linear_1"),
        ("time_in.out_layer", "timestep_embedder.linear_2"),
        ("vector_in.in_layer", "text_embedder.linear_1"),
        ("vector_in.out_layer", "text_embedder.linear_2"),
        ("guidance_in.in_layer", "guidance_embedder.linear_1"),
        ("guidance_in.out_layer", "guidance_embedder.linear_2"),
    ),
)  # fmt: skip

_FLUX_2 = (
    *_under("double_blocks.{}.", "transformer_blocks.{}.",
        ("img_mlp.0", "ff.linear_in"), ("img_mlp.2", "ff.linear_out"),
        ("txt_mlp.0", "ff_context.linear_in"), ("txt_mlp.2", "ff_context.linear_out"),
    ),
    *_under("single_blocks.{}.", "single_transformer_blocks.{}.",
        ("linear1", "attn.to_qkv_mlp_proj"), ("linear2", "attn.to_out"),
    ),
    *_under("", "",
        ("single_stream_modulation.lin", "single_stream_modulation.linear"),
        ("double_stream_modulation_img.lin", "double_stream_modulation_img.linear"),
        ("double_stream_modulation_txt.lin", "double_stream_modulation_txt.linear"),
    ),
    *_under("", "time_guidance_embed.",
        ("time_in.in_layer", "timestep_embedder.linear_1"),
        ("time_in.out_layer", "timestep_embedder.linear_2"),
        ("guidance_in.in_layer", "guidance_embedder.linear_1"),
        ("guidance_in.out_layer", "guidance_embedder.linear_2"),
    ),
)  # fmt: skip

_HUNYUAN_VIDEO = (
    *_under("double_blocks.{}.", "transformer_blocks.{}.",
        ("img_attn_qkv", _QKV), ("txt_attn_qkv", _ADDED_QKV), ("img_attn_proj", "attn.to_out.0"),
        ("txt_attn_proj", "attn.to_add_out"), ("img_attn_q_norm", "attn.norm_q"),
        ("img_attn_k_norm", "attn.norm_k"), ("txt_attn_q_norm", "attn.norm_added_q"),
        ("txt_attn_k_norm", "attn.norm_added_k"), ("img_mlp.fc1", "ff.net.0.proj"),
        ("img_mlp.fc2", "ff.net.2"), ("txt_mlp.fc1", "ff_context.net.0.proj"),
        ("txt_mlp.fc2", "ff_context.net.2"), ("img_mod.linear", "norm1.linear"),
        ("txt_mod.linear", "norm1_context.linear"),
    ),
    *_under("single_blocks.{}.", "single_transformer_blocks.{}.",
        ("modulation.linear", "norm.linear"), ("q_norm", "attn.norm_q"), ("k_norm", "attn.norm_k"),
    ),
    *_under("txt_in.", "context_embedder.",
        ("input_embedder", "proj_in"),
        ("t_embedder.mlp.0", "time_text_embed.timestep_embedder.linear_1"),
        ("t_embedder.mlp.2", "time_text_embed.timestep_embedder.linear_2"),
        ("c_embedder.linear_1", "time_text_embed.text_embedder.linear_1"),
        ("c_embedder.linear_2", "time_text_embed.text_embedder.linear_2"),
    ),
    *_under("txt_in.individual_token_refiner.blocks.{}.",
            "context_embedder.token_refiner.refiner_blocks.{}.",
        ("self_attn_qkv", _QKV), ("self_attn_proj", "attn.to_out.0"), ("mlp.fc1", "ff.net.0.proj"),
        ("mlp.fc2", "ff.net.2"), ("adaLN_modulation.1", "norm_out.linear"), ("norm1", "norm1"),
        ("norm2", "norm2"),
    ),
    *_under("", "",
        ("img_in.proj", "x_embedder.proj"),
        ("time_in.mlp.0", "time_text_embed.timestep_embedder.linear_1"),
        ("time_in.mlp.2", "time_text_embed.timestep_embedder.linear_2"),
        ("guidance_in.mlp.0", "time_text_embed.guidance_embedder.linear_1"),
        ("guidance_in.mlp.2", "time_text_embed.guidance_embedder.linear_2"),
    ),
)  # fmt: skip

_WAN = (
    *_under("blocks.{}.", "blocks.{}.",
        ("self_attn.q", "attn1.to_q"), ("self_attn.k", "attn1.to_k"), ("self_attn.v", "attn1.to_v"),
        ("self_attn.o", "attn1.to_out.0"), ("self_attn.norm_q", "attn1.norm_q"),
        ("self_attn.norm_k", "attn1.norm_k"), ("cross_attn.q", "attn2.to_q"),
        ("cross_attn.k", "attn2.to_k"), ("cross_attn.v", "attn2.to_v"),
        ("cross_attn.o", "attn2.to_out.0"), ("cross_attn.norm_q", "attn2.norm_q"),
        ("cross_attn.norm_k", "attn2.norm_k"), ("cross_attn.k_img", "attn2.add_k_proj"),
        ("cross_attn.v_img", "attn2.add_v_proj"), ("cross_attn.norm_k_img", "attn2.norm_added_k"),
        ("ffn.0", "ffn.net.0.proj"), ("ffn.2", "ffn.net.2"), ("norm3", "norm2"),
        ("modulation", "scale_shift_table"),
    ),
    *_under("", "condition_embedder.",
        ("text_embedding.0", "text_embedder.linear_1"),
        ("text_embedding.2", "text_embedder.linear_2"),
        ("time_embedding.0", "time_embedder.linear_1"),
        ("time_embedding.2", "time_embedder.linear_2"), ("time_projection.1", "time_proj"),
        ("img_emb.proj.0", "image_embedder.norm1"),
        ("img_emb.proj.1", "image_embedder.ff.net.0.proj"),
        ("img_emb.proj.3", "image_embedder.ff.net.2"), ("img_emb.proj.4", "image_embedder.norm2"),
        ("img_emb.emb_pos", "image_embedder.pos_embed"),
    ),
    *_under("", "", ("head.head", "proj_out"), ("head.modulation", "scale_shift_table")),
)  # fmt: skip

_Z_IMAGE = _under("", "", ("x_embedder", "all_x_embedder.2-1"),
    ("final_layer.linear", "all_final_layer.2-1.linear"),
    ("final_layer.adaLN_modulation.1", "all_final_layer.2-1.adaLN_modulation.1"),
)  # fmt: skip

ROWS: tuple[Row, ...] = (*_FLUX, *_FLUX_2, *_HUNYUAN_VIDEO, *_WAN, *_Z_IMAGE)
