# SPDX-License-Identifier: Apache-2.0
"""FLUX.1-dev, 11.9 billion parameters, with the names of diffusers' FluxTransformer2DModel."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from distorch.shapes.common import (
    NORMS_OF_TEXT,
    OF_IMAGE,
    OF_TEXT,
    Embedding,
    FeedForward,
    JointAttention,
    Modulation,
    modulated,
    patches,
)
from distorch.shapes.request import Request, empty

_WIDTH, _HEADS, _DOUBLE, _SINGLE = 3072, 24, 19, 38
_TEXT_WIDTH, _POOLED, _LATENT = 4096, 768, 64
_PIXELS = 16  # of a token, in each direction


class _Conditions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.timestep_embedder = Embedding(256, _WIDTH)
        self.guidance_embedder = Embedding(256, _WIDTH)
        self.text_embedder = Embedding(_POOLED, _WIDTH)

    def forward(self, time: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
        times = self.timestep_embedder(time) + self.guidance_embedder(time)
        out: torch.Tensor = times + self.text_embedder(pooled)
        return out


class _Double(nn.Module):
    """A block with other weights for the text than for the image."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm1_context = Modulation(_WIDTH, 6), Modulation(_WIDTH, 6)
        self.attn = JointAttention(_WIDTH, _HEADS, (*OF_IMAGE, "to_out", *NORMS_OF_TEXT, *OF_TEXT))
        self.ff = FeedForward(_WIDTH, 4 * _WIDTH)
        self.ff_context = FeedForward(_WIDTH, 4 * _WIDTH)

    def forward(
        self, image: torch.Tensor, text: torch.Tensor, time: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        of_image = self.norm1(time)
        normed = modulated(image, *of_image[:2])
        of_text = self.norm1_context(time)
        image_out, text_out = self.attn(normed, modulated(text, *of_text[:2]))
        image = image + of_image[2] * image_out
        image = image + of_image[5] * self.ff(modulated(image, *of_image[3:5]))
        text = text + of_text[2] * text_out
        return image, text + of_text[5] * self.ff_context(modulated(text, *of_text[3:5]))


class _Single(nn.Module):
    """A block for all tokens alike."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = Modulation(_WIDTH, 3)
        self.proj_mlp = nn.Linear(_WIDTH, 4 * _WIDTH)
        self.proj_out = nn.Linear(5 * _WIDTH, _WIDTH)
        self.attn = JointAttention(_WIDTH, _HEADS, OF_IMAGE)

    def forward(
        self, image: torch.Tensor, text: torch.Tensor, time: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.cat([text, image], dim=1)
        shift, scale, gate = self.norm(time)
        normed = modulated(x, shift, scale)
        inner = functional.gelu(self.proj_mlp(normed), approximate="tanh")
        out, _ = self.attn(normed)
        x = x + gate * self.proj_out(torch.cat([out, inner], dim=2))
        return x[:, text.shape[1] :], x[:, : text.shape[1]]


class Flux(nn.Module):
    """The transformer of FLUX.1-dev."""

    def __init__(self) -> None:
        super().__init__()
        self.time_text_embed = _Conditions()
        self.context_embedder = nn.Linear(_TEXT_WIDTH, _WIDTH)
        self.x_embedder = nn.Linear(_LATENT, _WIDTH)
        self.transformer_blocks = nn.ModuleList(_Double() for _ in range(_DOUBLE))
        self.single_transformer_blocks = nn.ModuleList(_Single() for _ in range(_SINGLE))
        self.norm_out = Modulation(_WIDTH, 2)
        self.proj_out = nn.Linear(_WIDTH, _LATENT)

    def step(self, request: Request) -> torch.Tensor:
        """One step of sampling."""
        batch = request.batch
        image = self.x_embedder(empty(batch, patches(request.size, _PIXELS), _LATENT))
        time = self.time_text_embed(empty(batch, 256), empty(batch, _POOLED))
        text = self.context_embedder(empty(batch, request.tokens, _TEXT_WIDTH))
        for block in (*self.transformer_blocks, *self.single_transformer_blocks):
            image, text = block(image, text, time)
        out: torch.Tensor = self.proj_out(modulated(image, *self.norm_out(time)))
        return out
