# SPDX-License-Identifier: Apache-2.0
"""load: the file's values, in their places, for every way a checkpoint may come."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file, save_model
from torch import nn

import distorch
from distorch import _ops
from tests.processes import donor_files

SPECS = ["cpu,0b;disk,*", "cpu,40%;disk,60%", "cpu,*"]
X = torch.arange(12).reshape(3, 4)


class Net(nn.Module):
    """A tied head, a buffer that is saved and one that is not."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(40, 24)
        self.layers = nn.ModuleList(nn.Linear(24, 24) for _ in range(4))
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(24, 40, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("steps", torch.arange(3.0), persistent=False)

    def forward(self, ids):
        h = self.embed(ids)
        for layer in self.layers:
            h = h + torch.tanh(layer(self.norm(h)))
        return self.head(h) * self.steps[2]


def trained(dtype=torch.float32):
    net = Net().eval()
    with torch.no_grad():
        net(X)
        for p in net.parameters():
            p.add_(torch.randn_like(p))
        net.norm.running_mean.add_(0.25)
    return net.to(dtype)


def empty():
    """As people build it: parameters on meta, buffers real."""
    net = Net().eval()
    for module in net.modules():
        for key, p in module._parameters.items():
            if p is not None:
                module._parameters[key] = nn.Parameter(p.to("meta"))
    net.head.weight = net.embed.weight
    return net


@pytest.fixture(params=SPECS)
def spec(request):
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_values_and_dtype_of_the_file(tmp_path, spec, dtype):
    source = trained(dtype)
    save_model(source, tmp_path / "m.safetensors")
    loaded = distorch.load(empty(), tmp_path / "m.safetensors", spec, min_bytes=0)
    wanted = source.state_dict()
    assert {k: v.dtype for k, v in loaded.state_dict().items()} == {
        k: v.dtype for k, v in wanted.items()
    }
    assert all(torch.equal(v, wanted[k]) for k, v in loaded.state_dict().items())
    assert torch.equal(loaded(X), source.to(dtype)(X))
    assert distorch.report(loaded).ok


def test_disk_weights_are_the_file_itself(tmp_path):
    path = tmp_path / "m.safetensors"
    save_model(trained(), path)
    loaded = distorch.load(empty(), path, "cpu,0b;disk,*", min_bytes=0)
    entries = json.loads(path.read_bytes()[8:].split(b"}}", 1)[0] + b"}}")
    start = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    for name, parameter in loaded.named_parameters():
        if not distorch.is_sharded(parameter):
            continue
        stored = name if name in entries else "head.weight"
        where, offset = _ops.file_range(parameter)
        assert (Path(where), offset) == (path, start + entries[stored]["data_offsets"][0])
    assert donor_files() == []


def test_weights_of_one_file_share_its_descriptors(tmp_path):
    path = tmp_path / "m.safetensors"
    source = nn.Sequential(*(nn.Linear(8, 8) for _ in range(100)))
    save_model(source, path)
    module = nn.Sequential(*(nn.Linear(8, 8, device="meta") for _ in range(100)))
    before = len(list(Path("/proc/self/fd").iterdir()))
    loaded = distorch.load(module, path, "cpu,0b;disk,*", min_bytes=0)
    assert sum(distorch.is_sharded(p) for p in loaded.parameters()) == 200
    assert len(list(Path("/proc/self/fd").iterdir())) - before < 10
    assert torch.equal(loaded(torch.ones(8)), source(torch.ones(8)))
    other = nn.Sequential(*(nn.Linear(8, 8) for _ in range(100)))
    save_model(other, tmp_path / "new.safetensors")
    (tmp_path / "new.safetensors").replace(path)  # whoever reads the old file goes on
    again = distorch.load(copy.deepcopy(other), path, "cpu,0b;disk,*", min_bytes=0)
    assert torch.equal(again(torch.ones(8)), other(torch.ones(8)))
    assert torch.equal(loaded(torch.ones(8)), source(torch.ones(8)))


def test_redistribute_finds_the_file_again(tmp_path):
    source = trained()
    save_model(source, tmp_path / "m.safetensors")
    loaded = distorch.load(empty(), tmp_path / "m.safetensors", "cpu,*", min_bytes=0)
    distorch.redistribute(loaded, "cpu,0b;disk,*")
    assert donor_files() == []
    assert torch.equal(loaded(X), source(X))
    with torch.no_grad():
        loaded.layers[0].weight.add_(1)  # the file is no longer its value
    distorch.redistribute(loaded, "cpu,*")
    distorch.redistribute(loaded, "cpu,0b;disk,*")
    assert len(set(donor_files())) == 1
    assert torch.equal(loaded.layers[0].weight + 0, source.layers[0].weight + 1)
    assert torch.equal(load_file(tmp_path / "m.safetensors")["layers.0.weight"],
                       source.layers[0].weight)  # fmt: skip


def test_writing_never_touches_the_file(tmp_path):
    path = tmp_path / "m.safetensors"
    save_model(trained(), path)
    before = path.read_bytes()
    loaded = distorch.load(empty(), path, "cpu,0b;disk,*", min_bytes=0)
    with torch.no_grad():
        for p in loaded.parameters():
            p.mul_(2)
    assert path.read_bytes() == before


def test_sharded_checkpoint_and_folder(tmp_path):
    source = trained()
    state = {k: v for k, v in source.state_dict().items() if k != "head.weight"}
    names = list(state)
    weight_map = {}
    for part, chosen in enumerate((names[::2], names[1::2])):
        file = f"m-{part}.safetensors"
        save_file({n: state[n] for n in chosen}, tmp_path / file)
        weight_map |= dict.fromkeys(chosen, file)
    (tmp_path / "m.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for where in (tmp_path, tmp_path / "m.safetensors.index.json"):
        loaded = distorch.load(empty(), where, "cpu,0b;disk,*", min_bytes=0)
        assert torch.equal(loaded(X), source(X))


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model.", "model."])
def test_prefix_of_a_whole_model_file(tmp_path, prefix):
    source = trained()
    state = {prefix + k: v.clone() for k, v in source.state_dict().items()}
    save_file(state, tmp_path / "m.safetensors")
    loaded = distorch.load(empty(), tmp_path / "m.safetensors", "disk,*", min_bytes=0, strict=False)
    assert torch.equal(loaded(X), source(X))


def test_module_with_values_is_filled(tmp_path, spec):
    source = trained()
    save_model(source, tmp_path / "m.safetensors")
    module = Net().eval()
    ids = {name: p.shape for name, p in module.named_parameters()}
    loaded = distorch.load(module, tmp_path / "m.safetensors", spec, min_bytes=0)
    assert loaded is module
    assert {name: p.shape for name, p in loaded.named_parameters()} == ids
    assert loaded.head.weight is loaded.embed.weight
    assert torch.equal(loaded(X), source(X))


def test_frozen_stays_frozen(tmp_path):
    save_model(trained(), tmp_path / "m.safetensors")
    module = Net()
    module.layers.requires_grad_(False)
    distorch.load(module, tmp_path / "m.safetensors", "disk,*", min_bytes=0)
    assert [p.requires_grad for p in module.layers.parameters()] == [False] * 8
    assert module.embed.weight.requires_grad


def test_plan_of_a_file_is_the_plan_of_the_load(tmp_path, spec):
    path = tmp_path / "m.safetensors"
    save_model(trained(), path)
    plan = distorch.plan(path, spec, min_bytes=0, keep=["norm.*"])
    net = Net()
    del net.steps
    net.register_buffer("steps", torch.ones(0), persistent=False)
    loaded = distorch.load(net, path, spec, min_bytes=0, keep=["norm.*"])
    assert distorch.report(loaded).bytes == plan.bytes


def test_saved_plan(tmp_path):
    path = tmp_path / "m.safetensors"
    source = trained()
    save_model(source, path)
    plan = distorch.plan(Net(), "cpu,1kb;disk,*", min_bytes=0)
    plan.save(tmp_path / "plan.json")
    plan = distorch.Plan.load(tmp_path / "plan.json")
    loaded = distorch.load(empty(), path, plan=plan, min_bytes=0, strict=False)
    assert distorch.report(loaded).placement == plan.placement
    assert torch.equal(loaded(X), source(X))


def test_peak_memory(tmp_path):
    """What stays + ring + two largest tensors, in child processes (the full size: benchmarks/)."""
    program = Path(__file__).parents[2] / "benchmarks" / "load_memory.py"
    sizes = ["--layers=16", "--width=2048", f"--ring={24 << 20}", f"--folder={tmp_path}"]
    out = tmp_path / "out.json"
    environment = {**os.environ, "PYTHONPATH": str(Path(distorch.__file__).parents[1])}
    subprocess.run([sys.executable, program, *sizes, "--json", out], check=True, env=environment)
    rows = json.loads(out.read_text())["rows"]
    assert [round(row["stays"] / row["file"], 1) for row in rows] == [0, 0.2, 1]
    for row in rows:
        assert row["peak_load"] <= row["allowed"], row
        assert row["peak_with_step"] <= row["allowed"], row
    assert rows[2]["peak_load"] >= rows[2]["stays"], "the measure sees what stays"


def test_what_is_needed_first_is_read_first(tmp_path):
    """Weights that grow on their way share the room of two, in their order."""
    module = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(40)))
    state = {name: value.bfloat16() for name, value in module.state_dict().items()}
    save_file(state, tmp_path / "m.safetensors")
    for _ in range(5):
        found = nn.Sequential(*(nn.Linear(64, 64, bias=False, device="meta") for _ in range(40)))
        distorch.load(found, tmp_path / "m.safetensors", "cpu,*", dtype=torch.float32)
        for name, value in found.state_dict().items():
            assert torch.equal(value, state[name].float())


def test_experts_of_a_hub_file_are_joined(tmp_path):
    """transformers has them in one weight, files of the hub one by one. It is read in pieces."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, num_local_experts=3,
    )  # fmt: skip
    model = MixtralForCausalLM(config)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert sum(".experts." in name for name in stored) == 9
    with distorch.init_empty_weights():
        loaded = MixtralForCausalLM(config)
    distorch.load(loaded, tmp_path, "cpu,0b;disk,*", min_bytes=0)
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
