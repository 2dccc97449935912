# SPDX-License-Identifier: Apache-2.0
"""Which files make up a checkpoint: indexes, parts, links, and tensors that nobody can read."""

import json
import struct

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import distorch
from distorch.cli import main
from distorch.errors import FormatError
from distorch.formats.checkpoint import open_checkpoint


def net():
    torch.manual_seed(0)
    return nn.ModuleDict({name: nn.Linear(64, 32, bias=False) for name in "ab"})


def state(seed=1):
    torch.manual_seed(seed)
    return {f"{name}.weight": torch.randn(32, 64) for name in "ab"}


def check(source, wanted, spec="cpu,0b;disk,*", **options):
    module = distorch.load(net(), source, spec, min_bytes=0, compute="cpu", **options)
    for name, value in wanted.items():
        assert torch.equal(distorch.materialize(module.get_parameter(name)), value), name


# --- an index is the authority ---


def index(folder, places, name="model.safetensors.index.json"):
    (folder / name).write_text(json.dumps({"weight_map": places}))
    return folder / name


@pytest.mark.parametrize("names", [("aa", "zz"), ("zz", "aa")])
@pytest.mark.parametrize("by_folder", [True, False])
def test_a_tensor_comes_from_the_file_that_the_index_names(tmp_path, names, by_folder):
    """An overlay whose tensor is in an older shard, too, and a tensor that it does not list."""
    new, old = (f"{name}.safetensors" for name in names)
    wanted = state()
    stale = {**state(2), "c.weight": torch.zeros(4)}
    save_file({**stale, "b.weight": wanted["b.weight"]}, tmp_path / old)
    save_file({"a.weight": wanted["a.weight"]}, tmp_path / new)
    file = index(tmp_path, {"a.weight": new, "b.weight": old})
    source = tmp_path if by_folder else file
    check(source, wanted)
    assert distorch.plan(source, "cpu,*").total_bytes == 2 * 32 * 64 * 4
    assert len(open_checkpoint(file).tensors) == 2


INDEXES = {
    "a shard that is not there": ({"a.weight": "gone.safetensors"}, "gone.safetensors.*not there"),
    "a tensor of another shard": ({"a.weight": "y.safetensors"}, "'a.weight' in 'y.safetensors'"),
    "no tensors": ({}, "lists no tensors"),
    "a file elsewhere": ({"a.weight": "../x.safetensors"}, "outside its folder"),
    "no table": ([], "not an index"),
}


@pytest.mark.parametrize("case", INDEXES)
def test_indexes_that_are_wrong(tmp_path, case):
    save_file({"a.weight": torch.ones(2)}, tmp_path / "x.safetensors")
    save_file({"b.weight": torch.ones(2)}, tmp_path / "y.safetensors")
    places, message = INDEXES[case]
    with pytest.raises(FormatError, match=message):
        open_checkpoint(index(tmp_path, places))


def test_scales_that_an_index_does_not_list(tmp_path):
    numbers = torch.full((32, 64), 2.0).to(torch.float8_e4m3fn)
    tensors = {"a.weight": numbers, "a.weight_scale": torch.tensor(0.25), "b.weight": numbers.clone(),
               "b.weight_scale": torch.tensor(4.0)}  # fmt: skip
    save_file(tensors, tmp_path / "x.safetensors")
    file = index(tmp_path, {"a.weight": "x.safetensors", "b.weight": "x.safetensors"})
    check(file, {"a.weight": torch.full((32, 64), 0.5), "b.weight": torch.full((32, 64), 8.0)})


def test_indexes_of_variants_and_of_torch_files(tmp_path):
    wanted = state()
    for name, value in wanted.items():
        save_file({name: value}, tmp_path / f"m.fp16-{name[0]}.safetensors")
    places = {name: f"m.fp16-{name[0]}.safetensors" for name in wanted}
    check(index(tmp_path, places, "m.safetensors.index.fp16.json"), wanted)
    check(tmp_path, wanted)
    other = tmp_path / "bin"
    other.mkdir()
    for name, value in wanted.items():
        torch.save({name: value}, other / f"{name[0]}.bin")
    index(other, {name: f"{name[0]}.bin" for name in wanted}, "pytorch_model.bin.index.json")
    check(other, wanted)


def test_one_file_beside_an_index_is_the_newer(tmp_path):
    wanted = state()
    save_file(wanted, tmp_path / "model.safetensors")
    save_file(state(2), tmp_path / "old.safetensors")
    index(tmp_path, dict.fromkeys(wanted, "old.safetensors"))
    check(tmp_path, wanted)


# --- numbered parts ---


def parts(folder, suffix, write):
    wanted = state()
    for number, (name, value) in enumerate(wanted.items(), 1):
        write({name: value}, folder / f"m-{number:05d}-of-00002{suffix}")
    return wanted


@pytest.mark.parametrize("kind", [".safetensors", ".bin"])
@pytest.mark.parametrize("named", ["", "m-00001-of-00002", "m-00002-of-00002"])
def test_parts_without_an_index(tmp_path, kind, named):
    wanted = parts(tmp_path, kind, save_file if kind == ".safetensors" else torch.save)
    check(tmp_path / (named + kind if named else ""), wanted)
    (tmp_path / f"m-00002-of-00002{kind}").unlink()
    with pytest.raises(FormatError, match=r"one of 2 parts.*m-00002-of-00002.* is missing"):
        open_checkpoint(tmp_path / f"m-00001-of-00002{kind}")


def gguf_part(path, tensors, number, count):
    writer = gguf.GGUFWriter(path, "flux")
    writer.add_uint16("split.no", number)
    writer.add_uint16("split.count", count)
    for name, value in tensors.items():
        writer.add_tensor(name, value.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_split_gguf_files(tmp_path):
    wanted = state()
    for number, (name, value) in enumerate(wanted.items()):
        gguf_part(tmp_path / f"m-{number + 1:05d}-of-00002.gguf", {name: value}, number, 2)
    for source in (tmp_path, *sorted(tmp_path.iterdir())):
        check(source, wanted)
    swapped = tmp_path / "swapped"
    swapped.mkdir()
    for number, (name, value) in enumerate(wanted.items()):
        gguf_part(swapped / f"m-{2 - number:05d}-of-00002.gguf", {name: value}, number, 2)
    with pytest.raises(FormatError, match="its header says part 1 of 2, and its name"):
        open_checkpoint(swapped)
    alone = tmp_path / "alone.gguf"
    gguf_part(alone, {"a.weight": wanted["a.weight"]}, 0, 2)
    with pytest.raises(FormatError, match=r"one of 2 parts.*-00001-of-00002.gguf"):
        open_checkpoint(alone)


def test_a_tensor_that_two_parts_have(tmp_path):
    for number in (1, 2):
        save_file(state(), tmp_path / f"m-{number:05d}-of-00002.safetensors")
    with pytest.raises(FormatError, match="'a.weight' is in 'm-00002.*and in a part before"):
        open_checkpoint(tmp_path)


# --- links into a cache of downloads: blobs without a suffix ---

NAMED = ("link", "blob", "folder")


def written(path, kind):
    if kind == ".safetensors":
        save_file(state(), path)
    elif kind == ".gguf":
        writer = gguf.GGUFWriter(path, "flux")
        for name, value in state().items():
            writer.add_tensor(name, value.numpy().astype(np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    else:
        torch.save(state(), path)


@pytest.mark.parametrize(
    ("kind", "named"),
    [(kind, named) for kind in (".safetensors", ".bin", ".gguf") for named in NAMED]
    + [(".pt", "link"), (".pt", "blob")],  # folders of .pt files are not looked for
)
def test_links_to_blobs(tmp_path, kind, named):
    (tmp_path / "blobs").mkdir()
    snapshot = tmp_path / "snapshots"
    snapshot.mkdir()
    blob = tmp_path / "blobs" / "0123abcd"
    written(blob, kind)
    link = snapshot / f"model{kind}"
    link.symlink_to("../blobs/0123abcd")
    check({"link": link, "blob": blob, "folder": snapshot}[named], state())
    module = distorch.load(net().bfloat16(), link, "cpu,*", min_bytes=0)
    small = torch.bfloat16 if kind == ".gguf" else torch.float32  # as the format itself would
    assert module["a"].weight.dtype == small


# --- tensors that nobody can read ---


def raw_file(path, extra):
    """A safetensors file with a weight, and bytes of a dtype that torch need not know."""
    value = state()["a.weight"]
    body = value.numpy().tobytes()
    dtype, shape, data = extra
    header = {
        "a.weight": {"dtype": "F32", "shape": [32, 64], "data_offsets": [0, len(body)]},
        "s": {"dtype": dtype, "shape": shape, "data_offsets": [len(body), len(body) + len(data)]},
    }
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body + data)
    return {"a.weight": value}


@pytest.mark.parametrize(
    "extra",
    [("F4", [4, 8], bytes(16)), ("F8_E8M0", [16], bytes(16)), ("U16", [8], bytes(16)),
     ("F8_E4M3FNUZ", [16], bytes(16)), ("U64", [2], bytes(16))],
    ids=lambda extra: extra[0],
)  # fmt: skip
def test_a_dtype_that_nobody_wants_stops_nothing(tmp_path, extra, capsys):
    file = tmp_path / "m.safetensors"
    wanted = raw_file(file, extra)
    assert main(["inspect", str(file)]) == 0
    assert str(extra[1][-1]) in capsys.readouterr().out
    assert distorch.plan(file, "cpu,*").total_bytes == 32 * 64 * 4 + 16
    module = nn.ModuleDict({"a": nn.Linear(64, 32, bias=False)})
    distorch.load(module, file, "cpu,*", strict=False, min_bytes=0)
    assert torch.equal(module["a"].weight, wanted["a.weight"])


def test_a_wanted_tensor_of_a_type_that_is_not_read(tmp_path):
    raw_file(tmp_path / "m.safetensors", ("F4", [4, 8], bytes(16)))
    module = nn.Module()
    module.a = nn.Linear(64, 32, bias=False)
    module.s = nn.Parameter(torch.zeros(4, 8))
    with pytest.raises(FormatError, match="'s'.*type F4"):
        distorch.load(module, tmp_path / "m.safetensors", "cpu,*", min_bytes=0)
    torch.save({"a.weight": state()["a.weight"], "s": torch.eye(4).to_sparse()}, tmp_path / "m.pt")
    with pytest.raises(FormatError, match=r"'s'.*torch\.sparse_coo"):
        distorch.load(module, tmp_path / "m.pt", "cpu,*", min_bytes=0)


def test_views_of_a_torch_file(tmp_path):
    """What torch keeps as a lazy negation or conjugation is read as its values."""
    numbers = torch.randn(32, 64, dtype=torch.complex64)
    wanted = {"a.weight": numbers.conj().imag.clone(), "b.weight": numbers.real.clone()}
    torch.save({"a.weight": numbers.conj().imag, "b.weight": numbers.real}, tmp_path / "m.pt")
    check(tmp_path / "m.pt", wanted)


def test_dimensions_of_one_that_gguf_files_drop(tmp_path):
    module = nn.Module()
    module.tok = nn.Parameter(torch.zeros(1, 64))
    module.conv = nn.Conv2d(64, 32, 1, bias=False)
    torch.manual_seed(3)
    tok, conv = torch.randn(64), torch.randn(32, 64)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "flux")
    writer.add_tensor("tok", tok.numpy())
    writer.add_tensor("conv.weight", conv.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    distorch.load(module, tmp_path / "m.gguf", "cpu,*", min_bytes=0)
    assert torch.equal(module.tok, tok[None])
    assert torch.equal(module.conv.weight, conv[:, :, None, None])
    save_file({"tok": tok, "conv.weight": conv}, tmp_path / "m.safetensors")
    with pytest.raises(FormatError, match=r"'tok': the file has shape \(64,\)"):
        distorch.load(module, tmp_path / "m.safetensors", "cpu,*", min_bytes=0)


@pytest.mark.parametrize("kind", ["zip", "legacy"])
def test_damaged_torch_files(tmp_path, kind):
    """Bytes changed, cut and put in: an error of ours, or the file is still one."""
    torch.save(state(), tmp_path / "m.pt", _use_new_zipfile_serialization=kind == "zip")
    whole = (tmp_path / "m.pt").read_bytes()
    generator = np.random.default_rng(0)
    refused = 0
    for _ in range(150):
        data = bytearray(whole)
        at = int(generator.integers(0, 700 if generator.random() < 0.7 else len(data)))
        change = generator.integers(0, 3)
        if change == 0:
            data[at] ^= int(generator.integers(1, 256))
        elif change == 1:
            del data[at : at + int(generator.integers(1, 40))]
        else:
            data[at:at] = generator.bytes(3)
        (tmp_path / "m.pt").write_bytes(data)
        try:
            open_checkpoint(tmp_path / "m.pt")
        except FormatError as error:
            assert "m.pt" in str(error)
            refused += 1
    assert refused > 50
