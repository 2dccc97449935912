"""Models on a GPU: the same bits as resident, whatever the streams do."""

import copy
import threading

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import distorch

SPECS = ["cuda:0,0b;cpu,*", "cuda:0,0b;disk,*", "cuda:0,50%;cpu,50%", "cuda:0,30%;cpu,30%;disk,*"]


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


def net(dtype=torch.bfloat16):
    torch.manual_seed(0)
    return nn.Sequential(*(Block(256) for _ in range(6))).to(dtype)


def x():
    return torch.randn(64, 256, generator=torch.Generator().manual_seed(1)).bfloat16().cuda()


@pytest.mark.parametrize("spec", SPECS)
def test_forward_and_backward(spec):
    plain = net().cuda()
    model = distorch.distribute(net(), spec, min_bytes=0)
    assert distorch.report(model).ok
    for _ in range(4):
        results = []
        for module in (plain, model):
            module.zero_grad()
            result = module(x())
            result.float().square().mean().backward()
            results.append([result, *(p.grad for p in module.parameters())])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_other_streams_and_threads():
    plain, model = net().cuda(), distorch.distribute(net(), "cuda:0,0b;cpu,*", min_bytes=0)
    wanted, found = plain(x()), []

    def run():
        stream = torch.cuda.Stream()
        with torch.no_grad(), torch.cuda.stream(stream):
            for _ in range(8):
                found.append(model(x()))
            stream.synchronize()

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 24
    assert all(torch.equal(result, wanted) for result in found)


def test_memory_is_given_back():
    model = distorch.distribute(net(), "cuda:0,0b;cpu,*", min_bytes=0)
    model(x())
    distorch.undistribute(model, device="cpu")
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    model = distorch.distribute(model, "cuda:0,0b;cpu,*", min_bytes=0)
    model(x())
    del model
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before


@pytest.mark.parametrize("mode", ["merge", "fetch", "background"])
def test_loras(tmp_path, mode):
    save_file(net().state_dict(), tmp_path / "m.safetensors")
    generator = torch.Generator().manual_seed(4)
    lora = {
        f"{i}.up.lora_{side}.weight": torch.randn(shape, generator=generator)
        for i in range(6)
        for side, shape in (("A", (4, 256)), ("B", (1024, 4)))
    }
    options = {"loras": [(lora, 0.5)], "min_bytes": 0}
    on_cpu = distorch.load(net(), tmp_path / "m.safetensors", "cpu,*", **options)
    model = distorch.load(
        net(), tmp_path / "m.safetensors", "cuda:0,0b;cpu,*", lora_mode=mode, **options
    )
    for mine, other in zip(model.parameters(), on_cpu.parameters(), strict=True):
        assert torch.equal(distorch.materialize(mine).cpu(), distorch.materialize(other))


def test_compiled():
    plain, model = net().cuda(), distorch.distribute(net(), "cuda:0,0b;cpu,*", min_bytes=0)
    with torch.no_grad():
        wanted = torch.compile(copy.deepcopy(plain), fullgraph=True)(x())
        assert torch.equal(torch.compile(model, fullgraph=True)(x()), wanted)
