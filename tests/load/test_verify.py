# SPDX-License-Identifier: Apache-2.0
"""verify=True: bytes that are not what they were never become part of a weight."""

import gc
import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import distorch
from distorch.cli import main
from distorch.errors import FetchError, FormatError, SpecError
from distorch.formats import unchanged, verify
from distorch.loading.prepare import Request, prepare
from tests.gguf_files import Q, write_gguf

BLOCK = 64 << 10
X = torch.ones(2, 96)
DISK = "cpu,0b;disk,*"
LORA = {
    "1.lora_A.weight": torch.full((2, 200), 0.01),
    "1.lora_B.weight": torch.full((150, 2), 0.02),
}  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache folder of the test's own."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder / "distorch"


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(96, 200), nn.Linear(200, 150), nn.Linear(150, 9)).eval()


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "a model.safetensors"
    save_file(net().state_dict(), path, metadata={"note": "nothing"})
    return path


def load(file, spec=DISK, **options):
    """Without look-ahead and room for more than one weight, so that each pass reads them anew."""
    options = {"min_bytes": 0, "prefetch": 0, "verify": True, "progress": False} | options
    return distorch.load(net(), file, spec, **options)


def rot(path, at):
    """Turns one bit over. Size and time stay. Twice, and the file is as it was."""
    status = path.stat()
    with path.open("r+b") as opened:
        opened.seek(at)
        (byte,) = opened.read(1)
        opened.seek(at)
        opened.write(bytes([byte ^ 4]))
        opened.flush()
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def ranges(path):
    """Tensor -> its first byte and the one behind its last."""
    with path.open("rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        header = json.loads(opened.read(length))
    return {
        name: tuple(8 + length + offset for offset in told["data_offsets"])
        for name, told in header.items()
        if name != "__metadata__"
    }


def another_process(monkeypatch):
    """As another process would see it: it knows the cache folder alone, and reads no file whole."""
    gc.collect()
    assert not unchanged._alive

    def refused(*_):
        raise AssertionError("the file was read whole again")

    monkeypatch.setattr(verify, "take_sums", refused)


# --- found ---


def test_a_changed_byte_of_any_weight_is_found_when_it_is_fetched(file):
    model, want = load(file), net()(X)
    assert torch.equal(model(X), want)
    for name, (begin, end) in ranges(file).items():
        for at in (begin, end - 1):
            rot(file, at)
            with pytest.raises(FetchError, match="are not what they were") as caught:
                model(X)
            assert file.name in str(caught.value)
            first = max(begin, at // BLOCK * BLOCK)  # no block has bytes of two weights
            assert f"bytes {first} to " in str(caught.value), name
            rot(file, at)
            assert torch.equal(model(X), want)


def test_without_it_nothing_is_compared_and_nothing_is_kept(file, cache):
    model = load(file, verify=False)
    rot(file, ranges(file)["1.weight"][0])
    model(X)
    assert not cache.exists()


@pytest.mark.parametrize("spec", ["cpu,*", "cpu,50%;disk,*", DISK])
def test_a_later_process_finds_it_without_reading_all_of_the_file(file, spec, monkeypatch):
    load(file)
    another_process(monkeypatch)
    assert torch.equal(load(file, spec)(X), net()(X))
    another_process(monkeypatch)
    rot(file, ranges(file)["1.weight"][0] + 5)
    module = net()
    with torch.no_grad():
        module[0].weight.fill_(1)
    before = module(X)
    with pytest.raises(FetchError, match="are not what they were"):
        distorch.load(module, file, spec, min_bytes=0, verify=True)(X)
    if spec == "cpu,*":  # the load failed, not a fetch: the module is as it was
        assert torch.equal(module(X), before)
    rot(file, ranges(file)["1.weight"][0] + 5)
    assert torch.equal(load(file, spec)(X), net()(X))


def test_the_header_is_compared_too(file, monkeypatch):
    load(file)
    another_process(monkeypatch)
    rot(file, file.read_bytes().index(b"nothing"))  # it can still be read
    with pytest.raises(FetchError, match="bytes 0 to "):
        load(file)


def test_rows_of_an_embedding(tmp_path):
    file = tmp_path / "words.safetensors"
    words = nn.Embedding(5000, 48)
    save_file(words.state_dict(), file)
    model = distorch.load(nn.Embedding(5000, 48), file, DISK, min_bytes=0, prefetch=0, verify=True)
    begin = ranges(file)["weight"][0]
    rot(file, begin + 4321 * 192)
    rows = torch.tensor([3, 1, 4999])
    assert torch.equal(model(rows), words(rows))
    with pytest.raises(FetchError, match="are not what they were"):
        model(torch.tensor([4321]))


def test_originals_under_loras(file):
    model, plain = load(file), net()(X)
    distorch.set_loras(model, [(LORA, 1.0)])
    patched = model(X)
    at = sum(ranges(file)["1.weight"]) // 2  # a block that no other weight has part in
    rot(file, at)
    with pytest.raises(FetchError, match="are not what they were"):
        distorch.set_loras(model, [(LORA, 0.5)])
    assert torch.equal(model(X), patched)
    rot(file, at)
    distorch.set_loras(model, [])
    assert torch.equal(model(X), plain)


def test_values_that_are_read_outside_of_forward(file):
    model, plain = load(file), load_file(file)
    rot(file, ranges(file)["2.weight"][0])
    with pytest.raises(FetchError, match="are not what they were"):
        distorch.redistribute(model, "cpu,*", progress=False)
    with pytest.raises(FetchError, match="are not what they were"):
        model[2].weight.clone()
    rot(file, ranges(file)["2.weight"][0])
    distorch.redistribute(model, "cpu,*", progress=False)
    assert all(torch.equal(value, plain[name]) for name, value in model.state_dict().items())


def test_gguf(tmp_path):
    linear, path = nn.Linear(96, 64), tmp_path / "a.gguf"
    write_gguf(path, "llama", {"weight": linear.weight.detach()}, Q.Q8_0)

    def loaded():
        module = nn.Linear(96, 64, bias=False)
        return distorch.load(module, path, "cpu,*", min_bytes=0, verify=True)

    want = loaded()(X)
    gc.collect()
    rot(path, path.stat().st_size // 2)
    with pytest.raises(FetchError, match="are not what they were"):
        loaded()
    rot(path, path.stat().st_size // 2)
    assert torch.equal(loaded()(X), want)


def torch_file(path, *, zipped=True, more=None):
    """One weight of three is a strided view."""
    values = net().state_dict()
    values["1.weight"] = values["1.weight"].t().contiguous().t()
    torch.save(values | (more or {}), path, _use_new_zipfile_serialization=zipped)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("more", [None, {"sparse": torch.eye(3).to_sparse()}])
def test_any_byte_of_a_torch_file(tmp_path, zipped, more):
    """Also those between tensors, which say where tensors are."""
    path = tmp_path / "a.pt"
    torch_file(path, zipped=zipped, more=more)
    want = load(path, "cpu,*", strict=False)(X)
    assert torch.equal(want, net()(X))
    gc.collect()
    size = path.stat().st_size
    for at in [*range(0, size, size // 60), *range(size - 90, size, 30)]:
        rot(path, at)
        with pytest.raises(FetchError, match="are not what they were"):
            load(path, "cpu,*", strict=False)
        rot(path, at)
    assert torch.equal(load(path, strict=False)(X), want)


@pytest.mark.parametrize("replaced", [True, False])
def test_originals_in_torch_files(tmp_path, replaced):
    """torch maps such files. A map of a file that was cut short would end the process."""
    path = tmp_path / "a.pt"
    torch_file(path)
    model, plain = load(path, "cpu,*"), net()(X)
    distorch.set_loras(model, [(LORA, 1.0)])
    patched = model(X)
    if replaced:
        os.truncate(path, 1000)
    else:
        rot(path, path.read_bytes().index(net()[1].weight.t().contiguous().detach().numpy()) + 50)
    with pytest.raises(FetchError):
        distorch.set_loras(model, [])
    assert torch.equal(model(X), patched)
    assert not torch.equal(patched, plain)


# --- which sums are believed ---


def test_a_file_that_was_replaced_or_written_has_sums_of_its_own(file):
    load(file)
    changed = {name: value + 1 for name, value in net().state_dict().items()}
    save_file(changed, file, metadata={"note": "nothing"})
    os.utime(file, ns=(1, 1))
    module = load(file)
    assert torch.equal(module[0].bias, changed["0.bias"])


DAMAGE = {
    "another version": lambda told: told | {"version": 99},
    "sums of nobody": lambda told: told | {"sums": "AAAA" + told["sums"][4:]},
    "fewer": lambda told: told | {"sums": told["sums"][:4]},
    "no base64": lambda told: told | {"sums": "?" * len(told["sums"])},
    "a number": lambda told: told | {"sums": 5},
    "no table": lambda told: [told],
    "nothing": lambda told: {},
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_sums_are_not_believed(file, cache, kind):
    load(file)
    gc.collect()
    (kept,) = cache.glob("sums-*.json")
    right = json.loads(kept.read_text())
    kept.write_text(json.dumps(DAMAGE[kind](right)))
    with pytest.warns(UserWarning, match="are not used.*taken anew"):
        assert torch.equal(load(file)(X), net()(X))
    assert json.loads(kept.read_text()) == right


def test_sums_that_others_may_have_written_are_not_believed(file, cache):
    load(file)
    gc.collect()
    (kept,) = cache.glob("sums-*.json")
    assert kept.stat().st_mode & 0o777 == 0o600
    rot(file, ranges(file)["0.weight"][0])
    kept.chmod(0o622)
    with pytest.warns(UserWarning, match="another user could have written them"):
        load(file, "cpu,*")
    assert kept.stat().st_mode & 0o777 == 0o600


def test_a_cache_folder_that_cannot_be_written(file, cache):
    cache.parent.write_text("no folder")
    with pytest.warns(UserWarning, match="cannot be kept.*They hold for this process"):
        model = load(file)
    rot(file, ranges(file)["0.weight"][0])
    with pytest.raises(FetchError, match="are not what they were"):
        model(X)


def test_sums_go_when_nobody_reads_the_file_any_more(file):
    model = load(file, "cpu,*")
    assert len(unchanged._alive) == 1
    del model
    gc.collect()
    assert not unchanged._alive


@pytest.mark.parametrize("right", [True, False])
def test_a_blob_of_the_hub_has_to_be_what_its_name_says(file, tmp_path, right):
    digest = hashlib.sha256(file.read_bytes() if right else b"another").hexdigest()
    blob = tmp_path / "models--a--b" / "blobs" / digest
    link = tmp_path / "models--a--b" / "snapshots" / "1" / "model.safetensors"
    for path in (blob, link):
        path.parent.mkdir(parents=True)
    file.rename(blob)
    link.symlink_to(blob)
    if right:
        assert torch.equal(load(link)(X), net()(X))
    else:
        with pytest.raises(FormatError, match="its SHA-256 is"):
            load(link)


def test_a_file_that_got_its_old_time_back_is_compared_again(file):
    model = load(file)
    time = file.stat().st_mtime_ns
    os.utime(file, ns=(1, 1))
    load(file, verify=False)  # it is another file at that moment
    os.utime(file, ns=(time, time))
    rot(file, ranges(file)["1.weight"][0])
    for reads in (lambda: model(X), lambda: load(file)(X)):
        with pytest.raises(FetchError, match="are not what they were"):
            reads()


def test_a_file_that_is_replaced_between_verifying_and_loading(file, tmp_path):
    module, other = net(), tmp_path / "other"
    request = Request.of(DISK, None, None, {"min_bytes": 0, "verify": True}, ())
    with request.verifying(file, False):
        shutil.copy(file, other)
        other.replace(file)
        with pytest.raises(FormatError, match="was written to while it was verified"):
            prepare(module, file, request)


# --- asking for it ---


def test_a_plan_reads_nothing(file, cache):
    distorch.plan(file, DISK, module=net(), min_bytes=0, verify=True)
    assert not cache.exists()


@pytest.mark.parametrize("verify", ["yes", 1, None])
def test_what_is_no_option(file, verify):
    with pytest.raises(SpecError, match="expected True or False"):
        load(file, verify=verify)


def test_the_command(file, capsys):
    assert main(["verify", str(file)]) == 0
    assert "seen first" in capsys.readouterr().out
    assert main(["verify", str(file)]) == 0
    assert "as it was" in capsys.readouterr().out
    rot(file, ranges(file)["1.bias"][0])
    assert main(["verify", str(file)]) == 1
    assert "are not what they were" in capsys.readouterr().err
    assert main(["verify", "--anew", "--json", str(file)]) == 0
    assert json.loads(capsys.readouterr().out)["files"][0]["known"] is False
    assert main(["verify", str(file)]) == 0


def test_a_process_that_is_killed_while_it_takes_sums_leaves_none(file, cache):
    code = f"""
import os, signal
from distorch.formats import unchanged, verify
unchanged.write_atomically = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
with verify.verifying({str(file)!r}):
    pass
"""
    done = subprocess.run([sys.executable, "-c", code], check=False)
    assert done.returncode == -9
    assert list(cache.iterdir()) == []
