# SPDX-License-Identifier: Apache-2.0
"""Wan 2.2 A14B (text to video): one of its two experts, 14.3 billion parameters each, with the
names of diffusers' WanTransformer3DModel. A step of sampling uses one expert.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from distorch.errors import SpecError
from distorch.shapes.common import Embedding, FeedForward, attention, modulated, patches, turned
from distorch.shapes.request import Request, empty

_WIDTH, _HEADS, _BLOCKS, _INNER = 5120, 40, 40, 13824
_TEXT_WIDTH, _LATENT = 4096, 16
_PIXELS, _FRAMES = 16, 4  # of a token: pixels in each direction; frames behind the first one


class _Attention(nn.Module):
    """Attention to the tokens of the video, or to those of the text."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(_WIDTH, _WIDTH) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(_WIDTH, _WIDTH)])
        self.norm_q, self.norm_k = nn.RMSNorm(_WIDTH), nn.RMSNorm(_WIDTH)

    def forward(self, x: torch.Tensor, text: torch.Tensor | None = None) -> torch.Tensor:
        others = x if text is None else text
        query, key, value = self.to_q(x), self.to_k(others), self.to_v(others)
        query, key, value = (
            part.unflatten(2, (_HEADS, -1))
            for part in (self.norm_q(query), self.norm_k(key), value)
        )
        if text is None:
            query, key = turned(query), turned(key)
        out: torch.Tensor = self.to_out[0](attention(query, key, value))
        return out


class _Block(nn.Module):
    """Norms and modulation are computed in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.empty(1, 6, _WIDTH, dtype=torch.float32))
        self.attn1 = _Attention()
        self.attn2 = _Attention()
        self.norm2 = nn.LayerNorm(_WIDTH, dtype=torch.float32)
        self.ffn = FeedForward(_WIDTH, _INNER)

    def forward(self, x: torch.Tensor, text: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        parts = (self.scale_shift_table + time.float()).chunk(6, dim=1)
        out = self.attn1(modulated(x.float(), *parts[:2]).to(x.dtype))
        x = (x.float() + out * parts[2]).to(x.dtype)
        x = x + self.attn2(self.norm2(x.float()).to(x.dtype), text)
        out = self.ffn(modulated(x.float(), *parts[3:5]).to(x.dtype))
        x = x.float() + out.float() * parts[5]
        return x.to(text.dtype)


class _Conditions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.time_embedder = Embedding(256, _WIDTH).float()
        self.time_proj = nn.Linear(_WIDTH, 6 * _WIDTH)
        self.text_embedder = Embedding(_TEXT_WIDTH, _WIDTH)


class Wan(nn.Module):
    """The transformer of one expert."""

    def __init__(self) -> None:
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.empty(1, 2, _WIDTH, dtype=torch.float32))
        self.patch_embedding = nn.Conv3d(_LATENT, _WIDTH, (1, 2, 2), (1, 2, 2))
        self.condition_embedder = _Conditions()
        self.blocks = nn.ModuleList(_Block() for _ in range(_BLOCKS))
        self.proj_out = nn.Linear(_WIDTH, 4 * _LATENT)

    def step(self, request: Request) -> torch.Tensor:
        """One step of sampling."""
        batch, frames = request.batch, request.frames or 1
        width, height = request.size or (0, 0)
        patches(request.size, _PIXELS)
        if (frames - 1) % _FRAMES:
            raise SpecError(f"frames={frames}: expected multiples of {_FRAMES} and one, as 81")
        latents = empty(batch, _LATENT, (frames - 1) // _FRAMES + 1, height // 8, width // 8)
        x = self.patch_embedding(latents).flatten(2).transpose(1, 2).contiguous()
        conditions = self.condition_embedder
        time = conditions.time_embedder(empty(batch, 256).float()).to(x.dtype)
        parts = conditions.time_proj(functional.silu(time)).unflatten(1, (6, -1))
        text = conditions.text_embedder(empty(batch, request.tokens, _TEXT_WIDTH))
        for block in self.blocks:
            x = block(x, text, parts)
        shift, scale = (self.scale_shift_table + time.unsqueeze(1)).chunk(2, dim=1)
        out: torch.Tensor = self.proj_out(modulated(x.float(), shift, scale).to(x.dtype))
        return out
