# SPDX-License-Identifier: Apache-2.0
"""`plan(FILE, spec, module=...)` is what `load` does; nothing moves."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import distorch


def net():
    return nn.Sequential(nn.Linear(96, 64), nn.Linear(64, 32), nn.Linear(32, 64, bias=False))


def fp8(path):
    tensors = net().state_dict()
    for name in [name for name in tensors if name.endswith("weight")]:
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
        tensors[f"{name}_scale"] = torch.ones(())
    save_file(tensors, path)


def plain(path):
    save_file(net().state_dict(), path)


LORA = {"0.lora_A.weight": torch.ones(2, 96), "0.lora_B.weight": torch.ones(64, 2)}


@pytest.mark.parametrize("write", [plain, fp8])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dtype": "bfloat16"},
        {"resident": "dequantised"},
        {"loras": [(LORA, 1.0)], "patched_dtype": "float16"},
        {"order": "sequential", "keep": "2.*"},
    ],
)
@pytest.mark.parametrize("spec", ["cpu,8kb;disk,*", "cpu,50%;disk,50%"])
def test_it_is_what_load_does(tmp_path, write, options, spec):
    write(file := tmp_path / "m.safetensors")
    with torch.device("meta"):
        module = net()
    plan = distorch.plan(file, spec, module=module, min_bytes=0, **options)
    assert all(parameter.is_meta for parameter in module.parameters())
    loaded = distorch.load(module, file, spec, min_bytes=0, **options)
    report = distorch.report(loaded)
    assert report.ok
    assert report.placement == plan.placement
    assert {d: n for d, n in report.bytes.items() if n} == {
        d: n for d, n in plan.bytes.items() if n
    }
    again = distorch.load(net(), file, plan=plan, **options)
    assert distorch.report(again).placement == plan.placement


def test_a_file_alone(tmp_path):
    plain(file := tmp_path / "m.safetensors")
    plan = distorch.plan(file, "cpu,50%;disk,50%", min_bytes=0)
    assert distorch.report(distorch.load(net(), file, plan=plan)).placement == plan.placement
    with pytest.raises(distorch.SpecError, match="module=model"):
        distorch.plan(file, "cpu,*", dtype="float16")
    with pytest.raises(distorch.SpecError, match="checkpoint file"):
        distorch.plan(net(), "cpu,*", module=net())


def test_nothing_moves(tmp_path):
    """Not even a tie that load would make; and a module that load refuses is refused."""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
            self.register_buffer("table", torch.ones(2), persistent=False)

        def tie_weights(self):
            self.b.weight = self.a.weight

    save_file({"a.weight": torch.ones(8, 8)}, file := tmp_path / "m.safetensors")
    with distorch.init_empty_weights():
        module = Tied()
    assert distorch.plan(file, "disk,*", module=module).placement["b.weight"] == "cpu"
    assert module.a.weight is not module.b.weight
    with torch.device("meta"):
        module = Tied()
    for call in (
        lambda: distorch.plan(file, "disk,*", module=module),
        lambda: distorch.load(module, file, "disk,*"),
    ):
        with pytest.raises(distorch.PlacementError, match="'table'"):
            call()
        assert module.a.weight is not module.b.weight


def test_names_that_are_no_options(tmp_path):
    plain(file := tmp_path / "m.safetensors")
    for name, said in (
        ("placing", "there are compute"),
        ("moduel", "did you mean module=?"),
        ("plan", "option plan="),
    ):
        with pytest.raises(distorch.SpecError) as caught:
            distorch.plan(file, "cpu,*", **{name: None})
        assert said in str(caught.value)
    with pytest.raises(distorch.SpecError, match="expected a module or the path"):
        distorch.plan(nn.Linear, "cpu,*")


def test_numbers_of_a_file_are_in_their_own_order(tmp_path):
    """safetensors sorts by the alphabet; a file in another order keeps that."""
    layers = {f"layers.{i}.weight": torch.ones(8, 8) for i in range(12)}
    save_file(layers, file := tmp_path / "m.safetensors")
    assert list(distorch.plan(file, "cpu,*").sizes) == list(layers)
    order = ["token", "layers.10.weight", "layers.9.weight", "output"]
    torch.save({name: torch.ones(8, 8) for name in order}, file := tmp_path / "m.pt")
    assert list(distorch.plan(file, "cpu,*").sizes) == order
