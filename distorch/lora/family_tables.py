# SPDX-License-Identifier: Apache-2.0
"""How the networks of one family are named by their authors and by diffusers.

A row is an author's name and the diffusers names whose rows it holds, one after the other; "{}" is
the number of a block, "~" says that the two halves of its rows are swapped (shift and scale). A row
counts only where a module has one side of it, so that rows of several families do not get in each
other's way. Sources: the conversions of diffusers' loaders.
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
        ("final_layer.linear", "proj_out"), ("final_layer.adaLN_modulation.1", "~norm_out.linear"),
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

_LUMINA_BLOCK = (
    ("attention.qkv", _QKV), ("attention.out", "attn.to_out.0"),
    ("feed_forward.w1", "feed_forward.linear_1"), ("feed_forward.w2", "feed_forward.linear_2"),
    ("feed_forward.w3", "feed_forward.linear_3"), ("adaLN_modulation.1", "norm1.linear"),
)  # fmt: skip
_LUMINA_2 = (
    *_under("layers.{}.", "layers.{}.", *_LUMINA_BLOCK),
    *_under("noise_refiner.{}.", "noise_refiner.{}.", *_LUMINA_BLOCK),
    *_under("context_refiner.{}.", "context_refiner.{}.", *_LUMINA_BLOCK),
    *_under("", "",
        ("cap_embedder.0", "time_caption_embed.caption_embedder.0"),
        ("cap_embedder.1", "time_caption_embed.caption_embedder.1"),
        ("t_embedder.mlp.0", "time_caption_embed.timestep_embedder.linear_1"),
        ("t_embedder.mlp.2", "time_caption_embed.timestep_embedder.linear_2"),
        ("final_layer.adaLN_modulation.1", "norm_out.linear_1"),
        ("final_layer.linear", "norm_out.linear_2"),
    ),
)  # fmt: skip

_KREA_BLOCK = (
    ("attn.wq", "attn.to_q"), ("attn.wk", "attn.to_k"), ("attn.wv", "attn.to_v"),
    ("attn.wo", "attn.to_out.0"), ("attn.gate", "attn.to_gate"), ("mlp.gate", "ff.gate"),
    ("mlp.up", "ff.up"), ("mlp.down", "ff.down"),
)  # fmt: skip
_KREA_2 = (
    *_under("blocks.{}.", "transformer_blocks.{}.", *_KREA_BLOCK),
    *_under("txtfusion.layerwise_blocks.{}.", "text_fusion.layerwise_blocks.{}.", *_KREA_BLOCK),
    *_under("txtfusion.refiner_blocks.{}.", "text_fusion.refiner_blocks.{}.", *_KREA_BLOCK),
    *_under("", "",
        ("first", "img_in"), ("last.linear", "final_layer.linear"),
        ("tmlp.0", "time_embed.linear_1"), ("tmlp.2", "time_embed.linear_2"),
        ("tproj.1", "time_mod_proj"), ("txtmlp.1", "txt_in.linear_1"),
        ("txtmlp.3", "txt_in.linear_2"), ("txtfusion.projector", "text_fusion.projector"),
    ),
)  # fmt: skip

_LTX_TIMES = tuple(
    (f"{author}{end}", f"{ours}{end}")
    for author, ours in (
        ("adaln_single.", "time_embed."), ("audio_adaln_single.", "audio_time_embed."),
        ("av_ca_video_scale_shift_adaln_single.", "av_cross_attn_video_scale_shift."),
        ("av_ca_audio_scale_shift_adaln_single.", "av_cross_attn_audio_scale_shift."),
        ("av_ca_a2v_gate_adaln_single.", "av_cross_attn_video_a2v_gate."),
        ("av_ca_v2a_gate_adaln_single.", "av_cross_attn_audio_v2a_gate."),
        ("prompt_adaln_single.", "prompt_adaln."),
        ("audio_prompt_adaln_single.", "audio_prompt_adaln."),
    )
    for end in ("emb.timestep_embedder.linear_1", "emb.timestep_embedder.linear_2", "linear")
)  # fmt: skip
_LTX_ATTENTIONS = (
    "attn1", "attn2", "audio_attn1", "audio_attn2", "audio_to_video_attn", "video_to_audio_attn",
)  # fmt: skip
_LTX = (
    *_under("", "", *_LTX_TIMES,
        ("patchify_proj", "proj_in"), ("audio_patchify_proj", "audio_proj_in"),
        ("text_embedding_projection.aggregate_embed", "text_proj_in"),
    ),
    *_under("transformer_blocks.{}.", "transformer_blocks.{}.",
        ("scale_shift_table_a2v_ca_video", "video_a2v_cross_attn_scale_shift_table"),
        ("scale_shift_table_a2v_ca_audio", "audio_a2v_cross_attn_scale_shift_table"),
        *((f"{name}.q_norm", f"{name}.norm_q") for name in _LTX_ATTENTIONS),
        *((f"{name}.k_norm", f"{name}.norm_k") for name in _LTX_ATTENTIONS),
    ),
)  # fmt: skip

_FLUX_3_BLOCK = (
    ("q_proj", "attn.to_q"), ("k_proj", "attn.to_k"), ("v_proj", "attn.to_v"),
    ("attn_out", "attn.to_out.0"), ("mlp_in", "ff.linear_in"), ("mlp_out", "ff.linear_out"),
)  # fmt: skip
_FLUX_3 = (
    *(row for mode in ("image", "image_cond")
      for row in _under(f"content_mode_blocks.{mode}.{{}}.", f"mode_blocks.{mode}.{{}}.",
                        *_FLUX_3_BLOCK)),
    *_under("txt_mode_blocks.{}.", "txt_mode_blocks.{}.", *_FLUX_3_BLOCK),
    *_under("single_blocks.{}.", "single_transformer_blocks.{}.", *_FLUX_3_BLOCK),
    *_under("", "",
        ("time_in.in_layer", "timestep_embedder.linear_1"),
        ("time_in.out_layer", "timestep_embedder.linear_2"),
        ("ref_time_in.in_layer", "target_timestep_embedder.linear_1"),
        ("ref_time_in.out_layer", "target_timestep_embedder.linear_2"),
        ("final_layer.image.linear", "proj_out"),
        ("final_layer.image.adaLN_modulation.1", "~norm_out.linear"),
    ),
)  # fmt: skip

_ACE_STEP = _under("layers.{}.", "layers.{}.",
    *((f"{where}.{name}_proj", f"{where}.to_{name}")
      for where in ("self_attn", "cross_attn") for name in "qkv"),
    ("self_attn.o_proj", "self_attn.to_out.0"), ("cross_attn.o_proj", "cross_attn.to_out.0"),
)  # fmt: skip

_ANIMA = (
    *_under("blocks.{}.", "transformer_blocks.{}.",
        *((f"adaln_modulation_{part}.{n}", f"norm{i}.linear_{n}")
          for i, part in enumerate(("self_attn", "cross_attn", "mlp"), 1) for n in (1, 2)),
        *((f"{where}.{name}_proj", f"attn{i}.to_{name}")
          for i, where in enumerate(("self_attn", "cross_attn"), 1) for name in "qkv"),
        ("self_attn.output_proj", "attn1.to_out.0"), ("cross_attn.output_proj", "attn2.to_out.0"),
        ("mlp.layer1", "ff.net.0.proj"), ("mlp.layer2", "ff.net.2"),
    ),
    *_under("", "",
        ("final_layer.adaln_modulation.1", "norm_out.linear_1"),
        ("final_layer.adaln_modulation.2", "norm_out.linear_2"), ("final_layer.linear", "proj_out"),
        ("t_embedder.1.linear_1", "time_embed.t_embedder.linear_1"),
        ("t_embedder.1.linear_2", "time_embed.t_embedder.linear_2"),
        ("t_embedding_norm", "time_embed.norm"), ("x_embedder.proj.1", "patch_embed.proj"),
    ),
)  # fmt: skip

_CHROMA = _under("distilled_guidance_layer.layers.{}.", "distilled_guidance_layer.layers.{}.",
    ("in_layer", "linear_1"), ("out_layer", "linear_2"),
)  # fmt: skip

_H3_BLOCK = (
    ("attn.qkv_proj", _QKV), ("attn.out_proj", "attn.to_out.0"), ("mlp.fc1", "~ff.net.0.proj"),
    ("mlp.fc2", "ff.net.2"),
)  # fmt: skip
_MINIMAX_H3 = (
    *_under("blocks.{}.", "transformer_blocks.{}.",
        *_H3_BLOCK, ("adaln_proj.linear", "adaln_proj.linear"),
    ),
    *_under("token_refiner.blocks.{}.", "token_refiner.refiner_blocks.{}.", *_H3_BLOCK),
    *_under("", "",
        ("video_patch_proj", "proj_in"), ("audio_patch_proj", "audio_proj_in"),
        ("condition_proj", "context_embedder"), ("time_embedder.proj_in", "time_embedder.linear_1"),
        ("time_embedder.proj_out", "time_embedder.linear_2"),
        ("final_layer.adaln_proj.linear", "norm_out.linear"), ("final_layer.video_out", "proj_out"),
        ("final_layer.audio_out", "audio_proj_out"),
    ),
)  # fmt: skip

ROWS: tuple[Row, ...] = (
    *_FLUX, *_FLUX_2, *_HUNYUAN_VIDEO, *_WAN, *_Z_IMAGE, *_KREA_2, *_LTX, *_FLUX_3, *_ACE_STEP,
    *_ANIMA, *_LUMINA_2, *_CHROMA, *_MINIMAX_H3,
)  # fmt: skip
