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
    if "loras" not in options:  # those change the sizes of what is in the plan
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
