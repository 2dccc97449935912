# SPDX-License-Identifier: Apache-2.0
"""Modules of torch.nn by themselves, and the ways in which they share weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from ..checks import Built
from .inputs import noise


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


def _build(make: Callable[[], nn.Module], shape: tuple[int, ...], integer: bool) -> Built:
    torch.manual_seed(0)
    x = torch.arange(12).reshape(2, 6) if integer else noise(*shape)
    return Built(make().eval(), arguments=(x,))


def _model(make: Callable[[], nn.Module], *shape: int, integer: bool = False):
    return partial(_build, make, shape, integer)


def _shared_module():
    layer = nn.Linear(8, 8)
    return nn.Sequential(layer, nn.Tanh(), layer)


def _convolutions():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ConvTranspose2d(8, 3, 3))


def _small_norms():
    return nn.Sequential(nn.Conv1d(4, 4, 3), nn.GroupNorm(2, 4), nn.PReLU(4))


def _encoder_layer():
    return nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True)


PLAIN = {
    "linear": _model(lambda: nn.Linear(8, 8), 2, 8),
    "tied": _model(_Tied, integer=True),
    "shared_module": _model(_shared_module, 2, 8),
    "lstm": _model(lambda: nn.LSTM(8, 8, num_layers=2, bidirectional=True), 5, 2, 8),
    "gru": _model(lambda: nn.GRU(8, 8), 5, 2, 8),
    "encoder_layer": _model(_encoder_layer, 2, 5, 16),
    "conv": _model(_convolutions, 2, 3, 8, 8),
    "weight_norm": _model(lambda: nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), 2, 8),
    "small_norms": _model(_small_norms, 2, 4, 9),
}
