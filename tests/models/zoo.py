"""Tiny random models of many architectures: name -> function giving (module, call).

`call(module)` runs one forward and returns a list of floating tensors. Seeds are the caller's.
"""

from __future__ import annotations

import torch
from torch import nn

TINY = {
    "vocab_size": 99, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "head_dim": 8,
}  # fmt: skip
GPT = {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}

CAUSAL = {
    "gpt2": GPT, "gptj": GPT | {"rotary_dim": 4}, "codegen": GPT | {"rotary_dim": 4},
    "gpt_neo": TINY | {"num_layers": 2, "num_heads": 4,
                       "attention_types": [[["global", "local"], 1]]},
    "gpt_neox": TINY, "opt": TINY | {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "bloom": {"vocab_size": 99, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "llama": TINY, "mistral": TINY, "mixtral": TINY | {"num_local_experts": 4},
    "qwen2": TINY, "qwen3": TINY,
    "qwen2_moe": TINY | {"num_experts": 4, "moe_intermediate_size": 16,
                         "shared_expert_intermediate_size": 16},
    "gemma": TINY, "gemma2": TINY, "gemma3_text": TINY, "phi": TINY, "phi3": TINY,
    "falcon": {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2,
               "num_attention_heads": 4},
    "stablelm": TINY, "starcoder2": TINY, "olmo": TINY, "olmo2": TINY, "cohere": TINY,
    "granite": TINY, "persimmon": TINY, "biogpt": TINY,
    "mpt": {"vocab_size": 99, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64},
    "xglm": {"vocab_size": 99, "d_model": 32, "num_layers": 2, "attention_heads": 4,
             "ffn_dim": 64},
    "mamba": {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
}  # fmt: skip
ENCODERS = {
    "bert": TINY, "roberta": TINY, "electra": TINY | {"embedding_size": 32}, "camembert": TINY,
    "albert": TINY | {"embedding_size": 16}, "mpnet": TINY,
    "roformer": TINY | {"embedding_size": 32},
    "deberta": TINY, "deberta-v2": TINY, "xlm-roberta": TINY,
    "distilbert": {"vocab_size": 99, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64},
}  # fmt: skip
SEQ2SEQ = {
    "t5": {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4},
    **dict.fromkeys(
        ("bart", "mbart", "marian", "pegasus", "m2m_100"),
        {"vocab_size": 99, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2,
         "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64,
         "decoder_ffn_dim": 64, "max_position_embeddings": 64, "pad_token_id": 1,
         "decoder_start_token_id": 2},
    ),
}  # fmt: skip
VISION = {
    "vit": TINY | {"image_size": 32, "patch_size": 8},
    "deit": TINY | {"image_size": 32, "patch_size": 8},
    "dinov2": TINY | {"image_size": 32, "patch_size": 8},
    "beit": TINY | {"image_size": 32, "patch_size": 8},
    "convnext": {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]},
    "resnet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]},
    "swin": {"image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [1, 1],
             "num_heads": [2, 2], "window_size": 2},
    "segformer": {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1],
                  "num_attention_heads": [1, 1, 2, 2], "decoder_hidden_size": 16},
}  # fmt: skip


def _tensors(output) -> list[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, dict):
        output = list(output.values())
    if isinstance(output, (list, tuple)):
        return [t for part in output for t in _tensors(part)]
    return []


def _config(kind: str, settings: dict):
    from transformers import AutoConfig

    return AutoConfig.for_model(kind, **settings)


def _text(kind, settings, auto, **extra):
    def make():
        import transformers

        model = getattr(transformers, auto).from_config(_config(kind, settings))
        ids = torch.arange(3, 27).reshape(2, 12)
        inputs = {"input_ids": ids, **{name: value(ids) for name, value in extra.items()}}
        return model, lambda m: _tensors(m(**inputs, return_dict=True))[:3]

    return make


def _vision(kind, settings):
    def make():
        from transformers import AutoModel

        pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
        model = AutoModel.from_config(_config(kind, settings))
        return model, lambda m: _tensors(m(pixel_values=pixels, return_dict=True))

    return make


def _noise(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


def _diffusers(name, settings, inputs):
    def make():
        import diffusers

        model = getattr(diffusers, name)(**settings)
        kwargs = inputs()
        return model, lambda m: _tensors(m(**kwargs, return_dict=False))

    return make


DIFFUSERS = {
    "UNet2DModel": (
        {"sample_size": 16, "in_channels": 3, "out_channels": 3, "layers_per_block": 1,
         "block_out_channels": (8, 16), "norm_num_groups": 4, "attention_head_dim": 4,
         "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
         "up_block_types": ("AttnUpBlock2D", "UpBlock2D")},
        lambda: {"sample": _noise(1, 3, 16, 16), "timestep": 3},
    ),
    "UNet2DConditionModel": (
        {"sample_size": 16, "layers_per_block": 1, "block_out_channels": (8, 16),
         "norm_num_groups": 4, "attention_head_dim": 4, "cross_attention_dim": 16,
         "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
         "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")},
        lambda: {"sample": _noise(1, 4, 16, 16), "timestep": 3,
                 "encoder_hidden_states": _noise(1, 5, 16)},
    ),
    "AutoencoderKL": (
        {"block_out_channels": (8, 16), "norm_num_groups": 4, "latent_channels": 4,
         "down_block_types": ("DownEncoderBlock2D",) * 2,
         "up_block_types": ("UpDecoderBlock2D",) * 2},
        lambda: {"sample": _noise(1, 3, 16, 16)},
    ),
    "DiTTransformer2DModel": (
        {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "num_layers": 2,
         "sample_size": 8, "num_embeds_ada_norm": 10, "norm_num_groups": 4},
        lambda: {"hidden_states": _noise(1, 4, 8, 8), "timestep": torch.tensor([3]),
                 "class_labels": torch.tensor([1])},
    ),
    "FluxTransformer2DModel": (
        {"in_channels": 4, "num_layers": 1, "num_single_layers": 2, "attention_head_dim": 16,
         "num_attention_heads": 2, "joint_attention_dim": 16, "pooled_projection_dim": 16,
         "axes_dims_rope": (4, 4, 8)},
        lambda: {"hidden_states": _noise(1, 16, 4), "encoder_hidden_states": _noise(1, 6, 16),
                 "pooled_projections": _noise(1, 16), "timestep": torch.tensor([0.5]),
                 "img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(6, 3)},
    ),
    "SD3Transformer2DModel": (
        {"sample_size": 8, "patch_size": 2, "in_channels": 4, "num_layers": 2,
         "attention_head_dim": 8, "num_attention_heads": 2, "caption_projection_dim": 16,
         "joint_attention_dim": 16, "pooled_projection_dim": 16, "out_channels": 4,
         "pos_embed_max_size": 8},
        lambda: {"hidden_states": _noise(1, 4, 8, 8), "encoder_hidden_states": _noise(1, 6, 16),
                 "pooled_projections": _noise(1, 16), "timestep": torch.tensor([3])},
    ),
    "WanTransformer3DModel": (
        {"patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12,
         "in_channels": 4, "out_channels": 4, "text_dim": 16, "freq_dim": 16, "ffn_dim": 32,
         "num_layers": 2},
        lambda: {"hidden_states": _noise(1, 4, 2, 8, 8), "timestep": torch.tensor([3]),
                 "encoder_hidden_states": _noise(1, 6, 16)},
    ),
    "PixArtTransformer2DModel": (
        {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "num_layers": 2,
         "sample_size": 8, "cross_attention_dim": 16, "caption_channels": 16, "out_channels": 8,
         "use_additional_conditions": False},
        lambda: {"hidden_states": _noise(1, 4, 8, 8), "timestep": torch.tensor([3]),
                 "encoder_hidden_states": _noise(1, 6, 16),
                 "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}},
    ),
    "AutoencoderTiny": (
        {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8),
         "num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)},
        lambda: {"sample": _noise(1, 3, 16, 16)},
    ),
    "LTXVideoTransformer3DModel": (
        {"in_channels": 8, "out_channels": 8, "num_attention_heads": 2, "attention_head_dim": 16,
         "cross_attention_dim": 32, "num_layers": 2, "caption_channels": 16},
        lambda: {"hidden_states": _noise(1, 8, 8), "encoder_hidden_states": _noise(1, 6, 16),
                 "timestep": torch.tensor([3]), "encoder_attention_mask": torch.ones(1, 6),
                 "num_frames": 2, "height": 2, "width": 2},
    ),
    "QwenImageTransformer2DModel": (
        {"in_channels": 16, "out_channels": 4, "num_layers": 2, "attention_head_dim": 16,
         "num_attention_heads": 2, "joint_attention_dim": 16, "axes_dims_rope": (4, 6, 6)},
        lambda: {"hidden_states": _noise(1, 16, 16), "encoder_hidden_states": _noise(1, 6, 16),
                 "encoder_hidden_states_mask": torch.ones(1, 6, dtype=torch.bool),
                 "timestep": torch.tensor([0.5]), "img_shapes": [[(1, 4, 4)]]},
    ),
}  # fmt: skip


class _Tied(nn.Module):
    """Two names of one parameter, and a parameter that is a view of another's storage."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.head = nn.Linear(16, 20, bias=False)
        self.head.weight = self.embed.weight
        flat = torch.randn(16 * 32)
        self.left = nn.Parameter(flat[: 16 * 16].view(16, 16))
        self.right = nn.Parameter(flat[16 * 16 :].view(16, 16).t())

    def forward(self, ids):
        return self.head(self.embed(ids) @ self.left @ self.right)


def _plain(build, *shape, integer=False):
    def make():
        x = torch.arange(12).reshape(2, 6) if integer else _noise(*shape)
        return build(), lambda m: _tensors(m(x))

    return make


def _shared_module():
    layer = nn.Linear(8, 8)
    return nn.Sequential(layer, nn.Tanh(), layer)


def _convolutions():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ConvTranspose2d(8, 3, 3))


def _small_norms():
    return nn.Sequential(nn.Conv1d(4, 4, 3), nn.GroupNorm(2, 4), nn.PReLU(4))


def _encoder_layer():
    return nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True)


TORCH = {
    "linear": _plain(lambda: nn.Linear(8, 8), 2, 8),
    "tied": _plain(_Tied, integer=True),
    "shared_module": _plain(_shared_module, 2, 8),
    "lstm": _plain(lambda: nn.LSTM(8, 8, num_layers=2, bidirectional=True), 5, 2, 8),
    "gru": _plain(lambda: nn.GRU(8, 8), 5, 2, 8),
    "encoder_layer": _plain(_encoder_layer, 2, 5, 16),
    "conv": _plain(_convolutions, 2, 3, 8, 8),
    "weight_norm": _plain(lambda: nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), 2, 8),
    "small_norms": _plain(_small_norms, 2, 4, 9),
}


def zoo() -> dict:
    """Every architecture by name."""
    found = dict(TORCH)
    for kind, settings in CAUSAL.items():
        found[kind] = _text(kind, settings, "AutoModelForCausalLM")
    for kind, settings in ENCODERS.items():
        found[kind] = _text(kind, settings, "AutoModel")
    for kind, settings in SEQ2SEQ.items():
        found[kind] = _text(
            kind, settings, "AutoModelForSeq2SeqLM", decoder_input_ids=lambda ids: ids[:, :5]
        )
    for kind, settings in VISION.items():
        found[kind] = _vision(kind, settings)
    for name, (settings, inputs) in DIFFUSERS.items():
        found[name] = _diffusers(name, settings, inputs)
    return found
