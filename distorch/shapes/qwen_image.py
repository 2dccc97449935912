# SPDX-License-Identifier: Apache-2.0
"""Qwen-Image, 20.4 billion parameters, with the names of diffusers' QwenImageTransformer2DModel."""

from __future__ import annotations

import torch
from torch import nn

from distorch.shapes.common import (
    NORMS_OF_TEXT,
    OF_IMAGE,
    Embedding,
    FeedForward,
    JointAttention,
    Modulation,
    modulated,
    patches,
)
from distorch.shapes.request import Request, empty

_WIDTH, _HEADS, _BLOCKS = 3072, 24, 60
_TEXT_WIDTH, _LATENT = 3584, 64
_PARTS = (
    *OF_IMAGE, "add_k_proj", "add_v_proj", "add_q_proj", "to_out", "to_add_out", *NORMS_OF_TEXT,
)  # fmt: skip
_PIXELS = 16  # of a token, in each direction


class _Time(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.timestep_embedder = Embedding(256, _WIDTH)


class _Block(nn.Module):
    """A block with other weights for the text than for the image."""

    def __init__(self) -> None:
        super().__init__()
        self.img_mod = nn.Sequential(nn.SiLU(), nn.Linear(_WIDTH, 6 * _WIDTH))
        self.attn = JointAttention(_WIDTH, _HEADS, _PARTS)
        self.img_mlp = FeedForward(_WIDTH, 4 * _WIDTH)
        self.txt_mod = nn.Sequential(nn.SiLU(), nn.Linear(_WIDTH, 6 * _WIDTH))
        self.txt_mlp = FeedForward(_WIDTH, 4 * _WIDTH)

    def forward(
        self, image: torch.Tensor, text: torch.Tensor, time: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        of_image = self.img_mod(time).unsqueeze(1).chunk(6, dim=-1)
        of_text = self.txt_mod(time).unsqueeze(1).chunk(6, dim=-1)
        image_out, text_out = self.attn(
            modulated(image, *of_image[:2]), modulated(text, *of_text[:2])
        )
        image, text = image + of_image[2] * image_out, text + of_text[2] * text_out
        image = image + of_image[5] * self.img_mlp(modulated(image, *of_image[3:5]))
        return image, text + of_text[5] * self.txt_mlp(modulated(text, *of_text[3:5]))


class QwenImage(nn.Module):
    """The transformer of Qwen-Image."""

    def __init__(self) -> None:
        super().__init__()
        self.time_text_embed = _Time()
        self.txt_norm = nn.RMSNorm(_TEXT_WIDTH)
        self.img_in = nn.Linear(_LATENT, _WIDTH)
        self.txt_in = nn.Linear(_TEXT_WIDTH, _WIDTH)
        self.transformer_blocks = nn.ModuleList(_Block() for _ in range(_BLOCKS))
        self.norm_out = Modulation(_WIDTH, 2)
        self.proj_out = nn.Linear(_WIDTH, _LATENT)

    def step(self, request: Request) -> torch.Tensor:
        """One step of sampling."""
        batch = request.batch
        image = self.img_in(empty(batch, patches(request.size, _PIXELS), _LATENT))
        text = self.txt_in(self.txt_norm(empty(batch, request.tokens, _TEXT_WIDTH)))
        time = self.time_text_embed.timestep_embedder(empty(batch, 256))
        for block in self.transformer_blocks:
            image, text = block(image, text, time)
        out: torch.Tensor = self.proj_out(modulated(image, *self.norm_out(time)))
        return out
