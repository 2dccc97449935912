# SPDX-License-Identifier: Apache-2.0
"""The ways of training that are compared: each gives back its losses and its weights."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F

from .models import VOCABULARY


def train(
    model,
    optimizer=torch.optim.AdamW,
    *,
    steps=50,
    accumulate=1,
    amp=None,
    scaler=None,
    clip=None,
    **options,
):
    """Losses and final trainable weights; the data, and dropout, are the same at every call.

    `amp` is the dtype of autocast, `scaler` a GradScaler, `clip` the largest norm of gradients.
    """
    model.train()
    trainable = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    optimizer = optimizer([p for _, p in trainable], lr=1e-2, **options)
    torch.manual_seed(2)
    losses = []
    for step in range(steps * accumulate):
        ids = torch.randint(VOCABULARY, (4, 9))
        with torch.autocast("cpu", amp) if amp is not None else nullcontext():
            logits = model(ids[:, :-1])
        loss = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten()) / accumulate
        (scaler.scale(loss) if scaler is not None else loss).backward()
        losses.append(loss.item())
        if (step + 1) % accumulate:
            continue
        if scaler is not None:
            scaler.unscale_(optimizer)
        if clip is not None:
            torch.nn.utils.clip_grad_norm_([p for _, p in trainable], clip)
        if scaler is not None:
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step()
        optimizer.zero_grad()
    return losses, {name: parameter.detach().clone() for name, parameter in trainable}


def assert_same_training(got, wanted):
    """The same losses, the same weights, and the losses are those of a model that learns."""
    assert got[0] == wanted[0]
    assert len(set(wanted[0])) > 1
    assert got[1].keys() == wanted[1].keys() and wanted[1]
    for name, weight in wanted[1].items():
        assert torch.equal(got[1][name], weight), name
