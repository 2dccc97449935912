# SPDX-License-Identifier: Apache-2.0
"""GGUF: blocks on the donor, exact numbers in the operator, whatever the placement."""

import gguf
import numpy as np
import pytest
import torch
from torch import nn

import distorch
from distorch import SpecError

SPECS = ["cpu,*", "cpu,0b;disk,*", "cpu,30kb;disk,*"]
TYPES = ["Q8_0", "Q4_0", "Q4_K", "Q6_K", "IQ4_XS", "BF16", "F16", "F32"]
PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Net(nn.Module):
    def __init__(self, dtype=torch.bfloat16):
        super().__init__()
        self.table = nn.Embedding(300, 256, dtype=dtype)
        self.up = nn.Linear(256, 512, dtype=dtype)
        self.conv = nn.Conv2d(
            8, 16, 4, bias=False, dtype=dtype
        )  # rows of 128: not whole Q4_K blocks
        self.down = nn.Linear(512, 256, dtype=dtype)

    def forward(self, tokens):
        hidden = self.down(self.up(self.table(tokens)).relu())
        return hidden + self.conv(hidden.reshape(1, 8, -1, 32)).mean()


def random_blocks(kind, count, generator):
    """Bytes of blocks whose scales are ordinary numbers."""
    elements, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    blocks = generator.integers(0, 256, (count // elements, nbytes), dtype=np.uint8)
    halves = blocks.view(np.uint8)
    where = {"Q6_K": [208], "Q4_K": [0, 2]}.get(kind, [0])
    for at in where:
        halves[:, at : at + 2] = np.float16(0.0002).reshape(1).view(np.uint8)
    return blocks


def written(path, kind, module):
    """A file with the module's shapes, and its values as gguf-py decodes them."""
    generator = np.random.default_rng(3)
    writer = gguf.GGUFWriter(path, "test")
    values = {}
    for name, parameter in module.named_parameters():
        if parameter.dim() == 1 or kind in PLAIN:
            value = torch.from_numpy(
                generator.standard_normal(parameter.shape, dtype=np.float32) * 0.1
            )
            dtype = PLAIN.get(kind, torch.float32) if parameter.dim() > 1 else torch.float32
            values[name] = value.to(dtype).float()
            if dtype == torch.bfloat16:
                raw = value.bfloat16().view(torch.uint8).numpy()
                writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
            else:
                writer.add_tensor(name, value.to(dtype).numpy())
            continue
        shape = tuple(parameter.shape)
        blocks = random_blocks(kind, parameter.numel(), generator)
        kind_id = gguf.GGMLQuantizationType[kind]
        values[name] = (
            torch.from_numpy(gguf.quants.dequantize(blocks, kind_id)).reshape(shape).clone()
        )
        flat = (
            shape
            if shape[-1] % gguf.GGML_QUANT_SIZES[kind_id][0] == 0
            else (blocks.size // blocks.shape[1], gguf.GGML_QUANT_SIZES[kind_id][0])
        )
        rows = blocks.reshape(*flat[:-1], -1)
        writer.add_tensor(name, rows, raw_dtype=kind_id)
        if flat != shape:
            writer.add_array(f"comfy.gguf.orig_shape.{name}", list(shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


def stored_bytes(path):
    return {t.name: t.n_bytes for t in gguf.GGUFReader(path).tensors}


def load(path, spec, dtype=torch.bfloat16, **options):
    return distorch.load(Net(dtype), path, spec, min_bytes=0, prefetch="2mb", **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("spec", SPECS)
def test_exact_numbers(tmp_path, spec, kind, dtype):
    values = written(tmp_path / "x.gguf", kind, Net())
    model = load(tmp_path / "x.gguf", spec, dtype)
    plain = Net(dtype)
    plain.load_state_dict({name: value.to(dtype) for name, value in values.items()})
    for (name, mine), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert mine.dtype == dtype
        assert torch.equal(distorch.materialize(mine), other), name
    tokens = torch.randint(0, 300, (1, 32))
    for _ in range(2):
        assert torch.equal(model(tokens), plain(tokens))
    report = distorch.report(model)
    assert report.ok, report.problems
    if kind not in PLAIN:
        narrow = sum(
            n for name, n in stored_bytes(tmp_path / "x.gguf").items() if name.endswith("weight")
        )
        small = sum(p.numel() * p.itemsize for p in plain.parameters() if p.dim() == 1)
        assert sum(report.bytes.values()) == narrow + small
    for name, value in model.state_dict().items():
        assert torch.equal(value, plain.state_dict()[name])
    assert torch.equal(distorch.undistribute(model)(tokens), plain(tokens))


def test_backward_through_blocks(tmp_path):
    values = written(tmp_path / "x.gguf", "Q8_0", Net())
    model = load(tmp_path / "x.gguf", "cpu,0b;disk,*", torch.float32)
    plain = Net(torch.float32)
    plain.load_state_dict(values)
    hidden = torch.randn(3, 256)
    grads = []
    for net in (model, plain):
        x = hidden.clone().requires_grad_()
        net.down(net.up(x).relu()).square().sum().backward()
        grads.append(x.grad)
    assert torch.equal(*grads)


def test_redistribute_keeps_the_blocks(tmp_path):
    written(tmp_path / "x.gguf", "Q4_0", Net())
    model = load(tmp_path / "x.gguf", "cpu,0b;disk,*")
    tokens = torch.randint(0, 300, (1, 32))
    before = model(tokens)
    for spec in ("cpu,*", "cpu,50%;disk,50%", "cpu,0b;disk,*"):
        distorch.redistribute(model, spec)
        assert torch.equal(model(tokens), before)
        assert distorch.report(model).ok


def test_resident_weights_may_be_wide(tmp_path):
    written(tmp_path / "x.gguf", "Q4_0", Net())
    narrow = load(tmp_path / "x.gguf", "cpu,200kb;disk,*")
    wide = load(tmp_path / "x.gguf", "cpu,200kb;disk,*", resident="dequantised")
    tokens = torch.randint(0, 300, (1, 32))
    assert torch.equal(narrow(tokens), wide(tokens))
    for model in (narrow, wide):
        report = distorch.report(model)
        assert report.ok and report.bytes["cpu"] <= 200 * 1024
    assert not distorch.is_sharded(
        next(p for n, p in wide.named_parameters() if distorch.report(wide).placement[n] == "cpu")
    )
    with pytest.raises(SpecError, match="resident"):
        load(tmp_path / "x.gguf", "cpu,*", resident="wide")


def test_only_the_rows_asked_for(tmp_path):
    values = written(tmp_path / "x.gguf", "Q8_0", Net())
    model = load(tmp_path / "x.gguf", "cpu,0b;disk,*")
    tokens = torch.tensor([[5, 299, 5, 0]])
    distorch.reset_stats(model)
    assert torch.equal(model.table(tokens), values["table.weight"].bfloat16()[tokens])
    assert distorch.stats(model).bytes == {"disk->cpu": 3 * 256 // 32 * 34}  # 5 is there twice
    with pytest.raises(IndexError, match="300"):
        model.table(torch.tensor([300]))


@pytest.mark.parametrize("mode", ["merge", "fetch", "background"])
@pytest.mark.parametrize("spec", SPECS)
def test_loras_on_blocks(tmp_path, spec, mode):
    values = written(tmp_path / "x.gguf", "Q4_K", Net())
    generator = torch.Generator().manual_seed(0)
    lora = {
        "up.lora_A.weight": torch.randn(4, 256, generator=generator) * 0.01,
        "up.lora_B.weight": torch.randn(512, 4, generator=generator),
        "conv.lora_A.weight": torch.randn(4, 8, 4, 4, generator=generator) * 0.01,
        "conv.lora_B.weight": torch.randn(16, 4, 1, 1, generator=generator),
    }
    model = load(tmp_path / "x.gguf", spec, loras=[(lora, 0.5)], lora_mode=mode)
    for name in ("up", "conv"):
        base = values[f"{name}.weight"].double()
        product = (
            lora[f"{name}.lora_B.weight"].flatten(1).double()
            @ lora[f"{name}.lora_A.weight"].flatten(1).double()
        )
        exact = base + 0.5 * product.reshape(base.shape)
        actual = distorch.materialize(getattr(model, name).weight)
        assert actual.dtype == torch.bfloat16
        assert (
            (actual.double() - exact).abs() <= torch.finfo(torch.bfloat16).eps * exact.abs() + 1e-9
        ).all()
    assert distorch.report(model).ok
    distorch.set_loras(model, [])
    for name, value in values.items():
        assert torch.equal(
            distorch.materialize(dict(model.named_parameters())[name]), value.bfloat16()
        )
