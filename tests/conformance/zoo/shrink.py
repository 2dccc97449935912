# SPDX-License-Identifier: Apache-2.0
"""Any transformers configuration made tiny, by what its fields are called."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

LAYERS = 2
HEADS = 4
HEAD_DIM = 8
HIDDEN = HEADS * HEAD_DIM
VOCABULARY = 128
IMAGE = 32
PATCH = 8

# The first pattern that matches the whole name decides; None leaves the number alone.
_NUMBERS: list[tuple[str, int | None]] = [
    (r".*(token_id|token_index|token_idx|_idx|_index|label_id|_ids?)", None),
    (r".*(dropout|drop|eps|theta|ratio|scale|factor|rate|std|prob|range|alpha|beta|bias)", None),
    (r"type_vocab_size|num_labels|num_channels|in_channels|in_chans|out_channels", None),
    (r".*vocab_size.*|.*_vocab|vocab", VOCABULARY),
    (r"max_position_embeddings|n_positions|max_seq_len(gth)?|n_ctx|.*max_.*positions", 64),
    (r".*(kv_heads|key_value_heads|num_kv|n_kv_head|query_groups).*", 2),
    (r"qk_rope_head_dim|qk_nope_head_dim|rotary_dim", HEAD_DIM // 2),
    (r".*(head_dim|head_size|d_kv|kv_channels|head_width)", HEAD_DIM),
    (r".*(num|n)_.*heads?(_.*)?|(.*_)?heads?|n_heads?_.*", HEADS),
    (r".*(lora_rank|_rank)", 8),
    (r".*experts_per_tok.*|.*top_?k.*|moe_k|num_selected_experts|n_groups?|num_expert_groups?", 1),
    (r".*(num|n)_.*experts?(_.*)?|num_local_experts|n_routed.*", 4),
    (r"first_k_dense_replace", 1),
    (r".*num_hash.*|.*codebooks?|num_feature_levels|.*num_stages", None),
    (r".*codebook_size|num_embeddings", 32),
    (r".*(layers?|blocks?|depth|layer_num)", LAYERS),
    (r"num_frames|num_input_frames", 4),
    (r"mask_(time|feature)_length", 2),
    (r"image_size|img_size|.*_image_size", IMAGE),
    (r"patch_size|.*_patch_size", PATCH),
    (r".*(intermediate|ffn|feed_?forward|mlp|inner|_ff|fc).*", 64),
    (r"d_ff", 64),
    (r".*(mel_bins|num_mels|n_mels|feature_size)", 16),
    (r".*state_size|d_state", 4),
    (r".*quer(y|ies)(_tokens)?|num_latents", 8),
    (r"(.*_)?(hidden_sizes?|d_model|n_embd|embed_dim|embedding_size|embedding_dim|width|hidden|"
     r"dim|projection_size|embed_size|d_latents|n_embed|hidden_channels|embed_dims?|rnn_size)",
     HIDDEN),
]  # fmt: skip
_RULES = [(re.compile(pattern), value) for pattern, value in _NUMBERS]


def _number(name: str, value: int) -> int:
    for pattern, tiny in _RULES:
        if pattern.fullmatch(name):
            return value if tiny is None else min(value, tiny) if value > 0 else value
    return value


# The same for lists of numbers: the name, and what one of them (the i-th) becomes.
_LISTS: list[tuple[str, Callable[[int, int], int]]] = [
    (r".*(depths|layers|blocks|repeats)", lambda i, value: min(value, 1)),
    (r".*heads", lambda i, value: min(value, 2)),
    (r".*(hidden_sizes|embed_dims?|dims)", lambda i, value: 8 * (i + 1) if value > 8 else value),
    (r".*(conv_dim|channels)", lambda i, value: min(value, 16)),
    (r"image_size|img_size", lambda i, value: min(value, IMAGE)),
]


def _list(name: str, values: list[Any]) -> list[Any]:
    if not all(type(value) is int for value in values):
        return values
    for pattern, tiny in _LISTS:
        if re.fullmatch(pattern, name):
            return [tiny(i, value) for i, value in enumerate(values)]
    return values


_SECTIONS: dict[str, Any] = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
}
_HYBRID: dict[str, Any] = {"layer_types": ["linear_attention", "full_attention"]}
_WINDOWS: dict[str, Any] = {
    "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2,
}  # fmt: skip

# What names do not tell, by model type (also that of a part).
OVERRIDES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        ("qwen2_vl_text", "qwen2_5_vl_text", "qwen2_5_omni_text", "paddleocr_vl_text",
         "ernie4_5_vl_moe_text"),
        _SECTIONS,
    ),
    **dict.fromkeys(
        ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "qwen4_exp_text", "kimi_linear"),
        _HYBRID,
    ),
    **dict.fromkeys(("swin", "donut-swin", "maskformer-swin"), _WINDOWS),
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "mamba2": {"num_heads": 8, "head_dim": 8, "expand": 2, "n_groups": 1},
    "wav2vec2-bert": {"vocab_size": 32},
    "wav2vec2-conformer": {"vocab_size": 32},
    "deepseek_v2": {"num_experts_per_tok": 2, "topk_method": "greedy"},
    "xmod": {"default_language": "en_XX"},
    "lilt": {"channel_shrink_ratio": 2},
    "autoformer": {"prediction_length": 4, "context_length": 8},
    "patchtst": {"context_length": 16, "patch_length": 4, "patch_stride": 4},
    "patchtsmixer": {"context_length": 16, "patch_length": 4, "patch_stride": 4},
    "bit": {"num_groups": 4},
    "reformer": {"is_decoder": True},
}  # fmt: skip


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None


def tiny_settings(config_class: Any) -> dict[str, Any]:
    """What to pass to a configuration class for a tiny model."""
    from transformers import PreTrainedConfig

    common = {f.name for f in dataclasses.fields(PreTrainedConfig)}
    subs = getattr(config_class, "sub_configs", {})
    settings: dict[str, Any] = {}
    for field in dataclasses.fields(config_class):
        name, value = field.name, _default(field)
        if name in common and name not in ("pad_token_id", "bos_token_id", "eos_token_id"):
            continue
        if name in subs:
            continue
        if name.endswith("token_id") or name.endswith("token_index"):
            if type(value) is int and value >= VOCABULARY:
                settings[name] = VOCABULARY - 1 - (sum(map(ord, name)) % 40)
            elif isinstance(value, (list, tuple)):
                settings[name] = [2]
        elif type(value) is int:
            settings[name] = _number(name, value)
        elif isinstance(value, (list, tuple)):
            tiny = _list(name, list(value))
            if tiny != list(value):
                settings[name] = type(value)(tiny)
    for name in subs:
        sub = type(getattr(_plain(config_class), name))
        if dataclasses.is_dataclass(sub):
            settings[name] = {"model_type": sub.model_type} | tiny_settings(sub)
    rope = _rope(getattr(_plain(config_class), "rope_parameters", None))
    if rope:
        settings["rope_parameters"] = rope
    return settings | OVERRIDES.get(config_class.model_type, {})


def _rope(parameters: Any) -> dict[str, Any] | None:
    """Rotary settings whose sections fit the small heads; None where they fit as they are."""
    if not isinstance(parameters, dict) or not parameters.get("mrope_section"):
        return None
    half = int(HEAD_DIM * parameters.get("partial_rotary_factor", 1.0)) // 2
    count = len(parameters["mrope_section"])
    sections = [half // count + (i < half % count) for i in range(count)]
    return parameters | {"mrope_section": sections}


_instances: dict[type, Any] = {}


def _plain(config_class: type) -> Any:
    if config_class not in _instances:
        _instances[config_class] = config_class()
    return _instances[config_class]
