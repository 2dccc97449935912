# SPDX-License-Identifier: Apache-2.0
"""Files that are damaged, hostile or of another model: FormatError, and the module as before."""

import json
import struct

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import distorch
from distorch import FormatError, PlacementError, SpecError


def net():
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))


def raw(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype="F32", shape=(2,), span=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(span)}


HOSTILE = {
    "empty": b"",
    "short": b"\x08\0\0",
    "length beyond the file": raw({}, length=1 << 40),
    "length that overflows": raw({}, length=2**64 - 1),
    "not json": raw(b"{hello"),
    "not utf-8": raw(b"\xff\xfe{}"),
    "a list": raw([1, 2]),
    "negative offset": raw({"a": entry(span=(-8, 0))}, b"\0" * 8),
    "backwards": raw({"a": entry(span=(8, 0))}, b"\0" * 8),
    "beyond the end": raw({"a": entry(span=(0, 8))}, b"\0" * 4),
    "hole": raw({"a": entry(), "b": entry(span=(16, 24))}, b"\0" * 24),
    "overlap": raw({"a": entry(), "b": entry(span=(4, 12))}, b"\0" * 12),
    "shape and bytes differ": raw({"a": entry(shape=(3,))}, b"\0" * 8),
    "product overflows": raw({"a": entry(shape=(2**33, 2**33))}, b"\0" * 8),
    "negative size": raw({"a": entry(shape=(-1, -2))}, b"\0" * 8),
    "unknown dtype": raw({"a": entry(dtype="F4096")}, b"\0" * 8),
    "no offsets": raw({"a": {"dtype": "F32", "shape": [2]}}, b"\0" * 8),
    "trailing bytes": raw({"a": entry()}, b"\0" * 9),
    "a picture": b"\x89PNG\r\n\x1a\n" + b"\0" * 100,
    "gguf": b"GGUF\x03\0\0\0" + b"\0" * 100,
    "pickle": b"PK\x03\x04" + b"\0" * 100,
    "deep nesting": raw(b"[" * 100_000),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_file(tmp_path, kind):
    path = tmp_path / "m.safetensors"
    path.write_bytes(HOSTILE[kind])
    module, x = net(), torch.ones(1, 8)
    before = module(x)
    with pytest.raises(FormatError, match="m.safetensors"):
        distorch.load(module, path, "disk,*")
    with pytest.raises(FormatError, match="m.safetensors"):
        distorch.plan(path, "disk,*")
    assert torch.equal(module(x), before)


def test_every_truncation_is_refused(tmp_path):
    path = tmp_path / "m.safetensors"
    save_file(net().state_dict(), path)
    data = path.read_bytes()
    for length in range(0, len(data), 37):
        path.write_bytes(data[:length])
        with pytest.raises(FormatError):
            distorch.load(net(), path, "disk,*")


REFUSED = {
    "missing": (lambda s: s.pop("0.weight"), r"1 missing \(0\.weight\)"),
    "unexpected": (lambda s: s.update(extra=torch.ones(1)), r"1 unexpected \(extra\)"),
    "shape": (lambda s: s.update({"0.bias": torch.ones(9)}), r"0\.bias.*\(9,\).*\(8,\)"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_another_model(tmp_path, kind):
    change, message = REFUSED[kind]
    state = net().state_dict()
    change(state)
    path = tmp_path / "m.safetensors"
    save_file(state, path)
    module = net()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    with pytest.raises(FormatError, match=message):
        distorch.load(module, path, "disk,*")
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())


def test_not_strict_keeps_what_is_missing(tmp_path):
    state = net().state_dict()
    del state["1.bias"]
    state["extra"] = torch.ones(3)
    save_file(state, tmp_path / "m.safetensors")
    module = net()
    bias = module[1].bias.clone()
    loaded = distorch.load(module, tmp_path / "m.safetensors", "disk,*", strict=False, min_bytes=0)
    assert torch.equal(loaded[1].bias + 0, bias)
    assert torch.equal(loaded[0].weight + 0, state["0.weight"])


def test_meta_weight_without_values(tmp_path):
    state = net().state_dict()
    del state["1.bias"]
    save_file(state, tmp_path / "m.safetensors")
    with torch.device("meta"):
        module = net()
    with pytest.raises(FormatError, match=r"1\.bias"):
        distorch.load(module, tmp_path / "m.safetensors", "disk,*", strict=False)


def test_meta_buffer_without_values(tmp_path):
    save_file({"weight": torch.ones(2, 2)}, tmp_path / "m.safetensors")
    with torch.device("meta"):
        module = nn.Linear(2, 2, bias=False)
        module.register_buffer("table", torch.ones(2), persistent=False)
    with pytest.raises(PlacementError, match="table.*meta"):
        distorch.load(module, tmp_path / "m.safetensors", "disk,*")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "not an index"),
        ('{"weight_map": {"a": "../x.safetensors"}}', "outside its folder"),
        ('{"weight_map": {"a": "gone.safetensors"}}', "gone.safetensors"),
        ('{"weight_map": {"b": "part.safetensors"}}', "'b'"),
        ('{"weight_map": []}', "not an index"),
    ],
)
def test_bad_index(tmp_path, index, message):
    save_file({"a": torch.ones(2)}, tmp_path / "part.safetensors")
    (tmp_path / "m.safetensors.index.json").write_text(index)
    with pytest.raises(FormatError, match=message):
        distorch.load(net(), tmp_path / "m.safetensors.index.json", "disk,*")


def test_bad_place_is_refused_before_reading(tmp_path):
    save_file(net().state_dict(), tmp_path / "m.safetensors")
    for spec, error in [("cpu,2tbb", SpecError), ("cuda:7,1gb;cpu,*", PlacementError)]:
        module = net()
        with pytest.raises(error):
            distorch.load(module, tmp_path / "m.safetensors", spec)
        assert not any(distorch.is_sharded(p) for p in module.parameters())


def test_no_such_file(tmp_path):
    with pytest.raises(FormatError, match="no such file"):
        distorch.load(net(), tmp_path / "none.safetensors", "disk,*")
    with pytest.raises(FormatError, match="found none"):
        distorch.load(net(), tmp_path, "disk,*")
