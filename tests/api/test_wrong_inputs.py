# SPDX-License-Identifier: Apache-2.0
"""Wrong inputs: each error names what was given, what was expected, and what to do."""

import json
import struct
import types

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import distorch
from distorch.errors import FetchError, FormatError, PlacementError, SpecError


def net():
    return nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))


def distributed():
    return distorch.distribute(net(), "disk,*", min_bytes=0)


def on_meta():
    with torch.device("meta"):
        return net()


@pytest.fixture
def files(tmp_path):
    """Files of all kinds in one folder."""
    state = net().state_dict()
    save_file(state, tmp_path / "m.safetensors")
    save_file({"elsewhere.weight": torch.ones(3)}, tmp_path / "other.safetensors")
    save_file(
        {"0.weight": torch.ones(64, 32), "0.bias": state["0.bias"]}, tmp_path / "wide.safetensors"
    )
    save_file(
        {"foo.lora_A.weight": torch.ones(2, 3), "foo.lora_B.weight": torch.ones(3, 2)},
        tmp_path / "lora.safetensors",
    )
    whole = (tmp_path / "m.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-100])
    (tmp_path / "empty.safetensors").write_bytes(b"")
    (tmp_path / "text.safetensors").write_bytes(b"<html>Not found</html>" * 9)
    header = json.dumps({"w": {"dtype": "X9", "shape": [1], "data_offsets": [0, 1]}}).encode()
    (tmp_path / "dtype.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"0")
    (tmp_path / "plan.json").write_text(json.dumps({"version": 2, "hash": "0"}))
    (tmp_path / "old.json").write_text(json.dumps({"version": 1, "hash": "0"}))
    (tmp_path / "nothing").mkdir()
    return tmp_path


SPECS = [
    ("cpu,2", "'cpu,2'", "did you mean '2gb'"),
    ("cpu,2tbb;disk,*", "'tbb'", "units are b, kb, mb, gb, tb and %"),
    ("cpu;disk,*", "'cpu'", "expected 'device,share'"),
    ("cpu,*;disk,*", "'disk,*'", "one entry takes the rest"),
    ("cpu,1gb;cpu,*", "entry 1", "name each device once"),
    ("cpu,-1gb;disk,*", "'-1gb'", "a share is 0 or more"),
    ("cpu,70%;disk,1gb;sim,40%", "110%", "at most 100%"),
    ("cpu,0%;disk,0%", "'disk,0%'", "give at least one"),
    ("gpu:1,1gb;cpu,*", "'gpu:1'", "did you mean 'cuda:1'?"),
    ("ssd,*", "'ssd'", "did you mean 'disk'?"),
    ("cuda:x,1gb;cpu,*", "'cuda:x'", "expected 'cpu', 'disk' or a type with an index"),
    ("disk:1,*", "'disk:1'", "write 'disk'"),
    ("cpu+disk,*", "'cpu+disk'", "give 'disk' an entry of its own"),
    ("cpu,1gb;;disk,*", "entry 2", "remove the extra ';'"),
    ("", "''", "expected for example 'cuda:0,2.5gb;cpu,*' or 'auto'"),
    (b"cpu,*", "bytes", "expected a string"),
    ("cuda:7,1gb;cpu,*", "'cuda:7'", "this machine has cpu, disk"),
    ("cpu,900tb;disk,*", "989560464998400 bytes", "give a smaller share"),
]


@pytest.mark.parametrize(("spec", "given", "to_do"), SPECS)
@pytest.mark.parametrize("call", [distorch.distribute, distorch.plan])
def test_placements(call, spec, given, to_do):
    module = net()
    with pytest.raises((SpecError, PlacementError)) as caught:
        call(module, spec)
    assert given in str(caught.value) and to_do in str(caught.value)
    assert not any(distorch.is_sharded(p) for p in module.parameters())


OPTIONS = [
    ({"min_byte": 0}, "min_byte=", "did you mean min_bytes=?"),
    ({"ordr": "sequential"}, "ordr=", "did you mean order=?"),
    ({"spek": "cpu,*"}, "spek=", "did you mean spec=?"),
    ({"lora": []}, "lora=", "there are compute, order"),
    ({"order": "best"}, "'best'", "expected 'interleaved', 'sequential' or 'optimal'"),
    ({"min_bytes": "lots"}, "min_bytes='lots'", "such as 1048576 or '1mb', or 'auto'"),
    ({"prefetch": -1}, "prefetch=-1", "expected bytes"),
    ({"keep": 3}, "keep=3", "expected name patterns"),
    ({"keep": ["9.*"]}, "'9.*' matches no weight", "names look like"),
    ({"rules": [("0.*",)]}, "rules=[('0.*',)]", "expected (pattern, device) pairs"),
    ({"rules": [("0.*", "tape")]}, "'tape'", "known: cpu, disk"),
    ({"compute": "disk"}, "compute='disk'", "expected 'cpu' or an accelerator"),
    ({"compress": "zip"}, "compress='zip'", "expected 'auto' or 'never'"),
    ({"progress": "yes"}, "progress='yes'", "expected None"),
    ({"donor": "disk"}, "donor='disk'", "write '...;disk,*'"),
    ({"virtual_vram": "1gb"}, "a placement and virtual_vram=", "one of them"),
    ({"plan": "p.json"}, "plan='p.json'", "Plan.load('p.json') reads a saved one"),
]


@pytest.mark.parametrize(("options", "given", "to_do"), OPTIONS)
@pytest.mark.parametrize("make", [net, distributed])
def test_options(make, options, given, to_do):
    module = make()
    before = [distorch.is_sharded(p) for p in module.parameters()]
    with pytest.raises((SpecError, PlacementError)) as caught:
        distorch.distribute(module, "cpu,*", **options)
    assert given in str(caught.value) and to_do in str(caught.value)
    assert [distorch.is_sharded(p) for p in module.parameters()] == before


MODULES = [
    (None, "NoneType", "expected a module (torch.nn.Module)"),
    (nn.Linear, "the class Linear", "make one of it first"),
    ({"w": torch.ones(2)}, "dict", "pipe.transformer"),
]
ON_MODULES = [
    lambda m: distorch.distribute(m, "cpu,*"),
    lambda m: distorch.redistribute(m, "cpu,*"),
    lambda m: distorch.load(m, "m.safetensors", "cpu,*"),
    lambda m: distorch.set_loras(m, []),
    distorch.undistribute, distorch.report, distorch.stats, distorch.finish_merging,
]  # fmt: skip


@pytest.mark.parametrize(("module", "given", "to_do"), MODULES)
@pytest.mark.parametrize("call", ON_MODULES)
def test_modules(call, module, given, to_do):
    with pytest.raises(SpecError) as caught:
        call(module)
    assert given in str(caught.value) and to_do in str(caught.value)


NOT_DISTRIBUTED = [
    lambda m: distorch.redistribute(m, "cpu,*"),
    lambda m: distorch.set_loras(m, []),
    distorch.undistribute, distorch.report, distorch.stats, distorch.finish_merging,
]  # fmt: skip


@pytest.mark.parametrize("call", NOT_DISTRIBUTED)
def test_a_module_that_is_not_distributed(call):
    with pytest.raises(PlacementError, match="this Sequential is not distributed: call distorch"):
        call(net())


@pytest.mark.parametrize("source", [types.SimpleNamespace(components={}), 3, nn.Linear])
def test_a_plan_of_what_is_none(source):
    with pytest.raises(SpecError, match=r"expected a module or the path.*pipe\.transformer"):
        distorch.plan(source, "cpu,*")


def test_a_folder_with_a_pipeline(tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(FormatError, match="is a pipeline of diffusers: give the folder of one"):
        distorch.plan(tmp_path, "cpu,*")


LOADS = [
    ("gone.safetensors", {}, "no such file", "expected a checkpoint"),
    ("nothing", {}, "nothing", "expected one *.safetensors"),
    ("cut.safetensors", {}, "cut.safetensors", "download it again"),
    ("empty.safetensors", {}, "empty.safetensors", "download it again"),
    ("text.safetensors", {}, "text.safetensors", "is not a safetensors file"),
    ("dtype.safetensors", {}, "`X9`", "expected one of"),
    ("other.safetensors", {}, "elsewhere.weight", "Build the module with the checkpoint's own"),
    ("wide.safetensors", {}, "1.weight", "Build the module with the checkpoint's own"),
    ("m.safetensors", {"dtype": "int8"}, "dtype=torch.int8", "expected a floating dtype"),
    ("m.safetensors", {"dtype": "floaty"}, "dtype='floaty'", "such as torch.bfloat16"),
    ("m.safetensors", {"resident": "wide"}, "resident='wide'", "'dequantised'"),
    ("m.safetensors", {"lora_mode": "later"}, "lora_mode='later'", "'background'"),
    ("m.safetensors", {"patched_dtype": 3}, "patched_dtype=3", "or 'base'"),
    (
        "m.safetensors",
        {"loras": "x.safetensors"},
        "'x.safetensors'",
        "[('style.safetensors', 0.8)]",
    ),
    ("m.safetensors", {"loras": [("x",)]}, "('x',)", "(file or state dict, strength) pairs"),
    ("m.safetensors", {"loras": [("x", "0.8")]}, "'0.8'", "expected a finite number"),
    ("m.safetensors", {"loras": [("gone", 1.0)]}, "'gone'", "no such file"),
    ("m.safetensors", {"strict_lora": False}, "strict_lora=", "did you mean strict_loras=?"),
    ("m.safetensors", {"spec": None}, "none of them", "virtual_vram= or plan="),
]


@pytest.mark.parametrize(("file", "options", "given", "to_do"), LOADS)
def test_load(files, file, options, given, to_do):
    module = on_meta()
    with pytest.raises((SpecError, FormatError, PlacementError)) as caught:
        distorch.load(module, files / file, **{"spec": "cpu,*", **options})
    assert given in str(caught.value) and to_do in str(caught.value)
    assert all(parameter.is_meta for parameter in module.parameters())


@pytest.mark.parametrize("file", [None, 3, b"m.safetensors", {"0.weight": torch.ones(2)}])
def test_what_is_no_path(file):
    for call in (distorch.plan, lambda f, s: distorch.load(net(), f, s)):
        with pytest.raises(SpecError, match="expected .*the path of a checkpoint, got"):
            call(file, "cpu,*")


def test_a_lora_that_fits_nothing(files):
    with pytest.raises(FormatError, match=r"lora\.safetensors.*foo"):
        distorch.load(
            on_meta(), files / "m.safetensors", "cpu,*", loras=[(files / "lora.safetensors", 1.0)]
        )


def test_a_plan_that_is_no_plan(files):
    with pytest.raises(FormatError, match=r"plan\.json.*placement, sizes.* missing; make it again"):
        distorch.Plan.load(files / "plan.json")
    with pytest.raises(FormatError, match="expected version 2, found 1; make it again with"):
        distorch.Plan.load(files / "old.json")
    plan = distorch.plan(files / "other.safetensors", "cpu,*")
    with pytest.raises(PlacementError, match=r"no place for '0\.weight'; make a new one"):
        distorch.distribute(net(), plan=plan)


def test_addresses():
    weight = distributed()[0].weight
    with pytest.raises(PlacementError, match=r"bytes are on a donor.*distorch\.materialize"):
        weight.data_ptr()
    with pytest.raises(PlacementError, match=r"does not exist any more: keep its module"):
        distributed()[0].weight.data_ptr()
    for call in (distorch.shard, distorch.materialize):
        with pytest.raises(SpecError, match="expected a tensor, got int"):
            call(3)
    assert not distorch.is_sharded(3)


def test_traces(tmp_path):
    with (
        pytest.raises(SpecError, match="expected the path of a JSON file, got 3"),
        distorch.trace(distributed(), 3),
    ):
        pass
    with pytest.raises(PlacementError, match="not distributed"), distorch.profiling(net()):
        pass


def test_a_checkpoint_that_is_gone_while_it_is_used(files):
    model = distorch.load(on_meta(), files / "m.safetensors", "disk,*", min_bytes=0)
    with (files / "m.safetensors").open("r+b") as file:
        file.truncate(600)
    with pytest.raises(FetchError, match=r"'0\.weight'.*m\.safetensors"):
        model(torch.ones(1, 64))


def test_a_hint_names_an_option_of_this_function():
    with pytest.raises(distorch.SpecError, match="a placement says where weights go"):
        distorch.distribute(nn.Linear(2, 2), "cpu,*", device_map="auto")
    for name in ("scheduler", "torch_dtype", "local_files_only"):
        with pytest.raises(distorch.SpecError) as told:
            distorch.distribute(nn.Linear(2, 2), "cpu,*", **{name: None})
        assert "components=" not in str(told.value)
        assert "dtype=" not in str(told.value).removeprefix(f"there is no option {name}=")
