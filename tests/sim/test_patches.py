# SPDX-License-Identifier: Apache-2.0
"""LoRAs with an accelerator: patched there, the same bits as on the CPU, streams in order."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import distorch
from distorch.testing import sim
from tests.gguf_files import write_blocks

SPECS = [
    "sim:0,0b;cpu,*",
    "sim:0,0b;disk,*",
    "sim:0,0b;sim:1,*",
    "sim:0,50%;cpu+sim:1,50%",
    "sim:0,*",
]


def net():
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(64, 64, bias=False, dtype=torch.bfloat16) for _ in range(6)))


def lora(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{i}.lora_{side}.weight": torch.randn(shape, generator=generator)
        for i in range(6)
        for side, shape in (("A", (4, 64)), ("B", (64, 4)))
    }


@pytest.fixture
def path(tmp_path):
    save_file(net().state_dict(), tmp_path / "base.safetensors")
    return tmp_path / "base.safetensors"


@pytest.mark.parametrize("mode", ["merge", "fetch", "background"])
@pytest.mark.parametrize("spec", SPECS)
def test_the_same_bits_as_on_the_cpu(path, spec, mode):
    sim.configure(devices=2, links={("sim:1", "sim:0"): (50e9, 5e-6)})
    options = {"min_bytes": 0, "prefetch": "64kb"}
    x = torch.randn(3, 64).bfloat16()
    model = distorch.load(net(), path, spec, loras=[(lora(), 0.5)], lora_mode=mode, **options)
    for loras in ([(lora(), 0.5)], [(lora(), 0.9)], [(lora(1), -0.3), (lora(), 0.1)], []):
        distorch.set_loras(model, loras)
        plain = distorch.load(net(), path, "cpu,*", loras=loras, **options)
        for _ in range(3):
            assert torch.equal(model(x.to("sim")).cpu(), plain(x))
        for mine, other in zip(model.parameters(), plain.parameters(), strict=True):
            assert torch.equal(distorch.materialize(mine).cpu(), distorch.materialize(other))
        assert distorch.report(model).ok, distorch.report(model).problems
    assert sim.races() == []


def test_scaled_numbers_are_widened_on_the_device(tmp_path):
    sim.configure(devices=1)
    state = {k: v.to(torch.float8_e4m3fn) for k, v in net().state_dict().items()}
    for i in range(6):
        state[f"{i}.weight_scale"] = torch.tensor(0.5 + i)
    save_file(state, tmp_path / "fp8.safetensors")
    x = torch.randn(3, 64).bfloat16()
    options = {"min_bytes": 0, "prefetch": "64kb"}
    model = distorch.load(net(), tmp_path / "fp8.safetensors", "sim:0,0b;cpu,*", **options)
    plain = distorch.load(net(), tmp_path / "fp8.safetensors", "cpu,*", **options)
    for _ in range(3):
        assert torch.equal(model(x.to("sim")).cpu(), plain(x))
    assert distorch.report(model).bytes["cpu"] == 6 * 64 * 64
    assert sim.races() == []


def test_a_strength_moves_no_bytes_at_fetch(path):
    sim.configure(devices=1)
    options = {"min_bytes": 0, "prefetch": "64kb", "lora_mode": "fetch"}
    style = lora()
    model = distorch.load(net(), path, "sim:0,0b;cpu,*", loras=[(style, 0.5)], **options)
    model(torch.randn(3, 64).bfloat16().to("sim"))
    sim.synchronize()
    begin = len(sim.timeline())
    distorch.set_loras(model, [(style, 0.9)])
    sim.synchronize()
    assert len(sim.timeline()) == begin


def test_blocks_are_decoded_on_the_device(tmp_path):
    sim.configure(devices=2, links={("sim:1", "sim:0"): (50e9, 5e-6)})
    write_blocks(tmp_path / "x.gguf", 6, 64)
    options = {"min_bytes": 0, "prefetch": "64kb"}
    plain = distorch.load(net(), tmp_path / "x.gguf", "cpu,*", **options)
    x = torch.randn(3, 64).bfloat16()
    for spec in SPECS:
        model = distorch.load(
            net(), tmp_path / "x.gguf", spec, loras=[(lora(), 0.1)], lora_mode="fetch", **options
        )
        distorch.set_loras(model, [])
        for _ in range(3):
            assert torch.equal(model(x.to("sim")).cpu(), plain(x)), spec
        report = distorch.report(model)
        assert report.ok and sum(report.bytes.values()) == 6 * 64 * 2 * 34
    assert sim.races() == []
