# SPDX-License-Identifier: Apache-2.0
"""What the models have in common. The names of weights are those of diffusers' classes."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from distorch.errors import SpecError


def turned(x: torch.Tensor) -> torch.Tensor:
    """Queries or keys [..., tokens, heads, numbers] with their positions, computed in float32."""
    angles = x.new_empty(x.shape[1], 1, x.shape[-1], dtype=torch.float32)
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)  # type: ignore[no-untyped-call]
    swapped = torch.stack([-second, first], dim=-1).flatten(-2)
    return (x.float() * angles + swapped.float() * angles).to(x.dtype)


def attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, causal: bool = False
) -> torch.Tensor:
    """[batch, tokens, heads, numbers] of each -> [batch, tokens, heads * numbers]."""
    grouped = query.shape[2] != key.shape[2]
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    out = functional.scaled_dot_product_attention(
        query, key, value, is_causal=causal, enable_gqa=grouped
    )
    return out.transpose(1, 2).flatten(2)


def modulated(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Layer norm without weights, and then a scale and a shift that depend on the time."""
    return functional.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift


class Gelu(nn.Module):
    """A matrix and its activation."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, inner)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.gelu(self.proj(x), approximate="tanh")


class FeedForward(nn.Module):
    """Two matrices with an activation between them."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.net = nn.Sequential(Gelu(width, inner), nn.Identity(), nn.Linear(inner, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.net(x)
        return out


class Embedding(nn.Module):
    """Two matrices for the time or another condition."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(inputs, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.linear_2(functional.silu(self.linear_1(x)))
        return out


class Modulation(nn.Module):
    """`parts` vectors from the embedded time."""

    def __init__(self, width: int, parts: int) -> None:
        super().__init__()
        self.parts = parts
        self.linear = nn.Linear(width, parts * width)

    def forward(self, time: torch.Tensor) -> tuple[torch.Tensor, ...]:
        parts: torch.Tensor = self.linear(functional.silu(time)).unsqueeze(1)
        return parts.chunk(self.parts, dim=-1)


OF_IMAGE = ("norm_q", "norm_k", "to_q", "to_k", "to_v")  # parts of a JointAttention
OF_TEXT = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
NORMS_OF_TEXT = ("norm_added_q", "norm_added_k")


class JointAttention(nn.Module):
    """Attention of an image's tokens, and of a text's with other matrices, to all of them."""

    norm_q: nn.Module
    norm_k: nn.Module
    to_q: nn.Module
    to_k: nn.Module
    to_v: nn.Module
    to_out: nn.ModuleList
    norm_added_q: nn.Module
    norm_added_k: nn.Module
    add_q_proj: nn.Module
    add_k_proj: nn.Module
    add_v_proj: nn.Module
    to_add_out: nn.Module

    def __init__(self, width: int, heads: int, names: tuple[str, ...]) -> None:
        """`names`: its parts in their order, which is not the same in each model."""
        super().__init__()
        self.heads = heads
        for name in names:
            if name == "to_out":
                part: nn.Module = nn.ModuleList([nn.Linear(width, width)])
            elif name.startswith("norm"):
                part = nn.RMSNorm(width // heads)
            else:
                part = nn.Linear(width, width)
            self.add_module(name, part)

    def _split(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(*x.shape[:-1], self.heads, -1)

    def forward(
        self, image: torch.Tensor, text: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        query, key, value = (self._split(f(image)) for f in (self.to_q, self.to_k, self.to_v))
        if text is None:
            query, key = turned(self.norm_q(query)), turned(self.norm_k(key))
            return attention(query, key, value), None
        added = [self._split(f(text)) for f in (self.add_q_proj, self.add_k_proj, self.add_v_proj)]
        query, key = self.norm_q(query), self.norm_k(key)
        query = torch.cat([self.norm_added_q(added[0]), query], dim=1)
        key = torch.cat([self.norm_added_k(added[1]), key], dim=1)
        value = torch.cat([added[2], value], dim=1)
        out = attention(turned(query), turned(key), value)
        count = text.shape[1]
        return self.to_out[0](out[:, count:]), self.to_add_out(out[:, :count])


def patches(size: tuple[int, int] | None, pixels: int) -> int:
    """Tokens of a picture, of so many pixels in each direction. SpecError unless it divides."""
    width, height = size or (0, 0)
    if width % pixels or height % pixels:
        raise SpecError(f"size={width}x{height}: expected multiples of {pixels} pixels")
    return width // pixels * (height // pixels)
