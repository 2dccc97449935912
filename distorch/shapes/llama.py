# SPDX-License-Identifier: Apache-2.0
"""Llama 3 with 70.6 billion parameters, with the names of transformers' LlamaForCausalLM."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from distorch.shapes.common import attention, turned
from distorch.shapes.request import Request

_WIDTH, _HEADS, _KEYS, _BLOCKS, _INNER, _WORDS = 8192, 64, 8, 80, 28672, 128256
_HEAD = _WIDTH // _HEADS


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(_WIDTH, _WIDTH, bias=False)
        self.k_proj = nn.Linear(_WIDTH, _KEYS * _HEAD, bias=False)
        self.v_proj = nn.Linear(_WIDTH, _KEYS * _HEAD, bias=False)
        self.o_proj = nn.Linear(_WIDTH, _WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = (
            f(x).unflatten(-1, (-1, _HEAD)) for f in (self.q_proj, self.k_proj, self.v_proj)
        )
        out: torch.Tensor = self.o_proj(attention(turned(query), turned(key), value, causal=True))
        return out


class _FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(_WIDTH, _INNER, bias=False)
        self.up_proj = nn.Linear(_WIDTH, _INNER, bias=False)
        self.down_proj = nn.Linear(_INNER, _WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn = _Attention()
        self.mlp = _FeedForward()
        self.input_layernorm = nn.RMSNorm(_WIDTH)
        self.post_attention_layernorm = nn.RMSNorm(_WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x))
        out: torch.Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class _Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(_WORDS, _WIDTH)
        self.layers = nn.ModuleList(_Block() for _ in range(_BLOCKS))
        self.norm = nn.RMSNorm(_WIDTH)


class Llama(nn.Module):
    """The whole model."""

    def __init__(self) -> None:
        super().__init__()
        self.model = _Blocks()
        self.lm_head = nn.Linear(_WIDTH, _WORDS, bias=False)

    def step(self, request: Request) -> torch.Tensor:
        """One pass over the tokens that are new. Of those before, nothing is read."""
        words = torch.empty(request.batch, request.tokens, dtype=torch.int64, device="meta")
        x = self.model.embed_tokens(words)
        for block in self.model.layers:
            x = block(x)
        out: torch.Tensor = self.lm_head(self.model.norm(x)[:, -1:])
        return out
