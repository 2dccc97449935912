# SPDX-License-Identifier: Apache-2.0
"""Files of strangers: they give tensors or an error, whatever they name or claim."""

import io
import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
import zipfile

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import distorch
from distorch.errors import FormatError
from distorch.timeline import Timeline
from tests import hub_cache

X = torch.ones(1, 8)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).eval()


def sharded(folder):
    """A checkpoint of two files with an index; returns the index."""
    folder.mkdir(parents=True, exist_ok=True)
    weight_map = {}
    for number in (0, 1):
        name = f"model-{number + 1:05d}-of-00002.safetensors"
        own = {k: v for k, v in net().state_dict().items() if k.startswith(f"{number}.")}
        save_file(own, folder / name)
        weight_map |= dict.fromkeys(own, name)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    return index


def check_loads(path):
    module = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).eval()
    distorch.load(module, path, "disk,*", min_bytes=0)
    assert torch.equal(module(X), net()(X))


def test_links_that_people_and_tools_make_are_followed(tmp_path):
    sharded(tmp_path / "real")
    snapshot = hub_cache.put(tmp_path / "cache", "a/b", tmp_path / "real")
    farm = tmp_path / "farm"  # as cp --recursive --symbolic-link makes it
    farm.mkdir()
    for path in (tmp_path / "real").iterdir():
        (farm / path.name).symlink_to(path)
    (tmp_path / "folder").symlink_to(tmp_path / "real")
    for folder in (snapshot, farm, tmp_path / "folder"):
        check_loads(folder)
        check_loads(folder / "model.safetensors.index.json")
    inner = tmp_path / "inner"
    index = sharded(inner)
    (inner / "parts").mkdir()
    for path in inner.glob("*.safetensors"):
        path.rename(inner / "parts" / path.name)
    told = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": {k: f"parts/{v}" for k, v in told.items()}}))
    check_loads(inner)


@pytest.mark.parametrize(
    "name",
    ["../other.safetensors", "link.safetensors", "folder/other.safetensors", "/dev/zero", "", ".",
     "a\0b", "x/../../other.safetensors", "loop.safetensors"],
)  # fmt: skip
def test_an_index_reads_its_own_folder_only(tmp_path, name):
    index = sharded(tmp_path / "model")
    save_file(net().state_dict(), tmp_path / "other.safetensors")
    (tmp_path / "model" / "link.safetensors").symlink_to(tmp_path / "other.safetensors")
    (tmp_path / "model" / "loop.safetensors").symlink_to("loop.safetensors")
    (tmp_path / "model" / "folder").symlink_to(tmp_path)
    (tmp_path / "model" / "x").mkdir()
    told = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": {**told, "0.weight": name}}))
    with pytest.raises(FormatError, match="outside its folder|which is not there"):
        distorch.load(net(), index, "disk,*", min_bytes=0)


def test_parts_that_are_links_to_elsewhere(tmp_path):
    index = sharded(tmp_path / "model")
    index.unlink()
    part = tmp_path / "model" / "model-00002-of-00002.safetensors"
    check_loads(part.parent)
    shutil.move(part, tmp_path / "elsewhere.safetensors")
    part.symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(FormatError, match="outside its folder"):
        distorch.plan(part.parent, "disk,*")


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_what_is_no_file_is_refused_at_once(tmp_path, kind):
    """In a process of its own: what is waited for in a system call cannot be interrupted here."""
    for name in ("m.safetensors", "plan.json", "m.safetensors.index.json", "m.gguf", "m.pt"):
        path = tmp_path / name
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "device":
            path.symlink_to("/dev/zero")
        else:
            path.mkdir()
    program = """
import sys, distorch, torch
from distorch.timeline import Timeline
for name in ("m.safetensors", "m.safetensors.index.json", "m.gguf", "m.pt"):
    for read in (lambda p: distorch.plan(p, "disk,*"),
                 lambda p: distorch.set_loras(distorch.distribute(torch.nn.Linear(2, 2), "disk,*"),
                                              [(p, 1.0)])):
        try:
            read(name)
        except distorch.FormatError as error:
            assert name in str(error), error
        else:
            raise SystemExit(name)
for load in (distorch.Plan.load, Timeline.load):
    try:
        load("plan.json")
    except distorch.FormatError as error:
        assert "no ordinary file" in str(error), error
print("refused")
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.stdout.strip() == "refused", done.stderr[-2000:]


def test_json_that_is_too_deep_or_too_large(tmp_path):
    index = sharded(tmp_path / "model")
    for path, load in (
        (index, lambda path: distorch.plan(path, "disk,*")),
        (tmp_path / "plan.json", distorch.Plan.load),
        (tmp_path / "trace.json", Timeline.load),
    ):
        path.write_text("[" * 200_000)
        with pytest.raises(FormatError, match=path.name):
            load(path)
    for path, load in (
        (index, lambda path: distorch.plan(path, "disk,*")),
        (tmp_path / "plan.json", distorch.Plan.load),
    ):
        with path.open("wb") as file:
            file.truncate(40 << 30)  # a hole, which takes no room on the disk
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(FormatError, match=r"it has more than 32 MiB"):
            load(path)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10


class _Runs:
    def __reduce__(self):
        return os.system, ("touch ran",)


def test_nothing_is_unpickled_but_tensors(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("m.pt", "m.bin", "m.ckpt", "m.pth", "m.safetensors"):
        for content in (_Runs(), {"0.weight": _Runs()}, {"state_dict": {"a": [_Runs()]}}):
            torch.save(content, name)
            for file in (name, "old"):
                with pytest.raises(FormatError):
                    distorch.load(net(), file, "disk,*")
                with pytest.raises(FormatError):
                    distorch.set_loras(distorch.distribute(net(), "cpu,*"), [(file, 1.0)])
            (tmp_path / "old").write_bytes(pickle.dumps(content))
    assert not (tmp_path / "ran").exists()


def test_an_archive_that_grows(tmp_path):
    whole = io.BytesIO()
    torch.save(net().state_dict(), whole)
    for name in ("data.pkl", "data/0"):
        path = tmp_path / "m.pt"
        with zipfile.ZipFile(whole) as read, zipfile.ZipFile(path, "w") as packed:
            for entry in read.infolist():
                kind = zipfile.ZIP_DEFLATED if entry.filename.endswith(name) else 0
                packed.writestr(entry.filename, read.read(entry), compress_type=kind)
        with pytest.raises(FormatError, match="an archive with packed entries"):
            distorch.load(net(), path, "disk,*")


def test_a_lora_that_is_larger_than_the_memory(tmp_path):
    """A file with a hole takes no room on the disk."""
    rank = 1 << 36
    header = {
        "0.lora_A.weight": {"dtype": "F32", "shape": [rank, 8], "data_offsets": [0, rank * 32]}
    }
    text = json.dumps(header).encode()
    path = tmp_path / "lora.safetensors"
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + rank * 32)
    with pytest.raises(FormatError, match=r"of RAM are free: is it a whole model\?"):
        distorch.set_loras(distorch.distribute(net(), "cpu,*"), [(path, 1.0)])


def test_names_do_not_reach_the_terminal_as_commands(tmp_path):
    evil = "a\x1b[2J\r\nb\u202e.weight"
    metadata = {"note": "\x1b]0;title\x07", "k\x1b[1m": "v\nforged line"}
    save_file({evil: torch.zeros(4, 4)}, tmp_path / "m.safetensors", metadata)
    (tmp_path / "m.safetensors").chmod(0o644)
    for command in (["inspect", "m.safetensors"], ["plan", "m.safetensors", "cpu,0b;disk,*"],
                    ["inspect", "none\x1b[2J.safetensors"], ["trace", "m.safetensors"],
                    ["plan", "m.safetensors", "cpu\x1b[2J,*"]):  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-m", "distorch", *command],
            cwd=tmp_path, capture_output=True, text=True, check=False,
        )  # fmt: skip
        shown = (done.stdout + done.stderr).replace("\n", "")
        assert shown.isprintable(), ascii(shown)
        assert "forged line" not in done.stdout.splitlines()


def test_a_checkpoint_that_is_larger_than_the_memory(tmp_path):
    """Its header is read, and what lies in it is found; nothing maps it as memory to write to."""
    sizes = {"0.weight": 8 * 8 * 4, "0.bias": 32, "1.weight": 8 * 8 * 4, "1.bias": 32, "z": 1 << 40}
    header, at = {}, 0
    for name, nbytes in sizes.items():
        shape = {"weight": [8, 8], "bias": [8]}.get(name[2:], [nbytes // 4])
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + nbytes]}
        at += nbytes
    text = json.dumps(header).encode()
    with (tmp_path / "m.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in list(sizes)[:4]:
            file.write(net().state_dict()[name].numpy().tobytes())
        file.truncate(8 + len(text) + at)
    module = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).eval()
    distorch.load(module, tmp_path / "m.safetensors", "disk,*", min_bytes=0, strict=False)
    assert torch.equal(module(X), net()(X))
    whole = nn.Module()
    whole.z = nn.Parameter(torch.empty(1 << 38, device="meta"))
    # Nor does it take room on a disk: it stays in its file.
    distorch.load(whole, tmp_path / "m.safetensors", "disk,*", strict=False, min_bytes=0)
    assert distorch.is_sharded(whole.z) and whole.z.numel() == 1 << 38
    assert distorch.plan(whole, "cpu,1kb;disk,*", min_bytes=0).bytes["disk"] == 1 << 40
