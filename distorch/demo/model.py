# SPDX-License-Identifier: Apache-2.0
"""A small diffusion transformer for handwritten digits.

The architecture is DiT (Peebles and Xie, 2023) with adaLN-zero blocks, trained by rectified flow
(Liu et al., 2022): the network predicts the velocity from noise to image.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class DigitConfig:
    """Sizes of the transformer; `classes` digits and one more class for "no digit"."""

    image: int = 8
    patch: int = 2
    width: int = 192
    depth: int = 6
    heads: int = 4
    classes: int = 10


class Attention(nn.Module):
    """Self-attention over tokens [n, tokens, width]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.to_out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[n, tokens, width] -> [n, tokens, width]."""
        n, tokens, width = x.shape
        q, k, v = (
            layer(x).view(n, tokens, self.heads, -1).transpose(1, 2)
            for layer in (self.to_q, self.to_k, self.to_v)
        )
        mixed = functional.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.to_out(mixed.transpose(1, 2).reshape(n, tokens, width))
        return out


class Block(nn.Module):
    """A transformer block whose norms are modulated by the condition."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Tokens [n, tokens, width] and condition [n, width] -> tokens."""
        parts = self.modulation(functional.silu(condition))[:, None].chunk(6, dim=-1)
        shift1, scale1, gate1, shift2, scale2, gate2 = parts
        x = x + gate1 * self.attention(self.norm1(x) * (1 + scale1) + shift1)
        hidden = self.up(self.norm2(x) * (1 + scale2) + shift2)
        out: Tensor = x + gate2 * self.down(functional.gelu(hidden, approximate="tanh"))
        return out


class DigitTransformer(nn.Module):
    """Velocity of digits: images [n, 1, size, size], times [n] in 0..1, labels [n]."""

    def __init__(self, config: DigitConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or DigitConfig()
        tokens = (config.image // config.patch) ** 2
        pixels = config.patch**2
        self.embed = nn.Linear(pixels, config.width)
        self.positions = nn.Parameter(torch.zeros(tokens, config.width))
        self.labels = nn.Embedding(config.classes + 1, config.width)
        self.time1 = nn.Linear(config.width, config.width)
        self.time2 = nn.Linear(config.width, config.width)
        self.blocks = nn.ModuleList(Block(config.width, config.heads) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width, elementwise_affine=False)
        self.out = nn.Linear(config.width, pixels)

    @property
    def no_label(self) -> int:
        """The label of the unconditional pass."""
        return self.config.classes

    def _times(self, times: Tensor, dtype: torch.dtype) -> Tensor:
        half = self.config.width // 2
        steps = torch.arange(half, device=times.device) / half
        angles = times.float()[:, None] * 1000 * torch.exp(-math.log(10_000) * steps)
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1).to(dtype)
        out: Tensor = self.time2(functional.silu(self.time1(waves)))
        return out

    def forward(self, images: Tensor, times: Tensor, labels: Tensor) -> Tensor:
        """Velocity [n, 1, size, size] in the images' dtype."""
        n, patch = images.shape[0], self.config.patch
        x = self.embed(functional.unfold(images, patch, stride=patch).transpose(1, 2))
        x = x + self.positions
        condition = self._times(times, images.dtype) + self.labels(labels)
        for block in self.blocks:
            x = block(x, condition)
        pixels = self.out(self.norm(x)).transpose(1, 2).reshape(n, patch**2, -1)
        return functional.fold(pixels, images.shape[-2:], patch, stride=patch)
