# SPDX-License-Identifier: Apache-2.0
"""PEFT on distributed models: adapters before and after, trained, run, merged."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import distorch


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Linear(32, 64)
        self.down = nn.Linear(64, 32)

    def forward(self, x):
        return self.down(self.up(x).relu())


CONFIG = {"target_modules": ["up", "down"], "r": 4, "init_lora_weights": False}
SPECS = ["cpu,0b;disk,*", "cpu,*"]


def adapted(module):
    torch.manual_seed(1)
    return get_peft_model(module, LoraConfig(**CONFIG))


def train(model, steps=20):
    torch.manual_seed(2)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(steps):
        x = torch.randn(8, 32)
        loss = (model(x) - x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("when", ["before", "after"])
def test_adapters_train_and_merge(spec, when):
    plain = adapted(Net())
    options = {"min_bytes": 0, "keep": ["*lora_*"]}
    if when == "before":
        model = distorch.distribute(adapted(Net()), spec, **options)
    else:
        model = adapted(distorch.distribute(Net(), spec, min_bytes=0))
    assert distorch.is_sharded(model.base_model.model.up.base_layer.weight) == ("disk" in spec)
    assert train(model) == train(plain)
    x = torch.randn(3, 32)
    assert torch.equal(model(x), plain(x))
    merged, expected = model.merge_and_unload(), plain.merge_and_unload()
    assert torch.equal(merged(x), expected(x))
    for mine, other in zip(merged.parameters(), expected.parameters(), strict=True):
        assert torch.equal(distorch.materialize(mine), other)


def test_adapters_beside_patches(tmp_path):
    """A LoRA of ours below an adapter of PEFT's."""
    from safetensors.torch import save_file

    save_file(Net().state_dict(), tmp_path / "base.safetensors")
    state = {"up.lora_A.weight": torch.randn(2, 32), "up.lora_B.weight": torch.randn(64, 2)}
    results = []
    for mode in ("merge", "fetch", "background"):
        model = distorch.load(
            Net(), tmp_path / "base.safetensors", "cpu,0b;disk,*", min_bytes=0,
            loras=[(state, 0.5)], lora_mode=mode,
        )  # fmt: skip
        wrapped = adapted(model)
        train(wrapped, 3)
        distorch.set_loras(model, [(state, 0.1)])
        results.append(wrapped(torch.ones(2, 32)))
    assert all(torch.equal(results[0], other) for other in results[1:])
