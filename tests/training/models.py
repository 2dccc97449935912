# SPDX-License-Identifier: Apache-2.0
"""Small models to train, plain and under an adapter that somebody wrote by hand."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

VOCABULARY, WIDTH = 61, 32


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x):
        h = self.norm(x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        return x + self.dropout(self.down(self.up(self.norm(x)).relu()))


class Language(nn.Module):
    """A transformer with tied embeddings; `checkpointing` is None, "reentrant" or "not"."""

    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight
        self.checkpointing: str | None = None

    def forward(self, ids):
        x = self.embed(ids)
        if self.checkpointing == "reentrant" and not x.requires_grad:
            x.requires_grad_()  # else nothing inside gets a gradient
        for block in self.blocks:
            if self.checkpointing is None:
                x = block(x)
            else:
                x = checkpoint(block, x, use_reentrant=self.checkpointing == "reentrant")
        return self.head(x)


class LowRank(nn.Module):
    """A LoRA by hand: a frozen layer and two small ones that are trained."""

    def __init__(self, base: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def language() -> Language:
    torch.manual_seed(0)
    return Language()


def with_low_rank(model: Language) -> Language:
    """Freezes the model and puts adapters, on the compute device, over its feed-forward layers."""
    model.requires_grad_(False)
    torch.manual_seed(1)
    for block in model.blocks:
        block.up = LowRank(block.up)
        block.down = LowRank(block.down)
    return model


def with_peft(model: Language):
    """The same with PEFT."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules=["up", "down", "out_proj"], lora_dropout=0.1)
    return get_peft_model(model, config)
