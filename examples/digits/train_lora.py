# SPDX-License-Identifier: Apache-2.0
"""Trains a LoRA that turns the digits of `distorch demo` into their negatives: white on black."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from data import digits, share_recognised
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from train import WEIGHTS, train

from distorch.demo.model import DigitTransformer
from distorch.demo.sampling import sample


class LoraLinear(nn.Module):
    """base(x) + alpha / rank * up(down(x)), the base frozen (Hu et al., 2021)."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(rank, base.in_features) / rank)
        self.up = nn.Parameter(torch.zeros(base.out_features, rank))
        self.scale = alpha / rank

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return self.base(x) + self.scale * (x @ self.down.t() @ self.up.t())


def inject(model: DigitTransformer, rank: int, alpha: float) -> dict[str, LoraLinear]:
    """Puts a LoRA on every linear layer of the blocks; returns them by module path."""
    model.requires_grad_(False)
    found = {}
    for path, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and path.startswith("blocks."):
            parent, _, name = path.rpartition(".")
            found[path] = LoraLinear(layer, rank, alpha)
            setattr(model.get_submodule(parent), name, found[path])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, default=WEIGHTS / "digits-dit-bf16.safetensors")
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--alpha", type=float, default=8)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=WEIGHTS / "digits-negative-lora.safetensors")
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    images, labels = digits()
    model = DigitTransformer()
    model.load_state_dict({k: v.float() for k, v in load_file(options.base).items()})
    inject(model, options.rank, options.alpha)
    model = train(model, -images, labels, steps=options.steps, batch=options.batch, rate=4e-3)
    factors = {}
    for path, layer in model.named_modules():
        if isinstance(layer, LoraLinear):
            stem = f"base_model.model.{path}"
            factors[f"{stem}.lora_A.weight"] = layer.down.detach().bfloat16()
            factors[f"{stem}.lora_B.weight"] = layer.up.detach().bfloat16()
    metadata = {"lora_alpha": str(options.alpha), "r": str(options.rank)}
    save_file(factors, options.out, metadata=metadata)
    wanted = torch.arange(100) % 10
    share = share_recognised(-sample(model, wanted), wanted)
    print(f"{options.out}: {share:.0%} of 100 samples recognised as negatives")


if __name__ == "__main__":
    main()
