# SPDX-License-Identifier: Apache-2.0
"""Models: the same bits as resident, forward, backward and patched."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import distorch
from distorch import _donors, _ops

from .streams import Block

SPECS = ["{0},0b;cpu,*", "{0},0b;disk,*", "{0},50%;cpu,50%", "{0},30%;cpu,30%;disk,*"]
WIDTH = 64


def net(dtype):
    torch.manual_seed(0)
    return nn.Sequential(*(Block(WIDTH) for _ in range(6))).to(dtype)


def batch(machine):
    x = torch.randn(16, WIDTH, generator=torch.Generator().manual_seed(1))
    return x.to(machine.device, machine.dtype)


@pytest.mark.parametrize("spec", SPECS)
def test_forward_and_backward(machine, spec):
    plain = net(machine.dtype).to(machine.device)
    model = distorch.distribute(net(machine.dtype), spec.format(machine.device), min_bytes=0)
    assert distorch.report(model).ok
    x = batch(machine)
    for _ in range(4):
        results = []
        for module in (plain, model):
            module.zero_grad()
            result = module(x)
            result.float().square().mean().backward()
            results.append([result, *(p.grad for p in module.parameters())])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_memory_is_given_back(machine):
    def run(model):
        with torch.no_grad():
            return model(batch(machine)).cpu()

    spec = f"{machine.device},0b;cpu,*"
    model = distorch.distribute(net(machine.dtype), spec, min_bytes=0)
    wanted = run(model)
    distorch.undistribute(model, device="cpu")
    before = machine.allocated()
    model = distorch.distribute(model, spec, min_bytes=0)
    assert torch.equal(run(model), wanted)
    del model
    assert machine.allocated() == before


@pytest.mark.parametrize("mode", ["merge", "fetch", "background"])
def test_loras(machine, tmp_path, mode):
    save_file(net(torch.bfloat16).state_dict(), tmp_path / "m.safetensors")
    generator = torch.Generator().manual_seed(4)
    lora = {
        f"{i}.up.lora_{side}.weight": torch.randn(shape, generator=generator)
        for i in range(6)
        for side, shape in (("A", (4, WIDTH)), ("B", (4 * WIDTH, 4)))
    }
    options = {"loras": [(lora, 0.5)], "min_bytes": 0}
    on_cpu = distorch.load(net(torch.bfloat16), tmp_path / "m.safetensors", "cpu,*", **options)
    spec = f"{machine.device},0b;cpu,*"
    model = distorch.load(
        net(torch.bfloat16), tmp_path / "m.safetensors", spec, lora_mode=mode, **options
    )
    for mine, other in zip(model.parameters(), on_cpu.parameters(), strict=True):
        assert torch.equal(distorch.materialize(mine).cpu(), distorch.materialize(other))


@pytest.mark.parametrize("donor", ["cpu", "disk", "{0}"])
def test_rows_of_a_table(machine, donor):
    """A lookup in a table that is decoded brings the rows it asks for, from any donor."""
    table = torch.randint(-128, 128, (300, 64), dtype=torch.int8)
    stored = _donors.shard_on(donor.format(machine.device), table, machine.device, "table")
    rows = _ops.decoded(stored, "int8", torch.float32, (300, 64), name="table")
    ids = torch.tensor([[7, 299, 0], [7, 150, 1]])
    got = nn.functional.embedding(ids.to(machine.device), rows)
    assert torch.equal(got.cpu(), table[ids].float())
    none = nn.functional.embedding(ids[:0].to(machine.device), rows)
    assert none.shape == (0, 3, 64)
