# SPDX-License-Identifier: Apache-2.0
"""Models of diffusers: name -> (settings, inputs)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from ..checks import Built
from .inputs import noise


def build(name: str, settings: dict[str, Any], inputs: Callable[[], dict[str, Any]]) -> Built:
    import diffusers

    torch.manual_seed(0)
    module = getattr(diffusers, name)(**settings).eval()
    return Built(module, {**inputs(), "return_dict": False})


_MODELS = {
    "UNet2DModel": (
        {"sample_size": 16, "in_channels": 3, "out_channels": 3, "layers_per_block": 1,
         "block_out_channels": (8, 16), "norm_num_groups": 4, "attention_head_dim": 4,
         "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
         "up_block_types": ("AttnUpBlock2D", "UpBlock2D")},
        lambda: {"sample": noise(1, 3, 16, 16), "timestep": 3},
    ),
    "UNet2DConditionModel": (
        {"sample_size": 16, "layers_per_block": 1, "block_out_channels": (8, 16),
         "norm_num_groups": 4, "attention_head_dim": 4, "cross_attention_dim": 16,
         "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
         "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")},
        lambda: {"sample": noise(1, 4, 16, 16), "timestep": 3,
                 "encoder_hidden_states": noise(1, 5, 16)},
    ),
    "AutoencoderKL": (
        {"block_out_channels": (8, 16), "norm_num_groups": 4, "latent_channels": 4,
         "down_block_types": ("DownEncoderBlock2D",) * 2,
         "up_block_types": ("UpDecoderBlock2D",) * 2},
        lambda: {"sample": noise(1, 3, 16, 16)},
    ),
    "DiTTransformer2DModel": (
        {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "num_layers": 2,
         "sample_size": 8, "num_embeds_ada_norm": 10, "norm_num_groups": 4},
        lambda: {"hidden_states": noise(1, 4, 8, 8), "timestep": torch.tensor([3]),
                 "class_labels": torch.tensor([1])},
    ),
    "FluxTransformer2DModel": (
        {"in_channels": 4, "num_layers": 1, "num_single_layers": 2, "attention_head_dim": 16,
         "num_attention_heads": 2, "joint_attention_dim": 16, "pooled_projection_dim": 16,
         "axes_dims_rope": (4, 4, 8)},
        lambda: {"hidden_states": noise(1, 16, 4), "encoder_hidden_states": noise(1, 6, 16),
                 "pooled_projections": noise(1, 16), "timestep": torch.tensor([0.5]),
                 "img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(6, 3)},
    ),
    "SD3Transformer2DModel": (
        {"sample_size": 8, "patch_size": 2, "in_channels": 4, "num_layers": 2,
         "attention_head_dim": 8, "num_attention_heads": 2, "caption_projection_dim": 16,
         "joint_attention_dim": 16, "pooled_projection_dim": 16, "out_channels": 4,
         "pos_embed_max_size": 8},
        lambda: {"hidden_states": noise(1, 4, 8, 8), "encoder_hidden_states": noise(1, 6, 16),
                 "pooled_projections": noise(1, 16), "timestep": torch.tensor([3])},
    ),
    "WanTransformer3DModel": (
        {"patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12,
         "in_channels": 4, "out_channels": 4, "text_dim": 16, "freq_dim": 16, "ffn_dim": 32,
         "num_layers": 2},
        lambda: {"hidden_states": noise(1, 4, 2, 8, 8), "timestep": torch.tensor([3]),
                 "encoder_hidden_states": noise(1, 6, 16)},
    ),
    "PixArtTransformer2DModel": (
        {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "num_layers": 2,
         "sample_size": 8, "cross_attention_dim": 16, "caption_channels": 16, "out_channels": 8,
         "use_additional_conditions": False},
        lambda: {"hidden_states": noise(1, 4, 8, 8), "timestep": torch.tensor([3]),
                 "encoder_hidden_states": noise(1, 6, 16),
                 "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}},
    ),
    "AutoencoderTiny": (
        {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8),
         "num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)},
        lambda: {"sample": noise(1, 3, 16, 16)},
    ),
    "LTXVideoTransformer3DModel": (
        {"in_channels": 8, "out_channels": 8, "num_attention_heads": 2, "attention_head_dim": 16,
         "cross_attention_dim": 32, "num_layers": 2, "caption_channels": 16},
        lambda: {"hidden_states": noise(1, 8, 8), "encoder_hidden_states": noise(1, 6, 16),
                 "timestep": torch.tensor([3]), "encoder_attention_mask": torch.ones(1, 6),
                 "num_frames": 2, "height": 2, "width": 2},
    ),
    "QwenImageTransformer2DModel": (
        {"in_channels": 16, "out_channels": 4, "num_layers": 2, "attention_head_dim": 16,
         "num_attention_heads": 2, "joint_attention_dim": 16, "axes_dims_rope": (4, 6, 6)},
        lambda: {"hidden_states": noise(1, 16, 16), "encoder_hidden_states": noise(1, 6, 16),
                 "encoder_hidden_states_mask": torch.ones(1, 6, dtype=torch.bool),
                 "timestep": torch.tensor([0.5]), "img_shapes": [[(1, 4, 4)]]},
    ),
}  # fmt: skip


DIFFUSERS = {name: partial(build, name, *parts) for name, parts in _MODELS.items()}
