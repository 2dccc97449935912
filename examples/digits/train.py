# SPDX-License-Identifier: Apache-2.0
"""Trains the digit transformer of `distorch demo` on the digits that scikit-learn ships."""

from __future__ import annotations

import argparse
import copy
import json
from dataclasses import asdict
from pathlib import Path

import torch
from data import digits, share_recognised
from safetensors.torch import save_file
from tqdm import tqdm

import distorch.demo
from distorch.demo.model import DigitTransformer
from distorch.demo.sampling import sample

WEIGHTS = Path(distorch.demo.__file__).parent / "weights"


def flow_loss(model, images, labels):
    """Rectified flow: the velocity on a straight line from noise to image; a tenth unlabelled."""
    times = torch.sigmoid(torch.randn(len(images)))
    noise = torch.randn_like(images)
    at = times[:, None, None, None]
    hidden = torch.rand(len(labels)) < 0.1
    labels = torch.where(hidden, torch.full_like(labels, model.no_label), labels)
    velocity = model(noise + at * (images - noise), times, labels)
    return (velocity - (images - noise)).square().mean()


def train(model, images, labels, *, steps, batch, rate):
    """AdamW with warm-up and cosine decay; returns the moving average of the weights."""
    average = copy.deepcopy(model)
    chosen = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(chosen, lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    bar = tqdm(range(steps), unit="step")
    for step in bar:
        pick = torch.randint(len(images), (batch,))
        loss = flow_loss(model, images[pick], labels[pick])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        decay = min(0.998, (step + 1) / (step + 10))
        with torch.no_grad():
            for mean, now in zip(average.parameters(), model.parameters(), strict=True):
                mean.lerp_(now, 1 - decay)
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}")
    return average


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=WEIGHTS / "digits-dit-bf16.safetensors")
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    images, labels = digits()
    model = DigitTransformer()
    for block in model.blocks:
        torch.nn.init.zeros_(block.modulation.weight)
        torch.nn.init.zeros_(block.modulation.bias)
    torch.nn.init.normal_(model.positions, std=0.02)
    model = train(model, images, labels, steps=options.steps, batch=options.batch, rate=1e-3).to(
        torch.bfloat16
    )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, options.out, metadata={"config": json.dumps(asdict(model.config))})
    wanted = torch.arange(100) % 10
    share = share_recognised(sample(model, wanted), wanted)
    count = sum(p.numel() for p in model.parameters())
    print(f"{options.out}: {count:,} parameters, {share:.0%} of 100 samples recognised")


if __name__ == "__main__":
    main()
